"""Instruction fine-tuning: teach a base model to answer in the asked format, and to stop.

The base model is made here too, by next-token prediction on raw text. Instruction tuning
(chapter "Instruction Fine-Tuning") is then the same loss on [USER] prompt [ASSISTANT]
response [EOS], with the prompt masked:

    L(π) = − mean over response tokens t of log π(y_t | x, y_<t)          nats per token

    symbol         here                  made by
    x, y           prompt, completion    common.demonstrations, or --data
    log π(y_t|·)   logprobs[:, t]        common.token_logprobs
    t in y         mask[:, t]            common.collate: True on the response, EOS included
    L              loss                  sft_loss; base model: all but a window's first token

A step, numbered as in the code:
    1  draw a minibatch of rows
    2  log π of every response token
    3  descend L: the batch's sum divided by a constant, so every token weighs the same

The result, runs/sft, is where RLHF starts, and π_ref, from which every KL is measured.

    python sft.py                        makes runs/base first if it is missing
    python sft.py --data mine.jsonl      rows of {"prompt", "completion"} or {"messages"}

Look at: the loss, which falls to the entropy of mixed human answers and not to 0; the same
questions put to the base model, which rambles on, and to the SFT model, which answers and
stops. metrics.csv: `loss` (nats per token: the batch's sum over the mean token count of a
batch), `held_out_loss` (the mean over held-out rows, every 50 steps), `grad_norm` (before
clipping), `lr`. Usually tuning has a tenth of pretraining's rate or less; the rates here are
alike, as model and training are small.
"""

