"""common.py in the enumerable world: sampling, log-probs, scores, and what estimates KL."""

import functools
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

import common
from common import EOS

PROMPTS = [[1], *tiny.PROMPTS[1:]]  # one token: the least there is to start from
POLICY = tiny.transformer(1)
GROUPED = tiny.transformer(4, heads=4, kv_heads=2)  # query heads share keys and values
REFERENCE = {"near": tiny.nearby(POLICY, 0.01), "far": tiny.transformer(2, spread=3.0)}


def law(model: torch.nn.Module, temperature: float = 1.0) -> Tensor:
    """The exact probabilities, (3, 40)."""
    with torch.no_grad():
        logp = [tiny.token_logp(model, x, temperature=temperature).sum(1) for x in PROMPTS]
    return torch.stack(logp).exp()


@functools.cache
def sample(model: torch.nn.Module, seed: int, temperature: float = 1.0) -> common.Rollout:
    """51,000 samples, 17,000 per prompt, drawn in one ragged batch."""
    torch.manual_seed(seed)
    asked = [x for x in PROMPTS for _ in range(17_000)]
    return common.generate(model, asked, tiny.LONGEST, temperature)


# ------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("model", [POLICY, GROUPED])
def test_completions_are_all_there_is(model):
    """The fixture itself: a completion forgotten or counted twice."""
    assert len(set(tiny.completions())) == 40
    assert (law(model).sum(1) - 1).abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_generate_samples_from_exactly_pi(seed):
    """A wrong position, cache or CDF: each shifts some completion's frequency."""
    model = [POLICY, GROUPED][seed % 2]
    assert tiny.fits(sample(model, seed), law(model)) > 1e-4


def test_generate_samples_at_its_temperature():
    """Temperature ignored; and the χ² test above has the power to see T = 0.9."""
    assert tiny.fits(sample(POLICY, 0, 0.9), law(POLICY, 0.9)) > 1e-4
    assert tiny.fits(sample(POLICY, 0, 0.9), law(POLICY)) < 1e-4


def test_the_sampling_test_sees_a_lost_eos():
    """EOS dropped from the mask, or never sampled: the χ² test above must fail."""
    honest = sample(POLICY, 0)
    dropped = replace(honest, response_mask=honest.response_mask & (honest.tokens != EOS))
    assert tiny.fits(dropped, law(POLICY)) < 1e-4
    silent = tiny.nearby(POLICY, 0.0)
    head, never = silent.head, torch.where(torch.arange(tiny.V) == EOS, -1e9, 0.0)
    silent.head = lambda hidden: head(hidden) + never
    assert tiny.fits(sample(silent, 0), law(POLICY)) < 1e-4


@pytest.mark.parametrize(
    ("model", "seed", "temperature"), [(POLICY, 0, 1.0), (GROUPED, 1, 1.0), (POLICY, 0, 0.9)]
)
def test_what_generate_says_of_its_samples(model, seed, temperature):
    """Cached decoding is not the model; the mask misses a token or has one too many;
    `finished` is wrong; log-probs stored for another token or temperature."""
    rollout, made = sample(model, seed, temperature), tiny.completions()
    y = tiny.number(rollout.tokens, rollout.response_mask)
    assert (y >= 0).all()  # every one is finished or of full length
    assert torch.equal(rollout.finished, torch.tensor([c[-1] == EOS for c in made])[y])
    assert not rollout.logprobs[~rollout.response_mask].any()
    with torch.no_grad():
        for x, row, which in zip(PROMPTS, rollout.logprobs.split(17_000), y.split(17_000)):
            exact = tiny.token_logp(model, x, temperature=temperature)[which]
            assert (row[:, len(x) : len(x) + tiny.LONGEST] - exact).abs().max() < 1e-10


# ------------------------------------------------------------------------- log-probs and scores


@pytest.mark.parametrize("model", [POLICY, GROUPED])
def test_token_logprobs_are_the_enumerated_ones(model):
    """Outputs of the wrong column; padding that changes a number; a mask that hides one."""
    everything = tiny.everything(PROMPTS)
    with torch.no_grad():
        found = common.token_logprobs(model, everything.tokens, everything.response_mask)
        whole = common.token_logprobs(model, everything.tokens)
        for x, part, free in zip(PROMPTS, found.split(40), whole.split(40)):
            exact = tiny.token_logp(model, x)
            columns = slice(len(x), len(x) + tiny.LONGEST)
            assert (part[:, columns] - exact).abs().max() < 1e-10
            over = exact == 0  # where a completion is over, `whole` speaks of padding
            assert (free[:, columns] - exact)[~over].abs().max() < 1e-10
            assert (part.sum(1) - exact.sum(1)).abs().max() < 1e-10


