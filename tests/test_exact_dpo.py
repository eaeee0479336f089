"""dpo.py in the enumerable world: trained on exact preferences it is the optimal policy."""

import math

import pytest
import tiny
import torch
from tiny import NAMES, PROMPTS
from torch import Tensor

import common
import dpo

TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(tiny.completions(TWO))
START = tiny.transformer(8, channels=16, hidden=32, layers=1)
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


def minimised(policy, loss, gradient: float = 1e-6) -> None:
    """L-BFGS to the end: what the loss is least at, with no optimizer to blame."""
    until = dict(max_iter=400, tolerance_grad=gradient, tolerance_change=0)
    optimizer = torch.optim.LBFGS(policy.parameters(), line_search_fn="strong_wolfe", **until)

    def closure():
        optimizer.zero_grad()
        value = loss(policy)
        value.backward()
        return value

    optimizer.step(closure)


def pairwise(name: str, beta: float):
    """The loss of all ordered pairs of all prompts, with their exact soft labels."""
    rows = tiny.listed([(x, y) for x in PROMPTS for y in tiny.completions(TWO) for _ in "cr"])
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    with torch.no_grad():
        ref_logprobs = dpo.response_logprobs(START, tokens, mask)

    def loss(policy):
        ratios = dpo.response_logprobs(policy, tokens, mask) - ref_logprobs
        h = ratios[:, 0].view(3, N)  # each completion stands twice, as its own pair
        return dpo.LOSSES[name](h[:, FIRST], h[:, SECOND], beta, 1 - PREFERRED).mean()

    return loss


def total_variation(policy, target: Tensor) -> float:
    p = tiny.logp(policy, longest=TWO).exp()
    return (0.5 * (p - target.exp()).abs().sum(1).max()).item()


def test_dpo_on_exact_preferences_reaches_the_optimal_policy():
    """Chosen and rejected swapped, no reference, β in the wrong place: π* is elsewhere."""
    policy = tiny.nearby(START, 0.1)
    minimised(policy, pairwise("dpo", 1.0))
    best, _ = tiny.optimum(tiny.logp(START, longest=TWO), R, 1.0)
    assert total_variation(START, best) > 0.1
    assert total_variation(policy, best) < 1e-3


def test_ipo_on_exact_preferences_reaches_its_own_fixed_point():
    """log π/π_ref (y|x) = mean over y′ of (2 P(y ≻ y′) − 1)/(2τ), up to a constant, y′ = y
    counted as 0: IPO's is not π*."""
    policy, tau = tiny.nearby(START, 0.1), 0.5
    minimised(policy, pairwise("ipo", tau))
    gap = torch.zeros(3, N, dtype=torch.float64).index_add(1, FIRST, 2 * PREFERRED - 1)
    gap = gap / N / (2 * tau)
    fixed = (tiny.logp(START, longest=TWO) + gap).log_softmax(1)
    best, _ = tiny.optimum(tiny.logp(START, longest=TWO), R, tau)
    assert total_variation(policy, fixed) < 1e-3
    assert total_variation(policy, best) > 0.01


@pytest.mark.parametrize(
    ("name", "beta", "eps", "known"),
    [("ipo", 0.4, 0.2, (1 - 2 * 0.2) / (2 * 0.4)), ("ipo", 0.4, 0.0, 1 / 0.8),
     ("dpo", 0.4, 0.2, math.log(0.8 / 0.2) / 0.4), ("dpo", 1.0, 0.05, math.log(19.0))],
)  # fmt: skip
def test_one_pair_stops_at_its_known_gap(name, beta, eps, known):
    """IPO: h* = (2p − 1)/(2τ); smoothed DPO: h* = ln((1 − ε)/ε)/β. ε on the wrong side turns
    the sign. The slope there is 0, and a Transformer trained on the pair stops there."""
    h = torch.tensor([known], dtype=torch.float64, requires_grad=True)
    dpo.LOSSES[name](h, torch.zeros(1), beta, eps).sum().backward()
    assert h.grad.abs().item() < 1e-10
    policy, rows = tiny.nearby(START), tiny.listed([(PROMPTS[1], y) for y in ((1, 2, 0), (3,))])
    tokens, mask = rows.tokens[None], rows.response_mask[None]
    ref_logprobs = dpo.response_logprobs(START, tokens, mask).detach()

    def gap(policy):
        return (dpo.response_logprobs(policy, tokens, mask) - ref_logprobs).unbind(1)

    minimised(policy, lambda policy: dpo.LOSSES[name](*gap(policy), beta, eps).mean(), 1e-13)
    chosen, rejected = gap(policy)
    assert (chosen - rejected).item() == pytest.approx(known, abs=1e-6)


def test_response_logprobs_are_the_enumerated_ones():
    """Prompt or padding counted, EOS left out, a mean for the sum."""
    rows = tiny.everything()
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    found = dpo.response_logprobs(START, tokens, mask).view(3, 40)
    assert (found - tiny.logp(START)).abs().max() < 1e-10


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_what_train_descends(name, monkeypatch, tmp_path):
    """No reference in the ratio, or that of another row; prompt or padding counted: the
    loss and gradient of dpo.py's own first step, on all pairs, are the enumerated ones."""
    made, found = tiny.completions(TWO), []
    policy = tiny.nearby(START, 0.1)

    def record(loss, model, *_):
        found.extend([loss.item(), tiny.gradient(loss, model)])
        return loss.item()

    ids = lambda row, side: (tiny.chat(row["prompt"]), list(made[row[side]]))  # noqa: E731
    monkeypatch.setattr(common, "answer_ids", ids)
    monkeypatch.setattr(common, "descend", record)
    pairs = list(zip(FIRST.tolist(), SECOND.tolist()))
    rows = [dict(prompt=x, chosen=c, rejected=r) for x in NAMES for c, r in pairs]
    flags = dict(loss=name, beta=0.7, label_smoothing=0.1, steps=1, batch=len(rows))
    torch.set_default_dtype(torch.float64)  # of the cached reference log-probs
    try:
        dpo.train(dpo.Config(runs=str(tmp_path), **flags), policy, START, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    h = tiny.logp(policy, longest=TWO) - tiny.logp(START, longest=TWO).detach()
    h = h[:, FIRST] - h[:, SECOND]
    one = {
        "dpo": lambda h: (1 + (-0.7 * h).exp()).log(),
        "ipo": lambda h: (h - 1 / 1.4) ** 2,
        "hinge": lambda h: (1 - 0.7 * h).clamp(min=0),
    }[name]
    exact = (0.9 * one(h) + 0.1 * one(-h)).mean()
    assert abs(found[0] - exact) < 1e-10
    assert tiny.apart(found[1], tiny.gradient(exact, policy)) < 1e-10
