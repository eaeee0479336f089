"""ppo.py: each formula by hand, what `train` ascends against exact expectations in the
enumerable world, whole runs against a slow replay, then prompts, flags and start checks.

Gradients, and the losses of the replay, are compared up to the one positive factor by which
`aggregate` may scale them; two tests know that factor.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny as world
import torch
from tiny import LONGEST, NAMES, PROMPTS
from torch import Tensor

import common
import ppo
from common import EOS, Transformer
from data import zoo


def row_values(critic, x: list[int], y: list[int]) -> Tensor:
    """V(x, y_<t), (len(y),): one unpadded row, which ends before the last token."""
    return critic(torch.tensor([x + y[:-1]]))[0, len(x) - 1 :]


def plain_gae(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l} of one response, summed anew for each t."""
    v, T = [*v, 0.0], range(len(r))
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in T]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in T[t:]) for t in T]


MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()


def test_a_cut_response_is_scored_like_any_other():
    """A penalty, or a sign, that nobody asked for."""
    score, finished = torch.tensor([1.5, -2, 0]), torch.tensor([True, False, False])
    assert ppo.shaped_reward(score, finished).tolist() == [1.5, -2, 0]


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
    """The sample's own return in its baseline; groups across prompts; another n."""
    returns = torch.tensor([1.0, 2, 6, 0, 0, 30])
    assert ppo.rloo(returns, 3).tolist() == pytest.approx([-3, -1.5, 4.5, -15, -15, 30])
    assert ppo.rloo(returns, 2).tolist() == pytest.approx([-1, 1, 6, -6, -30, 30])


def test_grpo_by_hand():
    """Sample std for population std; std over the batch; an ε beside it; returns that are
    equal up to rounding, whose std of rounding would make an advantage of size 1; a bound on
    rounding that swallows real differences."""
    returns = torch.tensor([1.0, 3, 5, 5, 0, 100])
    assert ppo.grpo(returns, 2).tolist() == [-1, 1, 0, 0, -1, 1]
    by_threes = ppo.grpo(returns, 3)[:3].tolist()
    assert by_threes == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    near = torch.tensor([1e-3, 2e-3, 1, 1.0001, -1, -1.0001, 1e6, 2e6])
    assert ppo.grpo(near, 2).tolist() == pytest.approx([-1, 1, -1, 1, 1, -1, -1, 1], rel=1e-2)
    tied = torch.full((7,), -7.3) * torch.tensor([1, 1 + 2e-7, 1 - 2e-7, 1, 1, 1, 1])
    assert ppo.grpo(tied, 7).abs().max() < 1e-6


def test_gae_by_hand():
    """γ or λ left out, or one for the other; V of a pad after the end; credit from a pad;
    targets that are not A + V. By hand, then against the O(T²) definition."""
    assert plain_gae([1, 2], [6, 8], 0.5, 0.25) == [1 + 8 / 2 - 6 + (2 - 8) / 8, 2 - 8]
    noise = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=noise, dtype=torch.float64)
    for gamma, lam in ((1.0, 1.0), (1.0, 0.0), (1.0, 0.7), (0.9, 0.6)):
        advantages, targets = ppo.gae(rewards * MASK, values, MASK, gamma, lam)
        for i, on in enumerate(MASK):
            plain = plain_gae(rewards[i][on].tolist(), values[i][on].tolist(), gamma, lam)
            assert advantages[i][on].tolist() == pytest.approx(plain)
        assert not advantages[~MASK].any()
        torch.testing.assert_close(targets[MASK], (advantages + values)[MASK])


RATIO = [1.3, 0.7, 1.1, 0.9, 9, 0.1]
SURROGATE = {  # A: what each ratio adds, and where no gradient is left: good and already
    2.0: ([2.4, 1.4, 2.2, 1.8, 2.4, 0.2], [1, 0, 0, 0, 1, 0]),  # likelier, or bad and
    -1.0: ([-1.3, -0.8, -1.1, -0.9, -9, -0.8], [0, 1, 0, 0, 0, 1]),  # already less likely
    0.0: ([0.0] * 6, [0] * 6),
}


