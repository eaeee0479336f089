"""RLHF proper: policy-gradient ascent of one objective, response-level and bandit-style.

    J(π) = E[r(x, y)] − β KL(π ‖ π_ref),      x ~ prompts, y ~ π(·|x)        eq:rlhf_opt_eq

A step, numbered as in `train`, symbol by symbol:
       symbol                 here                        made by
    1  x (s_t), M prompts     x; asked: of each row       draw
       y (a_t), N for each x  tokens where mask is True   common.generate: one fused batch
    2  π_old                  old_logprobs                common.token_logprobs: one pass
       π_ref                  ref_logprobs                the same function, frozen weights
       r(x, y), r_θ           reward                      common.load_reward, shaped_reward
       V(x)                   values                      common.token_values, before y's first
    3  KL = E[kl], β          kl (nats), cfg.beta         response_return: Σ_t log π/π_ref
       R = r − β kl           returns                     response_return
    4  A = R − baseline       advantages                  estimate_advantages
       what V learns          targets                     the same: R
    5  π (π^RL)               logprobs                    common.token_logprobs, each update
       ρ_t = π / π_old, ε     ratio, cfg.clip             surrogate
       the two losses         loss, v_loss                policy_loss, value_loss
    6  J = E[R]               J = reward − β kl           measure: means over the batch
(N is the book's K in RLOO and G in GRPO. With --estimator gae a token is the action, and V is
read before every one, V(x, y_<t): section "MDP vs. Bandit Framing".)

Three places differ from standard RL, eq:rl_opt (chapter "Training Overview"):
    [a] a reward model in place of a reward function;
    [b] no state transitions: the prompt is the state, a whole completion is the action;
    [c] one reward for the whole response, and no γ: eq:rl_opt_int.

The book's algorithms (chapter "Reinforcement Learning"), and what differs here:
    all         the loss is summed over a response's tokens and averaged over responses, which
                is eq:loss_fixed_length up to 1/L_max; the book mostly has 1/|a|,
                eq:loss_per_sequence. An unfinished response is scored like any other; the
                book's section "Implementation" gives it a penalty. See aggregate, shaped_reward
    REINFORCE   --estimator reinforce --epochs 1 --minibatches 1. Every token has the whole R,
                where eq:vanilla_policy_gradient has G_t, what comes from t on; and b(s) = 0
    RLOO        --estimator rloo --epochs 1 --minibatches 1
    PPO         --estimator gae, λ = 0.95 (the book's code: λ = 1), and 8 updates a rollout
                (1 to 4). Advantages are not whitened. The critic has its own Adam, its loss is
                not clipped and is averaged over tokens, and it starts as the policy's trunk
                with a head of zeros; InstructGPT's starts as the reward model
    GRPO        --estimator grpo. The KL is in R, and so in the group's mean and std, where
                eq:GRPO_token has it in the loss; the std is that of the population, where the
                book's code has the sample's plus a small constant
    (default)   --estimator value. PPO's ratio and clip, but one A for the whole response

    python ppo.py                            the whole recipe: first trains what is missing
    python ppo.py --estimator rloo --epochs 1 --minibatches 1 --out rloo
    python ppo.py --beta 0 --out ppo_beta0   over-optimisation

Look at: J and reward rising while kl stays near 2 nats, and gold with them: what annotators of
the zoo (data/zoo.py, a toy world of animals) really value, at most 3. No loss uses it. Reward
up and gold down is over-optimisation: raise β or get a better reward model. trace.jsonl follows
one prompt through training, symbol by symbol; `python -m tools.report` shows it. `measure`
explains the columns of metrics.csv.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import common
from common import arg
from data import zoo


@dataclass
class Config:
    beta: float = arg(0.3, "β, weight of the KL penalty, reward per nat", low=0)
    estimator: str = arg("value", "of the advantage A",
                         choices=("value", "rloo", "grpo", "reinforce", "gae"))  # fmt: skip
    steps: int = arg(60, "rollouts, each followed by its updates", low=1)
    prompts: int = arg(32, "M, prompts per step", low=1)
    samples: int = arg(4, "N, completions per prompt", low=1)
    epochs: int = arg(2, "passes over each rollout", low=1)
    minibatches: int = arg(4, "updates per epoch", low=1)
    clip: float = arg(0.2, "ε of the clipped ratio", low=0)
    lam: float = arg(0.95, "λ, used by gae alone", low=0)
    lr: float = arg(3e-4, "learning rate of policy and critic, falling to 0", low=0)
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, under --runs")
    out: str = arg("ppo", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "random seed: the same command, the same result", low=0)
    device: str = arg("auto", "a torch device; auto: cuda, else mps, else cpu")


# ------------------------------------------------------------------------------- the maths


def shaped_reward(score: Tensor, finished: Tensor) -> Tensor:
    """r(x, y) of J, (B,), for training and tables, from the reward model's score of each
    response, (B,), and whether it ended with EOS, (B,). A cut response is scored like any
    other: the annotators saw that it was cut, and disliked it. To change r, change this."""
    return score


def response_return(
    score: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """One-sample estimates, per row, of J and of the KL in it: (returns, kl), both (B,).
    score (B,) is r(x, y); log-probs and mask are (B, T); kl is in nats, and known as k1 (k3 as
    a loss: exercises/kl_in_loss.diff). R is treated as a constant although kl depends on π:
    ∇J = E[R ∇ log π(y|x) + ∇R], and the second term, −β E[∇ log π(y|x)], is 0."""
    # KL = E_y[Σ_t log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t)]           eq:kl_expectation
    kl = ((logprobs - ref_logprobs) * response_mask).sum(1)
    # R = r(x, y) − β Σ_t (log π − log π_ref)                    eq:rlhf_opt_eq, eq:kl_standard
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
    """Leave-one-out advantages (B,); n consecutive rows share a prompt."""
    # A_i = R_i − mean_{j≠i} R_j                                            eq:RLOO_advantage
    #     = n/(n−1) (R_i − mean R)                                      eq:RLOO_advantage_alt
    groups = returns.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten() * n / (n - 1)


def grpo(returns: Tensor, n: int) -> Tensor:
    """Group-normalised advantages (B,); equal returns give 0. eq:GRPO_ADV
    Not gradient ascent on J: dividing by std gives every prompt the same weight, and of n = 2
    returns only the order counts."""
    # A_i = (R_i − mean R) / std R
    groups = returns.view(-1, n)
    std = groups.std(1, correction=0, keepdim=True)
    rounding = 1e-6 * groups.abs().amax(1, keepdim=True)  # below it returns are equal
    advantages = (groups - groups.mean(1, keepdim=True)) / std.where(std > rounding, torch.inf)
    return advantages.flatten()


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, all (B, T) -> (advantages, value targets), (B, T).
    values[:, t] is V of what stands before token t; after the last one V = 0."""
    values = values * response_mask
    advantages, next_value, next_advantage = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        # δ_t = r_t + γ V(s_{t+1}) − V(s_t)                                     eq:TD_RESIDUAL
        # A_t = δ_t + γλ A_{t+1}, here s_t = (x, y_<t)                             eq:GAE_DFN
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * response_mask[:, t]
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token, (B, T), and where the clip has turned its gradient
    off, (B, T), bool. Advantages are (B, T) or (B, 1)."""
    # ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)              eq:PPO_POL_RATIO, of one token
    ratio = (logprobs - old_logprobs).exp()
    # min(ρ_t A, clip(ρ_t, 1−ε, 1+ε) A)          eq:PPO_EQN_EXPECTED; eq:PPO_EQN_EXPANDED × |a|
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.min(free, clipped), clipped < free


def aggregate(per_token: Tensor, mask: Tensor) -> Tensor:
    """Summed over a response's tokens, averaged over responses: (B, T) each -> (). The book's
    eq:loss_fixed_length up to the constant L_max."""
    # (1/B) Σ_i Σ_t ℓ_{i,t}
    return (per_token * mask).sum(1).mean()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float,
) -> Tensor:
    """The loss of the policy: (B, T) each -> (). A may be (B, 1)."""
    # Descending it ascends J: at ρ = 1 its gradient is −Σ_t A ∇ log π(y_t|·) = −A ∇ log π(y|x).
    # For value, rloo and reinforce the mean of that over y ~ π is −∇J, as
    # E[baseline · ∇ log π] = 0 (eq:REINFORCE_with_baseline). grpo and gae, λ < 1, have a bias.
    return -aggregate(surrogate(logprobs, old_logprobs, advantages, clip)[0], response_mask)


def value_loss(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error of V over the mask, (B, T) each -> (), in units of r²."""
    # L_V = ½ mean (V − target)²
    return 0.5 * ((values - targets).square() * mask).sum() / mask.sum()