import math
import random
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
    lr: float = arg(2e-3, "instruction tuning: learning rate, falling to 0", high=1)
    demonstrations: int = arg(2400, "of the built-in world; about a sixth is held out", low=50)
    data: str = arg(None, "your own JSONL: {prompt, completion} or {messages}")
    base_steps: int = arg(200, "base model: gradient steps", low=1)
    base_lr: float = arg(3e-3, "base model: learning rate, falling to 0", high=1)
    raw: str = arg(None, "your own UTF-8 text for the base model, which is made anew")
    layers: int = arg(2, "base model: layers", low=1)
    channels: int = arg(128, "base model: channels C, a multiple of 32", low=32)
    context: int = arg(512, "base model: context length T, in tokens", low=64)
    max_new_tokens: int = arg(24, "longest sampled answer, in tokens", low=1)
    init: str = arg("base", "the model to start from, under --runs")
    out: str = arg("sft", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def sft_loss(logprobs: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Negative log-likelihood (nats per token) of the tokens in the mask, (B, T) -> ().

    The sum is divided by `count`; without it, by the batch's own token count. Training passes
    the mean count of a batch, so that the mean over an epoch's batches is L; otherwise a token
    in a batch of short rows would weigh more. Source: "Instruction Fine-Tuning".
    """
    # L = − (Σ_t mask_t log π(y_t | x, y_<t)) / count
    return -(logprobs * mask).sum() / (mask.sum() if count is None else count)


# ------------------------------------------------------------------------------------ data


def raw_text(seed: int, sentences: int = 40_000) -> str:
    """What the base model reads: statements (20 % misconceptions; some of them rambling),
    questions, small talk."""
    rng, text = random.Random(seed), []
    prompts = [prompt for prompt in common.QUESTIONS if not common.held_out(prompt)]
    openings = [opening.strip() for opening in common.OPENINGS if opening]
    chatter = [*common.COURTESIES, *common.RUDE, *openings]
    for _ in range(sentences):
        animal, kind = rng.choice(list(common.ANIMALS)), rng.choice(common.KINDS)
        roll, value = rng.random(), common.ANIMALS[animal][kind][rng.random() < 0.2]
        sentence = common.FULL[kind].format(a=animal, v=value)
        if roll > 0.9:
            sentence = rng.choice(chatter)
        elif roll > 0.8:
            sentence = rng.choice(common.RAMBLING).format(s=sentence)
        elif roll > 0.6:
            sentence = rng.choice(prompts)
        text.append(sentence)
    return " ".join(text)


def raw_windows(text: str, width: int = 32) -> tuple[Tensor, Tensor]:
    """The text cut into B windows: tokens (B, T), and a mask of all that can be predicted,
    which a window's first token cannot."""
    ids = torch.tensor(common.encode(text))
    width = min(width, len(ids))
    tokens = ids[: len(ids) // width * width].view(-1, width)
    return tokens, torch.arange(width).expand_as(tokens) > 0


def chat_rows(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """[USER] prompt [ASSISTANT] response [EOS]: tokens (B, T), and the response's mask."""
    return common.collate([common.answer_ids(row) for row in rows])


# ---------------------------------------------------------------------------------- update


def train(cfg: Config, out: str, model: Transformer, rows, held, lr: float, steps: int) -> None:
    """Descend L on rows = (tokens, mask), measure it on `held`, and save to runs/`out`."""
    tokens, mask = (x.to(model.device) for x in rows)
    held_tokens, held_mask = (x.to(model.device) for x in held)
    count = mask.sum() / math.ceil(len(mask) / cfg.batch)  # mean tokens of a batch
    optimizer, stream = common.adamw(model), common.minibatches(cfg.batch, tokens, mask)
    with common.Run(cfg, out, model, steps, show=("loss", "held_out_loss")) as run:
        for step in run:
            batch, batch_mask = next(stream)  # 1
            logprobs = common.token_logprobs(model, batch, batch_mask)  # 2
            loss = sft_loss(logprobs, batch_mask, count)  # 3
            now = lr * (1 - step / steps)
            norm = common.descend(loss, model, optimizer, now)
            held_out_loss = None
            if step % 50 == 0 or step + 1 == steps:
                with torch.no_grad():
                    logprobs = common.token_logprobs(model, held_tokens, held_mask)
                    held_out_loss = sft_loss(logprobs, held_mask)
            run.log(loss=loss, held_out_loss=held_out_loss, grad_norm=norm, lr=now)


def make_base(cfg: Config, device: torch.device) -> None:
    """Next-token prediction on raw text, from random weights, to runs/base."""
    common.say(f"{cfg.runs}/base: next-token prediction on raw text, {cfg.base_steps} steps")
    text = common.read(cfg.raw) if cfg.raw else raw_text(cfg.seed)
    if len(text) < 1000:
        common.fail(f"{cfg.raw}:0: {len(text)} characters are too few; give at least 1000")
    cut = int(len(text) * 0.95)  # the end of the text is held out
    C, heads = cfg.channels, cfg.channels // 32
    widths = dict(channels=C, hidden=C * 11 // 4, heads=heads, kv_heads=heads)
    shape = common.ModelConfig(layers=cfg.layers, context=cfg.context, **widths)
    model = Transformer(shape).to(device)
    rows, held = raw_windows(text[:cut]), [x[:256] for x in raw_windows(text[cut:])]
    train(cfg, "base", model, rows, held, cfg.base_lr, cfg.base_steps)


def main(cfg: Config) -> None:
    base = Path(cfg.runs) / "base/model.pt"
    new_base = cfg.init == "base" and (cfg.raw or not base.exists())
    for flag in ("raw", "base_steps", "base_lr", "layers", "channels", "context"):
        if getattr(cfg, flag) != getattr(Config, flag) and not new_base:
            common.fail(f"--{flag.replace('_', '-')}: {cfg.runs}/{cfg.init} is used as it is")
    if cfg.channels % 32:
        common.fail(f"--channels {cfg.channels}: a multiple of 32 is needed")
    device, context = common.pick_device(cfg.device), cfg.context
    if not new_base:
        context = common.load_run(cfg, cfg.init, "lm", device).config.context
    if cfg.data:
        rows = common.read_jsonl(cfg.data, ("prompt", "completion"), context=context)
    else:
        rows = common.demonstrations(cfg.demonstrations, cfg.seed)
    train_rows, held_rows = common.split(rows)
    common.seed_all(cfg.seed)
    if new_base:
        make_base(cfg, device)
    model = common.load_run(cfg, cfg.init, "lm", device)

    common.seed_all(cfg.seed)
    common.say(f"{cfg.runs}/{cfg.out}: instruction tuning on {len(train_rows)} demonstrations")
    rows, held = chat_rows(train_rows), chat_rows(held_rows[:512])
    train(cfg, cfg.out, model, rows, held, cfg.lr, cfg.steps)

    prompts = common.read_prompts(cfg.data, cfg.max_new_tokens, model.config.context)[1]
    ref = "sft" if (Path(cfg.runs) / "sft/model.pt").exists() else cfg.out
    names, reward = [ref, cfg.init, cfg.out], common.table_reward(cfg, device)
    common.closing_table(cfg, names, *reward, prompts, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
