"""Instruction fine-tuning: teach a base model to answer in a chat format, and to stop.

The base model is made here too, by next-token prediction on raw text. Instruction tuning
(chapter "Instruction Fine-Tuning") is then the same loss on [USER] prompt [ASSISTANT]
response [EOS], with the prompt masked:

    L(π) = − mean over response tokens t of log π(y_t | x, y_<t)          nats per token

    symbol         here                  made by
    x, y           prompt, completion    zoo.demonstrations, or --data
    log π(y_t|·)   logprobs[:, t]        common.token_logprobs
    t in y         mask[:, t]            common.collate: True on the response, EOS included
    L              loss                  sft_loss; base model: the same, on all tokens

A step, numbered as in the code:
    1  draw a minibatch of rows
    2  log π of every response token
    3  descend L

The result, runs/sft, is where RLHF starts, and π_ref, from which every KL is measured.

    python sft.py                        makes runs/base first if it is missing, and anew if
                                         a flag of the base model is given
    python sft.py --data mine.jsonl      rows of {"prompt", "completion"} or {"messages"}

Without --data, questions and answers are those of a toy world, the zoo (data/zoo.py). Its
people answer in five styles and are partly wrong; what they value stands in `gold`.

Look at: the loss, which falls to the entropy of these mixed answers (about 0.3) and not to 0;
the same questions put to the base model, which rambles on, and to the SFT model, which answers
and stops. metrics.csv: `loss`; `held_out_loss`, every 50 steps; `grad_norm`, before clipping;
`lr`.

Differs from the book: instruction tuning usually has a tenth of the learning rate of
pretraining, or less, and smaller batches. Here both are close, as the model and both trainings
are small.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import common
from common import Transformer, arg
from data import zoo


@dataclass
class Config:
    steps: int = arg(300, "instruction tuning: gradient steps", low=1)
    batch: int = arg(64, "rows per step, B", low=1)
    lr: float = arg(2e-3, "instruction tuning: learning rate, falling to 0", low=0)
    demonstrations: int = arg(2000, "rows of the zoo to train on", low=1)
    data: str = arg(None, "your own JSONL: {prompt, completion} or {messages}")
    base_steps: int = arg(200, "base model: gradient steps", low=1)
    base_lr: float = arg(3e-3, "base model: learning rate, falling to 0", low=0)
    raw: str = arg(None, "base model: your own text (default: that of --data, or the zoo's)")
    layers: int = arg(2, "base model: layers", low=1)
    channels: int = arg(128, "base model: channels C, a multiple of 32", low=32)
    context: int = arg(512, "base model: longest sequence, in tokens", low=32)
    max_new_tokens: int = arg(24, "longest sampled answer, in tokens", low=1)
    init: str = arg("base", "the model to start from, under --runs")
    out: str = arg("sft", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "random seed: the same command, the same result", low=0)
    device: str = arg("auto", "a torch device; auto: cuda, else mps, else cpu")


# ------------------------------------------------------------------------------- the maths


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood, nats per token: the mean over all tokens in the mask, not over
    rows. (B, T) each -> (). Source: "Instruction Fine-Tuning"."""
    # L = − Σ_t mask_t log π(y_t | x, y_<t) / Σ_t mask_t
    return -(logprobs * mask).sum() / mask.sum()


# -------------------------------------------------------------------------------- the step


def train(cfg: Config, out: str, model: Transformer, rows, held, lr: float, steps: int) -> None:
    """Descend L on rows = (tokens, mask), measure it on `held`, and save to runs/`out`."""
    stream, optimizer = common.minibatches(cfg.batch, *rows), common.adam(model)
    with common.Run(cfg, out, model, steps, show=("loss", "held_out_loss")) as run:
        for step in range(steps):
            # 1. rows (x, y)
            tokens, mask = next(stream)
            # 2. log π(y_t | x, y_<t)
            logprobs = common.token_logprobs(model, tokens, mask)
            # 3. L
            loss = sft_loss(logprobs, mask)
            rate = lr * (1 - step / steps)
            norm = common.descend(loss, model, optimizer, rate)

            held_out = None
            if step % 50 == 0 or step + 1 == steps:
                with torch.no_grad():
                    held_out = sft_loss(common.token_logprobs(model, *held), held[1])
            run.log(loss=loss, held_out_loss=held_out, grad_norm=norm, lr=rate)