def estimate_advantages(
    cfg: Config, reward, returns, values, logprobs, ref_logprobs, response_mask
) -> tuple[Tensor, Tensor | None]:
    """Step 4, the one place where the estimators differ: A, (B, 1), the same for every token
    of y, or (B, T) for gae; and the critic's targets (B, T), if there is a critic. `values` is
    V in the columns where it was read, 0 elsewhere."""
    R = returns[:, None]
    match cfg.estimator:
        case "value":  # A = R − V(x), in the first response column; V learns E[R | x]
            return R - values.sum(1, keepdim=True), R.expand_as(values)
        case "rloo":
            return rloo(returns, cfg.samples)[:, None], None
        case "grpo":
            return grpo(returns, cfg.samples)[:, None], None
        case "reinforce":  # baseline 0; reward_model.py centres r on demonstrations
            return R, None
        case "gae":  # the token-level MDP view: a reward and a V(x, y_<t) per token; γ = 1
            rewards = token_rewards(reward, logprobs, ref_logprobs, response_mask, cfg.beta)
            return gae(rewards, values, response_mask, 1.0, cfg.lam)


# -------------------------------------------------------------------------------- the step


def train(cfg: Config, policy, reference, critic, reward_fn, prompts: list[str]) -> None:
    """Ascend J, and save to runs/`out`. critic is None where A needs no V."""
    optimizer, critic_optimizer = common.adam(policy), common.adam(critic) if critic else None
    traces, show, v_loss = [], ("reward", "kl", "J", "gold"), None
    with common.Run(cfg, cfg.out, policy, cfg.steps, show) as run:
        for step, x in enumerate(draw(cfg, prompts)):
            # 1. x ~ prompts, y ~ π(·|x): N responses to each of M prompts, all in one batch.
            #    [b] The episode ends with y
            asked = [prompt for prompt in x for _ in range(cfg.samples)]
            chats = [common.chat(prompt) for prompt in asked]
            rollout = common.generate(policy, chats, cfg.max_new_tokens)
            tokens, mask = rollout.tokens, rollout.response_mask
            # 2. log π(y|x), log π_ref(y|x), r(x, y), V: one pass each. V is read before the
            #    first response token; for gae before every one
            value_mask = mask if cfg.estimator == "gae" else mask & (mask.cumsum(1) == 1)
            with torch.no_grad():
                old_logprobs = common.token_logprobs(policy, tokens, mask)
                ref_logprobs = common.token_logprobs(reference, tokens, mask)
                reward = reward_fn(asked, rollout)  # [a] a model of what people prefer
                values = torch.zeros_like(old_logprobs)
                if critic:
                    values = common.token_values(critic, tokens, value_mask)
            # 3. R = r − β kl: [c] one number for the whole response
            returns, kl = response_return(reward, old_logprobs, ref_logprobs, mask, cfg.beta)
            # 4. A, the same for every token of y; for gae one each
            advantages, targets = estimate_advantages(
                cfg, reward, returns, values, old_logprobs, ref_logprobs, mask
            )
            # 5. epochs of clipped minibatch updates; in the very first ρ = 1
            updates, lr = [], cfg.lr * (1 - step / cfg.steps)
            for _ in range(cfg.epochs):
                order = torch.randperm(len(tokens)).to(tokens.device)
                for i in order.tensor_split(cfg.minibatches):
                    logprobs = common.token_logprobs(policy, tokens[i], mask[i])
                    old, A = old_logprobs[i], advantages[i]
                    loss = policy_loss(logprobs, old, A, mask[i], cfg.clip)
                    norm = common.descend(loss, policy, optimizer, lr)
                    if critic:
                        V = common.token_values(critic, tokens[i], value_mask[i])
                        v_loss = value_loss(V, targets[i], value_mask[i])
                        common.descend(v_loss, critic, critic_optimizer, lr)
                    update = dict(logprobs=logprobs, old=old, A=A, mask=mask[i])
                    updates.append(update | dict(loss=loss, norm=norm, v_loss=v_loss))
            # 6. J = reward − β kl, and what else is worth watching
            row = measure(cfg, asked, rollout, reward, kl, old_logprobs, updates)
            row = run.log(**row, lr=lr)

            if step == 0:
                check_start(cfg, row)
            if is_traced(cfg, step):
                given = (reward, kl, returns, old_logprobs, ref_logprobs, advantages, values)
                traces.append(trace(cfg, step, asked, rollout, policy, *given))
        lines = [json.dumps(traced, ensure_ascii=False) + "\n" for traced in traces]
        common.write(run.folder / "trace.jsonl", "".join(lines))