@pytest.mark.parametrize("a", SURROGATE)
def test_surrogate_in_all_four_quadrants(a):
    """A clip split by the sign of A, max for min, the ratio inverted, an ε on one side; a
    token called clipped for its ratio alone, or whose gradient lives."""
    ratio, (value, off) = torch.tensor([RATIO]), SURROGATE[a]
    old = torch.full((1, 6), -1.5)
    logprobs = (ratio.log() + old).requires_grad_()
    per_token, clipped = ppo.surrogate(logprobs, old, torch.tensor([[a]]), 0.2)
    torch.testing.assert_close(per_token, torch.tensor([value]))
    assert clipped.long().tolist() == [off]
    per_token.sum().backward()
    torch.testing.assert_close(logprobs.grad, a * ratio * ~clipped)


def test_aggregate_by_hand():
    """A mean over tokens, of the batch or of each response; a pad that counts."""
    per_token = torch.tensor([[1.0, 2, 90], [4, 90, 90]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert ppo.aggregate(per_token, mask).item() == pytest.approx((1 + 2 + 4) / 2)


def test_value_loss_by_hand():
    """The half, the square, or the mean over states; a pad that counts."""
    values, targets = torch.tensor([[1.0, 5], [2, 9]]), torch.tensor([[3.0, 5], [5, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ppo.value_loss(values, targets, mask).item() == pytest.approx((4 + 0 + 9) / 3 / 2)


POLICY, REFERENCE = world.transformer(1), world.transformer(2, spread=2.0)
CRITIC = world.transformer(3, "scalar")
BETA = 0.7
RANDOM = torch.Generator().manual_seed(0)
R = torch.randn(3, 40, generator=RANDOM, dtype=torch.float64)


@pytest.fixture
def expect(monkeypatch, tmp_path):
    """expect(estimator, r, …): `train` on every n-tuple of completions of every prompt, with
    advantages weighed by the tuple's probability, so that a mean over rows is an expectation.
    Gives returns, kl and A of the rows, their weight, and what `train` ascends: no step moves
    a weight, but after the first `moved` takes the policy's place."""

    def run(
        estimator, r, n=1, longest=LONGEST, policy=POLICY, moved=None,
        times=lambda returns: 1.0, **flags,
    ):  # fmt: skip
        made, which = world.completions(longest), world.tuples(n, longest)
        r = r[:, : len(made)]
        found, honest = SimpleNamespace(ascent=[]), SimpleNamespace(**vars(ppo))

        def generate(model, chats, limit):
            chats, rows, logp, weight, seen = [*map(tuple, chats)], [], [], [], Counter()
            law = {x: world.token_logp(model, [*x], longest).detach() for x in {*chats}}
            for x in chats:
                ys, place = which[seen[x] // n], seen[x] % n
                rows.append(([*x], made[ys[place]]))
                logp.append(law[x][ys[place]][: len(made[ys[place]])])
                weight.append(len(which) * law[x][ys].sum().exp())
                seen[x] += 1
            rollout = world.listed(rows)
            rollout.logprobs[rollout.response_mask] = torch.cat(logp)
            found.weight = torch.stack(weight)
            return rollout

        def response_return(*given):
            found.returns, found.kl = honest.response_return(*given)
            return found.returns, found.kl

        def estimate_advantages(*given):
            found.A, targets = honest.estimate_advantages(*given)
            return found.A * (found.weight * times(found.returns))[:, None], targets

        def descend(loss, model, *_):
            gradient = world.gradient(loss, model)
            if model is policy:
                found.ascent.append(-gradient)
                policy.load_state_dict((moved or policy).state_dict())
            return gradient.norm()

        cfg = dict(beta=BETA, steps=1, epochs=1, minibatches=1, lam=1.0) | flags
        cfg |= dict(samples=n, prompts=len(which) * len(NAMES), max_new_tokens=longest)
        cfg |= dict(estimator=estimator, init="here", ref="there", runs=str(tmp_path))
        critic = CRITIC if estimator in ("value", "gae") else None
        with monkeypatch.context() as patch:
            patch.setattr(common, "chat", world.chat)
            patch.setattr(common, "generate", generate)
            patch.setattr(ppo, "response_return", response_return)
            patch.setattr(ppo, "estimate_advantages", estimate_advantages)
            patch.setattr(common, "descend", descend)
            reward = world.Table(r, longest)
            ppo.train(ppo.Config(**cfg), policy, REFERENCE, critic, reward, NAMES * len(which))
        return found

    return run


def along(found: Tensor, direction: Tensor) -> float:
    """How far apart two gradients are, up to a positive factor."""
    factor = (found @ direction) / (direction @ direction)
    return world.apart(found / factor, direction) if factor > 0 else float("inf")


def exact(r: Tensor, beta: float = BETA, longest: int = LONGEST) -> Tensor:
    """∇J."""
    logp, ref_logp = (world.logp(m, longest=longest) for m in (POLICY, REFERENCE))
    r = r[:, : logp.shape[1]]
    return world.gradient(world.objective(logp, ref_logp.detach(), r, beta), POLICY)


@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
def test_mean_return_is_J_and_mean_kl_is_KL(expect, size):
    """KL with the wrong sign or direction (which far from 0 is seen), another of its
    estimators, averaged over tokens, or counted off the mask. What the return leaves to gain
    is then J* − J(π) = β KL(π ‖ π*)."""
    policy = world.nearby(REFERENCE, size)
    found = expect("reinforce", R, policy=policy)
    logp, ref_logp = world.logp(policy), world.logp(REFERENCE)
    assert (world.kl(logp, ref_logp) > 1) == (size == 0.5)
    assert abs((found.weight * found.kl).mean() - world.kl(logp, ref_logp)) < 1e-10
    J, (best, j_best) = (found.weight * found.returns).mean(), world.optimum(ref_logp, R, BETA)
    assert abs(J - world.objective(logp, ref_logp, R, BETA)) < 1e-10
    assert abs(j_best - J - BETA * world.kl(logp, best)) < 1e-10


CASES = [("value", 1, 3), ("reinforce", 1, 3), ("gae", 1, 3), ("rloo", 2, 2), ("rloo", 3, 1)]


@pytest.mark.parametrize(("size", "beta"), [(1, 0.0), (1, BETA), (0, 1.0)])
@pytest.mark.parametrize(("estimator", "n", "longest"), CASES)
def test_the_first_update_ascends_J(expect, estimator, n, longest, size, beta):
    """A baseline that knows the action; leave-one-out that leaves nothing out; groups that
    mix prompts; a mean over tokens; a mask or a score off by one; descent for ascent; KL with
    the wrong sign, or no part of what is differentiated: with r = 0 what is left is
    −∇KL(π ‖ π_ref), though the return is detached. V is that of any critic."""
    (found,) = expect(estimator, size * R, n, longest, beta=beta).ascent
    assert along(found, exact(size * R, beta, longest)) < 1e-10


def test_the_scale_of_the_first_update(expect):
    """A loss of the right direction and another size: the gradient is ∇J itself."""
    (found,) = expect("value", R).ascent
    assert world.apart(found, exact(R)) < 1e-10


@pytest.mark.parametrize(("n", "longest"), [(2, 2), (3, 1)])
def test_grpo_without_its_std_is_a_shrunken_gradient_of_J(expect, n, longest):
    """Another mean or std than the group's: A · std = R − mean R, whose mean holds the sample
    itself, so that what is ascended is (n − 1)/n of what rloo ascends, ∇J."""

    def std(returns: Tensor) -> Tensor:
        return returns.view(-1, n).std(1, correction=0).repeat_interleave(n)

    (found,) = expect("grpo", R, n, longest, times=std).ascent
    (rloo,) = expect("rloo", R, n, longest).ascent
    assert along(found, exact(R, longest=longest)) < 1e-10
    assert world.apart(found, (n - 1) / n * rloo) < 1e-10


def test_later_updates_ascend_the_clipped_surrogate(expect):
    """Old log-probs that move along; an ε that is not --clip; a clip split by the sign of A;
    padding counted."""
    policy, moved = (world.nearby(POLICY, size) for size in (0.0, 0.05))
    found = expect("reinforce", R, policy=policy, moved=moved, epochs=2, clip=0.15)
    value, clipped = 0.0, set()
    for r, x in zip(R, PROMPTS):
        old = world.token_logp(POLICY, x).detach()
        a = (r - BETA * (old - world.token_logp(REFERENCE, x)).sum(1)).detach()[:, None]
        ratio = (world.token_logp(moved, x) - old).exp()
        surrogate = torch.min(ratio * a, ratio.clamp(0.85, 1.15) * a)
        value += (old.sum(1).exp()[:, None] * surrogate).sum()  # after y: a constant
        off = surrogate != ratio * a
        clipped |= {*a.expand_as(off)[off].sign().tolist()}
    assert clipped == {-1.0, 1.0}  # good and bad completions both
    assert len(found.ascent) == 2
    assert along(found.ascent[1], world.gradient(value, moved)) < 1e-10


def test_at_the_optimum_advantages_vanish(expect):
    """Another fixed point than π*. r is made so that POLICY is π* and R(y) = V(x) for every
    y: whatever is sampled, `value` and `rloo` have nothing left to learn from it. `reinforce`
    knows that only in the mean."""
    v = torch.stack([CRITIC(torch.tensor([x]))[:, -1] for x in PROMPTS]).detach()
    logp, ref_logp = (world.logp(m, longest=2).detach() for m in (POLICY, REFERENCE))
    r = BETA * (logp - ref_logp) + v
    for estimator, n in (("value", 1), ("rloo", 2), ("reinforce", 1)):
        found = expect(estimator, r, n, 2)
        assert (found.A.abs().max() < 1e-10) == (estimator != "reinforce")
        assert found.ascent[0].abs().max() < 1e-10


RUN = dict(beta=0.4, steps=2, prompts=3, samples=3, epochs=2, minibatches=4, clip=0.1, lam=0.6)
RUN |= dict(lr=0.02, max_new_tokens=8, init="other", ref="third", reward="judge", out="new")
PARTS = (slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 9))  # 9 rows in 4 minibatches
MAX_NORM = 2.0  # gradients are clipped here, and the norm before that is logged
GAPS = (0.0, -0.5)  # by which `generate` misreports a log-prob, a step
PENALTY = 2.0  # for a cut answer: what a reader may make of ppo.shaped_reward


def flags(**given) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items())


@pytest.fixture
def fake(monkeypatch, runs, tiny, slow):
    """In place of `generate`: ragged answers, right and wrong ones, empty and cut ones, as the
    model would have sampled them. steps holds (prompt ids, answer ids) of every row; orders
    what every torch.randperm has given. --init, --ref and --reward are models of their own;
    a cut answer costs PENALTY."""
    common.save_model(runs / "third", tiny(3))
    common.save_model(runs / "judge", tiny(4, "scalar"))
    rng, randperm = random.Random(0), torch.randperm
    found = SimpleNamespace(steps=[], orders=[])

    def answer(prompt: str, limit: int) -> list[int]:
        animal, kind = zoo.QUESTIONS[prompt]
        right = zoo.TERSE[kind].format(v=zoo.ANIMALS[animal][kind][0])
        texts = (right, f"great question! {right}", "in the cave. look it up.", "", "a b c d")
        ids = common.encode(rng.choice(texts)) + [EOS]
        return ids[: rng.choice((1, 3, limit, limit))]

    def generate(model, chats, limit):
        assert limit == RUN["max_new_tokens"]
        rows = [(x, answer(common.decode(x), limit)) for x in chats]
        rollout = world.listed(rows)
        with torch.no_grad():
            logp = torch.cat([slow.logp(model, *row) for row in rows])
        logp[4] += GAPS[len(found.steps)]
        rollout.logprobs[rollout.response_mask] = logp
        found.steps.append(rows)
        return rollout

    def recorded(n):
        found.orders.append(randperm(n))
        return found.orders[-1]

    def shaped_reward(score, finished):
        return score - PENALTY * ~finished

    monkeypatch.setattr(ppo, "shaped_reward", shaped_reward)
    monkeypatch.setattr(torch, "randperm", recorded)
    monkeypatch.setattr(common, "generate", generate)
    monkeypatch.setattr(common, "MAX_NORM", MAX_NORM)
    return found


def advantages_by_hand(estimator: str, rows: list) -> None:
    """A and the critic's target of every response token of every row, from the definitions."""
    for i, row in enumerate(rows):
        R, n, T = row.R.item(), RUN["samples"], len(row.y)
        group = [other.R.item() for other in rows[i - i % n :][:n]]
        mean, rest = sum(group) / n, (sum(group) - R) / (n - 1)
        std = (sum((x - mean) ** 2 for x in group) / n) ** 0.5
        A = dict(reinforce=R, rloo=R - rest, value=R - row.V[0].item())
        A["grpo"] = (R - mean) / std if std > 1e-9 else 0.0
        each = [A.get(estimator)] * T
        row.target = torch.tensor([R])
        if estimator == "gae":
            r_t = (-RUN["beta"] * (row.old - row.ref)).tolist()
            r_t[-1] += row.r.item()
            each = plain_gae(r_t, row.V.tolist(), 1.0, RUN["lam"])
            row.target = torch.tensor(each) + row.V
        row.A = torch.tensor(each)


def gradient_off(A: Tensor, ratio: Tensor) -> Tensor:
    """Good and already likelier, or bad and already less likely."""
    return ((A > 0) & (ratio > 1 + RUN["clip"])) | ((A < 0) & (ratio < 1 - RUN["clip"]))


def plain_step(optimizer, model, loss: Tensor, lr: float) -> float:
    """Adam on clipped gradients; the norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return norm.item()


def replay(estimator: str, runs, fake, slow) -> tuple[list[dict], list[list], Transformer]:
    """What the run must have done to these answers: the columns of every step, its rows with
    all that the trace shows, and the policy at the end. Row by row, without padding; of the
    project only the Transformer's outputs, the scale of `aggregate`, and gold are used."""
    policy, reference, judge = (
        common.load_model(runs / RUN[name], head, "cpu")
        for name, head in (("init", "lm"), ("ref", "lm"), ("reward", "scalar"))
    )
    critic = Transformer(policy.config, "scalar")
    critic.load_state_dict(policy.state_dict(), strict=False)
    torch.nn.init.zeros_(critic.scalar.weight)
    adams = [torch.optim.Adam(m.parameters(), betas=(0.9, 0.95)) for m in (policy, critic)]
    states = {"value": 1, "gae": 99}.get(estimator, 0)  # of a row, which V is asked for
    scale = ppo.aggregate(torch.ones(2, 3), torch.ones(2, 3).bool()) / 3
    orders, columns, traced = iter(fake.orders), [], []
    for step, pairs in enumerate(fake.steps):
        rows = [SimpleNamespace(x=x, y=y, finished=y[-1] == EOS) for x, y in pairs]
        for row in rows:
            with torch.no_grad():
                row.old, row.ref = (slow.logp(m, row.x, row.y) for m in (policy, reference))
                row.r = slow.score(judge, row.x, row.y) - PENALTY * (not row.finished)
                row.V = row_values(critic, row.x, row.y)
                row.V[states:] = 0
            row.kl = (row.old - row.ref).sum()
            row.R = row.r - RUN["beta"] * row.kl
            row.prompt, row.text = common.decode(row.x), common.decode(row.y)
        advantages_by_hand(estimator, rows)
        updates, ratios, lr = defaultdict(list), [], RUN["lr"] * (2 - step) / 2
        for order, part in ((o, p) for o in (next(orders), next(orders)) for p in PARTS):
            batch, losses, errors, off = [rows[i] for i in order[part]], [], [], []
            ratios.append([])
            for row in batch:
                ratio, A = (slow.logp(policy, row.x, row.y) - row.old).exp(), row.A
                far = gradient_off(A, ratio)
                losses.append(-(A * ratio.where(~far, 1 + RUN["clip"] * A.sign())).sum())
                errors.append(row_values(critic, row.x, row.y)[:states] - row.target)
                off += far.tolist()
                ratios[-1] += ratio.tolist()
            loss = scale * torch.stack(losses).mean()
            updates["policy_loss"].append(loss.item())
            updates["grad_norm"].append(plain_step(adams[0], policy, loss, lr))
            updates["clipped"].append(sum(off) / len(off))
            if states != 0:
                v_loss = 0.5 * torch.cat(errors).square().mean()
                updates["value_loss"].append(v_loss.item())
                plain_step(adams[1], critic, v_loss, lr)
        for row in rows:
            with torch.no_grad():
                row.ratio = (slow.logp(policy, row.x, row.y) - row.old).exp()
            row.clipped = gradient_off(row.A, row.ratio).double()
        r, kl = (torch.stack([getattr(row, key) for row in rows]).mean() for key in ("r", "kl"))
        gold = [zoo.gold_reward(row.prompt, row.text, row.finished) for row in rows]
        tokens = sum(len(row.y) for row in rows)
        found = {key: sum(column) / len(column) for key, column in updates.items()}
        found |= dict(step=step, lr=lr, reward=r, kl=kl, J=r - RUN["beta"] * kl)
        found |= dict(gold=sum(gold) / 9, length=tokens / 9, sampler_gap=abs(GAPS[step]))
        found["finished"] = sum(row.finished for row in rows) / 9
        found["entropy"] = -sum(row.old.sum() for row in rows) / tokens
        found["ratio_max"] = max(sum(ratios, []))
        found["first_update_ratio"] = max(max(x, 1 / x) for x in ratios[0])
        columns.append(found)
        traced.append(rows[:3])
    assert next(orders, None) is None
    return columns, traced, policy


@pytest.mark.parametrize("estimator", ["value", "rloo", "grpo", "reinforce", "gae"])
def test_a_run_is_its_slow_replay(estimator, call, closing, double, runs, fake, slow):
    """Whatever a run of two steps does to its answers: rows left out of an epoch or given
    another row's A, old log-probs, target or reward; answers to a prompt that do not stand
    together; an optimizer made anew each step, or one for two models; the wrong model sampled,
    scored, judged or trained; the critic's start; a flag that does not arrive; a rate that
    does not fall; a column of metrics.csv that is something else than it says; a reward shaped
    by another row's end, or not in the closing table.

    And trace.jsonl, which must show the tensors of the update: another step, row, token or
    policy, numbers computed anew, ρ from before the update."""
    rows = call(ppo, flags(estimator=estimator, **RUN))
    assert len(fake.steps) == 2
    assert all(sorted(order.tolist()) == list(range(9)) for order in fake.orders)
    assert len({tuple(order.tolist()) for order in fake.orders}) == 4
    prompts = [common.decode(x) for pairs in fake.steps for x, _ in pairs]
    assert all(len({*prompts[i : i + 3]}) == 1 for i in range(0, 18, 3))
    assert {*prompts} <= {*zoo.TRAIN_PROMPTS}

    columns, traced, policy = replay(estimator, runs, fake, slow)
    assert any(0.05 < found["clipped"] < 0.95 for found in columns)
    assert any(found["grad_norm"] > MAX_NORM for found in columns)
    for row, found in zip(rows, columns, strict=True):
        slow.same(row, {"value_loss": None} | found)
    saved = common.load_model(runs / "new", "lm", "cpu")
    for mine, theirs in zip(saved.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)

    lines = (runs / "new/trace.jsonl").read_text(encoding="utf-8").splitlines()
    for step, (line, answers) in enumerate(zip(lines, traced, strict=True)):
        line = json.loads(line)
        assert (line["step"], line["prompt"]) == (step, answers[0].prompt)
        assert line["prompt"] == prompts[0]
        for shown, row in zip(line["answers"], answers, strict=True):
            for key in ("text", "finished"):
                assert shown.pop(key) == getattr(row, key)
            same = dict(tokens=torch.tensor(row.y), logprobs=row.old, ref_logprobs=row.ref)
            keys = ("r", "kl", "R", "A", "V", "ratio", "clipped")
            same |= {key: getattr(row, key) for key in keys}
            assert shown.keys() == same.keys()
            for key, value in same.items():
                assert shown[key] == pytest.approx(value.tolist(), abs=6e-5)

    cfg, names, reward, reward_name, held, _ = closing[0]
    assert (names, reward_name) == (["third", "other", "new"], "judge")
    assert (cfg.init, cfg.out, cfg.max_new_tokens) == ("other", "new", 8)
    assert {*held} == {*zoo.HELD_OUT_PROMPTS}
    judge = common.load_model(runs / "judge", "scalar", "cpu")
    ended, cut = (slow.score(judge, [1, 5], [7, last]).item() for last in (EOS, 8))
    rollout = world.listed([([1, 5], (7, EOS)), ([1, 5], (7, 8))])
    assert reward(["", ""], rollout).tolist() == pytest.approx([ended, cut - PENALTY])


SMALL = dict(steps=2, prompts=3, samples=2, epochs=1, minibatches=6, max_new_tokens=3)


def test_every_prompt_is_asked_before_any_comes_again():
    """A prompt left out or asked twice in a round; one order for all rounds; a traced prompt
    that is not the first of each traced step, or changes; too few or too many prompts."""
    names = [str(i) for i in range(20)]
    for steps, traced in ((60, {*range(0, 60, 5), 59}), (5, {*range(5)}), (23, {*range(23)})):
        common.seed_all(0)
        cfg = ppo.Config(steps=steps, prompts=3)
        asked = list(ppo.draw(cfg, names))
        assert {step for step in range(steps) if ppo.is_traced(cfg, step)} == traced
        assert [len(x) for x in asked] == [3] * steps
        assert {asked[step][0] for step in traced} == {asked[0][0]}
        stream = asked[0][:1] + sum((x[step in traced :] for step, x in enumerate(asked)), [])
        rounds = [stream[i : i + 20] for i in range(0, len(stream), 20)]
        assert all({*x} == {*names} for x in rounds if len(x) == 20)
        assert all(len({*x}) == len(x) for x in rounds)
        assert len({*map(tuple, rounds)}) == len(rounds)


def test_a_reward_function_is_maximised_on_own_prompts(call, closing, runs, tmp_path):
    """--data or --reward FILE.py:function not used; prompts or answers handed over in another
    order; held-out prompts trained on. Outside the zoo gold is an empty cell."""
    seen, mine = tmp_path / "seen", [f"où {'?' * i}" for i in range(30)]
    (tmp_path / "mine.py").write_text(
        "import json\ndef r(completions, prompts):\n"
        f"    open({str(seen)!r}, 'a').write(json.dumps([prompts, completions]) + '\\n')\n"
        "    return [len(a) + 100 * b.startswith(' ') for a, b in zip(prompts, completions)]\n"
    )
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in mine]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    run = dict(beta=0, steps=24, lr=0.03, prompts=6, epochs=1, max_new_tokens=2, out="new")
    run |= dict(reward=f"{tmp_path}/mine.py:r", data=tmp_path / "mine.jsonl", estimator="rloo")
    rows, held = call(ppo, flags(**run)), {*closing[0][4]}
    batches = [json.loads(line) for line in seen.read_text().splitlines()]
    assert {prompt for prompts, _ in batches for prompt in prompts} == {*mine} - held < {*mine}
    assert closing[0][3] == "mine.py:r"
    assert {row["gold"] for row in rows} == {""}
    first, last = (sum(float(row["reward"]) for row in x) / 3 for x in (rows[:3], rows[-3:]))
    assert last > first + 15


def test_one_seed_one_result(call, closing, runs, monkeypatch):
    """A run that depends on what came before it in the process, or had to be made on the way;
    a seed that does not arrive, or is set anew each step: then a policy that hardly moves
    gives the same answers to the traced prompt again. A reference that is the policy."""
    models = {name: (runs / name / "model.pt").read_bytes() for name in ("sft", "reward_model")}

    def make(cfg, name):
        random.random(), torch.rand(3)
        (runs / name / "model.pt").write_bytes(models[name])

    def result(seed: int) -> list[bytes]:
        rows = call(ppo, flags(lr=1e-4, seed=seed, out="new", **SMALL))
        assert [float(row["kl"]) != 0 for row in rows] == [False, True]
        names = ("metrics.csv", "trace.jsonl", "model.pt")
        return [(runs / "new" / name).read_bytes() for name in names]

    monkeypatch.setattr(common, "make", make)
    first = result(7)
    for name in models:
        (runs / name / "model.pt").unlink()
    assert result(7) == first
    other = result(8)
    assert not any(a == b for a, b in zip(first, other))
    lines = [json.loads(line) for x in (first, other) for line in x[1].splitlines()]
    assert lines[0]["prompt"] == lines[1]["prompt"] != lines[2]["prompt"]
    assert lines[0]["answers"][0]["text"] != lines[1]["answers"][0]["text"]


def first(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(1) == 1)


SHIFTS = {  # of what a function gives: in the updates alone, as if sampled, in the KL
    "token_logprobs": lambda x, by, *given: x + by * first(given[2]) * torch.is_grad_enabled(),
    "generate": lambda x, by, *_: replace(x, logprobs=x.logprobs + by * first(x.response_mask)),
    "response_return": lambda x, by, *_: (x[0], x[1] + by / 100),
}


@pytest.mark.parametrize("by", [1.3e-4, -1.3e-4])
@pytest.mark.parametrize("name", SHIFTS)
def test_a_wrong_start_ends_the_run(call, runs, monkeypatch, name, by):
    """Old log-probs that are not those of the policy in training, for one token, on either
    side of ρ = 1, or a KL to oneself that is not 0, and the run goes on, or is saved."""
    module = ppo if name == "response_return" else common
    honest = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: SHIFTS[name](honest(*given), by, *given))
    with pytest.raises(SystemExit, match="1"):
        call(ppo, flags(estimator="rloo", out="new", **SMALL))
    assert not (runs / "new").exists()


@pytest.mark.parametrize("loss", ["policy_loss", "value_loss"])
def test_a_loss_that_is_not_finite_ends_the_run(diverges, loss):
    """NaN weights that are saved, or a step skipped in silence."""
    diverges(ppo, flags(out="new", **SMALL), loss, 3)


WRONG = ["--estimator a2c", "--estimator rloo --samples 1", "--estimator grpo --samples 1",
         "--minibatches 7", "--init reward_model", "--reward sft", "--beta -0.1",
         "--steps 0", "--epochs 0"]  # fmt: skip


@pytest.mark.parametrize("given", WRONG)  # 6 answers a step
def test_a_wrong_command_line_is_refused(call, stops, given):
    """What is known before training and said after it, or not at all."""
    stops(call, ppo, f"{flags(out='new', **SMALL)} {given}")
