"""RLHF proper: policy-gradient ascent of one objective, response-level and bandit-style.

    J(π) = E[r(x, y)] − β KL(π ‖ π_ref),      x ~ prompts, y ~ π(·|x)        eq:rlhf_opt_eq

    symbol         here                         made by
    x (s_t)        prompts                      common.read_prompts
    y (a_t)        tokens where response_mask   common.generate: one fused batch, M × N rows
    r(x, y), r_θ   reward                       common.Reward: the reward model's score
    π (π^RL)       policy, logprobs             common.token_logprobs
    π_ref          reference, ref_logprobs      the same function, frozen weights
    KL, β          kl (nats), cfg.beta          response_return: Σ_t log π − log π_ref
    R              returns                      response_return: one sample of J's integrand
    V(x)           values                       common.token_values: before y has begun
    A              advantages                   advantages_and_targets: one flag, one place
    J              J = reward − β kl            logged, with reward and kl, every step

What sets this apart from standard RL, eq:rl_opt (chapter "Training Overview"), is marked:
    [1] a reward model in place of a reward function;
    [2] no state transitions: the prompt is the state, a whole completion is the action;
    [3] one reward for the whole response, and no γ: eq:rl_opt_int.

    python ppo.py                            the whole recipe: makes the inputs it lacks
    python ppo.py --estimator rloo --out ppo_rloo        or grpo, reinforce, gae
    python ppo.py --beta 0 --out ppo_beta0   over-optimisation

Look at: J and reward rising while kl stays at a few nats, and gold, on which nothing here
trains, rising with them. Reward up and gold down is over-optimisation: raise β or get a
better reward model. `rollout_row` explains every column of metrics.csv.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import common
from common import arg


@dataclass
class Config:
    beta: float = arg(0.3, "β, the price of one nat of KL, in reward per nat")
    estimator: str = arg(
        "value", "of the advantage A", choices=("value", "rloo", "grpo", "reinforce", "gae")
    )
    steps: int = arg(60, "rollouts, each followed by its updates", low=1)
    prompts: int = arg(32, "M, prompts per step", low=1)
    samples: int = arg(4, "N, completions per prompt", low=1)
    epochs: int = arg(2, "K, passes over each rollout", low=1)
    minibatches: int = arg(4, "updates per epoch", low=1)
    clip: float = arg(0.2, "ε of the clipped ratio")
    lam: float = arg(0.95, "λ, used by gae alone")
    lr: float = arg(3e-4, "learning rate of policy and critic, falling to 0")
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg(None, "your own r(x, y), FILE.py:function, for the reward model")
    reward_model: str = arg("reward_model", "r_θ, under --runs")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, under --runs")
    out: str = arg("ppo", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def response_return(
    score: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """One sample of J's integrand per row, and the KL inside it: (returns, kl), both (B,).

    score (B,) is r(x, y); log-probs and mask are (B, T). kl is in nats per response: its mean
    over y ~ π is KL(π ‖ π_ref) exactly (eq:kl_expectation). Both are detached: the gradient
    of J reaches π through the log-probs of the policy loss, not through the return.
    """
    # KL = E_y[Σ_t log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t)]
    kl = ((logprobs - ref_logprobs) * response_mask).sum(1)
    # R = r(x, y) − β Σ_t (log π − log π_ref)                                 eq:rlhf_opt_eq
    return (score - beta * kl).detach(), kl.detach()


def token_rewards(
    score: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """The same return, token by token (B, T), for `gae`: each row sums to its R."""
    # r_t = −β (log π − log π_ref)_t, plus r(x, y) at the last response token
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    later = response_mask.flip(1).cumsum(1).flip(1)  # response tokens from t on
    return (rewards + score[:, None] * (response_mask & (later == 1))).detach()


def rloo(returns: Tensor, n: int) -> Tensor:
    """Leave-one-out advantages (B,); n consecutive rows share a prompt. eq:RLOO_advantage"""
    # A_i = R_i − mean_{j≠i} R_j = n/(n−1) (R_i − mean R)
    groups = returns.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten() * n / (n - 1)


def grpo(returns: Tensor, n: int) -> Tensor:
    """Group-normalised advantages (B,); equal returns give exactly 0. eq:GRPO_ADV

    Not an ascent of J: every prompt's spread counts the same. With n = 2 the sizes of the
    returns do not count at all, and what is ascended is the win rate (twice).
    """
    # A_i = (R_i − mean R) / std R
    groups = returns.view(-1, n)
    groups = groups - groups[:, :1]  # an equal group becomes exact zeros, not rounding
    std = groups.std(1, correction=0, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / torch.where(std > 0, std, 1.0)
    return advantages.flatten()


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, all (B, T) -> (advantages, value targets), (B, T).

    values[:, t] is V of what stands before token t; after the response V = 0. eq:GAE_DFN
    """
    values = values * response_mask
    advantages, after, later = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        # δ_t = r_t + γ V(s_{t+1}) − V(s_t);     A_t = δ_t + γλ A_{t+1}
        delta = rewards[:, t] + gamma * after - values[:, t]
        later = (delta + gamma * lam * later) * response_mask[:, t]
        advantages[:, t], after = later, values[:, t]
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float,
) -> Tensor:
    """The clipped surrogate, per token, to be descended: (B, T) each -> (). A may be (B, 1).

    Summed over a response's tokens and averaged over responses, so that at ratio 1 its
    gradient is −∇J, REINFORCE with a baseline (eq:REINFORCE_with_baseline); averaging over
    a response's tokens instead would favour short good and long bad ones.
    """
    # ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)                           eq:PPO_POL_RATIO
    ratio = (logprobs - old_logprobs).exp()
    # L = − mean_y Σ_t min(ρ_t A, clip(ρ_t, 1−ε, 1+ε) A)                   eq:PPO_EQN_EXPANDED
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * response_mask).sum(1).mean()


