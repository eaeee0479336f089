"""Rejection sampling: draw N answers per prompt, keep the best by reward, imitate them.

The most basic way to raise E[r(x, y)] (chapter "Rejection Sampling"): no gradient passes
through the reward, and no KL term is paid. Imitating best-of-N answers moves π towards the
best-of-N policy, whose KL to the sampler is at most log N − (N − 1)/N nats.

    symbol         here                  made by
    x_1 … x_M      prompts               common.read_prompts
    Y (M, N)       answers               common.generate, eq:rs_completion_matrix
    R (M, N)       rewards               common.Reward, eq:rs_reward_matrix
    S(R)           selected              top_per_prompt, top_k_overall or random_per_prompt
    L              loss                  imitation_loss: the SFT loss on the selected answers
    KL(π ‖ π_ref)  kl                    measured, on some of the samples, every round

    python rejection_sampling.py                    makes whatever input is missing first
    python rejection_sampling.py --rounds 3 --out rs_3      each from the improved policy
    python rejection_sampling.py --select random --out rs_random        the matched control

Look at: gold against the control of the same size, which imitates itself and stands still.
selected.jsonl has the answers that were kept; `sft.py --data` takes it as it is.
metrics.csv: `round`; of the round's samples, drawn before its updates, `reward`, `gold`
(means) and `kl` (nats per response, from the first 512; of π only at temperature 1);
`selected`, the mean reward of those kept; `loss` (nats per token); `lr`.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

import common
from common import arg


@dataclass
class Config:
    prompts: int = arg(2048, "M, prompts per round", low=1)
    samples: int = arg(16, "N, completions per prompt", low=1)
    select: str = arg("per_prompt", "S(R)", choices=("per_prompt", "top_k", "random"))
    top_k: int = arg(1024, "K, answers kept by --select top_k", low=1)
    rounds: int = arg(1, "sample, select, imitate; so many times", low=1)
    steps: int = arg(96, "gradient steps per round", low=1)
    batch: int = arg(64, "selected answers per step", low=1)
    lr: float = arg(3e-4, "learning rate, falling to 0 in each round")
    temperature: float = arg(1.0, "of the samples; above 1 for more variety", low=0.01)
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg(None, "your own r(x, y), FILE.py:function, for the reward model")
    reward_model: str = arg("reward_model", "r_θ, under --runs")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, from which KL is measured, under --runs")
    out: str = arg("rejection_sampling", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def top_per_prompt(rewards: Tensor) -> Tensor:
    """The best answer to each prompt: (M, N) -> (M,) columns. eq:rs_selection_per_prompt"""
    # S(R) = [argmax_j r_1j, …, argmax_j r_Mj], ties to the first
    return rewards.argmax(1)


def top_k_overall(rewards: Tensor, k: int) -> Tensor:
    """The k best of all answers: (M, N) -> (k,) flat indices, best first, ties to the lower
    index; easy prompts may fill it. Raises ValueError for k > M·N. eq:rs_topk_selection"""
    if not 1 <= k <= rewards.numel():
        raise ValueError(f"top_k {k} of {rewards.numel()} answers: choose at most that many")
    # S_K(R) = argsort(vec R, descending)[:K]
    return rewards.flatten().sort(descending=True, stable=True).indices[:k]


def random_per_prompt(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The control, blind to reward: (M, N) -> (M,) columns."""
    M, N = rewards.shape
    return torch.randint(N, (M,), generator=generator, device=rewards.device)