def is_traced(cfg: Config, step: int) -> bool:
    """About a dozen steps, and the last."""
    return step % max(1, cfg.steps // 12) == 0 or step + 1 == cfg.steps


def draw(cfg: Config, prompts: list[str]) -> Iterator[list[str]]:
    """M prompts for each step, none a second time before all were asked. But the first one of
    every traced step is the same, so that its answers can be compared over training."""
    stream = common.shuffled(prompts)
    traced = next(stream)
    for step in range(cfg.steps):
        first = [traced] if is_traced(cfg, step) else []
        yield first + [next(stream) for _ in range(cfg.prompts - len(first))]


@torch.no_grad()
def measure(cfg: Config, asked, rollout, reward, kl, old_logprobs, updates) -> dict:
    """The columns of metrics.csv. Those of the update are means over its minibatches."""
    mask, finished = rollout.response_mask, rollout.finished
    answers = zip(asked, common.completions(rollout), finished.tolist())
    gold = [zoo.gold_reward(*answer) for answer in answers]
    ratios, clipped = [], []
    for u in updates:
        ratios.append((u["logprobs"] - u["old"]).exp()[u["mask"]])
        off = surrogate(u["logprobs"], u["old"], u["A"], cfg.clip)[1]
        clipped.append(off[u["mask"]].float().mean())
    losses, norms, v_losses = ([u[key] for u in updates] for key in ("loss", "norm", "v_loss"))
    return {
        "reward": reward.mean(),  # mean r(x, y)
        "kl": kl.mean(),  # mean Σ_t (log π − log π_ref): KL(π ‖ π_ref), nats per response
        "J": reward.mean() - cfg.beta * kl.mean(),  # the objective
        "gold": sum(gold) / len(gold),  # the annotators' true reward; no loss uses it
        "length": mask.sum(1).float().mean(),  # tokens per response, EOS included
        "finished": finished.float().mean(),  # share that ended with EOS
        "entropy": -old_logprobs.sum() / mask.sum(),  # mean −log π, nats per token
        "sampler_gap": (old_logprobs - rollout.logprobs).abs().max(),  # scored against sampled
        "policy_loss": torch.stack(losses).mean(),
        "value_loss": None if v_losses[0] is None else torch.stack(v_losses).mean(),
        "grad_norm": torch.stack(norms).mean(),  # of the policy's gradient, before clipping
        "clipped": torch.stack(clipped).mean(),  # share of tokens: surrogate without gradient
        "ratio_max": torch.cat(ratios).max(),  # the largest ρ of all
        "first_update_ratio": torch.maximum(ratios[0], 1 / ratios[0]).max(),  # must be 1
    }


@torch.no_grad()
def trace(cfg: Config, step: int, asked, rollout, policy, *given: Tensor) -> dict:
    """The N answers to the traced prompt, the first of the batch, in this step: the numbers
    and columns of the update itself, and ρ as the update left it."""
    reward, kl, returns, old, ref, A, values = (x[: cfg.samples] for x in given)
    tokens, mask = rollout.tokens[: cfg.samples], rollout.response_mask[: cfg.samples]
    numbers = dict(r=reward, kl=kl, R=returns)
    columns = dict(tokens=tokens, logprobs=old, ref_logprobs=ref, A=A.expand_as(mask), V=values)
    new = common.token_logprobs(policy, tokens, mask)
    columns["ratio"] = (new - old).exp()
    columns["clipped"] = surrogate(new, old, A, cfg.clip)[1]
    answers = []
    for i, text in enumerate(common.completions(rollout)[: cfg.samples]):
        answer = {"text": text, "finished": bool(rollout.finished[i])}
        answer |= {key: round(number[i].item(), 4) for key, number in numbers.items()}
        for key, column in columns.items():
            answer[key] = [round(x, 4) for x in column[i][mask[i]].tolist()]
        answers.append(answer)
    return {"step": step, "prompt": asked[0], "answers": answers}


def check_start(cfg: Config, row: dict[str, float]) -> None:
    """What must hold at step 0, before anything is learned; 1e-4 is for rounding."""
    if cfg.init == cfg.ref and row["kl"] != 0:
        common.fail(f"policy and reference are the same, but KL is {row['kl']}", 1)
    if abs(row["first_update_ratio"] - 1) > 1e-4:
        common.fail(f"step 0: ρ is {row['first_update_ratio']} before any update, not 1", 1)
    if row["sampler_gap"] > 1e-4:
        common.fail(f"sampled and scored log-probs differ by {row['sampler_gap']} nats", 1)


def main(cfg: Config) -> None:
    if cfg.estimator in ("rloo", "grpo") and cfg.samples < 2:
        common.fail(f"--samples 1: {cfg.estimator} needs at least 2 for each prompt")
    if cfg.minibatches > cfg.prompts * cfg.samples:
        common.fail(f"--minibatches {cfg.minibatches}: more than the answers of a step")
    device = common.pick_device(cfg.device)
    reward_model = common.load_reward(cfg, cfg.reward, device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    reference = common.load_run(cfg, cfg.ref, "lm", device).requires_grad_(False)
    context = min(policy.config.context, reference.config.context)
    prompts, held = common.read_prompts(cfg, context)

    def reward_fn(asked: list[str], rollout: common.Rollout) -> Tensor:
        return shaped_reward(reward_model(asked, rollout), rollout.finished)

    common.seed_all(cfg.seed)
    critic = None
    if cfg.estimator in ("value", "gae"):  # V starts as 0: a trunk of its own, a zero head
        critic = common.scalar_copy(policy)
        torch.nn.init.zeros_(critic.scalar.weight)
    about = f"{cfg.estimator}, β = {cfg.beta}, {cfg.prompts} prompts × {cfg.samples} answers"
    source = Path(cfg.reward).name
    print(f"{cfg.out}: {about}; reward: {source}")
    train(cfg, policy, reference, critic, reward_fn, prompts)
    names = [cfg.ref, cfg.init, cfg.out]
    common.closing_table(cfg, names, reward_fn, source, held, device)
    print(f"\npython -m tools.report --runs {cfg.runs} shows what happened")


if __name__ == "__main__":
    common.start(main, Config, __doc__)