def value_loss(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error of V over the mask, (B, T) each -> (); reward squared."""
    # L_V = ½ mean (V − target)²
    return 0.5 * ((values - targets).square() * mask).sum() / mask.sum()


# --------------------------------------------------------------------- rollout and advantage


@dataclass
class Batch:
    """M × N responses and all that is known of them before the update; no gradients."""

    tokens: Tensor  # (B, T)
    response_mask: Tensor  # (B, T)
    logprobs: Tensor  # (B, T) log π of the policy that sampled them: π_old
    ref_logprobs: Tensor  # (B, T)
    reward: Tensor  # (B,) r(x, y)
    returns: Tensor  # (B,) R
    values: Tensor | None  # (B, T)
    row: dict  # this rollout's part of metrics.csv


@torch.no_grad()
def collect(cfg: Config, prompts: list[str], policy, reference, critic, reward) -> Batch:
    """Sample and score: steps 1 to 3 of the algorithm."""
    asked = [prompt for prompt in prompts for _ in range(cfg.samples)]
    # 1. y ~ π(·|x) for all M × N rows at once. [2] The episode is over when y is.
    rollout = common.generate(policy, [common.chat(x) for x in asked], cfg.max_new_tokens)
    tokens, mask = rollout.tokens, rollout.response_mask
    # 2. log π(y|x), log π_ref(y|x), r(x, y), V(x): one batched pass each
    logprobs = common.token_logprobs(policy, tokens, mask)
    ref_logprobs = common.token_logprobs(reference, tokens, mask)
    scores = reward(asked, rollout)  # [1] a model of what people prefer
    values = common.token_values(critic, tokens, mask) if critic else None
    # 3. [3] one number for the whole response
    returns, kl = response_return(scores, logprobs, ref_logprobs, mask, cfg.beta)

    texts, finished = common.completions(rollout), rollout.finished
    gold = [common.gold_reward(*answer) for answer in zip(asked, texts, finished.tolist())]
    row = rollout_row(scores, kl, cfg.beta, gold, mask, finished, logprobs, rollout.logprobs)
    return Batch(tokens, mask, logprobs, ref_logprobs, scores, returns, values, row)


def rollout_row(reward, kl, beta, gold, mask, finished, logprobs, sampled) -> dict:
    """What metrics.csv says of a rollout, from before its updates. `update` adds the rest."""
    reward, kl = reward.mean().item(), kl.mean().item()
    return {
        "reward": reward,  # mean r(x, y)
        "kl": kl,  # mean Σ_t log π − log π_ref: KL(π ‖ π_ref), nats per response
        "J": reward - beta * kl,  # the objective
        "gold": sum(gold) / len(gold),  # what the annotators value; nothing trains on it
        "length": mask.sum(1).float().mean().item(),  # tokens per response, EOS included
        "finished": finished.float().mean().item(),  # share that ended with EOS
        "entropy": -logprobs.sum().item() / mask.sum().item(),  # mean −log π, nats per token
        "sampler_gap": (logprobs - sampled).abs().max().item(),  # sampling against scoring
    }


def advantages_and_targets(cfg: Config, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4, the one place that the flag --estimator chooses: A (B, 1), the same for every
    token of y, or (B, T) for gae; what the critic should have said (B, T), and where."""
    R, V, mask = batch.returns[:, None], batch.values, batch.response_mask
    match cfg.estimator:
        case "value":  # A = R − V(x), V read before the first response token
            first = mask & (mask.cumsum(1) == 1)
            return R - (V * first).sum(1, keepdim=True), R.expand_as(mask), first
        case "rloo":
            return rloo(batch.returns, cfg.samples)[:, None], None, None
        case "grpo":
            return grpo(batch.returns, cfg.samples)[:, None], None, None
        case "reinforce":  # no baseline
            return R, None, None
        case "gae":  # the token-level MDP view: per-token rewards, V(s_t), λ; γ = 1
            parts = batch.reward, batch.logprobs, batch.ref_logprobs, mask, cfg.beta
            return *gae(token_rewards(*parts), V, mask, 1.0, cfg.lam), mask


# ---------------------------------------------------------------------------------- update


def update(
    cfg: Config, batch: Batch, policy, critic, optimizers, lr: float, where: str
) -> dict:
    """Step 5: K epochs of clipped minibatch updates. Before the first one the ratio is 1 and
    the gradient plain REINFORCE's; with K = 1 and one minibatch it is never anything else."""
    advantages, targets, value_mask = advantages_and_targets(cfg, batch)
    stats = []
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(advantages)).chunk(cfg.minibatches):
            at, rows = f"{where}, minibatch {len(stats)}", rows.to(batch.tokens.device)
            tokens, mask, old = (
                x[rows] for x in (batch.tokens, batch.response_mask, batch.logprobs)
            )
            logprobs = common.token_logprobs(policy, tokens, mask)
            log_ratio = (logprobs.detach() - old)[mask]
            # later rollouts may differ by rounding, since log-probs grow sharper
            if at == "step 0, minibatch 0" and (gap := log_ratio.abs().max()) > 1e-5:
                common.fail(f"{at}: log ratio {gap:.1e}, and it must be 0", 1)
            loss = policy_loss(logprobs, old, advantages[rows], mask, cfg.clip)
            row = {"policy_loss": common.descend(loss, policy, optimizers[0], lr, at)}
            row["value_loss"] = math.nan
            if critic:
                values = common.token_values(critic, tokens, mask)
                loss = value_loss(values, targets[rows], value_mask[rows])
                row["value_loss"] = common.descend(loss, critic, optimizers[1], lr, at)
            ratio = log_ratio.exp()
            row["ratio_max"] = ratio.max().item()  # the largest ρ_t
            row["clipped"] = (
                ((ratio - 1).abs() > cfg.clip).float().mean().item()
            )  # share of ρ_t
            stats.append(row)
    mean = {key: sum(row[key] for row in stats) / len(stats) for key in stats[0]}
    return mean | {"ratio_max": max(row["ratio_max"] for row in stats), "lr": lr}


