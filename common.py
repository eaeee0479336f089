"""What the five scripts share: machinery. The losses, the advantages, the penalty on KL and the
selection rules are in the scripts.

    tokens · Transformer · generate · log-probs, values, scores · steps        the first half
    files · runs · inputs · closing table · command line                       the second

Shapes: B rows, T positions, V vocabulary, C channels, N samples per prompt, M prompts.
Every (B, T) tensor is aligned with `tokens`: column t is about token t. (What the Transformer
returns at position t has read token t; `_outputs_before` moves it to column t + 1.) Inside
the Transformer: n nodes, m positions asked for.
"""

import argparse
import csv
import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import jsonl, zoo

# ---------------------------------------------------------------------------------- tokens

EOS, USER, ASSISTANT, PAD = range(4)
# four specials, 256 bytes, and every word of the zoo with and without a space before it
PIECES = [b""] * 4 + [bytes([i]) for i in range(256)]
PIECES += [x.encode() for word in zoo.WORDS for x in (word, " " + word) if len(x) > 1]
_IDS = {piece: i for i, piece in enumerate(PIECES) if i >= 4 + 256}


def encode(text: str) -> list[int]:
    """Text to ids: whole words of the zoo where they occur, else single UTF-8 bytes. No text
    encodes to one of the four specials."""
    ids = []
    for piece in re.findall(r" ?\w+|[\s\S]", text):
        piece = piece.encode()
        ids += [_IDS[piece]] if piece in _IDS else [4 + byte for byte in piece]
    return ids


def decode(ids: list[int]) -> str:
    """Ids to text; specials show as nothing. decode(encode(text)) == text."""
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def chat(prompt: str) -> list[int]:
    """[USER] prompt [ASSISTANT]: what a policy is given before it answers."""
    return [USER, *encode(prompt), ASSISTANT]