# ------------------------------------------------------------------------------------ data


def raw_windows(text: str, width: int = 32) -> tuple[Tensor, Tensor]:
    """The text cut into B windows: tokens (B, T), and a mask of what is predicted, all but the
    first token of each window."""
    ids = torch.tensor(common.encode(text))
    width = min(width, len(ids))
    tokens = ids[: len(ids) // width * width].view(-1, width)
    return tokens, torch.arange(width).expand_as(tokens) > 0


def make_base(cfg: Config, text: str, device: torch.device) -> None:
    """Next-token prediction on raw text, from random weights, to runs/base."""
    print(f"base: next-token prediction, {cfg.base_steps} steps")
    common.seed_all(cfg.seed)
    C, heads = cfg.channels, cfg.channels // 32
    widths = dict(channels=C, hidden=C * 11 // 4, heads=heads, kv_heads=heads)
    model = Transformer(common.ModelConfig(layers=cfg.layers, context=cfg.context, **widths))
    tokens, mask = (x.to(device) for x in raw_windows(text))
    cut = len(tokens) * 19 // 20 or 1  # the end of the text is held out, if there is one
    end = slice(cut, cut + 256) if cut < len(tokens) else slice(1)
    rows, held = (tokens[:cut], mask[:cut]), (tokens[end], mask[end])
    train(cfg, "base", model.to(device), rows, held, cfg.base_lr, cfg.base_steps)


def main(cfg: Config) -> None:
    device = common.pick_device(cfg.device)
    flags = ("raw", "base_steps", "base_lr", "layers", "channels", "context")
    changed = [flag for flag in flags if getattr(cfg, flag) != getattr(Config, flag)]
    if changed and cfg.init != "base":
        common.fail(f"--{changed[0].replace('_', '-')} is about base, and --init is {cfg.init}")
    if cfg.channels % 32:
        common.fail(f"--channels {cfg.channels}: must be a multiple of 32")
    there = (Path(cfg.runs) / "base/model.pt").exists()
    new_base = cfg.init == "base" and (bool(changed) or not there)
    context = cfg.context
    if not new_base:
        context = common.load_run(cfg, cfg.init, "lm", device).config.context
    if cfg.data:
        rows = common.read_jsonl(cfg.data, ("prompt", "completion"), context)
        train_rows, held_rows = common.split(rows, own=True)
    else:
        train_rows = zoo.demonstrations(cfg.demonstrations, cfg.seed)
        held_rows = zoo.demonstrations(cfg.demonstrations // 5 + 1, cfg.seed, held_out=True)
    asked = [row["prompt"] for row in held_rows] if cfg.data else zoo.HELD_OUT_PROMPTS
    prompts = common.fit_prompts(cfg, asked, context)
    if new_base:
        text = zoo.raw_text(cfg.seed)
        if cfg.raw:
            text = Path(cfg.raw).read_text("utf-8-sig")
        elif cfg.data:
            text = "\n".join(f"{row['prompt']}\n{row['completion']}" for row in train_rows)
        if not text.strip():
            common.fail(f"{cfg.raw} is empty")
        make_base(cfg, text, device)
    model = common.load_run(cfg, cfg.init, "lm", device)

    print(f"{cfg.out}: instruction tuning on {len(train_rows)} rows, {len(held_rows)} held out")
    common.seed_all(cfg.seed)
    rows, held = (common.collate([common.answer_ids(row) for row in side], device)
                  for side in (train_rows, held_rows[:512]))  # fmt: skip
    train(cfg, cfg.out, model, rows, held, cfg.lr, cfg.steps)

    ref = "sft" if (Path(cfg.runs) / "sft/model.pt").exists() else cfg.out
    reward = common.table_reward(cfg, device)
    common.closing_table(cfg, [ref, cfg.init, cfg.out], *reward, prompts, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
