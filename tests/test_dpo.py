"""dpo.py: every loss and its optimum, the reference, every flag and column, whole runs."""

import math

import pytest
import tiny as world
import torch
from tiny import PROMPTS

import common
import dpo
from data import zoo

TINY = "--steps 4 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")
SIDES = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("name", "h", "beta", "eps", "loss"),
    [  # σ(ln 3) = 3/4; IPO asks for a gap of 1/(2τ) = 2
        ("dpo", 2 * math.log(3), 0.5, 0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        ("ipo", 5.0, 0.25, 0.1, 0.9 * 9 + 0.1 * 49),
        ("hinge", -2.0, 0.25, 0.2, 0.8 * 1.5 + 0.2 * 0.5),
        ("hinge", 5.0, 0.25, 0.0, 0.0),  # done from h = 1/β on
        ("dpo", -1000.0, 0.5, 0.0, 500.0),  # log(sigmoid(x)) would be −inf
    ],
)
def test_loss_by_hand(name, h, beta, eps, loss):
    """A sign, β in the wrong place, ε on the wrong side; a mean in place of one value per
    pair."""
    chosen, rejected = torch.tensor([h - 1.5, 0.0]), torch.tensor([-1.5, 9.0])
    assert dpo.LOSSES[name](chosen, rejected, beta, eps)[0].item() == pytest.approx(loss)


TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(world.completions(TWO))
START = world.transformer(8, channels=16, hidden=32, layers=1)
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


def pairwise(name: str, beta: float):
    """The loss of all ordered pairs of all prompts, with their exact soft labels."""
    rows = world.listed([(x, y) for x in PROMPTS for y in world.completions(TWO) for _ in "cr"])
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    with torch.no_grad():
        ref_logprobs = dpo.response_logprobs(START, tokens, mask)

    def loss(policy):
        ratios = dpo.response_logprobs(policy, tokens, mask) - ref_logprobs
        h = ratios[:, 0].view(3, N)  # each completion stands twice, as its own pair
        return dpo.LOSSES[name](h[:, FIRST], h[:, SECOND], beta, 1 - PREFERRED).mean()

    return loss


def total_variation(policy, target) -> float:
    p = world.logp(policy, longest=TWO).exp()
    return (0.5 * (p - target.exp()).abs().sum(1).max()).item()


def test_exact_preferences_lead_dpo_to_the_optimal_policy_and_ipo_elsewhere(minimised):
    """Chosen and rejected swapped, no reference, β in the wrong place: π* is elsewhere. IPO's
    fixed point is log π/π_ref (y|x) = mean over y′ of (2 P(y ≻ y′) − 1)/(2τ), up to a
    constant, y′ = y counted as 0."""
    start = world.logp(START, longest=TWO).detach()
    best, _ = world.optimum(start, R, 1.0)
    gap = torch.zeros(3, N, dtype=torch.float64).index_add(1, FIRST, 2 * PREFERRED - 1)
    fixed = (start + gap / N / (2 * 0.5)).log_softmax(1)
    assert total_variation(START, best) > 0.1
    for name, beta, target in ("dpo", 1.0, best), ("ipo", 0.5, fixed):
        policy = world.nearby(START, 0.1)
        minimised(policy, pairwise(name, beta))
        assert total_variation(policy, target) < 1e-3
    assert total_variation(policy, world.optimum(start, R, 0.5)[0]) > 0.01


def one(name, beta, eps, h):
    """L of pairs with these gaps, as in the book."""
    loss = {
        "dpo": lambda h: (1 + (-beta * h).exp()).log(),
        "ipo": lambda h: (h - 1 / (2 * beta)) ** 2,
        "hinge": lambda h: (1 - beta * h).clamp(min=0),
    }[name]
    return (1 - eps) * loss(h) + eps * loss(-h)


