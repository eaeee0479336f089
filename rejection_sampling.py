"""Rejection sampling: draw N answers per prompt, keep the best by reward, imitate them.

The most basic way to raise E[r(x, y)] (chapter "Rejection Sampling"): there is no
policy gradient and no KL penalty, only supervised learning on selected answers. Imitating
best-of-N answers moves π towards the best-of-N policy, whose KL to the sampler is at most
log N − (N − 1)/N nats.

    symbol         here                  made by
    x_1 … x_M      asked                 common.shuffled; beyond all prompts, some twice
    Y (M, N)       rollouts, M·N rows    common.sample_answers, eq:rs_completion_matrix
    R (M, N)       R                     common.load_reward, eq:rs_reward_matrix
    S(R)           selected              top_per_prompt or top_k_overall; controls: random_…
    L              loss                  imitation_loss: the SFT loss on the selected answers
    KL(π ‖ π_ref)  kl                    measured on the samples, before a round's updates

A round, numbered as in the code:
    1  sample N answers to each of M prompts, from the policy as it is
    2  score them: R (M, N)
    3  select S(R)
    4  imitate what was selected, token for token: descend L

    python rejection_sampling.py                    makes whatever input is missing first
    python rejection_sampling.py --rounds 3 --out rs_3      each from the improved policy
    python rejection_sampling.py --select random --out rs_random        the matched control

Look at: gold in the closing table, which is what the zoo's annotators value, beside that of the
control, which trains on equally many answers, chosen at random, and so should stand still.
`random` is the control of `per_prompt`, `random_k` that of `top_k`. selected.jsonl has the
answers that were kept; `sft.py --data` takes it. metrics.csv: `round`; of the round's samples,
drawn before its updates, `reward`, `gold` (means) and `kl` (nats per response; an estimate of
KL(π ‖ π_ref) at temperature 1 alone); `selected_reward` and `selected_gold`, the means of those
kept; `loss` (nats per token), `grad_norm` (before clipping), `lr`.

Differs from the book: it samples at 0.7 to 1.0 with top-p; and it starts every round from the
same checkpoint, where --rounds goes on from the current policy. An answer that was cut may be
selected, and is then imitated without EOS.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import common
from common import arg
from data import zoo


@dataclass
class Config:
    prompts: int = arg(2048, "M, prompts per round", low=1)
    samples: int = arg(16, "N, completions per prompt", low=1)
    select: str = arg("per_prompt", "S(R), how answers are selected",
                      choices=("per_prompt", "top_k", "random", "random_k"))  # fmt: skip
    top_k: int = arg(1024, "K, answers kept by --select top_k and random_k", low=1)
    rounds: int = arg(1, "rounds of sample, select, imitate", low=1)
    steps: int = arg(96, "gradient steps per round", low=1)
    batch: int = arg(64, "selected answers per step", low=1)
    lr: float = arg(3e-4, "learning rate, falling to 0 in each round", low=0)
    temperature: float = arg(1.0, "of the samples; above 1 for more variety", low=0.01)
    max_new_tokens: int = arg(24, "longest response, in tokens", low=1)
    data: str = arg(None, "your own prompts: JSONL rows of {prompt}")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, from which KL is measured, under --runs")
    out: str = arg("rejection_sampling", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "random seed: the same command, the same result", low=0)
    device: str = arg("auto", "a torch device; auto: cuda, else mps, else cpu")


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
    """The control of top_per_prompt, blind to reward: (M, N) -> (M,) columns."""
    M, N = rewards.shape
    return torch.randint(N, (M,), generator=generator)


def random_k_overall(
    rewards: Tensor, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """The control of top_k_overall, blind to reward: (M, N) -> (k,) flat indices, no two the
    same. Raises ValueError for k > M·N."""
    if not 1 <= k <= rewards.numel():
        raise ValueError(f"top_k {k} of {rewards.numel()} answers: choose at most that many")
    return torch.randperm(rewards.numel(), generator=generator)[:k]


def select(rule: str, rewards: Tensor, k: int) -> Tensor:
    """S(R) by the rule that --select names: (M, N) -> flat indices of the answers to keep."""
    if rule in ("top_k", "random_k"):
        return top_k_overall(rewards, k) if rule == "top_k" else random_k_overall(rewards, k)
    M, N = rewards.shape
    columns = top_per_prompt(rewards) if rule == "per_prompt" else random_per_prompt(rewards)
    return torch.arange(M) * N + columns


def imitation_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """The SFT loss, nats per token, on selected answers: (B, T) each -> ()."""
    # L = − Σ_t mask_t log π(y_t | x, y_<t) / Σ_t mask_t
    return -(logprobs * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------- the round


def train(cfg: Config, policy, reference, reward_fn, prompts: list[str]) -> None:
    """Rounds of sampling, selection and imitation; saved to runs/`out`."""
    show = ("reward", "kl", "selected_reward", "loss")
    stream, kept = common.shuffled(prompts), []
    with common.Run(cfg, cfg.out, policy, cfg.rounds * cfg.steps, show) as run:
        for number in range(cfg.rounds):
            # 1. Y: N answers to each of M prompts, from the policy as it is
            asked = list(islice(stream, cfg.prompts))
            rollouts = list(
                common.sample_answers(
                    policy, asked, cfg.samples, cfg.max_new_tokens, cfg.temperature
                )
            )
            # 2. R (M, N), a row for each prompt, in the order of the rollouts
            R = torch.cat([reward_fn(x, rollout).cpu() for x, rollout in rollouts])
            R = R.view(cfg.prompts, cfg.samples)
            # 3. S(R)
            selected = select(cfg.select, R, cfg.top_k)
            about = {"round": number} | measure(policy, reference, rollouts, R, selected, kept)
            # 4. imitate the selected answers, with a fresh Adam
            ids = [(common.chat(x), y) for xs, rollout in rollouts
                   for x, y in zip(xs, common.response_ids(rollout))]  # fmt: skip
            rows = common.collate([ids[i] for i in selected.tolist()], policy.device)
            batches, optimizer = common.minibatches(cfg.batch, *rows), common.adam(policy)
            for step in range(cfg.steps):
                tokens, mask = next(batches)
                loss = imitation_loss(common.token_logprobs(policy, tokens, mask), mask)
                lr = cfg.lr * (1 - step / cfg.steps)
                norm = common.descend(loss, policy, optimizer, lr)
                run.log(**about, loss=loss, grad_norm=norm, lr=lr)
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in kept]
        common.write(run.folder / "selected.jsonl", "".join(lines))


@torch.no_grad()
def measure(policy, reference, rollouts, R: Tensor, selected: Tensor, kept: list) -> dict:
    """A round's part of metrics.csv; the selected answers are added to `kept`."""
    answers, kl = [], []
    for asked, rollout in rollouts:
        tokens, mask = rollout.tokens, rollout.response_mask
        logprobs = common.token_logprobs(policy, tokens, mask)
        ref_logprobs = common.token_logprobs(reference, tokens, mask)
        kl.append((logprobs - ref_logprobs).sum(1))
        answers += zip(asked, common.completions(rollout), rollout.finished.tolist())
    gold = torch.tensor([zoo.gold_reward(*answer) for answer in answers])
    for i in selected.tolist():
        row = dict(zip(("prompt", "completion", "completion_finished"), answers[i]))
        kept.append(row | {"reward": R.flatten()[i].item()})
    means = {
        "reward": R.mean(),
        "gold": gold.mean(),
        "kl": torch.cat(kl).mean(),
        "selected_reward": R.flatten()[selected].mean(),
        "selected_gold": gold[selected].mean(),
    }
    return {key: value.item() for key, value in means.items()}


def main(cfg: Config) -> None:
    if cfg.select in ("top_k", "random_k") and cfg.top_k > cfg.prompts * cfg.samples:
        common.fail(f"--top-k {cfg.top_k}: more than --prompts × --samples; lower it")
    device = common.pick_device(cfg.device)
    reward_fn = common.load_reward(cfg, cfg.reward, device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    reference = common.load_run(cfg, cfg.ref, "lm", device).requires_grad_(False)
    context = min(policy.config.context, reference.config.context)
    prompts, held = common.read_prompts(cfg, context)

    common.seed_all(cfg.seed)
    about = f"{cfg.prompts} prompts × {cfg.samples} answers, selected by {cfg.select}"
    source = Path(cfg.reward).name
    print(f"{cfg.out}: {about}; reward: {source}")
    train(cfg, policy, reference, reward_fn, prompts)
    names = [cfg.ref, cfg.init, cfg.out]
    common.closing_table(cfg, names, reward_fn, source, held, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