def imitation_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """The SFT loss, nats per token, on the selected answers: (B, T) each -> ()."""
    # L = − (Σ_t mask_t log π(y_t | x, y_<t)) / (Σ_t mask_t)
    return -(logprobs * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------- rollout


@torch.no_grad()
def sample_and_score(cfg: Config, prompts: list[str], policy, reference, reward):
    """Y and R: M × N answers (rows of selected.jsonl) and rewards (M, N), and what
    metrics.csv says of them. M × N rows are too many for one batch: 512 at a time."""
    asked = [prompt for prompt in prompts for _ in range(cfg.samples)]
    answers, rewards, kl = [], [], None
    for start in range(0, len(asked), 512):
        part = asked[start : start + 512]
        chats = [common.chat(prompt) for prompt in part]
        rollout = common.generate(policy, chats, cfg.max_new_tokens, cfg.temperature)
        rewards.append(reward(part, rollout))
        columns = zip(part, common.completions(rollout), rollout.finished.tolist())
        keys = ("prompt", "completion", "completion_finished")
        answers += [dict(zip(keys, row)) for row in columns]
        if kl is None:  # the first 512 tell enough
            models = (policy, reference)
            p, q = (
                common.token_logprobs(m, rollout.tokens, rollout.response_mask) for m in models
            )
            kl = (p - q).sum(1).mean().item()
    R = torch.cat(rewards).view(len(prompts), cfg.samples)
    gold = [common.gold_reward(*answer.values()) for answer in answers]
    row = {"reward": R.mean().item(), "gold": sum(gold) / len(gold), "kl": kl}
    return answers, R, row


def select(cfg: Config, rewards: Tensor) -> Tensor:
    """Flat indices of the answers that are kept, by the rule that --select names."""
    if cfg.select == "top_k":
        return top_k_overall(rewards, cfg.top_k)
    rule = top_per_prompt if cfg.select == "per_prompt" else random_per_prompt
    M, N = rewards.shape
    return torch.arange(M, device=rewards.device) * N + rule(rewards)


# ---------------------------------------------------------------------------------- update


def main(cfg: Config) -> None:
    if cfg.select == "top_k" and cfg.top_k > cfg.prompts * cfg.samples:
        common.fail(
            f"--top-k {cfg.top_k} of M·N = {cfg.prompts * cfg.samples} answers: lower it"
        )
    device = common.pick_device(cfg.device)
    prompts, held = common.read_prompts(cfg.data, cfg.max_new_tokens)
    flags = ("init", "ref") if cfg.reward else ("init", "ref", "reward_model")
    init, ref, *_ = common.ensure(cfg, *flags)
    reward = common.Reward(cfg.reward or cfg.reward_model, cfg.runs, device)
    policy = common.load_model(init, "lm", device)
    reference = common.load_model(ref, "lm", device).requires_grad_(False)

    common.seed_all(cfg.seed)
    print(
        f"{cfg.runs}/{cfg.out}: {cfg.rounds} round(s) of {cfg.prompts} prompts × {cfg.samples} "
        f"answers, kept by {cfg.select}, reward: {reward.source}"
    )
    stream, kept = common.shuffled(prompts), []
    total, show = cfg.rounds * cfg.steps, ("round", "reward", "kl", "selected", "loss")
    with common.Run(cfg, cfg.out, policy, total, show) as run:
        for step in run:
            if step % cfg.steps == 0:  # a new round, with the policy as it is now
                asked = [next(stream) for _ in range(cfg.prompts)]
                answers, R, row = sample_and_score(cfg, asked, policy, reference, reward)
                best = select(cfg, R)
                row |= {"selected": R.flatten()[best].mean().item()}
                chosen = [answers[i] | {"reward": R.flatten()[i].item()} for i in best.tolist()]
                kept += [answer | {"round": step // cfg.steps} for answer in chosen]
                tokens, mask = common.collate([common.answer_ids(a) for a in chosen], device)
                optimizer, queue = common.adamw(policy), []
            queue = queue or common.batches(mask, cfg.batch)
            batch, batch_mask = common.take(queue.pop(), tokens, mask)
            loss = imitation_loss(common.token_logprobs(policy, batch, batch_mask), batch_mask)
            lr = cfg.lr * (1 - step % cfg.steps / cfg.steps)
            loss = common.descend(loss, policy, optimizer, lr, f"step {step}")
            run.log(round=step // cfg.steps, **row, loss=loss, lr=lr)
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in kept]
        common.write(run.folder / "selected.jsonl", "".join(lines))
    found = common.report(cfg, cfg.ref, reward, held, device)
    common.before_and_after(cfg, found, device)


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
