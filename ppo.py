"""RLHF proper: policy-gradient ascent of one objective, response-level and bandit-style.

    J(π) = E[r(x, y)] − β KL(π ‖ π_ref),      x ~ prompts, y ~ π(·|x)        eq:rlhf_opt_eq

A step of the algorithm, numbered as in the code, symbol by symbol:
       symbol                 here                        made by
    1  x (s_t), M prompts     prompts                     common.read_prompts, shuffled
       y (a_t), N for each x  tokens where response_mask  common.generate: one fused batch
    2  π (π^RL)               policy, logprobs            common.token_logprobs: one pass
       π_ref                  reference, ref_logprobs     the same function, frozen weights
       r(x, y), r_θ           reward                      common.load_reward: a reward model
       V(x); gae: V(x, y_<t)  values                      common.token_values: before y; y_t
    3  KL = E[kl], β          kl (nats), cfg.beta         Σ_t (log π − log π_ref)
       R = r − β kl           returns                     response_return
       J = E[R]               J = reward − β kl           collect: means over the batch
    4  A = R − baseline       advantages                  estimate_advantages
    5  ρ_t = π / π_old, ε     ratio, cfg.clip             update → policy_loss, value_loss:
       π_old                  old_logprobs                K epochs of clipped updates

Three places differ from standard RL, eq:rl_opt (chapter "Training Overview"), but `gae` keeps
the standard view, token by token:
    [a] a reward model in place of a reward function;
    [b] no state transitions: the prompt is the state, a whole completion is the action;
    [c] one reward for the whole response, and no γ: eq:rl_opt_int.

The book's algorithms (chapter "Reinforcement Learning"), and what differs here:
    REINFORCE   --estimator reinforce --epochs 1 --minibatches 1    here b(s) = 0
    RLOO        --estimator rloo --epochs 1 --minibatches 1         nothing
    PPO         --estimator gae       a sum over a response's tokens, without the book's 1/|a|
    GRPO        --estimator grpo      also without 1/|a|; the KL is in R, not in the loss
    (default)   --estimator value     PPO's ratio and clip, but one A for the whole response

    python ppo.py                            the whole recipe: first trains what is missing
    python ppo.py --estimator rloo --out ppo_rloo
    python ppo.py --beta 0 --out ppo_beta0   over-optimisation

Look at: J and reward rising while kl stays at a few nats, and gold, which no loss here
uses, rising with them. Reward up and gold down is over-optimisation: raise β or get a
better reward model. trace.txt follows one prompt through a step, symbol by symbol.
`collect` and `update` explain the columns of metrics.csv.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import common
from common import arg


@dataclass
class Config:
    beta: float = arg(0.3, "β, the price of one nat of KL, in reward per nat")
    estimator: str = arg("value", "of A", choices=("value", "rloo", "grpo", "reinforce", "gae"))
    steps: int = arg(60, "rollouts, each followed by its updates", low=1)
    prompts: int = arg(32, "M, prompts per step", low=1)
    samples: int = arg(4, "N, completions per prompt", low=1)
    epochs: int = arg(2, "K, passes over each rollout", low=1)
    minibatches: int = arg(4, "updates per epoch", low=1)
    clip: float = arg(0.2, "ε of the clipped ratio")
    lam: float = arg(0.95, "λ, used by gae alone", high=1)
    lr: float = arg(3e-4, "learning rate of policy and critic, falling to 0", high=1)
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
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
    """One-sample estimates, per row, of J and of the KL in it: (returns, kl), both (B,).
    score (B,) is r(x, y); log-probs and mask are (B, T); kl is in nats, and known as k1. Both
    are detached although kl depends on π: what is left out, −β E[∇ log π(y|x)], is 0."""
    # KL = E_y[Σ_t log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t)]           eq:kl_expectation
    kl = ((logprobs - ref_logprobs) * response_mask).sum(1)
    # R = r(x, y) − β Σ_t (log π − log π_ref)                                 eq:rlhf_opt_eq
    return (score - beta * kl).detach(), kl.detach()


def token_rewards(
    score: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """The same return, token by token (B, T), for `gae`: each row sums to its R."""
    # r_t = −β (log π − log π_ref)_t, plus r(x, y) at the last response token
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    remaining = response_mask.flip(1).cumsum(1).flip(1)  # response tokens from t on
    return (rewards + score[:, None] * (response_mask & (remaining == 1))).detach()


def rloo(returns: Tensor, n: int) -> Tensor:
    """Leave-one-out advantages (B,); n consecutive rows share a prompt. eq:RLOO_advantage"""
    # A_i = R_i − mean_{j≠i} R_j = n/(n−1) (R_i − mean R)
    groups = returns.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten() * n / (n - 1)


def grpo(returns: Tensor, n: int) -> Tensor:
    """Group-normalised advantages (B,); equal returns give exactly 0. eq:GRPO_ADV
    Not gradient ascent on J: dividing by std gives every prompt the same weight, and of n = 2
    returns only the order counts."""
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
    values[:, t] is V of what stands before token t; after the response V = 0. eq:GAE_DFN"""
    values = values * response_mask
    advantages, next_value, next_advantage = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        # δ_t = r_t + γ V(s_{t+1}) − V(s_t);     A_t = δ_t + γλ A_{t+1}
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * response_mask[:, t]
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float,
) -> Tensor:
    """The clipped surrogate, per token, to be descended: (B, T) each -> (). A may be (B, 1).
    Summed over a response's tokens, averaged over responses: eq:PPO_EQN_EXPANDED without its
    1/|a|. At ρ = 1 the gradient is eq:REINFORCE_with_baseline: its mean over y ~ π is −∇J,
    unless A is biased, as with `grpo`, or λ < 1 and an inexact V. The whole response is one
    action (section "MDP vs. Bandit Framing"), yet ρ is per token: at ρ = 1 one ratio for the
    response has the same gradient, but as a product of ten it would soon leave 1 ± ε."""
    # ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)                           eq:PPO_POL_RATIO
    ratio = (logprobs - old_logprobs).exp()
    # L = − mean_y Σ_t min(ρ_t A, clip(ρ_t, 1−ε, 1+ε) A)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * response_mask).sum(1).mean()


