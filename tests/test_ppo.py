"""ppo.py: each formula by hand, what `update` differentiates against exact expectations in
the enumerable world, then whole runs: every column, every flag, trace.txt.

Claims about gradients are about what `update` differentiates; gradient clipping and Adam,
which come after, have no part in them. An exact expectation is one call of `collect` and
`update` on every completion, or n-tuple, with the advantages times B · π(y|x).
"""

import copy
import itertools
import json
import re
import zlib
from dataclasses import replace

import pytest
import tiny as world
import torch
from tiny import LONGEST, NAMES, PROMPTS
from torch import Tensor

import common
import ppo
from common import EOS, Rollout, Transformer

ESTIMATORS = ("value", "rloo", "grpo", "reinforce", "gae")
CPU = torch.device("cpu")


def row_logp(model, x: list[int], y: list[int]) -> Tensor:
    """log π(y_t | x, y_<t), (len(y),): one unpadded row."""
    logp = model(torch.tensor([x + y]))[0].log_softmax(-1)
    return logp[range(len(x) - 1, len(x) + len(y) - 1), y]


def row_values(critic, x: list[int], y: list[int]) -> Tensor:
    """V(x, y_<t), (len(y),): one unpadded row, which ends before y_t."""
    prefixes = [torch.tensor([x + y[:t]]) for t in range(len(y))]
    return torch.stack([critic(prefix)[0, -1] for prefix in prefixes])


def parts(batch) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of every row."""
    rows = zip(batch.tokens.tolist(), batch.response_mask.tolist())
    return [
        (ids[: on.index(True)], [token for token, response in zip(ids, on) if response])
        for ids, on in rows
    ]


# ------------------------------------------------------------------------ the maths, by hand

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()


def test_return_by_hand():
    """KL as a bonus, its ratio inverted, averaged over tokens, or counted off the response;
    the score on another token, or on a pad; a return that carries a gradient."""
    logprobs = torch.tensor([[9.0, -1, -2, -3, 9], [9, 9, 9, -4, 9], [9, 9, -1, -1, -1]])
    ref = torch.tensor([[5.0, -2, -2, -5, 5], [5, 5, 5, -1, 5], [5, 5, -1, -1, -1]])
    score = torch.tensor([10.0, 20, 30])
    logprobs.requires_grad_()
    returns, kl = ppo.response_return(score, logprobs, ref, MASK, beta=0.5)
    assert kl.tolist() == [3, -3, 0]
    assert returns.tolist() == [8.5, 21.5, 30]
    rewards = ppo.token_rewards(score, logprobs, ref, MASK, beta=0.5)
    assert rewards.tolist() == [[0, -0.5, 0, 9, 0], [0, 0, 0, 21.5, 0], [0, 0, 0, 0, 30]]
    assert not any(x.requires_grad for x in (returns, kl, rewards))


def test_rloo_by_hand():
    """The sample's own return in its baseline; groups across prompts."""
    returns = torch.tensor([1.0, 2, 6, 0, 0, 30])
    assert ppo.rloo(returns, 3).tolist() == pytest.approx([-3, -1.5, 4.5, -15, -15, 30])
    assert ppo.rloo(returns, 2).tolist() == pytest.approx([-1, 1, 6, -6, -30, 30])
    assert ppo.rloo(torch.full((8,), 1 / 3), 4).tolist() == [0] * 8


def test_grpo_by_hand():
    """Sample std for population std; std over the batch; a scale or shift that matters;
    equal returns, whose rounding over a std of rounding would be an advantage of size 1."""
    returns = torch.tensor([1.0, 3, 5, 5, 0, 100])
    assert ppo.grpo(returns, 2).tolist() == pytest.approx([-1, 1, 0, 0, -1, 1])
    by_threes = ppo.grpo(returns, 3)[:3].tolist()
    assert by_threes == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    equal = torch.tensor([0.1] * 7 + [1e6 / 3] * 7)
    assert ppo.grpo(equal, 7).tolist() == [0] * 14