def main(cfg: Config) -> None:
    if cfg.estimator in ("rloo", "grpo") and cfg.samples < 2:
        common.fail(f"--samples 1: {cfg.estimator} compares samples; use 2 or more, or value")
    device = common.pick_device(cfg.device)
    prompts, held = common.read_prompts(cfg.data, cfg.max_new_tokens)
    flags = ("init", "ref") if cfg.reward else ("init", "ref", "reward_model")
    init, ref, *_ = common.ensure(cfg, *flags)
    reward = common.Reward(cfg.reward or cfg.reward_model, cfg.runs, device)
    policy = common.load_model(init, "lm", device)
    reference = common.load_model(ref, "lm", device).requires_grad_(False)

    common.seed_all(cfg.seed)
    critic = None
    if cfg.estimator in ("value", "gae"):  # V starts as 0: a trunk of its own, a zero head
        critic = common.scalar_copy(policy)
        torch.nn.init.zeros_(critic.scalar.weight)
    optimizers = [common.adamw(model) for model in (policy, critic) if model]
    same = common.crc(init / "model.pt") == common.crc(ref / "model.pt")
    print(
        f"{cfg.runs}/{cfg.out}: {cfg.estimator}, β = {cfg.beta}, {cfg.steps} steps of "
        f"{cfg.prompts} prompts × {cfg.samples} answers, reward: {reward.source}"
    )
    stream = common.shuffled(prompts)
    with common.Run(cfg, cfg.out, policy, cfg.steps, show=("reward", "kl", "J", "gold")) as run:
        for step in run:
            asked = [next(stream) for _ in range(cfg.prompts)]
            batch = collect(cfg, asked, policy, reference, critic, reward)
            if step == 0 and not same:
                print(f"starting KL of {cfg.init} to {cfg.ref}: {batch.row['kl']:.3f} nats")
            elif step == 0 and batch.row["kl"] != 0:
                common.fail(
                    f"policy and reference are the same, but KL is {batch.row['kl']}", 1
                )
            lr = cfg.lr * (1 - step / cfg.steps)
            stats = update(cfg, batch, policy, critic, optimizers, lr, f"step {step}")
            run.log(**batch.row, **stats)

    found = common.report(cfg, cfg.ref, reward, held, device)
    common.before_and_after(cfg, found, device)


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