def is_clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Where the clip has turned the gradient off: (B, T), and A (B, T) or (B, 1) -> bool."""
    # ρ > 1 + ε and A > 0 (already much likelier), or ρ < 1 − ε and A < 0
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def value_loss(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error of V over the mask, (B, T) each -> (), in units of r²."""
    # L_V = ½ mean (V − target)²
    return 0.5 * ((values - targets).square() * mask).sum() / mask.sum()


# --------------------------------------------------------------------- rollout and advantage


@dataclass
class Batch:
    """M × N responses and all that is known of them before the update; no gradients."""

    tokens: Tensor  # (B, T)
    response_mask: Tensor  # (B, T)
    old_logprobs: Tensor  # (B, T) log π of the policy that sampled them: π_old
    ref_logprobs: Tensor  # (B, T)
    reward: Tensor  # (B,) r(x, y)
    returns: Tensor  # (B,) R
    kl: Tensor  # (B,)
    value_mask: Tensor  # (B, T) where V is needed: before the first token, or (gae) every one
    values: Tensor  # (B, T) V there; 0 without a critic
    row: dict  # this rollout's part of metrics.csv


@torch.no_grad()
def collect(cfg: Config, prompts: list[str], policy, reference, critic, reward_fn) -> Batch:
    """Steps 1 to 3 of the algorithm, and what metrics.csv says of the rollout."""
    asked = [prompt for prompt in prompts for _ in range(cfg.samples)]
    # 1. y ~ π(·|x) for all M × N rows at once. [b] The episode is over when y is.
    rollout = common.generate(policy, [common.chat(x) for x in asked], cfg.max_new_tokens)
    tokens, mask, finished = rollout.tokens, rollout.response_mask, rollout.finished
    # 2. log π(y|x), log π_ref(y|x), r(x, y), V: one batched pass each
    logprobs = common.token_logprobs(policy, tokens, mask)
    ref_logprobs = common.token_logprobs(reference, tokens, mask)
    r = reward_fn(asked, rollout)  # [a] a model of what people prefer
    value_mask = mask if cfg.estimator == "gae" else mask & (mask.cumsum(1) == 1)
    values = common.token_values(critic, tokens, value_mask) if critic else 0 * logprobs
    # 3. R = r − β kl: [c] one number for the whole response
    returns, kl = response_return(r, logprobs, ref_logprobs, mask, cfg.beta)
    answers = zip(asked, common.completions(rollout), finished.tolist())
    gold = [common.gold_reward(*answer) for answer in answers]
    row = {
        "reward": r.mean(),  # mean r(x, y)
        "kl": kl.mean(),  # mean Σ_t (log π − log π_ref): KL(π ‖ π_ref), nats per response
        "J": r.mean() - cfg.beta * kl.mean(),  # the objective
        "gold": sum(gold) / len(gold),  # the annotators' true reward; no loss uses it
        "length": mask.sum(1).float().mean(),  # tokens per response, EOS included
        "finished": finished.float().mean(),  # share that ended with EOS
        "entropy": -logprobs.sum() / mask.sum(),  # mean −log π, nats per token
        "sampler_gap": (logprobs - rollout.logprobs).abs().max(),  # as scored − as sampled
    }
    return Batch(tokens, mask, logprobs, ref_logprobs, r, returns, kl, value_mask, values, row)