def test_score_is_read_at_the_last_response_token():
    """A score read at a pad, at the prompt, or one token early."""
    judge, everything = tiny.transformer(3, "scalar"), tiny.everything(PROMPTS)
    judge.offset += 0.3
    found = common.score(judge, everything.tokens, everything.response_mask)
    rows = [x + list(y) for x in PROMPTS for y in tiny.completions()]
    alone = torch.stack([judge(torch.tensor([row]))[0, -1] for row in rows])
    assert (found - alone).abs().max() < 1e-10


def test_values_stand_before_the_token():
    """A critic that has read the token whose baseline it is."""
    critic, everything = tiny.transformer(3, "scalar"), tiny.everything(PROMPTS)
    found = common.token_values(critic, everything.tokens)
    for t in range(1, everything.tokens.shape[1]):
        before = critic(everything.tokens[:, :t])[:, -1]
        assert (found[:, t] - before).abs().max() < 1e-10


# ---------------------------------------------------- KL: estimators, and estimators as losses
# Samples from π give log-ratios l = log π − log π_ref. k1 = l, k2 = l²/2, k3 = e^−l − 1 + l.

ESTIMATORS = {
    "k1": lambda l: l,  # noqa: E741
    "k2": lambda l: l.square() / 2,  # noqa: E741
    "k3": lambda l: torch.expm1(-l) + l,  # noqa: E741
}


def log_ratios(policy, reference) -> Tensor:
    """l of every token of every completion, (120, T), as the scripts have it."""
    rows = tiny.everything(PROMPTS)
    with torch.no_grad():
        ref = common.token_logprobs(reference, rows.tokens, rows.response_mask)
    return common.token_logprobs(policy, rows.tokens, rows.response_mask) - ref


@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_expectation_of_an_estimator_is_kl(name, distance):
    """A sign or direction that is wrong: visible far from 0 only."""
    p = law(POLICY)
    with torch.no_grad():
        k = ESTIMATORS[name](log_ratios(POLICY, REFERENCE[distance]).sum(1))
        exact = tiny.kl(
            tiny.logp(POLICY, PROMPTS), tiny.logp(REFERENCE[distance], PROMPTS)
        ).item()
    assert exact < 0.05 if distance == "near" else exact > 1
    assert (p * k.view(3, 40)).sum(1).mean().item() == pytest.approx(exact, abs=1e-10)


def as_losses(distance: str, name: str, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """E[∇k] over y ~ π, beside ∇KL(π ‖ ref) and ∇KL(ref ‖ π)."""
    policy, reference = POLICY, REFERENCE[distance]
    ratios, k = log_ratios(policy, reference), ESTIMATORS[name]
    k = k(ratios).sum(1) if per_token else k(ratios.sum(1))
    loss = (law(policy) * k.view(3, 40)).sum(1).mean()
    logp, ref_logp = (tiny.logp(m, PROMPTS) for m in (policy, reference))
    kls = tiny.kl(logp, ref_logp), tiny.kl(ref_logp, logp)
    return tuple(tiny.gradient(value, policy) for value in (loss, *kls))


@pytest.mark.parametrize("distance", REFERENCE)
def test_k1_as_a_loss_does_nothing(distance):
    found, forward, _ = as_losses(distance, "k1", per_token=False)
    assert found.abs().max() < 1e-10 * forward.abs().max()


@pytest.mark.parametrize("distance", REFERENCE)
def test_k2_as_a_loss_has_the_gradient_of_kl(distance):
    found, forward, backward = as_losses(distance, "k2", per_token=False)
    assert tiny.apart(found, forward) < 1e-10
    assert tiny.apart(found, backward) > 0.01


@pytest.mark.parametrize("distance", REFERENCE)
def test_k3_as_a_loss_has_the_gradient_of_the_reverse_kl(distance):
    found, forward, backward = as_losses(distance, "k3", per_token=False)
    assert tiny.apart(found, backward) < 1e-10
    assert tiny.apart(found, forward) > 0.01


@pytest.mark.parametrize("distance", REFERENCE)
@pytest.mark.parametrize("name", ["k2", "k3"])
def test_summed_per_token_k2_and_k3_have_neither(name, distance):
    found, forward, backward = as_losses(distance, name, per_token=True)
    assert tiny.apart(found, forward) > 0.01
    assert tiny.apart(found, backward) > 0.01
