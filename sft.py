"""Instruction fine-tuning: teach a base model to answer in the asked format, and to stop.

The base model is made here too, by next-token prediction on raw text. Instruction tuning
(chapter "Instruction Finetuning") is then the same loss on [USER] prompt [ASSISTANT]
response [EOS], with the prompt masked:

    L(π) = − mean over response tokens t of log π(y_t | x, y_<t)          nats per token

    symbol         here                  made by
    x, y           prompt, completion    common.demonstrations, or --data
    log π(y_t|·)   logprobs[:, t]        common.token_logprobs
    t in y         mask[:, t]            common.collate: True on the response, EOS included
    L              loss                  sft_loss; for the base model the mask is all True

The result, runs/sft, is where RLHF starts, and π_ref, from which every KL is measured.

    python sft.py                        makes runs/base first if it is missing
    python sft.py --data mine.jsonl      rows of {"prompt", "completion"} or {"messages"}

Look at: the loss, which falls to the entropy of mixed human answers and not to 0; the same
questions put to the base model, which rambles on, and to the SFT model, which answers and
stops. metrics.csv: `loss` (nats per token), `held_out_loss` (the same on held-out rows,
empty between measurements), `lr`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import common
from common import Transformer, arg


@dataclass
class Config:
    steps: int = arg(300, "instruction tuning: gradient steps", low=1)
    batch: int = arg(64, "rows per step, B", low=1)
    lr: float = arg(2e-3, "instruction tuning: learning rate, falling to 0")
    demonstrations: int = arg(2400, "of the built-in world, a sixth of them held out", low=50)
    data: str = arg(None, "your own JSONL: {prompt, completion} or {messages}")
    base_steps: int = arg(200, "base model: gradient steps", low=1)
    base_lr: float = arg(3e-3, "base model: learning rate, falling to 0")
    raw: str = arg(None, "your own UTF-8 text for the base model, which is made anew")
    max_new_tokens: int = arg(24, "longest sampled answer, in tokens", low=1)
    init: str = arg("base", "the model to start from, under --runs")
    out: str = arg("sft", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token) of the tokens in the mask, (B, T) -> ().

    The mean is over the whole batch's tokens, so that a long row counts for more than a
    short one. Source: "Instruction Finetuning"; pretraining's loss with the prompt masked.
    """
    # L = − (Σ_t mask_t log π(y_t | x, y_<t)) / (Σ_t mask_t)
    return -(logprobs * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------ data


def read_text(path: str) -> str:
    """The raw text of --raw, which must be UTF-8 and long enough to learn from."""
    try:
        text = common.read(path).decode()
    except UnicodeDecodeError as error:
        common.fail(f"{path}:0: byte {error.start} is not UTF-8; save the file as UTF-8")
    if len(text) < 1000:
        common.fail(f"{path}:0: {len(text)} characters are too few; give at least 1000")
    return text


def raw_windows(text: str, width: int = 32) -> tuple[Tensor, Tensor]:
    """The text cut into B windows: tokens (B, T), and a mask that is True everywhere."""
    ids = torch.tensor(common.encode(text))
    width = min(width, len(ids))
    tokens = ids[: len(ids) // width * width].view(-1, width)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def chat_rows(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """[USER] prompt [ASSISTANT] response [EOS]: tokens (B, T), and the response's mask."""
    return common.collate([common.answer_ids(row) for row in rows])


# ---------------------------------------------------------------------------------- update


def train(cfg: Config, out: str, model: Transformer, rows, held, lr: float, steps: int) -> None:
    """Descend L on rows = (tokens, mask), measure it on `held`, and save to runs/`out`."""
    (tokens, mask), (held_tokens, held_mask) = (
        [x.to(model.device) for x in y] for y in (rows, held)
    )
    optimizer, queue = common.adamw(model), []
    with common.Run(cfg, out, model, steps, show=("loss", "held_out_loss")) as run:
        for step in run:
            queue = queue or common.batches(mask, cfg.batch)
            batch, batch_mask = common.take(queue.pop(), tokens, mask)
            loss = sft_loss(common.token_logprobs(model, batch, batch_mask), batch_mask)
            now = lr * (1 - step / steps)
            value = common.descend(loss, model, optimizer, now, f"{out}, step {step}")
            held_out_loss = math.nan
            if step % 50 == 0 or step == steps - 1:
                with torch.no_grad():
                    logprobs = common.token_logprobs(model, held_tokens, held_mask)
                    held_out_loss = sft_loss(logprobs, held_mask).item()
            run.log(loss=value, held_out_loss=held_out_loss, lr=now)


def make_base(cfg: Config, device: torch.device) -> None:
    """Next-token prediction on raw text, from random weights, to runs/base."""
    print(f"{cfg.runs}/base: next-token prediction on raw text, {cfg.base_steps} steps")
    text = read_text(cfg.raw) if cfg.raw else common.raw_text(cfg.seed)
    cut = int(len(text) * 0.95)  # the end of the text is held out
    model = Transformer(common.ModelConfig()).to(device)
    rows, held = raw_windows(text[:cut]), [x[:256] for x in raw_windows(text[cut:])]
    train(cfg, "base", model, rows, held, cfg.base_lr, cfg.base_steps)


def main(cfg: Config) -> None:
    if cfg.raw and cfg.init != "base":
        common.fail(f"--raw {cfg.raw}: it is for the base model; use it without --init")
    device = common.pick_device(cfg.device)
    if cfg.data:
        rows = common.read_jsonl(cfg.data, ("prompt", "completion"))
    else:
        rows = common.demonstrations(cfg.demonstrations, cfg.seed)
    train_rows, held_rows = common.split(rows)
    common.seed_all(cfg.seed)
    if cfg.init == "base" and (cfg.raw or not common.is_done(Path(cfg.runs) / "base")):
        make_base(cfg, device)
    model = common.load_model(common.ensure(cfg, "init")[0], "lm", device)

    common.seed_all(cfg.seed)
    print(f"{cfg.runs}/{cfg.out}: instruction tuning on {len(train_rows)} demonstrations")
    rows, held = chat_rows(train_rows), chat_rows(held_rows[:512])
    train(cfg, cfg.out, model, rows, held, cfg.lr, cfg.steps)

    prompts = (
        [row["prompt"] for row in held_rows] if cfg.data else common.read_prompts(None, 0)[1]
    )
    reward = common.find_reward(cfg, device)
    ref = "sft" if common.is_done(Path(cfg.runs) / "sft") else cfg.out
    found = common.report(cfg, ref, reward, prompts, device)
    common.before_and_after(cfg, found, device)


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