def estimate_advantages(estimator: str, cfg: Config, batch: Batch) -> Tensor:
    """Step 4, the one place where the estimators differ: A (B, 1), the same for every token
    of y, or (B, T) for gae."""
    R = batch.returns
    match estimator:
        case "value":  # A = R − V(x), V read before the first response token
            first = batch.response_mask & (batch.response_mask.cumsum(1) == 1)
            return R[:, None] - (batch.values * first).sum(1, keepdim=True)
        case "rloo":
            return rloo(R, cfg.samples)[:, None]
        case "grpo":
            return grpo(R, cfg.samples)[:, None]
        case "reinforce":  # baseline 0; reward_model.py centres r on demonstrations
            return R[:, None]
        case "gae":  # the token-level MDP view: per-token rewards, V(x, y_<t), λ; γ = 1
            known = batch.reward, batch.old_logprobs, batch.ref_logprobs, batch.response_mask
            rewards = token_rewards(*known, cfg.beta)
            return gae(rewards, batch.values, batch.response_mask, 1.0, cfg.lam)[0]


# ---------------------------------------------------------------------------------- update


def update(
    cfg: Config, batch: Batch, advantages: Tensor, policy, critic, optimizers, lr: float
) -> dict:
    """Step 5: K epochs of clipped minibatch updates. Returns the other columns of metrics.csv,
    means over the updates. In the first update ρ = 1, and the gradient is REINFORCE's with
    advantage A; with K = 1 and one minibatch that is the only update."""
    targets = advantages + batch.values  # value: R, at the first token; gae: A_t + V(x, y_<t)
    updates = []
    for _ in range(cfg.epochs):
        order = torch.randperm(len(advantages)).to(batch.tokens.device)
        for rows in order.tensor_split(cfg.minibatches):
            tokens, mask, A = batch.tokens[rows], batch.response_mask[rows], advantages[rows]
            old, value_mask = batch.old_logprobs[rows], batch.value_mask[rows]
            logprobs = common.token_logprobs(policy, tokens, mask)
            ratio = (logprobs.detach() - old).exp()
            loss = policy_loss(logprobs, old, A, mask, cfg.clip)
            norm = common.descend(loss, policy, optimizers[0], lr)
            row = {"policy_loss": loss.detach(), "grad_norm": norm}  # of π, before MAX_NORM
            # share of response tokens whose gradient the clip turned off
            row["clipped"] = (is_clipped(ratio, A, cfg.clip) & mask).sum() / mask.sum()
            row["ratio_max"] = ratio.max()
            row["start_ratio"] = torch.maximum(ratio, 1 / ratio).max()
            if critic:
                values = common.token_values(critic, tokens, value_mask)
                loss = value_loss(values, targets[rows], value_mask)
                common.descend(loss, critic, optimizers[1], lr)
                row["value_loss"] = loss.detach()
            updates.append(row)
    columns = {key: torch.stack([row[key] for row in updates]) for key in updates[0]}
    means = {"value_loss": None} | {key: column.mean() for key, column in columns.items()}
    means["ratio_max"] = columns["ratio_max"].max()  # the largest ρ of any update
    means["start_ratio"] = columns["start_ratio"][0]  # ρ or 1/ρ in the first: must be 1
    return means | {"lr": lr}