def collate(rows: list[tuple[list[int], list[int]]], device=None) -> tuple[Tensor, Tensor]:
    """(prompt ids, response ids) per row -> tokens (B, T), response_mask (B, T)."""
    T = max(len(p) + len(r) for p, r in rows)
    tokens = [p + r + [PAD] * (T - len(p) - len(r)) for p, r in rows]
    mask = [[len(p) <= t < len(p) + len(r) for t in range(T)] for p, r in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


# ----------------------------------------------------------------------------- Transformer
# A Llama-style model, and one trick for speed: rows that begin alike share work. Skip the trick
# on a first reading: suppose that every position is a node of its own. Then n = B·T, `node` and
# `place` are both 0 … B·T − 1, and `pick` only changes a shape.


@dataclass
class ModelConfig:
    """The sizes of a Transformer; saved with its weights."""

    vocab_size: int = len(PIECES)
    channels: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 352
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def prefix_tree(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The prefixes of a batch form a tree: a node is a distinct prefix. A causal model's state
    at a position depends only on the tokens up to it, so rows that begin alike, such as N
    answers to one prompt, have the same states there. Norms, linear layers and MLP run once a
    node; attention runs at every position of every row.

        tokens   where does the owl live      node   0 1 2 3 4
                 where does the fox PAD              0 1 2 5 6

    Returns node (B, T), the node at each position, and place (n,), for each node one flat
    position b·T + t where it stands. After a row's last True in `keep` (B, T) nothing is asked
    for: all those positions of the batch are one node (here 6)."""
    B, T = tokens.shape
    # A hash of each prefix: its tokens times random numbers, summed; int64 wraps round. Odd,
    # so that two tokens never give the same product; + 1, as token 0 would add nothing. Two
    # of n prefixes have the same hash with a chance of about n²/2⁶³.
    odd = torch.randint(2**62, (T,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    number = ((tokens + 1) * odd.to(tokens.device)).cumsum(1)
    needed = keep.flip(1).cumsum(1).flip(1) > 0  # a True here or later
    distinct, node = number.where(needed, 0).unique(return_inverse=True)
    flat = torch.arange(B * T, device=tokens.device)
    # of a node's positions the last: any would do, but every device must take the same
    place = torch.zeros_like(distinct).scatter_reduce_(0, node.flatten(), flat, "amax")
    return node, place


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for rows of x; F.embedding is the same with a faster backward. It takes nodes
    to positions, pick(x, node), and positions to nodes, pick(x, place)."""
    return F.embedding(index, x)


class Block(nn.Module):
    """Llama-style: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, D = c.heads, c.kv_heads, c.channels // c.heads
        self.attention_norm = nn.RMSNorm(c.channels, c.norm_eps)
        self.qkv = nn.Linear(c.channels, (c.heads + 2 * c.kv_heads) * D, bias=False)
        self.out = nn.Linear(c.heads * D, c.channels, bias=False)
        self.mlp_norm = nn.RMSNorm(c.channels, c.norm_eps)
        self.gate_up = nn.Linear(c.channels, 2 * c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.channels, bias=False)

    def forward(self, x: Tensor, cos, sin, future, node, to, cache=None) -> Tensor:
        """x (n, C) has one row per node, the result (m, C) one for each flat position in `to`.
        All blocks but the last return every node: `to` is place. The last returns the
        positions that are asked for."""
        (B, T), H, K, D = node.shape, self.heads, self.kv_heads, cos.shape[-1]
        qkv = self.qkv(self.attention_norm(x)).view(len(x), H + 2 * K, D)
        qk, v = qkv.split((H + K, K), 1)
        # rotary; cos and sin (n, 1, D): a node has one position, as equal prefixes are as long
        qk = qk * cos + qk.roll(D // 2, -1) * sin
        # attention needs whole rows: copy each node's q, k, v to every position where it stands
        qkv = pick(torch.cat((qk, v), 1).flatten(1), node).view(B, T, -1, D).transpose(1, 2)
        q, k, v = qkv.split((H, K, K), 1)  # (B, heads, T, D)
        if cache is not None:  # (2, B, K, room, D): write these T keys and values, read all
            stop = future.shape[1]  # start + T
            cache[0, :, :, stop - T : stop], cache[1, :, :, stop - T : stop] = k, v
            k, v = cache[0, :, :, :stop], cache[1, :, :, :stop]
        if H != K:  # groups of query heads share a key and value head
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        # y = softmax(q kᵀ / √D) v; `future` (T, stop) is −∞ where the key is after the query
        y = ((q * D**-0.5) @ k.transpose(-1, -2) + future).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(B * T, -1)
        # back to the positions in `to`. y has a row for each position, x for each node: look
        # up the node first (with `to` = place that gives x itself)
        x = pick(x, node.flatten()[to]) + self.out(pick(y, to))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """tokens (B, T) -> logits (B, T, V) with head "lm" (tied to the embedding), or
    -> one number per position (B, T) with head "scalar", minus the saved `offset`."""

    def __init__(self, config: ModelConfig, head: str = "lm"):
        super().__init__()
        c, self.config, self.head = config, config, head
        self.embed = nn.Embedding(c.vocab_size, c.channels)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.channels, c.norm_eps)
        nn.init.normal_(self.embed.weight, std=c.channels**-0.5)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                # as in GPT-2: what is added to the residual stream starts smaller
                residual = name.endswith(("out.weight", "down.weight"))
                scale = (2 * c.layers) ** -0.5 if residual else 1.0
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        if head == "scalar":
            self.scalar = nn.Linear(c.channels, 1, bias=False)
            nn.init.normal_(self.scalar.weight, std=(c.channels + 1) ** -0.5)
            self.register_buffer("offset", torch.zeros(()))
        # rotary: at position p, i and i + D/2 turn as a pair by the angle p θ^(−2i/D):
        # x_i cos − x_{i+D/2} sin,   x_{i+D/2} cos + x_i sin
        half = c.channels // c.heads // 2
        frequency = c.rope_theta ** (-torch.arange(half).double() / half)
        angle = torch.outer(torch.arange(c.context).double(), frequency)
        cos, sin = angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), 1)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, tokens: Tensor, keep=None, cache=None, start: int = 0) -> Tensor:
        """tokens (B, T) stand at positions start, start + 1, … Returns an output for each; or
        with `keep` (B, T), bool, only for the m positions where it is True: (m, V) or (m,).
        `cache` holds the keys and values of positions before start; those of `tokens` are
        added to it, in place."""
        (B, T), flat = tokens.shape, torch.arange(tokens.numel(), device=tokens.device)
        asked = flat if keep is None else keep.flatten().nonzero().squeeze(1)
        if start:  # `tokens` lacks the beginnings, so nothing is known to be shared
            node, place = flat.view(B, T), flat
        else:
            node, place = prefix_tree(tokens, torch.ones_like(tokens) if keep is None else keep)
        # equal prefixes are as long, so a node stands in one column only: place % T
        x, position = self.embed(tokens.flatten()[place]), start + place % T  # (n, C), (n,)
        cos, sin = self.cos[position, None], self.sin[position, None]
        future = x.new_full((T, start + T), -math.inf).triu(start + 1)
        for i, block in enumerate(self.blocks):
            to = asked if i + 1 == len(self.blocks) else place
            x = block(x, cos, sin, future, node, to, None if cache is None else cache[i])
        x = self.norm(x)
        if self.head == "scalar":
            outputs = self.scalar(x).squeeze(-1) - self.offset
        else:
            outputs = F.linear(x, self.embed.weight)
        return outputs.unflatten(0, (B, T)) if keep is None else outputs


def scalar_copy(model: Transformer) -> Transformer:
    """A new scalar-head Transformer whose trunk starts as a copy of the model's."""
    copy = Transformer(model.config, head="scalar").to(model.device)
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy


# -------------------------------------------------------------------------------- generate


@dataclass
class Rollout:
    """B sampled responses, each to its prompt."""

    tokens: Tensor  # (B, T) prompt, response, then PAD
    response_mask: Tensor  # (B, T) True on response tokens, EOS included
    finished: Tensor  # (B,) the response ended with EOS
    logprobs: Tensor  # (B, T) of the response tokens as sampled, 0 elsewhere


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0
) -> Rollout:
    """Sample one response to each of B prompts, all in one batch with a KV cache.

    All rows stand at the same position t: a row still in its prompt copies its own token t, a
    row that answers samples one, a row that has ended keeps PAD. So there is no left padding
    and no mask of padding. While no row samples, t jumps to the next prompt's end, and what
    lies between is read at once."""
    c, device, B = model.config, model.device, len(prompts)
    shortest, T = min(map(len, prompts)), max(map(len, prompts)) + max_new_tokens
    if shortest < 1 or max_new_tokens < 1 or temperature <= 0 or c.context < T:
        raise ValueError("generate: empty prompt, no new tokens, temperature ≤ 0, or too long")
    tokens = torch.tensor([p + [PAD] * (T - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    # one u per token, drawn on the CPU before the loop: every device has the same draws, and
    # they do not depend on which rows have ended
    u = torch.rand(B, T, dtype=model.embed.weight.dtype).to(device)
    mask, logprobs = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(u)
    cache = u.new_empty(c.layers, 2, B, c.kv_heads, T, c.channels // c.heads)
    # rows: those still in the batch. over: those of them that have ended, with EOS or cut;
    # they stay until enough have ended, then leave together
    rows, over = torch.arange(B, device=device), torch.zeros_like(mask[:, 0])
    read, t = 0, shortest
    while True:
        new = tokens[rows, read:t]  # what stands before is in the cache
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        p = (model(new, last, cache, start=read) / temperature).softmax(-1)  # (rows, V)
        # inverse CDF: the first token whose cumulative probability exceeds u
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True)
        logp, answering = p.gather(-1, token).log(), (t >= lengths[rows]) & ~over
        token = torch.where(answering, token.squeeze(-1), tokens[rows, t])
        logprobs[rows, t] = torch.where(answering, logp.squeeze(-1), 0.0)
        tokens[rows, t], mask[rows, t] = token, answering
        over = over | (answering & ((token == EOS) | (t + 1 == lengths[rows] + max_new_tokens)))
        going = (~over).nonzero().squeeze(-1)
        if len(going) == 0:
            break
        # on to the next position where a row samples
        read, t = t, max(t + 1, int(lengths[rows[going]].min()))
        if len(going) < 0.8 * len(rows):  # not at every step: moving the cache costs too
            rows, over, cache = rows[going], over[going], cache[:, :, going]
    longest = t + 1
    finished = ((tokens == EOS) & mask).any(1)
    return Rollout(tokens[:, :longest], mask[:, :longest], finished, logprobs[:, :longest])


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The B responses as ids, EOS included."""
    rows = zip(rollout.tokens.tolist(), rollout.response_mask.tolist())
    return [[i for i, on in zip(ids, mask) if on] for ids, mask in rows]


def completions(rollout: Rollout) -> list[str]:
    """The B responses as text."""
    return [decode(ids) for ids in response_ids(rollout)]


ROLLOUT = 24_576  # tokens in a batch of sample_answers: bounds the memory of its cache


def sample_answers(
    policy: Transformer, prompts: list[str], n: int, max_new_tokens: int, temperature=1.0
) -> Iterator[tuple[list[str], Rollout]]:
    """n answers to each of many prompts, in batches: (the prompt of each row, Rollout). The n
    answers to a prompt stand together. Short prompts come first, as a batch is as slow as its
    longest prompt."""
    prompts, asked = sorted(prompts, key=lambda x: len(chat(x))), []
    for i, prompt in enumerate(prompts):
        asked += [prompt] * n
        longest = max_new_tokens + len(chat(prompts[min(i + 1, len(prompts) - 1)]))
        if (len(asked) + n) * longest > ROLLOUT or i + 1 == len(prompts):
            yield asked, generate(policy, [chat(x) for x in asked], max_new_tokens, temperature)
            asked = []


# ------------------------------------------------------------- log-probs, values, scores

PASS = 8192  # tokens in a pass, padding included: bounds the memory of scoring many rows


def in_passes(function):
    """Let function(model, tokens, mask) see at most PASS tokens at a time, longest rows first,
    without the columns after the last True of the mask. A row shorter than a quarter of the
    first in a pass opens another: one long row must not pad all others to its length."""

    @functools.wraps(function)
    def wrapped(model: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        B, T = tokens.shape
        ends = (mask * torch.arange(1, T + 1, device=mask.device)).amax(1)
        ends, order = ends.sort(descending=True, stable=True)
        ends, first, parts = ends.tolist(), 0, []
        for i in range(1, B + 1):
            longest = max(1, ends[first])  # a mask may be all False
            # row i is not there, would not fit, or is much shorter
            if i == B or (i - first + 1) * longest > PASS or 4 * ends[i] < longest:
                rows = order[first:i]
                part = function(model, tokens[rows, :longest], mask[rows, :longest])
                parts.append(F.pad(part, (0, T - longest)) if part.dim() == 2 else part)
                first = i
        return torch.cat(parts)[order.argsort()]

    return wrapped


def _outputs_before(model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The project's one shift. The model's output at position t has read tokens ≤ t, so it
    goes to column t + 1:

        column     0   1   2   3   4
        tokens    x_0 x_1 y_0 y_1 EOS
        outputs     ─ o_0 o_1 o_2 o_3

    Returns the outputs (m,) or (m, V) of the columns in `mask` (B, T) in reading order, and a
    mask that says where they go; column 0 has none."""
    where = mask.clone()
    where[:, 0] = False
    keep = where.roll(-1, 1)  # the column before; column 0 is False, so nothing wraps
    return model(tokens, keep), where


@in_passes
def token_logprobs(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """log p(tokens[:, t] | tokens[:, :t]) in column t, (B, T), nats; column 0 is 0.
    With `mask` (B, T) they are worked out in its columns only; the others are 0."""
    logits, where = _outputs_before(model, tokens, mask)
    logp = -F.cross_entropy(logits, tokens[where], reduction="none")
    return torch.zeros_like(tokens, dtype=logp.dtype).masked_scatter(where, logp)


@in_passes
def token_values(critic: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """The critic's value of what stands before token t, in column t, (B, T); with `mask`
    (B, T) in its columns only."""
    values, where = _outputs_before(critic, tokens, mask)
    return torch.zeros_like(tokens, dtype=values.dtype).masked_scatter(where, values)


@in_passes
def _last_output(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """The output (B,) at the last True of each row of the mask (B, T)."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    return model(tokens, column == (mask * column).argmax(1, keepdim=True))


def score(reward_model: Transformer, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), (B,): the reward model's number at the last response token."""
    return _last_output(reward_model, tokens, response_mask)


# ----------------------------------------------------------------------------------- steps


def minibatches(size: int, tokens: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Random minibatches without end: (tokens, mask), at most `size` rows each. Sizes differ
    by one at most. In an epoch every row comes once. tokens and mask are (rows, T), or
    (rows, 2, T) for pairs.

    Rows of like length are not put together, although less padding would be faster: a batch of
    long rows has a large gradient, and Adam divides it by a second moment that has just grown
    with it. So long rows would count for less, and answers would come out too short."""
    column = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    while True:
        order = torch.randperm(len(tokens)).to(tokens.device)
        for rows in order.tensor_split(math.ceil(len(tokens) / size)):
            longest = int((mask[rows] * column).max())
            yield tokens[rows, ..., :longest], mask[rows, ..., :longest]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam; `descend` sets the learning rate of each step."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)


MAX_NORM = 100.0


def descend(loss: Tensor, model: nn.Module, optimizer, lr: float) -> Tensor:
    """One step of gradient descent; returns the gradient's norm, (). Gradients are clipped to
    norm MAX_NORM, a safety net for bad batches; ordinary steps stay below it."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


# ----------------------------------------------------------------------------------- files

VOCABULARY = zlib.crc32(b"\0".join(PIECES))  # saved with weights: ids must mean the same
HEADS = {"lm": "a policy", "scalar": "a reward model"}  # what a model with this head is


def fail(message: str, code: int = 2) -> None:
    """One line that says what is wrong and what to do, and the exit code."""
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


def write(path: Path, data: bytes | str) -> None:
    """The file appears complete or not at all: written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.replace(part, path)


def save_model(folder: Path, model: Transformer) -> None:
    """Write folder/model.pt: weights, head and sizes."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    saved = {"head": model.head, "config": asdict(model.config), "vocabulary": VOCABULARY}
    torch.save(saved | {"weights": weights}, buffer := io.BytesIO())
    write(folder / "model.pt", buffer.getvalue())


def load_model(folder: Path, head: str, device: torch.device | str) -> Transformer:
    """The Transformer in folder/model.pt, which must have this head."""
    # weights_only: a stranger's file can hold tensors and numbers, not code to run
    saved = torch.load(Path(folder) / "model.pt", map_location="cpu", weights_only=True)
    if saved["vocabulary"] != VOCABULARY:
        fail(f"{folder}/model.pt has another vocabulary; train it anew")
    if saved["head"] != head:
        fail(f"{folder} is {HEADS[saved['head']]}; {HEADS[head]} is needed here")
    model = Transformer(ModelConfig(**saved["config"]), head)
    model.load_state_dict(saved["weights"])
    return model.to(device)


def read_jsonl(path: str | Path, keys: tuple[str, ...], context: int) -> list[dict]:
    """The rows of a JSONL file. A line that is no row ends the program. A row that cannot be
    used (empty, chosen = rejected, over the context) is dropped, and the drops are counted."""
    try:
        found = jsonl.read(path, keys)
    except (OSError, ValueError) as error:
        fail(str(error))
    rows, dropped = [], {}
    for number, row in found.items():
        longest = max([len(encode(row[key])) for key in keys[1:]], default=0)
        if not all(row[key].strip() for key in keys):
            dropped.setdefault("empty text", []).append(number)
        elif "rejected" in keys and row["chosen"] == row["rejected"]:
            dropped.setdefault("chosen and rejected are the same", []).append(number)
        elif len(chat(row["prompt"])) + longest + 1 > context:
            why = f"over the context of {context} tokens (sft.py --context makes it longer)"
            dropped.setdefault(why, []).append(number)
        else:
            rows.append(row)
    for why, numbers in dropped.items():
        print(f"{path}:{numbers[0]}: {why}, {len(numbers)} dropped", file=sys.stderr)
    if not rows:
        fail(f"{path}: there is no usable row of {', '.join(keys)}")
    return rows


def split(rows: list[dict], own: bool) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out, by their question. The zoo says which it holds out;
    of your own questions it is one in six. A single question is on both sides."""
    held = zoo.hold_out(row["prompt"] for row in rows) if own else zoo.HELD_OUT
    sides = [], []
    for row in rows:
        sides[zoo.without_opening(row["prompt"]) in held].append(row)
    return sides if sides[0] or not own else (rows, rows)


def answer_ids(row: dict, key: str = "completion") -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of the answer under `key`; with EOS, unless the row says that
    it was cut: "completion_finished": false."""
    end = [] if row.get(f"{key}_finished") is False else [EOS]
    return chat(row["prompt"]), encode(row[key]) + end


def encode_pairs(rows: list[dict], device) -> tuple[Tensor, Tensor]:
    """Tokens and response masks of comparisons, (B, 2, T) each: [:, 0] chosen, [:, 1]
    rejected."""
    ids = [answer_ids(row, side) for row in rows for side in ("chosen", "rejected")]
    tokens, mask = collate(ids, device)
    return tokens.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


# ------------------------------------------------------------------------------------ runs


def seed_all(seed: int) -> None:
    """One seed for both generators that are used: Python's, and torch's on the CPU."""
    random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device of --device; auto: cuda if it is there, else mps, else cpu. In float32
    throughout: TF32, where the environment asks for it, would hide bugs behind rounding."""
    torch.set_float32_matmul_precision("highest")
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((device for device, works in there.items() if works), "cpu")
    return torch.device(name)


class Run:
    """A run while it is being made: log one row a step. At its end it is saved to runs/NAME. On
    Ctrl-C or an error it is saved to runs/NAME_stopped, and runs/NAME stays as it was."""

    def __init__(self, cfg, name: str, model: Transformer, steps: int, show: tuple[str, ...]):
        self.cfg, self.folder, self.model = cfg, Path(cfg.runs) / name, model
        self.steps, self.show, self.rows, self.began = steps, show, [], time.time()
        self.bar = tqdm(total=steps, desc=name, disable=None)  # None: only on a terminal

    def __enter__(self) -> "Run":
        return self

    def log(self, **row: float | Tensor | None) -> dict:
        """A row of metrics.csv, returned as floats. None, and a gold reward of NaN, which
        means outside the zoo, are empty cells; any other number must be finite."""
        row = {key: x.item() if isinstance(x, Tensor) else x for key, x in row.items()}
        known = {key: x for key, x in row.items() if x is not None}
        known = {key: x for key, x in known.items() if not (key.endswith("gold") and x != x)}
        said = "  ".join(f"{key} {known[key]:.3g}" for key in self.show if key in known)
        for key, value in known.items():
            if not math.isfinite(value):
                fail(f"{self.folder.name}, step {len(self.rows)}: {key} is {value}; {said}", 1)
        cells = {key: f"{known[key]:.6g}" if key in known else "" for key in row}
        self.rows.append({"step": len(self.rows)} | cells)
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update()
        if self.bar.disable and len(self.rows) % max(1, self.steps // 10) == 0:
            print(f"{self.folder.name} {len(self.rows)}/{self.steps}  {said}")
        return row

    def __exit__(self, kind, error, trace) -> None:
        self.bar.close()
        if kind is None:
            self.save(self.folder)
        elif self.rows and all(w.isfinite().all() for w in self.model.state_dict().values()):
            names = (f"{self.folder.name}_stopped{i or ''}" for i in itertools.count())
            folder = next(x for x in map(self.folder.with_name, names) if not x.exists())
            self.save(folder)
            done = f"stopped after {len(self.rows)} of {self.steps} steps"
            print(f"{done}, saved in {folder}", file=sys.stderr)

    def save(self, folder: Path) -> None:
        """The weights go last: in a new folder model.pt never stands alone."""
        table = csv.DictWriter(metrics := io.StringIO(), self.rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write(folder / "metrics.csv", metrics.getvalue())
        how = dict(script=Path(sys.argv[0]).name, flags=asdict(self.cfg), steps=len(self.rows))
        how |= dict(torch=torch.__version__, python=sys.version.split()[0])
        how |= dict(device=str(self.model.device), seconds=round(time.time() - self.began, 1))
        write(folder / "config.json", json.dumps(how, indent=1) + "\n")
        save_model(folder, self.model)


# ---------------------------------------------------------------------------------- inputs

RECIPE = {"base": "sft.py", "sft": "sft.py", "reward_model": "reward_model.py"}
PAIRS = 23_000  # of answers, sampled for a missing file; about 20,000 differ and are judged


def make(cfg, name: str) -> None:
    """Make the missing runs/NAME by its script in the recipe, in this process. Fail, and say
    what makes it, if the recipe has none, or if your own data would be mixed with the zoo."""
    command = f"python {RECIPE.get(name, 'SCRIPT.py')} --runs {cfg.runs}"
    if name not in RECIPE:
        fail(f"{cfg.runs}/{name} is not there; make it with: {command} --out {name}")
    if cfg.data:
        other = ", or give --reward FILE.py:function" if name == "reward_model" else ""
        fail(f"{cfg.runs}/{name} is not there, and with --data nothing is made from the zoo. "
             f"Make it of your own rows: {command} --data YOUR.jsonl{other}")  # fmt: skip
    print(f"{name} is not there: {RECIPE[name]} makes it")
    script, argv = str(Path(__file__).resolve().with_name(RECIPE[name])), sys.argv
    sys.argv = [script, "--runs", cfg.runs, "--seed", str(cfg.seed), "--device", cfg.device]
    runpy.run_path(script, run_name="__main__")
    sys.argv = argv


@functools.cache  # said once
def announce(runs: str, name: str, seed: int, data: str | None) -> None:
    """One line about the input runs/NAME: the seed and data that it was made with, and a
    warning where this run has others."""
    path = Path(runs) / name / "config.json"
    made = json.loads(path.read_text())["flags"] if path.exists() else {}
    its_seed, its_data = made.get("seed"), made.get("data")
    line = f"input {name}: seed {its_seed}, data {its_data or 'zoo'}"
    if (its_seed, its_data) != (seed, data):
        line += f"; warning: this run has seed {seed}, data {data or 'zoo'}"
    print(line)


def load_run(cfg, name: str, head: str, device: torch.device) -> Transformer:
    """The model in runs/NAME, made first if the recipe can."""
    if not (Path(cfg.runs) / name / "model.pt").exists():
        make(cfg, name)
    announce(cfg.runs, name, cfg.seed, cfg.data)
    return load_model(Path(cfg.runs) / name, head, device)


def collect_comparisons(policy: Transformer, n: int) -> list[dict]:
    """n pairs of a policy's answers, judged if they differ: rows of prompt, chosen, rejected,
    and whether each was finished. One pair in twenty is about a held-out prompt: no script
    trains on it, reward_model.py measures with it."""
    # 1. draw prompts
    sides = random.choices((zoo.TRAIN_PROMPTS, zoo.HELD_OUT_PROMPTS), (0.95, 0.05), k=n)
    prompts, rows = [random.choice(side) for side in sides], []
    # 2. sample two answers to each
    answered = sample_answers(policy, prompts, 2, 24)
    for asked, rollout in tqdm(answered, "batches of pairs", disable=None):
        answers = list(zip(completions(rollout), rollout.finished.tolist()))
        for prompt, a, b in zip(asked[::2], answers[::2], answers[1::2]):
            if a[0] != b[0] and a[0].strip() and b[0].strip():
                # 3. a person chooses one
                chosen, rejected = (a, b) if zoo.prefers(prompt, a, b) else (b, a)
                rows.append(
                    {
                        "prompt": prompt,
                        "chosen": chosen[0],
                        "rejected": rejected[0],
                        "chosen_finished": chosen[1],
                        "rejected_finished": rejected[1],
                    }
                )
    random.shuffle(rows)  # they were sampled by length
    return rows


def answerer(cfg, name: str) -> str:
    """The policy whose answers the missing runs/NAME is made of."""
    if not re.fullmatch("comparisons(_.+)?", name):
        fail(f"{cfg.runs}/{name} is not there; comparisons_NAME is made of the answers of NAME")
    return name.removeprefix("comparisons").removeprefix("_") or "sft"


def comparisons(cfg, context: int, device: torch.device) -> dict[str, list[dict]]:
    """The judged pairs by source: of cfg.data, or of each name in cfg.comparisons, "a,b". If
    runs/comparisons is missing, it is made of sft's answers; comparisons_NAME of NAME's."""
    keys, found = ("prompt", "chosen", "rejected"), {}
    if cfg.data:
        return {Path(cfg.data).name: read_jsonl(cfg.data, keys, context)}
    for name in cfg.comparisons.split(","):
        folder = Path(cfg.runs) / name
        if not (folder / "comparisons.jsonl").exists():
            of = answerer(cfg, name)
            policy = load_run(cfg, of, "lm", device)
            print(f"{name}: {PAIRS} pairs of answers of {of} are judged where they differ")
            seed_all(cfg.seed)
            rows = collect_comparisons(policy, PAIRS)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            flags = {"seed": cfg.seed, "data": None, "answers of": of}
            write(folder / "config.json", json.dumps({"flags": flags}, indent=1) + "\n")
            write(folder / "comparisons.jsonl", "".join(lines))
        announce(cfg.runs, name, cfg.seed, cfg.data)
        found[name] = read_jsonl(folder / "comparisons.jsonl", keys, context)
    return found


def fit_prompts(cfg, prompts: list[str], context: int) -> list[str]:
    """The prompts, each once, after which cfg.max_new_tokens more fit into the context."""
    fits = [x for x in dict.fromkeys(prompts) if len(chat(x)) + cfg.max_new_tokens <= context]
    if not fits:
        fail(f"no prompt leaves room for {cfg.max_new_tokens} new tokens in a context of "
             f"{context}: lower --max-new-tokens, or raise sft.py --context")  # fmt: skip
    return fits


def read_prompts(cfg, context: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts x: your own, or the zoo's."""
    rows = [{"prompt": prompt} for prompt in zoo.QUESTIONS]
    if cfg.data:
        rows = read_jsonl(cfg.data, ("prompt",), context)
    sides = split(rows, bool(cfg.data))
    train, held = (fit_prompts(cfg, [row["prompt"] for row in side], context) for side in sides)
    print(f"{len(train)} prompts to train on, {len(held)} held out")
    return train, held


def shuffled(prompts: list[str]) -> Iterator[str]:
    """Prompts without end, in an order shuffled anew when all were seen."""
    while True:
        yield from random.sample(prompts, len(prompts))


Reward = Callable[[list[str], Rollout], Tensor]  # (prompt of each row, answers) -> r (B,)


def model_reward(model: Transformer) -> Reward:
    """r(x, y): the score of a reward model."""
    return lambda prompts, rollout: score(model, rollout.tokens, rollout.response_mask)


def load_reward(cfg, source: str, device: torch.device) -> Reward:
    """r(x, y): by the reward model in runs/SOURCE, or by your own function, FILE.py:function.
    As in TRL it is called by keyword, function(prompts=…, completions=…, finished=…), with
    those of the three that it takes. It returns one number per row."""
    file, _, name = source.rpartition(":")
    if not file:
        return model_reward(load_run(cfg, source, "scalar", device).requires_grad_(False))
    sys.path.insert(0, str(Path(file).parent))  # so that it can import its neighbours
    function = runpy.run_path(file)[name]
    signature = inspect.signature(function)
    every = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    offered = ("prompts", "completions", "finished")
    takes = [key for key in offered if every or key in signature.parameters]
    try:
        signature.bind(**dict.fromkeys(takes))
    except TypeError as error:
        fail(f"--reward {source}: {error}; it may take {', '.join(offered)}, by these names")

    def reward(prompts: list[str], rollout: Rollout) -> Tensor:
        texts = completions(rollout)
        given = dict(zip(offered, (list(prompts), list(texts), rollout.finished.tolist())))
        values = list(function(**{key: given[key] for key in takes}))
        if len(values) != len(texts):
            raise ValueError(f"{source}: {len(values)} numbers for {len(texts)} answers")
        for value, prompt, text in zip(values, prompts, texts):
            if not math.isfinite(value):
                raise ValueError(f"{source}: {value} for {prompt!r}, {text!r}")
        return torch.tensor([float(x) for x in values], device=rollout.tokens.device)

    return reward


# --------------------------------------------------------------------------- closing table

NUMBERS = ("reward", "gold", "kl", "right", "length", "finished")


@torch.no_grad()
def evaluate(
    policy, reference, reward, prompts: list[str], max_new_tokens: int, n=4, seed=0
) -> dict:
    """n sampled answers to each of M prompts: `prompts`, `answers` as text, and (M, n) each of
    NUMBERS; kl is log π(y|x) − log π_ref(y|x), nats; length is in tokens."""
    torch.manual_seed(seed)
    rows = []
    for asked, rollout in sample_answers(policy, prompts, n, max_new_tokens):
        tokens, mask = rollout.tokens, rollout.response_mask
        kl = token_logprobs(policy, tokens, mask) - token_logprobs(reference, tokens, mask)
        r = reward(asked, rollout).tolist() if reward else [math.nan] * len(asked)
        texts, finished = completions(rollout), rollout.finished.tolist()
        gold = [zoo.gold_reward(*row) for row in zip(asked, texts, finished)]
        right, length = map(zoo.right, asked, texts), mask.sum(1).tolist()
        rows += zip(asked, texts, r, gold, kl.sum(1).tolist(), right, length, finished)
    asked, answers, *columns = zip(*rows)
    columns = dict(zip(NUMBERS, torch.tensor(columns).view(len(NUMBERS), -1, n)))
    return {"prompts": list(asked[::n]), "answers": list(answers)} | columns


def standard_error(values: Tensor, groups: list) -> float:
    """Clustered standard error of the mean of values (M, N); groups (M) are the clusters. NaN
    for a single cluster."""
    clusters = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    rows = (values - values.mean()).sum(1)
    sums = np.bincount([clusters[group] for group in groups], rows)
    n = len(sums)
    return math.sqrt(sums @ sums * n / (n - 1)) / values.numel() if n > 1 else math.nan


def win_rate(gold: Tensor, other: Tensor) -> Tensor:
    """Share of same-prompt pairs where gold > other, (M, N), (M, N) -> (); a tie counts ½. NaN
    where there is no gold."""
    gap = gold[:, :, None] - other[:, None, :]
    return (gap.sgn() + 1).where(~gap.isnan(), torch.nan).mean() / 2


def print_table(found: dict[str, dict], ref: str, reward_name: str) -> None:
    """One row per run. ± is one standard error; answers about one fact, or to one prompt
    outside the zoo, are not independent."""
    prompts = found[ref]["prompts"]
    groups = [zoo.QUESTIONS.get(prompt, prompt) for prompt in prompts]
    print(f"\n{len(prompts)} held-out prompts × 4 answers; reward: {reward_name}; KL to: {ref}")
    line = "{:20}{:>15}{:>15}{:>15}{:>10}{:>8}{:>8}{:>10}".format
    print(line("", "reward", "gold", "KL", "win rate", "right", "length", "finished"))
    for name, run in found.items():
        mean = {key: run[key].mean().item() for key in NUMBERS}
        cells = [f"{mean[k]:.2f} ± {standard_error(run[k], groups):.2f}" for k in NUMBERS[:3]]
        cells += [f"{win_rate(run['gold'], found[ref]['gold']):.2f}", f"{mean['right']:.2f}"]
        cells += [f"{mean['length']:.1f}", f"{mean['finished']:.3f}"]
        cells = ["–" if cell.startswith("nan") else cell.replace("nan", "–") for cell in cells]
        print(line(name, *cells))


def table_reward(cfg, device: torch.device) -> tuple[Reward | None, str]:
    """The reward of a table whose script needs none: runs/reward_model if it is there."""
    if (Path(cfg.runs) / "reward_model/model.pt").exists():
        return load_reward(cfg, "reward_model", device), "reward_model"
    return None, "none yet"


def closing_table(cfg, names: list[str], reward, reward_name: str, prompts, device) -> dict:
    """Evaluate these runs on at most 400 prompts, the first run being π_ref, and print their
    table; then what cfg.init and cfg.out answer to three prompts."""
    reference, found = load_model(Path(cfg.runs) / names[0], "lm", device), {}
    for name in tqdm(dict.fromkeys(names), desc="table", disable=None, leave=False):
        policy = load_model(Path(cfg.runs) / name, "lm", device)
        given = policy, reference, reward, prompts[:400], cfg.max_new_tokens
        found[name] = evaluate(*given, seed=zlib.crc32(name.encode()))  # no two share noise
    print_table(found, names[0], reward_name)
    if cfg.out in found and found[cfg.out]["finished"].mean() < 0.5:
        print(f"most answers were cut at --max-new-tokens {cfg.max_new_tokens}: raise it")
    print()
    for i, prompt in enumerate(found[names[0]]["prompts"][:3]):
        print(prompt)
        for name in (x for x in dict.fromkeys((cfg.init, cfg.out)) if x in found):
            print(f"{name:>20}: {found[name]['answers'][4 * i]}")
    return found


# ---------------------------------------------------------------------------- command line


def arg(default, help: str, low: float | None = None, choices=None):
    """A field of a Config, and so a flag: its default, what it is, its lowest value."""
    return field(default=default, metadata=dict(help=help, low=low, choices=choices))


def parse(config: type, doc: str, words: list[str] | None = None):
    """The command line as a Config: a --flag for each field."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    for f in fields(config):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        how = {"type": f.type, "default": f.default, "choices": f.metadata["choices"]}
        parser.add_argument(flag, help=f"{text} (default: %(default)s)", **how)
    cfg = config(**vars(parser.parse_args(words)))
    for f in fields(config):
        value, low = getattr(cfg, f.name), f.metadata["low"]
        if low is not None and not low <= value < math.inf:
            parser.error(f"--{f.name.replace('_', '-')} {value}: must be {low} or more")
        if f.name in ("init", "ref", "out", "comparisons"):
            several = value.split(",") if f.name == "comparisons" else [value]
            if not all(re.fullmatch(r"\w[\w.-]*", name) for name in several):
                parser.error(f"--{f.name} {value!r}: must be the name of a folder under --runs")
    return cfg


def start(main: Callable, config: type, doc: str) -> None:
    """Run a script's main with the command line. What is wrong with --out or with the name of
    an input is said at once."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none; a console may lack β
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    cfg = parse(config, doc)
    for name in ("runs", "data", "raw", "reward"):  # your reward may change the folder
        value = getattr(cfg, name, None)
        if value and (name != "reward" or ".py:" in value):
            setattr(cfg, name, os.path.abspath(value))
    inputs = {getattr(cfg, flag, None) for flag in ("init", "ref", "reward")} - {None}
    if hasattr(cfg, "comparisons") and not cfg.data:
        names = cfg.comparisons.split(",")
        missing = [x for x in names if not (Path(cfg.runs) / x / "comparisons.jsonl").exists()]
        inputs |= {answerer(cfg, name) for name in missing}
    if cfg.out in inputs | ({*RECIPE, "comparisons"} - {config.out}):
        fail(f"--out {cfg.out}: this run or others start from it; choose another name")
    for name in inputs - set(RECIPE):
        if ":" in name and ".py:" not in name:
            fail(f"--reward {name}: must be FILE.py:function, or a run under --runs")
        if ":" not in name and not (Path(cfg.runs) / name / "model.pt").exists():
            make(cfg, name)  # fails: no recipe has it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # saves what there is, as Ctrl-C
    try:
        main(cfg)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