def test_gae_by_hand():
    """γ or λ left out, or for one another; V of a pad after the end; credit from a pad."""
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    rewards = torch.tensor([[0.0, 1, 2, 0], [0, 0, 3, 4]])
    values = torch.tensor([[70.0, 6, 8, 90], [70, 80, 2, 6]])
    advantages, targets = ppo.gae(rewards, values, mask, gamma=0.5, lam=0.25)
    # δ = 1 + 8/2 − 6, 2 − 8;   3 + 6/2 − 2, 4 − 6
    expected = torch.tensor([[0, -1 - 6 / 8, -6, 0], [0, 0, 4 - 2 / 8, -2]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(targets, expected + values * mask)


def by_hand(estimator: str) -> tuple[ppo.Config, ppo.Batch]:
    """A batch of 4 ragged rows, 2 prompts × 2 samples; V is far from 0 at every position."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    logprobs, ref = torch.randn(2, 4, 4, generator=generator) * mask
    values = torch.arange(16.0).view(4, 4) + 10
    score = torch.tensor([1.0, 2, 3, 7])
    returns, kl = ppo.response_return(score, logprobs, ref, mask, 0.5)
    tokens = torch.randint(4, 300, (4, 4), generator=generator)
    batch = ppo.Batch(tokens, mask, logprobs, ref, score, returns, kl, mask, values, {})
    return ppo.Config(estimator=estimator, samples=2, beta=0.5, lam=0.5), batch


def advantages_by_hand(cfg, batch) -> list[list[float]]:
    """A of every response token of every row, from the definitions."""
    R, n = batch.returns.tolist(), cfg.samples
    known = zip(batch.reward, batch.old_logprobs, batch.ref_logprobs, batch.values)
    answers = []
    for i, (on, (r, logp, ref, v)) in enumerate(zip(batch.response_mask, known)):
        group = R[i - i % n : i - i % n + n]
        mean = sum(group) / n
        if cfg.estimator == "gae":
            r_t, v = (-cfg.beta * (logp - ref)[on]).tolist(), [*v[on].tolist(), 0.0]
            r_t[-1] += r.item()
            delta = [r_t[t] + v[t + 1] - v[t] for t in range(len(r_t))]
            later = [delta[t:] for t in range(len(delta))]
            answers.append([sum(cfg.lam**k * d for k, d in enumerate(x)) for x in later])
            continue
        spread = (sum((x - mean) ** 2 for x in group) / n) ** 0.5
        advantage = {
            "reinforce": R[i],
            "value": R[i] - v[on][0].item(),
            "rloo": R[i] - (sum(group) - R[i]) / max(1, n - 1),
            "grpo": (R[i] - mean) / (spread or 1),
        }[cfg.estimator]
        answers.append([advantage] * int(on.sum()))
    return answers


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_has_its_own_baseline(estimator):
    """V read at a pad, at the prompt's start, or after the action; a baseline of another
    prompt's answers; λ, β or N that do not reach the formula; another estimator's branch."""
    cfg, batch = by_hand(estimator)
    advantages = ppo.estimate_advantages(estimator, cfg, batch)
    assert advantages.shape == ((4, 4) if estimator == "gae" else (4, 1))
    rows = zip(advantages.expand(4, 4), batch.response_mask)
    found = [row[on].tolist() for row, on in rows]
    for mine, theirs in zip(found, advantages_by_hand(cfg, batch), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_policy_loss_by_hand():
    """A mean over tokens for the sum over a response's tokens; padding counted; a sign."""
    old = torch.zeros(2, 3)
    logprobs = torch.tensor([[1.1, 1.5, 9], [0.5, 9, 9]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = ppo.policy_loss(logprobs, old, torch.tensor([[2.0], [-4]]), mask, 0.2)
    assert loss.item() == pytest.approx(-((1.1 + 1.2) * 2 + 0.8 * -4) / 2)
    a = torch.tensor([[2.0, 1, 7], [-4, 7, 7]])  # gae: an advantage per token
    loss = ppo.policy_loss(logprobs, old, a, mask, 0.2)
    assert loss.item() == pytest.approx(-((1.1 * 2 + 1.2) + 0.8 * -4) / 2)


def test_a_token_counts_as_clipped_where_its_gradient_is_off():
    """A clip split by the sign of A has its gradient on exactly where PPO turns it off; and
    `clipped` once counted every ρ outside 1 ± ε, also those whose gradient lives."""
    ratio = torch.tensor([[1.3, 0.7, 1.1, 0.9, 9, 0.1, 1.3, 0.7]])
    # good and already likelier, or bad and already less likely: no more gradient
    off = {1.0: [1, 0, 0, 0, 1, 0, 1, 0], -1.0: [0, 1, 0, 0, 0, 1, 0, 1], 0.0: [0] * 8}
    for a, expected in off.items():
        logprobs, advantage = ratio.log().requires_grad_(), torch.tensor([[a]])
        mask = torch.tensor([[True] * 6 + [False] * 2])
        ppo.policy_loss(logprobs, 0 * ratio, advantage, mask, 0.2).backward()
        on = 1 - torch.tensor([expected])
        torch.testing.assert_close(logprobs.grad, -a * ratio * on * mask)
        for given in (advantage, advantage.expand(1, 8)):
            assert ppo.is_clipped(ratio, given, 0.2).long().tolist() == [expected]


def test_value_loss_by_hand():
    """The half, the square, or the mean over states; a pad that counts."""
    values, targets = torch.tensor([[1.0, 5], [2, 9]]), torch.tensor([[3.0, 5], [5, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ppo.value_loss(values, targets, mask).item() == pytest.approx((4 + 0 + 9) / 3 / 2)


# ------------------------------------------------- the enumerable world: exact expectations

POLICY, REFERENCE = world.transformer(1), world.transformer(2, spread=2.0)
CRITIC = world.transformer(3, "scalar")
BETA = 0.7
RANDOM = torch.Generator().manual_seed(0)
R = torch.randn(3, 40, generator=RANDOM, dtype=torch.float64)
TIED = torch.randint(3, (3, 40), generator=RANDOM).double()  # many completions are as good


def config(estimator: str, **flags) -> ppo.Config:
    given = dict(beta=BETA, epochs=1, minibatches=1, max_new_tokens=LONGEST) | flags
    return ppo.Config(estimator=estimator, **given)


def collected(
    cfg, r, policy=POLICY, critic=CRITIC, longest=LONGEST, reference=REFERENCE, names=NAMES
):
    """The Batch that ppo.collect makes of all n-tuples of completions, n = cfg.samples, and
    what each row must be multiplied by to make means over rows exact expectations."""
    made, which = world.completions(longest), world.tuples(cfg.samples, longest)
    prompts = [world.chat(name) for name in names]
    rows = [(x, made[i]) for x in prompts for i in which.flatten().tolist()]
    names = [name for name in names for _ in which]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "chat", world.chat)
        patch.setattr(common, "generate", lambda *_: world.listed(rows))
        reward = world.Table(r, longest)
        batch = ppo.collect(cfg, names, policy, reference, critic, reward)
    p = world.logp(policy, prompts, longest).detach().exp()
    weight = len(which) * p[:, which].prod(-1)  # (3, 40ⁿ)
    return batch, weight.flatten().repeat_interleave(cfg.samples)


def updates(cfg, batch, weight: Tensor, policy=POLICY, critic=CRITIC, moved=None) -> list:
    """(loss, gradient) of every step that ppo.update takes, in expectation: the policy's,
    then the critic's. No step changes a weight, but `moved` takes the policy's place."""
    steps, token_values = [], common.token_values
    advantages = ppo.estimate_advantages(cfg.estimator, cfg, batch)
    weighted = advantages * weight[:, None]
    batch = replace(
        batch,
        values=batch.values + advantages - weighted,  # so that A + V, the target, is as it was
        value_mask=batch.value_mask * weight[:, None],  # in value_loss the weights; else a mask
    )

    def record(loss, model, *_):
        steps.append((loss.item(), world.gradient(loss, model)))
        if moved is not None:
            model.load_state_dict(moved.state_dict())
        return loss.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "token_values", lambda c, t, mask: token_values(c, t, mask > 0))
        patch.setattr(common, "descend", record)
        ppo.update(cfg, batch, weighted, policy, critic, [None, None], 0.0)
    return steps


def ascent(cfg, batch, weight: Tensor, critic=CRITIC) -> Tensor:
    """E of what the policy ascends along at ratio 1."""
    return -updates(cfg, batch, weight, critic=critic)[0][1]


def ascended(cfg, r: Tensor, longest: int = LONGEST) -> Tensor:
    critic = CRITIC if cfg.estimator in ("value", "gae") else None
    return ascent(cfg, *collected(cfg, r, critic=critic, longest=longest), critic)


def exact(r: Tensor, beta: float = BETA, longest: int = LONGEST) -> Tensor:
    """∇J."""
    logp, ref_logp = (world.logp(m, longest=longest) for m in (POLICY, REFERENCE))
    return world.gradient(world.objective(logp, ref_logp.detach(), r, beta), POLICY)


@pytest.mark.parametrize("policy", [POLICY, world.nearby(REFERENCE, 0.01)])
def test_mean_return_is_J_and_mean_kl_is_KL(policy):
    """KL with the wrong sign or direction (which far from 0 is seen), another of its
    estimators, averaged over tokens, or counted off the mask."""
    batch, weight = collected(config("reinforce", samples=1), R, policy)
    logp, ref_logp = world.logp(policy), world.logp(REFERENCE)
    exact_kl = world.kl(logp, ref_logp)
    assert (exact_kl > 1) if policy is POLICY else (exact_kl < 0.05)
    assert abs((weight * batch.kl).mean() - exact_kl) < 1e-10
    J = world.objective(logp, ref_logp, R, BETA)
    assert abs((weight * batch.returns).mean() - J) < 1e-10
    known = batch.reward, batch.old_logprobs, batch.ref_logprobs, batch.response_mask, BETA
    assert (ppo.token_rewards(*known).sum(1) - batch.returns).abs().max() < 1e-10


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("estimator", ["value", "reinforce", "gae"])
def test_one_sample_estimators_ascend_J(estimator, beta):
    """A baseline that knows the action; a mean over tokens; a mask or score off by one; KL
    with the wrong sign. V is that of any critic, here random weights."""
    found = ascended(config(estimator, samples=1, beta=beta, lam=1.0), R)
    assert world.apart(found, exact(R, beta)) < 1e-10


@pytest.mark.parametrize(("n", "longest"), [(2, 2), (3, 1), (4, 1)])
def test_rloo_ascends_J(n, longest):
    """Leave-one-out that leaves nothing out; groups that mix prompts."""
    r = R[:, : len(world.completions(longest))]
    found = ascended(config("rloo", samples=n), r, longest)
    assert world.apart(found, exact(r, longest=longest)) < 1e-10


@pytest.mark.parametrize("estimator", ["value", "reinforce", "gae", "rloo"])
def test_the_kl_inside_the_return_is_descended_exactly(estimator):
    """A KL that is no part of what is differentiated: with r = 0 and β = 1 what is left is
    −∇KL(π ‖ π_ref), though the return is detached."""
    n, longest = (2, 2) if estimator == "rloo" else (1, 3)
    cfg = config(estimator, samples=n, beta=1.0, lam=1.0)
    zero = torch.zeros(3, len(world.completions(longest)), dtype=torch.float64)
    found = ascended(cfg, zero, longest)
    logp, ref_logp = (world.logp(m, longest=longest) for m in (POLICY, REFERENCE))
    kl = world.kl(logp, ref_logp.detach())
    assert world.apart(found, -world.gradient(kl, POLICY)) < 1e-10


@pytest.mark.parametrize(("n", "longest"), [(2, 2), (3, 1)])
def test_grpo_without_its_std_is_a_shrunken_gradient_of_J(n, longest):
    """Another mean or std than the group's: A · std = R − mean R, whose mean holds the sample
    itself, so that what is ascended is (n − 1)/n · ∇J."""
    cfg, r = config("grpo", samples=n), R[:, : len(world.completions(longest))]
    batch, weight = collected(cfg, r, critic=None, longest=longest)
    std = batch.returns.view(-1, n).std(1, correction=0).repeat_interleave(n)
    found = ascent(cfg, batch, weight * std, None)
    assert world.apart(found, (n - 1) / n * exact(r, longest=longest)) < 1e-10


@pytest.mark.parametrize(("r", "beta"), [(TIED[:, :13], 0.0), (R[:, :13], BETA)])
def test_grpo_of_two_ascends_twice_the_win_rate(r, beta):
    """A std with an ε, which only nearly normalises; ties that count. What is ascended is
    2 ∇P(R(y) > R(y′)) + ∇P(tie), y′ and returns frozen: this is not ∇J."""
    found = ascended(config("grpo", samples=2, beta=beta), r, 2)
    logp, ref_logp = (world.logp(m, longest=2) for m in (POLICY, REFERENCE))
    returns = (r - beta * (logp - ref_logp)).detach()
    mine, other = returns[:, :, None], returns[:, None, :]
    pairs = logp.exp()[:, :, None] * logp.exp().detach()[:, None, :]
    won, tied = ((pairs * on).sum((1, 2)).mean() for on in (mine > other, mine == other))
    same = logp.exp().square().sum(1).mean()  # twice the same completion
    assert (tied > 1.1 * same) == (beta == 0)
    assert world.apart(found, world.gradient(2 * won + tied, POLICY)) < 1e-10
    assert world.apart(found, exact(r, beta, 2)) > 0.1


def test_grpo_of_two_is_blind_to_magnitudes():
    """A normalisation that lets sizes through: any increasing function of r is as good as r.
    For rloo it is not, so the test can tell."""
    for estimator, blind in (("grpo", True), ("rloo", False)):
        cfg = config(estimator, samples=2, beta=0.0)
        a, b = ascended(cfg, TIED[:, :13], 2), ascended(cfg, TIED[:, :13].exp(), 2)
        assert (world.apart(a, b) < 1e-10) == blind


def table(critic, x: list[int]) -> Tensor:
    """V(x, y_<t) of every completion, one unpadded row at a time, (40, 3), 0 after y."""
    v = {p: critic(torch.tensor([x + list(p)]))[0, -1] for p in world.prefixes()}
    over = torch.zeros((), dtype=torch.float64)
    rows = [
        [v[y[:t]] if t < len(y) else over for t in range(LONGEST)] for y in world.completions()
    ]
    return torch.stack([torch.stack(row) for row in rows])


ALIVE = torch.tensor([[t < len(y) for t in range(LONGEST)] for y in world.completions()])
LAST = ALIVE & (ALIVE.sum(1, keepdim=True) == torch.arange(1, LONGEST + 1))


def to_go(x: int) -> tuple[Tensor, Tensor]:
    """r_t of every completion of a prompt, and Σ_{l ≥ t} r_l, (40, 3) each."""
    logp, ref_logp = (world.token_logp(m, PROMPTS[x]).detach() for m in (POLICY, REFERENCE))
    rewards = R[x][:, None] * LAST - BETA * (logp - ref_logp)
    return rewards, rewards.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_gae_weighs_later_errors_by_lambda(lam):
    """λ left out, V after the end, the score on another token: E Σ_t A_t ∇log π(y_t), with
    A_t = Σ_l λˡ δ_{t+l} from tables that know no padding."""
    found, value = ascended(config("gae", samples=1, lam=lam), R), 0.0
    for i, x in enumerate(PROMPTS):
        v, logp = table(CRITIC, x).detach(), world.token_logp(POLICY, x)
        delta = to_go(i)[0] + torch.cat([v[:, 1:], 0 * v[:, :1]], 1) - v
        a = sum(
            lam**k * torch.cat([delta[:, k:], torch.zeros(40, k)], 1) for k in range(LONGEST)
        )
        value += (logp.sum(1).exp().detach()[:, None] * a * ALIVE * logp).sum() / 3
    assert world.apart(found, world.gradient(value, POLICY)) < 1e-10


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_gae_with_the_true_values_ascends_J_at_any_lambda(lam):
    """Rewards or values of another token: V(s_t) = E[Σ_{l ≥ t} r_l | s_t] bootstraps without
    bias, any other V does not."""
    cfg = config("gae", samples=1, lam=lam)
    batch, weight = collected(cfg, R)
    biased = ascent(cfg, batch, weight)
    for i, rows in enumerate(batch.response_mask.split(40)):
        p, later = world.logp(POLICY).detach()[i].exp(), to_go(i)[1]
        true = torch.zeros(40, LONGEST, dtype=torch.float64)
        for t in range(LONGEST):
            begun = [y[:t] if t < len(y) else None for y in world.completions()]
            same = torch.tensor([[a == b for b in begun] for a in begun]) * p
            true[:, t] = same @ later[:, t] / same.sum(1)
        batch.values[40 * i : 40 * (i + 1)][rows] = true[ALIVE]
    assert world.apart(ascent(cfg, batch, weight), exact(R)) < 1e-10
    assert world.apart(biased, exact(R)) > 0.1


@pytest.mark.parametrize("estimator", ["value", "gae"])
def test_a_critic_that_sees_the_action_would_be_noticed(estimator, monkeypatch):
    """A test that cannot fail: the claims above hold for any V of what stands before the
    token, and for that alone."""
    monkeypatch.setattr(common, "token_values", lambda critic, tokens, mask: critic(tokens))
    found = ascended(config(estimator, samples=1, lam=1.0), R)
    assert world.apart(found, exact(R)) > 0.1


@pytest.mark.parametrize("estimator", ["value", "gae"])
def test_the_critic_descends_to_the_expected_return(estimator):
    """V trained on the wrong column, on padding, on another row's target, or towards another
    one: ∇ ½ E (V(x) − R)², and for gae E Σ_t over the states on the way, per state."""
    cfg = config(estimator, samples=1, lam=1.0)
    found = updates(cfg, *collected(cfg, R))[1][1]
    error = states = 0.0
    for i, x in enumerate(PROMPTS):
        p = world.logp(POLICY).detach()[i].exp()[:, None]
        p = p * (ALIVE if estimator == "gae" else torch.tensor([True, False, False]))
        error += 0.5 * (p * (table(CRITIC, x) - to_go(i)[1]).square()).sum()
        states += p.sum()
    assert world.apart(found, world.gradient(error / states, CRITIC)) < 1e-10


def test_later_updates_descend_the_clipped_surrogate():
    """Old log-probs that move along; an ε that is not --clip; a clip split by the sign of A;
    padding counted."""
    policy, moved = (world.nearby(POLICY, size) for size in (0.0, 0.05))
    cfg = config("reinforce", samples=1, epochs=2, clip=0.15)
    batch, weight = collected(cfg, R, policy, None)
    _, (loss, gradient) = updates(cfg, batch, weight, policy, None, moved)
    value, clipped = 0.0, set()
    for i, x in enumerate(PROMPTS):
        old = world.token_logp(POLICY, x).detach()
        a = (R[i] - BETA * (old - world.token_logp(REFERENCE, x)).sum(1)).detach()[:, None]
        ratio = (world.token_logp(moved, x) - old).exp()
        surrogate = torch.min(ratio * a, ratio.clamp(0.85, 1.15) * a)
        value -= (old.sum(1).exp()[:, None] * surrogate * ALIVE).sum() / 3
        off = (surrogate != ratio * a) & ALIVE
        clipped |= {*a.expand_as(off)[off].sign().tolist()}
    assert clipped == {-1.0, 1.0}  # good and bad completions both
    assert abs(loss - value) < 1e-10
    assert world.apart(gradient, world.gradient(value, moved)) < 1e-10


@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
def test_what_is_missing_to_the_optimum_is_beta_kl(size):
    """A return that is no sample of J's integrand: J* − J(π) = β KL(π ‖ π*)."""
    policy = world.nearby(REFERENCE, size)
    batch, weight = collected(config("reinforce", samples=1), R, policy)
    best, j_best = world.optimum(world.logp(REFERENCE), R, BETA)
    missing = j_best - (weight * batch.returns).mean()
    assert missing > 0
    assert abs(missing - BETA * world.kl(world.logp(policy), best)) < 1e-10


@pytest.mark.parametrize("estimator", ["rloo", "value"])
def test_at_the_optimum_the_gradient_vanishes_sample_by_sample(estimator, monkeypatch):
    """Another fixed point than π*. r is made so that POLICY is π* and R(y) = V(x) for every
    y: whatever is sampled, nothing is left to learn from it. `reinforce` knows that only in
    the mean."""
    monkeypatch.setattr(common, "chat", world.chat)
    v = torch.stack([CRITIC(torch.tensor([x]))[:, -1] for x in PROMPTS]).detach()
    r = (BETA * (world.logp(POLICY) - world.logp(REFERENCE)) + v).detach()
    best, _ = world.optimum(world.logp(REFERENCE), r, BETA)
    assert (best - world.logp(POLICY)).abs().max() < 1e-10
    cfg = config(estimator, samples=4)
    critic = CRITIC if estimator == "value" else None
    torch.manual_seed(0)
    batch = ppo.collect(cfg, NAMES * 8, POLICY, REFERENCE, critic, world.Table(r))
    assert ppo.estimate_advantages(estimator, cfg, batch).abs().max() < 1e-10
    assert ascent(cfg, batch, torch.ones(96), critic).abs().max() < 1e-10
    assert ppo.estimate_advantages("reinforce", cfg, batch).abs().max() > 0.1


# -------------------------------------------------------- the enumerable world: whole ascents


@pytest.fixture
def ascend(monkeypatch, tmp_path):
    """ascend(r, names, longest, start, **flags): ppo.main from `start` as policy and
    reference, with β = 1 and rewards r. Gives the policy and the Batches that it saw."""

    def run(r, names, longest, start, **flags):
        torch.set_default_dtype(torch.float64)  # of the models, which main makes itself
        common.save_model(tmp_path / "sft", start, {})
        batches, collect = [], ppo.collect

        def kept(*args):
            batches.append(collect(*args))
            return batches[-1]

        monkeypatch.setattr(ppo, "collect", kept)
        monkeypatch.setattr(common, "chat", world.chat)
        monkeypatch.setattr(common, "read_prompts", lambda *_: (names, names))
        monkeypatch.setattr(common, "check_inputs", lambda *_: None)
        monkeypatch.setattr(common, "load_reward", lambda *_: world.Table(r, longest))
        monkeypatch.setattr(common, "closing_table", lambda *_: None)
        place = dict(runs=str(tmp_path), device="cpu", max_new_tokens=longest)
        ppo.main(ppo.Config(beta=1.0, prompts=len(names), **place, **flags))
        return common.load_model(tmp_path / "ppo", "lm", CPU), batches

    yield run
    torch.set_default_dtype(torch.float32)


def test_the_reference_stays_what_the_policy_was(ascend):
    """A reference that is the policy itself, or is updated along: KL would stay 0."""
    policy, batches = ascend(R, NAMES, LONGEST, REFERENCE, steps=4, samples=8, lr=0.02)
    ref_logp = world.logp(REFERENCE).detach()
    for batch in batches:
        y = world.number(batch.tokens, batch.response_mask)
        # main shuffles the prompts: which one a row has is seen from its first token
        x = batch.tokens[:, 0] - 1
        assert (batch.ref_logprobs.sum(1) - ref_logp[x, y]).abs().max() < 1e-10
        kl = (batch.old_logprobs - batch.ref_logprobs).sum(1)
        assert (batch.returns - (R[x, y] - kl)).abs().max() < 1e-10
    assert kl.abs().max() > 0.01
    assert world.kl(world.logp(policy), ref_logp) > 0.01


SMALL = dict(channels=16, hidden=32, layers=1)
START, X, TWO = world.transformer(7, **SMALL), 1, 2  # one prompt, at most two tokens
REWARDS = R[:, :13]


def closed(policy) -> float:
    """The share of J* − J(π_ref) that the policy has closed."""
    logp, ref_logp = (world.logp(m, [PROMPTS[X]], TWO).detach() for m in (policy, START))
    r = REWARDS[X : X + 1]
    _, best = world.optimum(ref_logp, r, 1.0)
    gap = best - world.objective(ref_logp, ref_logp, r, 1.0)
    assert gap >= 0.3
    return 1 - ((best - world.objective(logp, ref_logp, r, 1.0)) / gap).item()


def climb(ascend, estimator: str, seed: int) -> float:
    flags = dict(steps=20, samples=96, epochs=2, minibatches=2, lr=0.01)
    names, flags = [NAMES[X]], flags | dict(estimator=estimator, seed=seed)
    return closed(ascend(REWARDS, names, TWO, START, **flags)[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ["value", "rloo", "reinforce", "gae"])
def test_sampled_ascent_reaches_the_optimum(estimator, seed, ascend):
    """Whatever bends the ascent as a whole: at least 95 % of what there is to gain."""
    assert climb(ascend, estimator, seed) >= 0.95


def test_exact_ascent_reaches_the_optimum():
    """A gradient that is ∇J at the start alone: the same ascent with exact expectations of
    what ppo.py differentiates reaches 99 %."""
    cfg = config("reinforce", samples=1, beta=1.0)
    policy = world.nearby(START, 0.0)
    optimizer = common.adamw(policy)
    for step in range(100):
        batch, weight = collected(cfg, REWARDS, policy, None, TWO, START, [NAMES[X]])
        advantages = ppo.estimate_advantages("reinforce", cfg, batch) * weight[:, None]
        logprobs = common.token_logprobs(policy, batch.tokens, batch.response_mask)
        loss = ppo.policy_loss(
            logprobs, batch.old_logprobs, advantages, batch.response_mask, 0.2
        )
        common.descend(loss, policy, optimizer, 0.01 * (1 - step / 100))
    assert closed(policy) >= 0.99


# ------------------------------------------------------------------ rollout and update, slowly

BEAR, CHEETAH = "where does the bear live?", "please tell me. what does the cheetah eat?"
ANSWERS = [  # text, finished, gold
    ("in the forest.", True, 2),
    ("in the cave. happy to help!", False, -1),
    ("meat.", True, 2),
    ("meat. look it up.", False, 0),
]


@pytest.mark.parametrize("estimator", ["value", "gae", "grpo"])
def test_a_rollout_by_hand(estimator, tiny, runs, monkeypatch):
    """Answers of a prompt that do not stand together, for rloo and grpo compare n consecutive
    rows; N, β or --max-new-tokens not used; policy for reference; a score, V or log-prob of
    another row or column; a column of metrics.csv that is something else than it says."""
    cfg = ppo.Config(beta=0.5, estimator=estimator, samples=2, max_new_tokens=9, runs=str(runs))
    reward_model = common.load_model(runs / "reward_model", "scalar", CPU)
    policy, reference, critic = tiny(0), tiny(1), tiny(2, "scalar")
    prompts = [BEAR, BEAR, CHEETAH, CHEETAH]
    rows = [
        (common.chat(x), common.encode(text) + [EOS] * finished)
        for x, (text, finished, _) in zip(prompts, ANSWERS)
    ]
    logp, ref_logp = ([row_logp(m, *row).detach() for row in rows] for m in (policy, reference))
    tokens, mask = common.collate(rows)
    sampled = torch.zeros(tokens.shape).masked_scatter(mask, torch.cat(logp))
    sampled[2, len(rows[2][0])] += 0.25  # what `generate` says is a little off

    def generate(model, asked, limit):
        assert model is policy
        assert asked == [x for x, _ in rows]
        assert limit == 9
        return Rollout(tokens, mask, torch.tensor([f for _, f, _ in ANSWERS]), sampled)

    monkeypatch.setattr(common, "generate", generate)
    reward = common.load_reward(cfg, "reward_model", CPU)
    critic = None if estimator == "grpo" else critic
    batch = ppo.collect(cfg, [BEAR, CHEETAH], policy, reference, critic, reward)

    r = torch.tensor([reward_model(torch.tensor([x + y]))[0, -1].item() for x, y in rows])
    kl = torch.stack([(a - b).sum() for a, b in zip(logp, ref_logp)])
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.reward, r, **close)
    torch.testing.assert_close(batch.kl, kl, **close)
    torch.testing.assert_close(batch.returns, r - 0.5 * kl, **close)
    torch.testing.assert_close(batch.old_logprobs[mask], torch.cat(logp), **close)
    torch.testing.assert_close(batch.ref_logprobs[mask], torch.cat(ref_logp), **close)
    first = mask & ~torch.cat([mask[:, :1], mask[:, :-1]], 1)
    known = {"value": first, "gae": mask, "grpo": first & False}[estimator]
    if critic:
        assert torch.equal(batch.value_mask, known)
        v = [row_values(critic, *row)[: None if estimator == "gae" else 1] for row in rows]
        torch.testing.assert_close(batch.values[known], torch.cat(v), **close)
    assert not batch.values[~known].any()
    assert not batch.values.requires_grad

    counts = [len(y) for _, y in rows]
    expected = {
        "reward": r.mean(),
        "kl": kl.mean(),
        "J": r.mean() - 0.5 * kl.mean(),
        "gold": sum(gold for _, _, gold in ANSWERS) / 4,
        "length": sum(counts) / 4,
        "finished": 0.5,
        "entropy": -sum(x.sum() for x in logp) / sum(counts),
        "sampler_gap": 0.25,
    }
    assert {k: float(v) for k, v in batch.row.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("estimator", ["value", "gae", "rloo"])
def test_an_update_is_its_slow_replay(estimator, monkeypatch):
    """Rows left out of an epoch, or with another row's A, old log-probs or target; --epochs,
    --minibatches, --clip or lr not used; old log-probs that move along; the critic's step for
    the policy; a column that is not what it says: the norm after clipping, the last minibatch
    for the mean, ρ outside 1 ± ε with its gradient on. Here row by row, by autograd, SGD."""
    monkeypatch.setattr(common, "chat", world.chat)
    monkeypatch.setattr(common, "MAX_NORM", 1.0)  # it binds, and is not what is logged
    clip, lr, K, minibatches = 0.05, 0.3, 3, 2
    cfg = config(estimator, samples=2, clip=clip, lr=9.0, epochs=K, minibatches=minibatches)
    has_critic = estimator != "rloo"
    policy, critic = world.nearby(POLICY, 0.0), world.nearby(CRITIC, 0.0)
    torch.manual_seed(1)
    given = policy, REFERENCE, critic if has_critic else None, world.Table(3 * R)
    batch = ppo.collect(cfg, NAMES, *given)
    A = ppo.estimate_advantages(estimator, cfg, batch)
    mine, my_critic = copy.deepcopy(policy), copy.deepcopy(critic)
    optimizers = [torch.optim.SGD(model.parameters(), lr=7.0) for model in (policy, critic)]
    torch.manual_seed(2)
    found = ppo.update(cfg, batch, A, policy, given[2], optimizers, lr)

    def step(model, loss) -> Tensor:
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 1.0
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients):
                weight -= lr * gradient / (norm + 1e-6)
        return norm

    rows, columns, largest = parts(batch), {}, []
    torch.manual_seed(2)
    for order in itertools.chain(*(torch.randperm(6).chunk(minibatches) for _ in range(K))):
        policy_loss = value_loss = tokens = off = states = 0
        for i in order.tolist():
            (x, y), on = rows[i], batch.response_mask[i]
            a = A.expand_as(batch.tokens)[i][on]
            ratio = (row_logp(mine, x, y) - batch.old_logprobs[i][on]).exp()
            surrogate = torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            (slope,) = torch.autograd.grad(surrogate.sum(), ratio, retain_graph=True)
            off, tokens = off + int((slope == 0).sum()), tokens + len(y)
            policy_loss -= surrogate.sum() / len(order)
            target = a + batch.values[i][on]
            if estimator == "value":
                target = batch.returns[i, None]
            error = (row_values(my_critic, x, y)[: len(target)] - target).square()
            value_loss, states = value_loss + 0.5 * error.sum(), states + len(target)
            largest.append(ratio.max().item())
        values = {"policy_loss": policy_loss, "grad_norm": step(mine, policy_loss)}
        values["clipped"] = torch.tensor(off / tokens)
        if has_critic:
            values["value_loss"] = value_loss / states
            step(my_critic, values["value_loss"])
        for key, value in values.items():
            columns.setdefault(key, []).append(value.item())
    expected = {key: sum(column) / len(column) for key, column in columns.items()}
    assert len(columns["clipped"]) == K * minibatches
    assert 0 < expected["clipped"] < 0.9
    assert max(largest) > 1 + 2 * clip
    expected |= {"ratio_max": max(largest), "start_ratio": 1.0, "lr": lr}
    if not has_critic:
        assert found.pop("value_loss") is None
    found = {key: float(value) for key, value in found.items()}
    assert found.pop("clipped") == pytest.approx(expected.pop("clipped"), rel=1e-6)  # float32
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for model, replay in ((policy, mine), (critic, my_critic)):
        for weight, replayed in zip(model.parameters(), replay.parameters()):
            torch.testing.assert_close(weight, replayed, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------- whole runs

TINY = "--steps 2 --prompts 3 --samples 2 --minibatches 2 --max-new-tokens 3"


@pytest.fixture
def seen(monkeypatch):
    """seen["collect"], of update, descend and closing_table too: of every call the models as
    they were, the arguments as they are, and the result."""
    calls = {}

    def watch(module, name):
        honest, record = getattr(module, name), calls.setdefault(name, [])

        def spy(*args):
            before = [copy.deepcopy(x) if isinstance(x, Transformer) else x for x in args]
            record.append((before, args, honest(*args)))
            return record[-1][-1]

        monkeypatch.setattr(module, name, spy)

    watch(ppo, "collect")
    watch(ppo, "update")
    watch(common, "descend")
    watch(common, "closing_table")
    return calls


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


ROLLOUT = ("reward", "kl", "J", "gold", "length", "finished", "entropy", "sampler_gap")
UPDATE = ("value_loss", "policy_loss", "grad_norm", "clipped", "ratio_max", "start_ratio", "lr")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_starts_at_no_kl_and_repeats_itself(repeats, moved, seen, estimator):
    """A start that is not the reference; seeds that do not reach the run; a reference or a
    reward model that is trained; a critic that shares the policy's weights or whose first V
    is not 0; columns that are not those of the step; lr that does not fall to 0."""
    rows = repeats(ppo, f"{TINY} --steps 4 --lr 0.01 --estimator {estimator}")
    assert [float(row["kl"]) != 0 for row in rows] == [False, True, True, True]
    assert moved()[:3] == [False, True, False]  # reward model, policy, reference
    for step, row in enumerate(rows):
        assert tuple(row) == ("step", *ROLLOUT, *UPDATE)
        batch, update = seen["collect"][step][-1], seen["update"][step][-1]
        for key, value in (batch.row | update).items():
            if value is None:
                assert row[key] == ""
            else:
                assert float(row[key]) == pytest.approx(float(value), rel=1e-5)
        assert float(row["lr"]) == pytest.approx(0.01 * (1 - step / 4))
        assert float(row["sampler_gap"]) < 1e-4  # rounding reaches 1e-5, and bugs 1e-2
        assert (row["value_loss"] != "") == (estimator in ("value", "gae"))

    (_, _, policy, reference, critic, _), live, _ = seen["collect"][0]
    assert same(policy, reference)
    memory = [{w.data_ptr() for w in m.parameters()} for m in live[2:5] if m]
    assert len(set().union(*memory)) == sum(map(len, memory))  # nothing shared
    assert (critic is not None) == (estimator in ("value", "gae"))
    if critic:
        assert not critic.scalar.weight.any()
        trunk = {k: v for k, v in critic.named_parameters() if k != "scalar.weight"}
        assert all(torch.equal(v, policy.get_parameter(k)) for k, v in trunk.items())
        assert not same(critic, live[4])


def question_set(train: bool) -> set[str]:
    return {x for x in common.QUESTIONS if (zlib.crc32(x.encode()) % 6 != 0) == train}


def test_a_run_is_made_of_what_its_flags_name(call, seen, runs, tiny):
    """--init, --ref, --reward, --steps, --prompts, --lr or --max-new-tokens read by nothing,
    or one for another; a seed that changes nothing; a closing table of other runs."""
    for name, model in (("third", tiny(3)), ("judge", tiny(4, "scalar"))):
        common.save_model(runs / name, model, {})
        common.write(runs / name / "config.json", '{"seconds": 0, "flags": {}}')
    flags = "--init other --ref third --reward judge --steps 5 --prompts 3 --samples 2"
    flags += " --epochs 1 --minibatches 1 --max-new-tokens 6 --lr 0.007 --out new"
    rows = call(ppo, flags)
    init, ref, judge = (
        common.load_model(runs / name, head, CPU)
        for name, head in (("other", "lm"), ("third", "lm"), ("judge", "scalar"))
    )
    (_, prompts, policy, reference, _, _), _, batch = seen["collect"][0]
    assert same(policy, init)
    assert same(reference, ref)
    trunk = dict(seen["collect"][0][0][4].named_parameters())  # the critic's, at the start
    assert not trunk.pop("scalar.weight").any()
    assert all(torch.equal(w, init.get_parameter(name)) for name, w in trunk.items())
    assert len(seen["collect"]) == len(rows) == 5
    assert len(prompts) == 3
    assert [x for x, _ in parts(batch)] == [common.chat(x) for x in prompts for _ in range(2)]
    assert max(len(y) for _, y in parts(batch)) == 6
    judged = [judge(torch.tensor([x + y]))[0, -1].item() for x, y in parts(batch)]
    assert float(rows[0]["reward"]) == pytest.approx(sum(judged) / 6, abs=1e-4)
    assert float(rows[0]["kl"]) != 0
    falling = [0.007 * (1 - step / 5) for step in range(5) for _ in ("policy", "critic")]
    assert [args[3] for _, args, _ in seen["descend"]] == pytest.approx(falling)
    cfg, names, _, reward_name, held, _ = seen["closing_table"][0][1]
    assert (names, reward_name, cfg.out) == (["third", "other", "new"], "judge", "new")
    assert set(held) == question_set(False)
    trace = (runs / "new/trace.txt").read_text()
    assert re.findall(r"(?m)^step (\d+)", trace) == ["0", "4"]  # every 20th, and the last
    other = call(ppo, f"{flags} --seed 1")
    assert {row["reward"] for row in other}.isdisjoint(row["reward"] for row in rows)


def test_every_training_prompt_is_asked_and_no_other(call, seen):
    """Training on held-out prompts, on a part of the prompts, or on one prompt twice before
    all were asked; a closing table of training prompts."""
    n = len(question_set(True))
    flags = f"--steps 2 --prompts {n // 2} --samples 1 --epochs 1 --minibatches 1"
    call(ppo, f"{flags} --max-new-tokens 1 --estimator reinforce --out new")
    asked = [x for _, args, _ in seen["collect"] for x in args[1]]
    assert len(asked) == len(set(asked)) == n - n % 2
    assert set(asked) <= question_set(True)
    assert set(seen["closing_table"][0][1][4]) == question_set(False)


def test_a_reward_function_is_maximised_on_own_prompts(call, seen, tmp_path):
    """--data or --reward FILE.py:function not used; prompts or answers handed over in another
    order; held-out prompts trained on; a prompt that leaves no room for --max-new-tokens;
    descent of J for ascent. Outside the world gold is an empty cell."""
    code, data = tmp_path / "mine.py", tmp_path / "mine.jsonl"
    code.write_text(
        "def r(x, y):\n    return [len(a) + 100 * b.startswith(' ') for a, b in zip(x, y)]\n"
    )
    mine = [f"где {'?' * i}" for i in range(30)]
    full = "a" * 157  # with its two specials, and 2 new tokens, over the context of 160
    rows = [{"prompt": prompt} for prompt in [*mine, full]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--beta 0 --steps 12 --lr 0.02 --prompts 24 --minibatches 1 --max-new-tokens 2"
    rows = call(ppo, f"{flags} --reward {code}:r --data {data} --estimator rloo --out new")
    train = {x for x in mine if zlib.crc32(x.encode()) % 6}
    assert 0 < len(train) < 30
    asked = {x for _, args, _ in seen["collect"] for x in args[1]}
    assert asked == train
    assert set(seen["closing_table"][0][1][4]) == {*mine} - train
    for (_, prompts, *_), _, batch in seen["collect"][:2]:
        known = zip([x for x in prompts for _ in range(4)], parts(batch), batch.reward)
        for x, (_, y), r in known:
            assert r == len(x) + 100 * common.decode(y).startswith(" ")
    reward = [float(row["reward"]) for row in rows]
    print("REWARD", reward)
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 15
    assert {row["gold"] for row in rows} == {""}


def test_one_epoch_of_one_minibatch_never_leaves_ratio_1(call):
    """The header's --epochs 1 --minibatches 1 is plain REINFORCE or RLOO: nothing is ever
    clipped. An update more, and a ratio moves."""
    once, more = (
        call(ppo, f"{TINY} --lr 0.01 --out new --epochs {k} --minibatches 1") for k in (1, 3)
    )
    for row in once:
        assert float(row["ratio_max"]) == pytest.approx(1, abs=1e-4)
        assert float(row["clipped"]) == 0
    assert float(more[0]["ratio_max"]) > 1.01


# ---------------------------------------------------------------------------------- trace.txt


def numbers(line: str, decimals: int = 2) -> list[float]:
    return [float(x) for x in re.findall(rf"-?\d+\.\d{{{decimals}}}(?!\d)", line)]


@pytest.mark.parametrize(("estimator", "n"), [*((name, 3) for name in ESTIMATORS), ("gae", 1)])
def test_trace_shows_the_numbers_of_the_update(call, seen, runs, estimator, n):
    """A trace of another step, row, token, policy or estimator than it says, or of numbers
    computed anew: each is compared with the tensors that the update had."""
    flags = f"{TINY} --init other --samples {n} --lr 0.02 --beta 0.4 --estimator {estimator}"
    rows = call(ppo, f"{flags} --out new")
    texts = re.split(r"(?m)^(?=step \d)", (runs / "new/trace.txt").read_text())[1:]
    after = [seen["collect"][1][0][2], seen["update"][1][1][3]]  # of step 0, and of step 1
    assert len(texts) == len(rows) == 2
    for step, (text, row, policy) in enumerate(zip(texts, rows, after)):
        (_, prompts, *_), _, batch = seen["collect"][step]
        A = seen["update"][step][1][2].expand_as(batch.tokens)
        lines, answers = text.strip().splitlines(), parts(batch)[:n]
        assert lines[0].startswith(f"step {step} ")
        assert prompts[0] in lines[0]
        mean_A, on = [], batch.response_mask
        for i, (x, y) in enumerate(answers):
            old, ref = (z[i][on[i]].sum() for z in (batch.old_logprobs, batch.ref_logprobs))
            R, a = batch.returns[i], A[i][on[i]].mean()
            new = row_logp(policy, x, y).sum().detach()
            assert abs(new - old) > 0.02  # so that after is not before
            expected = [batch.reward[i], old, ref, old - ref, R, R - a, a, new]
            line, quoted = lines[2 + i][:96], lines[2 + i][96:].strip()
            assert numbers(line) == pytest.approx([float(z) for z in expected], abs=0.006)
            assert quoted == repr(common.decode(y))
            mean_A.append(a.item())
        cfg = ppo.Config(estimator=estimator, samples=n, beta=0.4)
        for i, theirs in enumerate(advantages_by_hand(cfg, batch)):
            assert A[i][on[i]].tolist() == pytest.approx(theirs, abs=1e-4)

        i = max(range(n), key=lambda i: abs(mean_A[i]))
        x, y = answers[i]
        columns = [z[i][on[i]] for z in (batch.old_logprobs, batch.ref_logprobs, A)]
        ratio = (row_logp(policy, x, y) - columns[0]).exp()
        expected = torch.stack([*columns, ratio], 1).tolist()
        for t, token in enumerate(y):
            line = lines[4 + n + t]
            assert numbers(line[:48]) == pytest.approx(expected[t], abs=0.006)
            name = "EOS" if token == EOS else repr(common.decode([token]))
            assert line[48:].strip().startswith(name)
            a, rho = expected[t][2:]
            if min(abs(rho - 0.8), abs(rho - 1.2)) > 0.001:
                assert ("clipped" in line) == (rho > 1.2 if a > 0 else rho < 0.8)
        assert lines[4 + n + len(y)] == ""

        for line, name in zip(lines[5 + n + len(y) :], ("reinforce", *ESTIMATORS[:3], "gae")):
            assert line.startswith(f"A by {name}")
            needs = {"value": ("value", "gae"), "gae": ("gae",)}.get(name, ESTIMATORS)
            expected = []
            if estimator in needs and (n > 1 or name not in ("rloo", "grpo")):
                cfg = ppo.Config(estimator=name, samples=n, beta=0.4)
                expected = [sum(z) / len(z) for z in advantages_by_hand(cfg, batch)[:n]]
            assert numbers(line) == pytest.approx(expected, abs=0.006)

        J, reward, kl, mean_R = numbers(lines[-1], 3)
        assert J == pytest.approx(float(row["J"]), abs=6e-4)
        assert J == pytest.approx(mean_R, abs=2e-3)
        assert reward - 0.4 * kl == pytest.approx(J, abs=2e-3)
        assert mean_R == pytest.approx(batch.returns.mean().item(), abs=6e-4)
        assert abs(kl) > 0.01


# --------------------------------------------------------------------- what must end a run


def shift_logprobs(batch, by):
    batch.old_logprobs[batch.response_mask] += by


def shift_last(batch, by):
    remaining = batch.response_mask.flip(1).cumsum(1).flip(1)
    batch.old_logprobs[batch.response_mask & (remaining == 1)] += by


def shift_column(batch, key, by):
    batch.row[key] = batch.row[key] + by


@pytest.mark.parametrize(
    ("plant", "ends"),
    [
        (lambda batch: shift_logprobs(batch, 2e-4), True),
        (lambda batch: shift_logprobs(batch, -2e-4), True),
        (lambda batch: shift_last(batch, 1.3e-4), True),
        (lambda batch: shift_column(batch, "sampler_gap", 2e-4), True),
        (lambda batch: shift_column(batch, "kl", 1e-6), True),
        (lambda batch: shift_logprobs(batch, 3e-5), False),
    ],
    ids=["ratio below 1", "ratio above 1", "one token's ratio", "sampler", "kl", "rounding"],
)
def test_a_start_that_cannot_be_ends_the_run(call, files, monkeypatch, plant, ends):
    """Old log-probs that are not those of the policy in training, or a KL to oneself that is
    not 0, and the run goes on; a bound so near rounding that a sound run ends."""
    collect, before = ppo.collect, files()

    def planted(*args):
        batch = collect(*args)
        plant(batch)
        return batch

    monkeypatch.setattr(ppo, "collect", planted)
    if not ends:
        assert len(call(ppo, TINY)) == 2
        return
    with pytest.raises(SystemExit) as stopped:
        call(ppo, TINY)
    assert stopped.value.code == 1
    assert files() == before


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_loss_that_is_not_finite_ends_the_run(diverges, name):
    """NaN weights that are saved, or a step skipped in silence."""
    assert diverges(ppo, TINY, name, 6).count("\n") == 1


def test_as_many_updates_as_minibatches_says(call, monkeypatch):
    """Rows that do not divide by --minibatches: 6 in chunks of 2 are 3 updates, not 4."""
    calls, honest = [], common.descend
    monkeypatch.setattr(common, "descend", lambda *x: calls.append(1) or honest(*x))
    call(ppo, f"{TINY} --steps 1 --minibatches 4 --epochs 2 --estimator rloo --out new")
    assert len(calls) == 8


def test_a_reward_model_with_a_shorter_context(refused, runs, tiny):
    """Answers that its context cannot hold: a traceback."""
    common.save_model(runs / "short", tiny(3, "scalar", context=9), {})
    assert "short" in refused(ppo, f"{TINY} --reward short --out new")


def test_a_reference_with_a_shorter_context(call, runs, tiny, monkeypatch):
    """Prompts and answers that fit into the policy's context, and not into the reference's."""
    common.save_model(runs / "short", tiny(3, context=20), {})
    honest = common.read_prompts

    def read_prompts(data, room, context):
        assert context == 20
        return honest(data, room, context)

    monkeypatch.setattr(common, "read_prompts", read_prompts)
    rows = call(ppo, f"{TINY} --prompts 30 --max-new-tokens 9 --ref short --out new")
    assert rows


@pytest.mark.parametrize(
    "flags",
    [
        "--gamma 1",
        "--beta -0.1",
        "--beta inf",
        "--lr 1e30",
        "--lam 1.1",
        "--epochs 0",
        "--estimator a2c",
        "--samples 1 --estimator rloo",
        "--samples 1 --estimator grpo",
        "--init nowhere",
        "--ref nowhere",
        "--reward nowhere",
        "--init reward_model",
        "--ref reward_model",
        "--reward sft",
        "--reward nowhere.py:r",
        "--reward mine.py",
        "--data nowhere.jsonl",
        "--max-new-tokens 160",
        "--out sft",
        "--ref other --out other",
        "--reward judge --out judge",
        "--minibatches 7",  # of 6 answers
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags):
    """What is known before training and said after it, or not at all; a typo that becomes a
    default; an input that is overwritten."""
    refused(ppo, f"{TINY} {flags}")