@torch.no_grad()
def trace(cfg: Config, step: int, x: str, batch: Batch, advantages: Tensor, policy) -> str:
    """The first prompt x of a batch followed through the step, with the tensors of its update:
    its N answers; the one with the largest |A| token by token; every estimator's A of the
    same returns; and J, as in metrics.csv."""
    n, mask = cfg.samples, batch.response_mask[: cfg.samples]
    tokens, A, R = batch.tokens[:n], advantages[:n].expand_as(mask), batch.returns[:n]
    r, kl, old, ref = (
        z[:n] for z in (batch.reward, batch.kl, batch.old_logprobs, batch.ref_logprobs)
    )
    new = common.token_logprobs(policy, tokens, mask)
    mean_A = (A * mask).sum(1) / mask.sum(1)  # gae has an A for every token

    lines = [f"step {step}   x: {x}   A by {cfg.estimator}, β = {cfg.beta}"]
    rest = "R − A" if cfg.estimator in ("grpo", "gae") else "baseline"
    names = "r", "log π", "log π_ref", "kl", "R", rest, "A", "log π after"
    lines += [("{:>12}" * 8).format(*names) + "   y"]  # 8 columns of width 12
    columns = r, old.sum(1), ref.sum(1), kl, R, R - mean_A, mean_A, new.sum(1)
    for *numbers, answer in zip(*columns, common.completions(batch)):
        lines += [("{:12.2f}" * 8).format(*numbers) + f"   {answer!r}"]

    i = int(mean_A.abs().argmax())
    ratio = (new - old).exp()
    off = is_clipped(ratio, A, cfg.clip)
    lines += ["", ("{:>12}" * 4).format("log π", "log π_ref", "A", "ρ after") + "   y_t"]
    for t in mask[i].nonzero().flatten().tolist():
        piece = repr(common.decode([tokens[i, t]])) if tokens[i, t] != common.EOS else "EOS"
        clipped = "   clipped: no more gradient" if off[i, t] else ""
        numbers = old[i, t], ref[i, t], A[i, t], ratio[i, t]
        lines += [("{:12.2f}" * 4).format(*numbers) + f"   {piece}{clipped}"]

    lines += [""]
    for name in ("reinforce", "value", "rloo", "grpo", "gae"):
        if name in ("rloo", "grpo") and n == 1:
            text = "needs N > 1"
        elif name in ("value", "gae") and cfg.estimator not in (name, "gae"):
            text = "needs a V that this run does not train"
        else:
            other = (estimate_advantages(name, cfg, batch)[:n] * mask).sum(1) / mask.sum(1)
            text = ("{:12.2f}" * n).format(*other)
        lines += [f"A by {name:10s}{text}"]
    sums = "{J:.3f} = {reward:.3f} − {beta} × {kl:.3f}".format(**batch.row, beta=cfg.beta)
    lines += [f"J = reward − β kl = mean R over the batch: {sums} = {batch.returns.mean():.3f}"]
    return "\n".join(lines) + "\n"


def check_start(cfg: Config, row: dict[str, float]) -> None:
    """Constants that hold before anything is learned; 1e-4 tells bugs from rounding."""
    if cfg.init == cfg.ref and row["kl"] != 0:
        common.fail(f"policy and reference are the same, but KL is {row['kl']}", 1)
    if abs(row["start_ratio"] - 1) > 1e-4:
        common.fail(f"step 0: ρ is {row['start_ratio']} before any update, and must be 1", 1)
    if row["sampler_gap"] > 1e-4:
        common.fail(f"sampled and scored log-probs differ by {row['sampler_gap']} nats", 1)


def main(cfg: Config) -> None:
    if cfg.estimator in ("rloo", "grpo") and cfg.samples < 2:
        common.fail(f"--samples 1: {cfg.estimator} compares samples; use 2 or more, or value")
    if cfg.minibatches > cfg.prompts * cfg.samples:
        common.fail(f"--minibatches {cfg.minibatches}: more than answers; use fewer")
    device = common.pick_device(cfg.device)
    common.check_inputs(cfg, cfg.init, cfg.ref, cfg.reward)
    reward_fn = common.load_reward(cfg, cfg.reward, device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    reference = common.load_run(cfg, cfg.ref, "lm", device).requires_grad_(False)
    context = min(policy.config.context, reference.config.context)
    train, held = common.read_prompts(cfg.data, cfg.max_new_tokens, context)

    common.seed_all(cfg.seed)
    critic = None
    if cfg.estimator in ("value", "gae"):  # V starts as 0: a trunk of its own, a zero head
        critic = common.scalar_copy(policy)
        torch.nn.init.zeros_(critic.scalar.weight)
    optimizers = [common.adamw(model) for model in (policy, critic) if model]
    about = f"{cfg.estimator}, β = {cfg.beta}, {cfg.prompts} prompts × {cfg.samples} answers"
    common.say(f"{cfg.runs}/{cfg.out}: {about}, reward: {cfg.reward}")
    stream, traces = common.shuffled(train), []
    with common.Run(cfg, cfg.out, policy, cfg.steps, show=("reward", "kl", "J", "gold")) as run:
        for step in run:
            prompts = [next(stream) for _ in range(cfg.prompts)]
            batch = collect(cfg, prompts, policy, reference, critic, reward_fn)  # 1, 2, 3
            advantages = estimate_advantages(cfg.estimator, cfg, batch)  # 4
            lr = cfg.lr * (1 - step / cfg.steps)
            row = update(cfg, batch, advantages, policy, critic, optimizers, lr)  # 5
            row = run.log(**batch.row, **row)
            if step == 0:
                check_start(cfg, row)
            if step % 20 == 0 or step + 1 == cfg.steps:
                traces.append(trace(cfg, step, prompts[0], batch, advantages, policy))
    common.write(run.folder / "trace.txt", "\n".join(traces))
    common.say("\n" + traces[-1])
    common.closing_table(cfg, [cfg.ref, cfg.init, cfg.out], reward_fn, cfg.reward, held, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
