"""Rejection sampling: draw N answers per prompt, keep the best by reward, imitate them.

The most basic way to raise E[r(x, y)] (chapter "Rejection Sampling"): there is no
policy gradient and no KL penalty, only supervised learning on selected answers. Imitating
best-of-N answers moves π towards the best-of-N policy, whose KL to the sampler is at most
log N − (N − 1)/N nats.

    symbol         here                  made by
    x_1 … x_M      prompts               common.read_prompts
    Y (M, N)       answers               common.samples, eq:rs_completion_matrix
    R (M, N)       rewards               common.load_reward, eq:rs_reward_matrix
    S(R)           selected              top_per_prompt, top_k_overall or random_per_prompt
    L              loss                  imitation_loss: the SFT loss on the selected answers
    KL(π ‖ π_ref)  kl                    measured on the samples of every round

A round, numbered as in the code:
    1  sample N answers to each of M prompts, from the policy as it is
    2  score them: R (M, N)
    3  select S(R)
    4  imitate what was selected, token for token: descend L

    python rejection_sampling.py                    makes whatever input is missing first
    python rejection_sampling.py --rounds 3 --out rs_3      each from the improved policy
    python rejection_sampling.py --select random --out rs_random        the matched control

Look at: gold beside the control, which trains on equally many answers, chosen at random, and
so stands still. selected.jsonl has the answers that were kept; `sft.py --data` takes it.
metrics.csv: `round`; of the round's samples, drawn before its updates, `reward`, `gold`
(means) and `kl` (nats per response; of π only at temperature 1); `selected_reward` and
`selected_gold`, the means of those kept; `loss` (nats per token: the batch's sum over the
mean token count of a batch), `grad_norm` (before clipping), `lr`.
"""

import json
import math
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
    lr: float = arg(3e-4, "learning rate, falling to 0 in each round", high=1)
    temperature: float = arg(1.0, "of the samples; above 1 for more variety", low=0.01)
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
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
    index. They may all come from easy prompts. Raises ValueError for k > M·N.
    eq:rs_topk_selection"""
    if not 1 <= k <= rewards.numel():
        raise ValueError(f"top_k {k} of {rewards.numel()} answers: choose at most that many")
    # S_K(R) = argsort(vec R, descending)[:K]
    return rewards.flatten().sort(descending=True, stable=True).indices[:k]


def random_per_prompt(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The control, blind to reward: (M, N) -> (M,) columns."""
    M, N = rewards.shape
    return torch.randint(N, (M,), generator=generator, device=rewards.device)


def imitation_loss(logprobs: Tensor, mask: Tensor, count: float | Tensor | None = None):
    """The SFT loss, nats per token, on the selected answers: (B, T) each -> (). Divided by
    the batch's tokens, or by `count`, a constant, so that long answers keep their weight."""
    # L = − (Σ_t mask_t log π(y_t | x, y_<t)) / count
    return -(logprobs * mask).sum() / (mask.sum() if count is None else count)


# ----------------------------------------------------------------------------------- rollout


@torch.no_grad()
def sample_and_score(cfg: Config, prompts: list[str], policy, reference, reward_fn):
    """Steps 1 and 2: the M × N answers, rows of selected.jsonl and their (prompt, response)
    ids; rewards and gold, (M, N) each; and the KL."""
    answers, ids, rewards, gold, kl = [], [], [], [], []
    given = prompts, cfg.samples, cfg.max_new_tokens, cfg.temperature
    for asked, rollout in common.samples(policy, *given):
        tokens, mask = rollout.tokens, rollout.response_mask
        rewards.append(reward_fn(asked, rollout).cpu())
        log_ratio = common.token_logprobs(policy, tokens, mask)
        log_ratio = log_ratio - common.token_logprobs(reference, tokens, mask)
        kl.append(log_ratio.sum(1))
        ids += zip([common.chat(x) for x in asked], common.response_ids(rollout))
        for x, y, end in zip(asked, common.completions(rollout), rollout.finished.tolist()):
            answers.append({"prompt": x, "completion": y, "completion_finished": end})
            gold.append(common.gold_reward(x, y, end))
    shape = len(prompts), cfg.samples
    rewards, gold = torch.cat(rewards).view(shape), torch.tensor(gold).view(shape)
    return answers, ids, rewards, gold, torch.cat(kl).mean()


def select(cfg: Config, rewards: Tensor) -> Tensor:
    """Step 3: flat indices of the answers that are kept, by the rule that --select names."""
    if cfg.select == "top_k":
        return top_k_overall(rewards, cfg.top_k)
    rule = top_per_prompt if cfg.select == "per_prompt" else random_per_prompt
    M, N = rewards.shape
    return torch.arange(M, device=rewards.device) * N + rule(rewards)


# ---------------------------------------------------------------------------------- update


def main(cfg: Config) -> None:
    if cfg.select == "top_k" and cfg.top_k > cfg.prompts * cfg.samples:
        common.fail(f"--top-k {cfg.top_k}: more than --prompts × --samples; lower it")
    device = common.pick_device(cfg.device)
    common.check_inputs(cfg, cfg.init, cfg.ref, cfg.reward)
    reward_fn = common.load_reward(cfg, cfg.reward, device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    reference = common.load_run(cfg, cfg.ref, "lm", device).requires_grad_(False)
    context = min(policy.config.context, reference.config.context)
    prompts, held = common.read_prompts(cfg.data, cfg.max_new_tokens, context)

    common.seed_all(cfg.seed)
    about = f"{cfg.prompts} prompts × {cfg.samples} answers, kept by {cfg.select}"
    common.say(f"{cfg.runs}/{cfg.out}: {about}, reward: {cfg.reward}")
    prompt_stream, kept = common.shuffled(prompts), []
    total, show = cfg.rounds * cfg.steps, ("round", "reward", "kl", "selected_reward", "loss")
    with common.Run(cfg, cfg.out, policy, total, show) as run:
        for step in run:
            if step % cfg.steps == 0:  # a new round, with the policy as it is now
                asked = [next(prompt_stream) for _ in range(cfg.prompts)]
                scored = sample_and_score(cfg, asked, policy, reference, reward_fn)  # 1, 2
                answers, ids, R, gold, kl = scored
                selected = select(cfg, R)  # 3
                row = {"round": step // cfg.steps, "reward": R.mean(), "gold": gold.mean()}
                row |= {"kl": kl, "selected_reward": R.flatten()[selected].mean()}
                row |= {"selected_gold": gold.flatten()[selected].mean()}
                for i in selected.tolist():
                    about = {"reward": R.flatten()[i].item(), "round": row["round"]}
                    kept.append(answers[i] | about)
                tokens, mask = common.collate([ids[i] for i in selected.tolist()], device)
                count = mask.sum() / math.ceil(len(mask) / cfg.batch)  # mean tokens of a batch
                optimizer = common.adamw(policy)
                stream = common.minibatches(cfg.batch, tokens, mask)
            batch, batch_mask = next(stream)
            logprobs = common.token_logprobs(policy, batch, batch_mask)
            loss = imitation_loss(logprobs, batch_mask, count)  # 4
            lr = cfg.lr * (1 - step % cfg.steps / cfg.steps)
            norm = common.descend(loss, policy, optimizer, lr)
            run.log(**row, loss=loss, grad_norm=norm, lr=lr)
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in kept]
    common.write(run.folder / "selected.jsonl", "".join(lines))
    common.closing_table(cfg, [cfg.ref, cfg.init, cfg.out], reward_fn, cfg.reward, held, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