@pytest.mark.parametrize(
    ("own", "flags", "loss", "weight"),
    [
        (True, "", ("dpo", 0.3, 0.0), 0.0),
        (False, "--loss ipo --beta 0.7 --label-smoothing 0.2", ("ipo", 0.7, 0.2), 0.0),
        (False, "--loss hinge --beta 0.05 --nll 0.6", ("hinge", 0.05, 0.0), 0.6),
    ],
)
def test_every_column_and_the_weights_by_hand(
    own, flags, loss, weight, call, runs, double, closing, mine, drawn, slow, pairs, save
):
    """A column of metrics.csv that is something else, as a loss without the NLL that is
    descended, or a gradient's norm after clipping, which the second of these needs; a held-out
    pair trained on, pairs that come twice in an epoch or never; EOS left out, or there where an
    answer was cut; a reference that is the policy, moves with it, or is that of other rows; an
    optimizer that forgets; a rate that does not fall to 0; a flag that does not arrive: --loss,
    --beta, --label-smoothing, --nll, --steps, --batch, --lr, --data, --init, --ref; a table of
    training prompts, without π_ref, or without what it started from."""
    file, train, held = mine
    if not own:
        rows = pairs(24)
        rows[3]["chosen_finished"] = rows[5]["rejected_finished"] = False
        save("comparisons", rows)
        train, held = world.parted(rows)
    n = math.ceil(len(train) / 9)
    flags += f" --data {file}" * own + f" --steps {n + 2} --batch 9 --lr 0.003"
    table = call(dpo, f"{flags} --init sft --ref other --out new")
    policy, reference = (common.load_model(runs / x, "lm", CPU) for x in ("sft", "other"))
    known = sorted(tuple(slow.ids(row, side) for side in SIDES) for row in train)
    assert sorted(sum(drawn[:n], [])) == known
    assert drawn[0] != drawn[n]  # in another order
    take = slow.descent(policy, 0.003, n + 2)
    for step, (row, batch) in enumerate(zip(table, drawn, strict=True)):
        logps = [[slow.logp(policy, *answer) for answer in pair] for pair in batch]
        sums = torch.stack([torch.stack([c.sum(), r.sum()]) for c, r in logps])
        with torch.no_grad():
            ref = [[slow.logp(reference, *answer).sum() for answer in pair] for pair in batch]
        ratios = sums - torch.tensor(ref)
        chosen, rejected = ratios.unbind(1)
        nll = -torch.stack([c.mean() for c, _ in logps]).mean()
        numbers = {"step": step, "nll": nll, "accuracy": (chosen > rejected).double().mean()}
        for i, side in enumerate(SIDES):
            numbers[f"reward_{side}"] = loss[1] * ratios[:, i].mean()
            numbers[f"{side}_logp"] = sums[:, i].mean()
        numbers["margin"] = numbers["reward_chosen"] - numbers["reward_rejected"]
        numbers = {key: float(torch.as_tensor(x).detach()) for key, x in numbers.items()}
        slow.same(row, numbers | take(one(*loss, chosen - rejected).mean() + weight * nll))
    slow.same_weights(runs / "new", policy)

    cfg, names, reward, reward_name, prompts, device = closing[0]
    asked = dict.fromkeys(row["prompt"] for row in held) if own else zoo.HELD_OUT_PROMPTS
    assert prompts == list(asked)
    assert (names, reward_name) == (["other", "sft", "new"], "reward_model")
    rollout = world.listed([([1, 5], (7, 0))])
    judge = common.load_model(runs / "reward_model", "scalar", CPU)
    assert reward([""], rollout).item() == pytest.approx(
        slow.score(judge, [1, 5], [7, 0]).item()
    )


def test_every_batch_starts_from_the_reference(call, closing):
    """Reference log-probs of another row or model: with lr 0 the loss of every batch is step
    0's, ln 2. A pair that is neither right nor wrong counted as one of them."""
    for row in call(dpo, f"{TINY} --lr 0 --out new"):
        assert float(row["loss"]) == pytest.approx(math.log(2), abs=2e-5)
        assert (row["accuracy"], row["margin"]) == ("0.5", "0")


def test_pairs_come_from_all_files_alike(alike):
    """--pairs that takes the first file's only, or that is ignored; a second file that is not
    read; a held-out pair trained on."""
    alike(dpo, "--steps 1")


def test_one_seed_one_result_whatever_had_to_be_made(remade):
    """Random numbers used up by collecting comparisons shift those of the training; comparisons
    collected again although they are there; a seed that does not arrive."""
    remade(dpo, TINY)


@pytest.mark.parametrize("off", [(1, 0), (0, -1), (1, 1)])
def test_a_policy_that_differs_at_step_0_stops_the_run(off, call, stops, monkeypatch):
    """Policy and reference through different code: log-ratios that should be 0 are not, of one
    side alone, or of both alike, which no loss shows."""
    honest = dpo.response_logprobs

    def planted(model, *given):
        trained = any(weight.requires_grad for weight in model.parameters())
        return honest(model, *given) + 2e-4 * trained * torch.tensor(off)

    monkeypatch.setattr(dpo, "response_logprobs", planted)
    stops(call, dpo, f"{TINY} --out new", code=1)


def test_a_loss_that_is_not_finite_stops_the_run(diverges, monkeypatch):
    """NaN that is stepped on, skipped in silence, or saved."""
    monkeypatch.setattr(dpo, "LOSSES", {"dpo": lambda *given: dpo.dpo(*given)})
    assert "step 2" in diverges(dpo, TINY, "dpo", 3)


@pytest.mark.parametrize("flags", ["--estimator rloo", "--beta 0", "--loss kto",
                                   "--ref nowhere", "--init reward_model", "--out sft",
                                   "--comparisons nowhere"])  # fmt: skip
def test_a_wrong_command_line_is_refused(call, stops, flags):
    """A flag that is ignored; what is wrong said after training."""
    stops(call, dpo, f"{TINY} {flags}")
