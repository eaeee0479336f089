"""What each estimator of ∇J costs, exactly: bias, direction and noise of its gradient.

    python tests/studies/estimators.py          a minute on one core

The world is that of tests/tiny.py, 3 prompts with 40 completions each, and nothing is sampled:
E g is a sum over all completions, or over all groups of n. The advantages are those of ppo.py,
the gradients those of its `policy_loss` at ratio 1, before the first update of a rollout.

Rewards are normal with sd 1 around −1, 0 and 1: one prompt is harder than another, and 0 is the
middle, as reward_model.py centres r. β = 0.5. The policies are fitted to log π_ref + a r/β −
log Z. That is π_ref at a = 0 and π* at a = 1, and in between R = (1 − a) r + a constant.

How to read the tables. g is the mean gradient of a batch of B completions in which every prompt
has the same share: the prompts are fixed, the completions vary. A group counts as n of them.
    bias       ‖E g − ∇J‖ / ‖∇J‖; "0" is less than 1e-9
    cosine     between E g and ∇J: 1 if the bias changes the length of the step alone
    length     ‖E g‖ / ‖∇J‖
    variance   B · E‖g − E g‖² / ‖∇J‖², the same for every B: the noise of one completion. In
               a batch of B = variance the noise is as long as ∇J
    noise      variance / length²: in a batch of this size the noise is as long as E g. The
               scale of A does not change it, nor does it change a step of Adam

V is perfect (E[R | x]; for gae, E[what is still to come | s_t]), average (E[R] over all
prompts) or random: a Transformer with random weights, of 30 the most typical. The rows "as a
loss" take A = r, or r − E[r | x], and subtract β k from the objective: k1 = l, k2 = l²/2,
k3 = e^−l − 1 + l, where l is log π − log π_ref of the response, or of one token, and the
tokens' k are summed. Compare the former with `reinforce`, the latter with `value` and a perfect
V: both have k1 in the reward, as ppo.py has it.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (2, 1)]
import common, ppo, tiny  # noqa: E401, E402, I001

BETA, N = 0.5, 40
REFERENCE, CRITIC = tiny.transformer(1), tiny.transformer(9, "scalar")
NOISE = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
R = NOISE + torch.tensor([[-1.0], [0.0], [1.0]])


def policy_at(a: float):
    """The policy log π_ref + a r/β − log Z, nearly. L-BFGS would get nearer, but where it ends
    depends on rounding, and so would the second digit of the tables."""
    policy, steps = tiny.nearby(REFERENCE, 0.0), 400 if a > 0 else 0
    target = (tiny.logp(REFERENCE).detach() + a * R / BETA).log_softmax(1)
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        tiny.kl(target, tiny.logp(policy)).backward()
        optimizer.step()
    return policy


# ------------------------------------------------------------------ all there is to know of π


@dataclass
class World:
    """All completions of all prompts as rows, B = 120, in T columns."""

    p: Tensor  # (B,) π(y|x)
    mask: Tensor  # (B, T) response tokens
    logprobs: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    slopes: Tensor  # (B, T, P) the gradient that one unit of A at this token gives
    ascent: Tensor  # (P,) ∇J


def world(policy) -> World:
    rows = tiny.everything()
    tokens, mask = rows.tokens, rows.response_mask
    live = common.token_logprobs(policy, tokens, mask)
    ref_logprobs = common.token_logprobs(REFERENCE, tokens, mask).detach()
    logp, ref_logp = tiny.logp(policy), tiny.logp(REFERENCE).detach()
    ascent = tiny.gradient(tiny.objective(logp, ref_logp, R, BETA), policy)
    slopes = torch.zeros(*mask.shape, len(ascent), dtype=torch.float64)
    for row, t in mask.nonzero().tolist():
        advantages = torch.zeros_like(live)
        advantages[row, t] = len(mask)  # policy_loss is a mean over rows
        loss = ppo.policy_loss(live, live.detach(), advantages, mask, 0.2)
        slopes[row, t] = -tiny.gradient(loss, policy)
    p = logp.detach().exp().flatten()
    return World(p, mask, live.detach(), ref_logprobs, slopes, ascent)


def critics(w: World, returns: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """V of what stands before each response token, (B, T): perfect, average and random."""
    tokens, to_go = tiny.everything().tokens, rewards.flip(1).cumsum(1).flip(1)
    perfect = torch.zeros_like(to_go)
    for t in range(1, tokens.shape[1]):  # the mean over all rows that begin with the same t
        same = (tokens[:, None, :t] == tokens[None, :, :t]).all(2) & w.mask[:, t]
        share = same * w.p
        perfect[:, t] = share @ to_go[:, t] / share.sum(1).clamp(min=1e-300)
    average = (w.p * returns).sum() / 3
    random = common.token_values(CRITIC, tokens, w.mask).detach()
    return {"perfect": perfect * w.mask, "average": average * w.mask, "random": random}


# ------------------------------------------------------------------------ mean and variance


def moments(q: Tensor, weights: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """E g and E‖g − E g‖², where g is row i of weights @ vectors with probability q_i."""
    mean = q @ weights @ vectors
    square = q @ (weights @ (vectors @ vectors.T) * weights).sum(1)
    return mean, square - mean @ mean


def one_by_one(w: World, advantages: Tensor) -> list:
    """Of estimators that look at one completion at a time: A is (B, 1) or (B, T)."""
    parts = zip(w.p.split(N), (advantages[:, :, None] * w.slopes).sum(1).split(N))
    return [moments(p, torch.eye(N, dtype=torch.float64), g) for p, g in parts]


def in_groups(w: World, estimator, n: int, returns: Tensor) -> list:
    """Of estimators that compare n completions of a prompt. Their order does not matter, so
    the sum is over multisets, each of which stands for all its orders."""
    which = torch.combinations(torch.arange(N), n, with_replacement=True)
    counts = torch.nn.functional.one_hot(which, N).sum(1)
    orders = math.factorial(n) / (counts + 1.0).double().lgamma().exp().prod(1)
    found = []
    parts = zip(w.p.split(N), returns.split(N), w.slopes.sum(1).split(N))
    for p, of_prompt, s in parts:
        advantages = estimator(of_prompt[which].flatten(), n).view(-1, n)
        weights = torch.zeros(len(which), N, dtype=torch.float64)
        weights.scatter_add_(1, which, advantages / n)
        mean, variance = moments(orders * p[which].prod(1), weights, s)
        found.append((mean, n * variance))
    return found


# ------------------------------------------------------------------------------- the tables

LOSSES = {
    "k1": lambda l: l,  # noqa: E741
    "k2": lambda l: l.square() / 2,  # noqa: E741
    "k3": lambda l: torch.expm1(-l) + l,  # noqa: E741
}


def penalty(w: World, k: str) -> Tensor:
    """What −β k in the objective adds to A: −β k′(l), (B, T)."""
    l = (w.logprobs - w.ref_logprobs).requires_grad_()  # noqa: E741
    total = LOSSES[k[:2]](l if k.endswith("token") else l.sum(1)).sum()
    return -BETA * torch.autograd.grad(total, l)[0]


def estimators(w: World):
    """(name, moments of each prompt) of every row."""
    r = R.flatten()
    known = r, w.logprobs, w.ref_logprobs, w.mask, BETA
    (returns, _), rewards = ppo.response_return(*known), ppo.token_rewards(*known)
    values, first = critics(w, returns, rewards), w.mask & (w.mask.cumsum(1) == 1)
    yield "reinforce", one_by_one(w, returns[:, None])
    for name, v in values.items():
        baseline = (v * first).sum(1)  # V(x)
        yield f"value, {name} V", one_by_one(w, (returns - baseline)[:, None])
    for estimator in (ppo.rloo, ppo.grpo):
        for n in (2, 4):
            yield f"{estimator.__name__}, n = {n}", in_groups(w, estimator, n, returns)
    for name, v in values.items():
        for lam in (1.0, 0.95, 0.0):
            advantages, _ = ppo.gae(rewards, v, w.mask, 1.0, lam)
            yield f"gae, {name} V, λ = {lam:g}", one_by_one(w, advantages)
    mean = (w.p * r).view(3, N).sum(1).repeat_interleave(N)
    for name, a in (("r", r), ("r − E[r|x]", r - mean)):
        for k in ("k1", "k2", "k3", "k2 per token", "k3 per token"):
            yield f"{name}, {k} as a loss", one_by_one(w, a[:, None] + penalty(w, k))


def main() -> None:
    torch.set_num_threads(1)
    ref_logp = tiny.logp(REFERENCE).detach()
    start = tiny.objective(ref_logp, ref_logp, R, BETA)
    gap = tiny.optimum(ref_logp, R, BETA)[1] - start
    for a in (0.0, 0.5, 0.75):
        policy = policy_at(a)
        w, logp = world(policy), tiny.logp(policy).detach()
        closed, size = (tiny.objective(logp, ref_logp, R, BETA) - start) / gap, w.ascent.norm()
        print(f"\na = {a}: {closed:.1%} of J* − J(π_ref) gained, KL(π ‖ π_ref) ", end="")
        print(f"{tiny.kl(logp, ref_logp):.2f} nats, ‖∇J‖ {size:.2f}")
        heads = ("bias", "cosine", "length", "variance", "noise")
        print(" " * 40 + "".join(f"{head:>10s}" for head in heads))
        for name, found in estimators(w):
            mean = torch.stack([mean for mean, _ in found]).mean(0)
            bias, length = (mean - w.ascent).norm() / size, mean.norm() / size
            variance = sum(v for _, v in found) / 3 / size**2
            print(f"{name:40s}{f'{bias:.3f}' if bias > 1e-9 else '0':>10s}", end="")
            print(f"{mean @ w.ascent / mean.norm() / size:10.3f}{length:10.3f}", end="")
            print(f"{variance:10.1f}{variance / length**2:10.1f}")


if __name__ == "__main__":
    main()
