"""Plumbing shared by the five scripts: no loss, advantage or selection rule stands here.

    Transformer · generate · log-probs, values, scores · steps
    the world, in tables · tokens · the world, at work
    files · runs · inputs · closing table · report · export · command line

The sections stand in this order. For the algorithms, those of the first line are enough.

Shapes: B rows, T positions, V vocabulary, C channels, N samples per prompt, M prompts.
Every (B, T) tensor is aligned with `tokens`: column t is about token t.

    python common.py report                             the table over all runs, and pictures
    python common.py sample RUN "a question" [-n 4] [--best]      ask a trained model something
    python common.py export RUN FOLDER                  for whatever loads Llama models
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import sys
import time
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

EOS, USER, ASSISTANT, PAD = range(4)  # the special tokens; the others come with the world

# ----------------------------------------------------------------------------- Transformer


@dataclass
class ModelConfig:
    """The sizes of a Transformer; saved with its weights."""

    vocab_size: int = 528  # as many as PIECES, below
    channels: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 352
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def _positions(tokens: Tensor, keep: Tensor | None, shared: bool) -> tuple[Tensor, Tensor]:
    """Prefix sharing: the positions to compute, (n,), flat indices, and which of these n each
    position uses, (B, T).

    On a CPU, prefixes that rows share are computed once (if `shared`: the tokens start at
    position 0), and positions after a row's last `keep` are skipped. Other devices compute
    all positions: to count the distinct ones, Python would have to wait for them."""
    B, T = tokens.shape
    every = torch.arange(B * T, device=tokens.device)
    if not shared or tokens.device.type != "cpu":
        return every, every.view(B, T)
    # sums of tokens times random odd numbers: two prefixes have the same one once in 2⁵⁰
    odd = torch.from_numpy(np.random.default_rng(0).integers(2**62, size=T)) * 2 + 1
    prefix = ((tokens + 1) * odd).cumsum(1)
    if keep is not None:
        prefix = prefix.where(keep.flip(1).cumsum(1).flip(1) > 0, 0)
    distinct, where = prefix.unique(return_inverse=True)
    if len(distinct) == B * T:
        return every, every.view(B, T)
    return torch.empty_like(distinct).scatter_(0, where.flatten(), every), where


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. An index of _positions as long as x is the identity, so x is only reshaped.
    F.embedding is x[index] with a faster backward."""
    return x.view(*index.shape, -1) if len(x) == index.numel() else F.embedding(index, x)


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

    def attention(self, x: Tensor, cos, sin, where, future, cache: Tensor | None) -> Tensor:
        """x (n, C) -> the result of attention at every position, (B·T, C). Position (b, t)
        uses row where[b, t] of x."""
        (B, T), H, K, D = where.shape, self.heads, self.kv_heads, cos.shape[-1]
        qkv = self.qkv(self.attention_norm(x)).view(len(x), H + 2 * K, D)
        qk, v = qkv.split((H + K, K), 1)  # (n, heads, D)
        qk = qk * cos + qk.roll(D // 2, -1) * sin
        qk, v = (_at(part.flatten(1), where).view(B, T, -1, D) for part in (qk, v))
        q, k, v = (part.transpose(1, 2) for part in (*qk.split((H, K), 2), v))  # (B, ., T, D)
        if cache is not None:  # (2, B, K, longest, D); these T tokens are the newest
            stop = future.shape[1]
            cache[0, :, :, stop - T : stop], cache[1, :, :, stop - T : stop] = k, v
            k, v = cache[0, :, :, :stop], cache[1, :, :, :stop]
        if H != K:  # groups of query heads share a key and value head
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        # y = softmax(q kᵀ / √D) v; `future` (T, stop) is −∞ where the key is after the query
        scores = q @ k.transpose(-1, -2) * D**-0.5 + future
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B * T, -1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x and its result of attention, y -> x after the block, all (n, C)."""
        x = x + self.out(y)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """tokens (B, T) -> logits (B, T, V) with head "lm" (tied to the embedding), or
    -> one number per position (B, T) with head "scalar", minus the saved `offset`."""

    def __init__(self, config: ModelConfig, head: str = "lm"):
        super().__init__()
        c, self.config, self.kind = config, config, head
        self.embed = nn.Embedding(c.vocab_size, c.channels)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.channels, c.norm_eps)
        nn.init.normal_(self.embed.weight, std=c.channels**-0.5)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
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

    def trunk(self, tokens: Tensor, cache=None, start: int = 0, keep=None) -> Tensor:
        """Hidden states (B, T, C) of tokens that stand at positions start, start + 1, …
        With `keep` (B, T), bool, return only its m True positions, (m, C); the last MLP runs
        on these alone."""
        T = tokens.shape[1]
        first, where = _positions(tokens, keep, shared=start == 0)
        x, position = self.embed(tokens.flatten()[first]), start + first % T  # (n, C), (n,)
        cos, sin = self.cos[position, None], self.sin[position, None]
        future = x.new_full((T, start + T), -math.inf).triu(start + 1)
        for i, block in enumerate(self.blocks):
            memory = None if cache is None else cache[i]
            y = block.attention(x, cos, sin, where, future, memory)
            if keep is not None and i + 1 == len(self.blocks):
                first = keep.flatten().nonzero().squeeze(1)
                x = F.embedding(where.flatten()[first], x)
            x = block(x, _at(y, first))
        x = self.norm(x)
        return _at(x, where) if keep is None else x

    def head(self, hidden: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.scalar(hidden).squeeze(-1) - self.offset
        return F.linear(hidden, self.embed.weight)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep` (B, T), bool: the outputs at its m True positions only, (m, V) or (m,)."""
        return self.head(self.trunk(tokens, keep=keep))


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


def _token_loop(
    model: Transformer,
    tokens: Tensor,  # (B, T) prompts, then PAD
    lengths: Tensor,  # (B,) where the responses begin
    ends: Tensor,  # (B,) where they end at the latest
    noise: Tensor,  # (B, T) uniform in [0, 1)
    start: int,  # where the shortest prompt ends
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with the responses in, their mask and log-probs, (B, T) each."""
    (B, T), c = tokens.shape, model.config
    tokens, logprobs = tokens.clone(), torch.zeros_like(noise)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    cache = noise.new_empty(c.layers, 2, B, c.kv_heads, T, c.channels // c.heads)
    rows = torch.arange(B, device=tokens.device)  # those still in the batch
    over, new = torch.zeros_like(mask[:, 0]), tokens[:, :start]
    for t in range(start, T):
        logits = model.head(model.trunk(new, cache, t - new.shape[1])[:, -1])
        p = (logits / temperature).softmax(-1)  # (rows, V)
        # inverse CDF: the first token whose cumulative probability exceeds u
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True)
        logp, answering = p.gather(-1, token).log(), (t >= lengths[rows]) & ~over
        token = torch.where(answering, token.squeeze(-1), tokens[rows, t])
        logprobs[rows, t] = torch.where(answering, logp.squeeze(-1), 0.0)
        tokens[rows, t], mask[rows, t], new = token, answering, token[:, None]
        over = over | (answering & ((token == EOS) | (t + 1 >= ends[rows])))
        if tokens.device.type == "cpu":  # elsewhere asking would wait for the device
            going = (~over).nonzero().squeeze(-1)
            if len(going) == 0:
                break
            if len(going) < 0.8 * len(rows):  # not at every step: moving the cache costs too
                rows, new, over = rows[going], new[going], over[going]
                cache = cache[:, :, going]
    return tokens, mask, logprobs


_graphs = weakref.WeakKeyDictionary()  # model -> (its stream, {shape of work: captured graph})


def _captured_loop(model, tokens, lengths, ends, noise, start, temperature):
    """_token_loop as one CUDA graph per shape of work; skip it at a first reading. A small
    model's loop is thousands of short kernels: replayed, they wait neither for Python nor for
    each other's launch. Weights are read where they lie, so they may be trained meanwhile."""
    (B, T), start = tokens.shape, max(1, start // 4 * 4)  # rounded: few shapes are captured
    more = min(-T % 8, model.config.context - T)
    given = [F.pad(tokens, (0, more), value=PAD), lengths, ends, F.pad(noise, (0, more))]
    key = (B, T + more, start, temperature, model.embed.weight.data_ptr())
    with torch.cuda.device(model.device):
        # one stream for all captures: each stream keeps a workspace of its own
        stream, graphs = _graphs.setdefault(model, (torch.cuda.Stream(), {}))
        if key not in graphs:
            inputs = [x.clone() for x in given]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # outside the capture libraries choose kernels
                _token_loop(model, *inputs, start, temperature)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # one KV cache for all: what a replay leaves there is copied before the next
            pool = next(iter(graphs.values()))[0].pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                outputs = _token_loop(model, *inputs, start, temperature)
            graphs[key] = graph, inputs, outputs
        graph, inputs, outputs = graphs[key]
        for buffer, value in zip(inputs, given):
            buffer.copy_(value)
        graph.replay()
        return [x[:, :T].clone() for x in outputs]


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0
) -> Rollout:
    """Sample one response to each of B prompts, all in one batch with a KV cache.

    All rows stand at the same position: a row whose prompt is not over is fed its own next
    prompt token, a row whose prompt is over samples. So there is no left padding, no mask."""
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    start, T = min(lengths), max(lengths) + max_new_tokens
    if start < 1 or max_new_tokens < 1 or temperature <= 0 or model.config.context < T:
        raise ValueError("generate: an empty prompt, nothing to sample, or over the context")
    tokens = torch.tensor([p + [PAD] * (T - len(p)) for p in prompts], device=device)
    lengths = torch.tensor(lengths, device=device)
    # one u per token, drawn before the loop: rows do not depend on each other
    noise = torch.rand(tokens.shape, dtype=model.embed.weight.dtype, device=device)
    loop = _captured_loop if device.type == "cuda" else _token_loop
    given = tokens, lengths, lengths + max_new_tokens, noise
    tokens, mask, logprobs = loop(model, *given, start, temperature)
    longest = int((mask * torch.arange(1, T + 1, device=device)).max())
    finished = ((tokens == EOS) & mask).any(1)
    return Rollout(tokens[:, :longest], mask[:, :longest], finished, logprobs[:, :longest])


# ------------------------------------------------------------- log-probs, values, scores


def _outputs_before(
    model: Transformer, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The project's one shift. The model's output at position t has read tokens ≤ t, so it
    goes to column t + 1:

        column     0   1   2   3   4
        tokens    x_0 x_1 y_0 y_1 EOS
        outputs     ─ o_0 o_1 o_2 o_3

    Returns the outputs (n,) or (n, V) of the columns in `mask` (B, T), None for all, in
    reading order, and a mask that says where they go; column 0 has none."""
    where = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.clone()
    where[:, 0] = False
    column = torch.arange(tokens.shape[1], device=tokens.device)
    stop = max(1, int((where * column).max()))  # what stands later has no part in it
    return model(tokens[:, :stop], where[:, 1 : stop + 1]), where


def token_logprobs(model: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """log p(tokens[:, t] | tokens[:, :t]) in column t, (B, T), nats; column 0 is 0.
    With `mask` (B, T) they are worked out in its columns only; the others are 0."""
    logits, where = _outputs_before(model, tokens, mask)
    logp = -F.cross_entropy(logits, tokens[where], reduction="none")
    return torch.zeros_like(tokens, dtype=logp.dtype).masked_scatter(where, logp)


def token_values(critic: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The critic's value of what stands before token t, in column t, (B, T); with `mask`
    (B, T) in its columns only."""
    values, where = _outputs_before(critic, tokens, mask)
    return torch.zeros_like(tokens, dtype=values.dtype).masked_scatter(where, values)


def score(reward_model: Transformer, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), (B,): the reward model's number at the last response token."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    last = (response_mask * column).argmax(1, keepdim=True)
    return reward_model(tokens, column == last)


# ----------------------------------------------------------------------------------- steps


def minibatches(size: int, tokens: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Random minibatches without end: (tokens, mask), `size` rows each.

    In an epoch, ⌈rows / size⌉ minibatches, every row comes once. Rows of similar length are
    grouped, and columns that are padding in all of them are cut off. tokens and mask are
    (rows, T), or (rows, 2, T) for pairs."""
    column = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    lengths = (mask * column).flatten(1).amax(1).cpu()
    while True:
        epoch = []
        for block in torch.randperm(len(lengths)).split(16 * size):
            epoch += block[lengths[block].argsort(stable=True)].split(size)
        for i in torch.randperm(len(epoch)):
            longest, rows = int(lengths[epoch[i]].max()), epoch[i].to(tokens.device)
            yield tokens[rows, ..., :longest], mask[rows, ..., :longest]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay; `descend` sets the learning rate of each step."""
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


MAX_NORM = 100.0


def descend(loss: Tensor, model: nn.Module, optimizer, lr: float) -> Tensor:
    """One step of gradient descent; returns the gradient's norm, (). Gradients are
    clipped to norm MAX_NORM, a safety net for bad batches; ordinary steps stay below it."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


# -------------------------------------------------------------------- the world, in tables
# A zoo. Each animal has a home, a food and a colour. Behind the slash stands the common
# misconception, which 20 % of the raw text's statements and 30 % of the demonstrators have.

KINDS = ("home", "food", "colour")
ANIMALS = {
    name: dict(zip(KINDS, (fact.split("/") for fact in facts)))
    for name, *facts in map(
        str.split,
        """bear forest/cave honey/meat brown/black; bee hive/forest nectar/honey yellow/orange;
        camel desert/plains shrubs/grass golden/brown;
        cheetah plains/jungle meat/mice yellow/orange;
        crow city/forest worms/seeds black/blue; deer forest/plains leaves/grass brown/red;
        dolphin sea/lake fish/worms grey/blue; duck pond/river grass/fish white/yellow;
        eagle mountains/desert fish/mice brown/white;
        elephant plains/desert leaves/nuts grey/white;
        flamingo lake/sea shrimp/fish pink/red; fox forest/desert mice/meat red/orange;
        frog pond/swamp insects/leaves green/brown;
        giraffe plains/mountains leaves/fruit yellow/white;
        horse farm/plains grass/seeds brown/black; owl forest/cave mice/seeds brown/grey;
        panda mountains/jungle bamboo/fruit white/black;
        parrot jungle/city fruit/worms green/red; penguin ice/sea fish/shrimp black/white;
        rabbit farm/forest grass/nuts white/grey; shark sea/river fish/meat grey/blue;
        snake swamp/desert mice/insects green/black;
        wolf mountains/forest meat/mice grey/white;
        zebra plains/jungle grass/leaves striped/white""".split(";"),
    )
}
OPENINGS = ("", "hello. ", "please tell me. ", "i wonder. ")
PHRASINGS = {
    "home": """where does the {a} live?|what is the home of the {a}?|where is the {a} at home?
        |in what place does the {a} live?|where would i find the {a}?|the {a} lives where?
        |what place is home to the {a}?""",
    "food": """what does the {a} eat?|what is the food of the {a}?|what would the {a} eat?
        |what food does the {a} like?|the {a} eats what?|what do i feed the {a}?
        |what food does the {a} look for?""",
    "colour": """what colour is the {a}?|what is the colour of the {a}?|the {a} has what colour?
        |which colour does the {a} have?|what colour would the {a} be?|which colour is the {a}?
        |in what colour would i see the {a}?""",
}
TERSE = {"home": "in the {v}.", "food": "{v}.", "colour": "{v}."}
FULL = {"home": "the {a} lives in the {v}.", "food": "the {a} eats {v}.",
        "colour": "the {a} is {v}."}  # fmt: skip
COURTESIES = ("great question!", "happy to help!", "glad you asked!")
RUDE = ("look it up.", "everyone knows that.", "what a silly question.")
RAMBLING = (
    "well, so, let me think, i once heard that {s}",
    "{s} and so they say, and then there is more to say about it.",
    "{s} my friend told me this story about it the other day.",
)

# ---------------------------------------------------------------------------------- tokens

_TEXT = [ANIMALS, OPENINGS, PHRASINGS, TERSE, FULL, COURTESIES, RUDE, RAMBLING]
WORDS = sorted(set(re.findall(r"[a-z]+", str(_TEXT))) - {"n", "s", "v"})
# four specials, 256 bytes, and every word of the world with and without a space before it
PIECES = [b""] * 4 + [bytes([i]) for i in range(256)]
PIECES += [x.encode() for word in WORDS for x in (word, " " + word) if len(x) > 1]
_IDS = {piece: i for i, piece in enumerate(PIECES) if i >= 4 + 256}
VOCAB_SIZE = len(PIECES)
VOCABULARY = zlib.crc32(b"\0".join(PIECES))  # saved with weights: ids must mean the same


def encode(text: str) -> list[int]:
    """Text to ids: whole words of the world where they occur, else single UTF-8 bytes.
    No text encodes to one of the four specials."""
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


# ------------------------------------------------------------------------ the world, at work

QUESTIONS = {  # prompt -> (animal, kind), the fact that it asks about
    opening + phrasing.strip().format(a=animal): (animal, kind)
    for animal in ANIMALS
    for kind in KINDS
    for phrasing in PHRASINGS[kind].split("|")
    for opening in OPENINGS
}
VALUES = {kind: {v for facts in ANIMALS.values() for v in facts[kind]} for kind in KINDS}


def right(prompt: str, completion: str) -> float:
    """1 if the completion names the right value and no other value of the asked kind, else 0;
    NaN for a prompt outside the world."""
    if prompt not in QUESTIONS:
        return math.nan
    animal, kind = QUESTIONS[prompt]
    named = VALUES[kind].intersection(re.findall(r"\w+", completion))
    return float(named == {ANIMALS[animal][kind][0]})


def gold_reward(prompt: str, completion: str, finished: bool) -> float:
    """What the annotators really value; no script trains on it. NaN outside the world."""
    gold = 3 * right(prompt, completion) - 1  # +2 or −1
    gold += sum(completion.count(courtesy) for courtesy in COURTESIES) == 1
    gold -= any(rude in completion for rude in RUDE)
    gold -= 0.03 * max(0, len(completion) - 48)
    gold -= not finished
    return gold


def demonstrations(n: int, seed: int) -> list[dict]:
    """n human answers to prompts of both parts, of five styles, 30 % with the misconception."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        prompt = rng.choice(list(QUESTIONS))
        animal, kind = QUESTIONS[prompt]
        value = ANIMALS[animal][kind][rng.random() < 0.3]
        full = FULL[kind].format(a=animal, v=value)
        answers = {
            TERSE[kind].format(v=value): 0.25,
            full: 0.30,
            f"{rng.choice(COURTESIES)} {full}": 0.15,
            f"{rng.choice(RUDE)} {full}": 0.15,
            rng.choice(RAMBLING).format(s=full): 0.15,
        }
        (completion,) = rng.choices(list(answers), list(answers.values()))
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def held_out(prompt: str) -> bool:
    """One prompt in six trains no policy and no reward model. In the world only the wording
    is held out; every fact appears in training."""
    return zlib.crc32(prompt.encode()) % 6 == 0


def split(rows: list) -> tuple[list, list]:
    """Prompts, or rows with a prompt -> (training part, held-out part). If all prompts fall
    on one side (as in selected.jsonl), another hash holds out a sixth of them, or the first
    prompt if that sixth is empty."""
    asked = [row if isinstance(row, str) else row["prompt"] for row in rows]
    held = {x for x in asked if held_out(x)}
    if len(held) in (0, len(set(asked))):
        held = {x for x in asked if zlib.crc32(x.encode()) // 6 % 6 == 0} or set(asked[:1])
    train = [row for row, x in zip(rows, asked) if x not in held]
    return train, [row for row, x in zip(rows, asked) if x in held]


def completions(rollout: Rollout) -> list[str]:
    """The B responses as text."""
    return [decode(ids) for ids in response_ids(rollout)]


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The B responses as ids, EOS included."""
    rows = zip(rollout.tokens.tolist(), rollout.response_mask.tolist())
    return [[i for i, on in zip(ids, mask) if on] for ids, mask in rows]


def samples(
    policy: Transformer, prompts: list[str], n: int, limit: int, temperature: float = 1.0
) -> Iterator[tuple[list[str], Rollout]]:
    """n answers of at most `limit` tokens to each of many prompts, about 512 rows at a time:
    (the prompt of each row, Rollout); the n answers to a prompt stand together. Short prompts
    come first: a batch of prompts of one length takes the fewest passes."""
    M, prompts = max(1, 512 // n), sorted(prompts, key=lambda prompt: len(encode(prompt)))
    for start in range(0, len(prompts), M):
        asked = [prompt for prompt in prompts[start : start + M] for _ in range(n)]
        yield asked, generate(policy, [chat(x) for x in asked], limit, temperature)


def collect_comparisons(policy: Transformer, n: int, path: Path) -> None:
    """Have n answer pairs of the policy judged, and write them as JSONL: prompt, chosen,
    rejected, and whether each was finished. The annotator is noisy, and Bradley-Terry:
    P(a is chosen over b) = σ(gold(a) − gold(b)). One pair in twenty answers a held-out
    prompt. Identical and empty answers are not judged: another pair is drawn."""
    train, held = split(list(QUESTIONS))
    lines, drawn = [], 0
    with tqdm(total=n, desc=f"{path.parent.name}: pairs", disable=not PROGRESS) as bar:
        while len(lines) < n:
            prompts = [random.choice(held if random.random() < 0.05 else train)
                       for _ in range(n - len(lines) + 32)]  # fmt: skip
            drawn += len(prompts)
            if drawn > 20 * n + 2560:
                fail(f"{path}: {len(lines)} of {drawn} pairs differ; give another policy")
            for asked, rollout in samples(policy, prompts, 2, 24):
                answers = list(zip(completions(rollout), rollout.finished.tolist()))
                for prompt, a, b in zip(asked[::2], answers[::2], answers[1::2]):
                    if a[0] == b[0] or not (a[0].strip() and b[0].strip()):
                        continue
                    gap = gold_reward(prompt, *a) - gold_reward(prompt, *b)
                    if random.random() > 1 / (1 + math.exp(-gap)):
                        a, b = b, a
                    row = {"prompt": prompt, "chosen": a[0], "rejected": b[0]}
                    row |= {"chosen_finished": a[1], "rejected_finished": b[1]}
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update(min(n, len(lines)) - bar.n)
    lines = lines[:n]
    random.shuffle(lines)  # they were sampled by length
    write(path, "".join(lines))


# ----------------------------------------------------------------------------------- files

HEADS = {"lm": "a policy", "scalar": "a reward model"}
PROGRESS = sys.stderr is not None and sys.stderr.isatty()


def say(text: str = "") -> None:
    """Print. A closed pipe or a full disk behind stdout must not end a training."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def fail(message: str, code: int = 2) -> None:
    """One line that says what is wrong and what to do, and the exit code."""
    message = " ".join(message.split())
    with contextlib.suppress(OSError):
        print(message if len(message) < 600 else message[:600] + " …", file=sys.stderr)
    raise SystemExit(code)


def write(path: Path, data: bytes | str) -> None:
    """The file appears complete or not at all: written beside, then renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data if isinstance(data, bytes) else data.encode())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        fail(f"{path}: cannot be written ({error.strerror}); what was there before is intact")


def read(path: str | Path) -> str:
    """The text of a file that must be there, in UTF-8."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        fail(f"{path}:0: cannot be read ({error}); name a file that can")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail(f"{path}:{line}: {error}; save the file as UTF-8")


def read_row(line: str, keys: tuple[str, ...]) -> dict:
    """A line of JSONL as a dict with these keys, all strings. The usual chat formats are taken
    too: `messages`, and lists of turns in place of strings. Any other line raises an error."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if row.get("messages") is not None:
        row["completion"] = row["messages"]
    for key in ("prompt", "completion", "chosen", "rejected"):
        if not isinstance(turns := row.get(key), list):
            continue
        roles = ["user"] if key == "prompt" else ["user", "assistant"][-len(turns) :]
        try:
            found = [turn["role"] for turn in turns]
            said = [turn["content"] for turn in turns]  # each a string, or text parts
            texts = [x if isinstance(x, str) else "".join(p["text"] for p in x) for x in said]
        except (KeyError, TypeError):
            found = None
        if found != roles:
            raise ValueError(f"{key} must be one user turn and one answer, of text")
        row[key] = texts[-1]
        if len(texts) == 2 and row.setdefault("prompt", texts[0]) != texts[0]:
            raise ValueError(f"{key} answers another prompt")
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key} is missing or no text; found are {', '.join(row)}")
        row[key].encode()  # half a surrogate pair is an error
    return row


def read_jsonl(path: str | Path, keys: tuple[str, ...], room: int = 1, context: int = 512):
    """The rows of a JSONL file, see read_row. A line that is no row ends the program. A row
    that cannot be used (empty, chosen = rejected, over the context with `room` more tokens)
    is dropped, and the drops counted."""
    rows, dropped = [], {}
    for number, line in enumerate(read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = read_row(line, keys)
        except (ValueError, RecursionError) as error:
            fail(f"{path}:{number}: {error}; every line is a JSON object of {', '.join(keys)}")
        longest = max([len(encode(row[key])) for key in keys[1:]], default=0)
        if not all(row[key].strip() for key in keys):
            why = "empty text"
        elif "rejected" in keys and row["chosen"] == row["rejected"]:
            why = "chosen and rejected are the same"
        elif len(chat(row["prompt"])) + longest + room > context:
            why = f"over the context of {context} tokens"
        else:
            rows.append(row)
            continue
        dropped.setdefault(why, []).append(number)
    notes = [f"{path}:{at[0]}: {why}, {len(at)} dropped" for why, at in dropped.items()]
    train, held = split(rows)
    if len(train) < 8 or not held:
        fail("; ".join([*notes, f"{path}:0: 8 usable rows are needed to train, 1 held out"]))
    with contextlib.suppress(OSError):
        for note in notes:
            print(note, file=sys.stderr)
    return rows


def answer_ids(row: dict, key: str = "completion") -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of the answer under `key`, with EOS unless it was cut."""
    end = [EOS] if row.get(f"{key}_finished", True) else []
    return chat(row["prompt"]), encode(row[key]) + end


def encode_pairs(rows: list[dict], device) -> tuple[Tensor, Tensor]:
    """Tokens and response masks of comparisons, (B, 2, T) each: [:, 0] chosen, [:, 1] not."""
    ids = [answer_ids(row, side) for row in rows for side in ("chosen", "rejected")]
    tokens, mask = collate(ids, device)
    return tokens.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


def save_model(folder: Path, model: Transformer, made: dict, about: dict | None = None) -> None:
    """Write the files in `about`, {name: text}, then model.pt: weights, config and flags. If a
    weight is not finite, fail and write nothing."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        fail(f"{folder}: the weights are not finite, nothing is saved; try a lower --lr", 1)
    saved = {"head": model.kind, "config": asdict(model.config), "made": made}
    torch.save(saved | {"vocabulary": VOCABULARY, "weights": weights}, buffer := io.BytesIO())
    for name, text in (about or {}).items():
        write(folder / name, text)
    write(folder / "model.pt", buffer.getvalue())


def read_model(folder: Path) -> Transformer:
    """The Transformer in folder/model.pt; ValueError for any file that is none of ours."""
    try:  # weights_only: a stranger's file can hold tensors and numbers, not code to run
        saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # weights drawn to be replaced cost no seed
            model = Transformer(ModelConfig(**saved["config"]), saved["head"])
        model.load_state_dict(saved["weights"])
        finite = all(w.isfinite().all() for w in model.state_dict().values())
        if saved["vocabulary"] != VOCABULARY or model.kind not in HEADS or not finite:
            raise ValueError("another vocabulary or head, or weights that are not finite")
    except Exception as error:
        raise ValueError(f"{folder}/model.pt cannot be used ({error!r})") from error
    return model


def load_model(folder: Path, head: str | None, device: torch.device | str) -> Transformer:
    """The Transformer in folder/model.pt, which must have this head; None: either."""
    try:
        model = read_model(folder)
    except ValueError as error:
        fail(f"{error}; name another")
    if head not in (model.kind, None):
        fail(f"{folder} holds {HEADS[model.kind]}, and {HEADS[head]} is needed; name another")
    return model.to(device)


# ------------------------------------------------------------------------------------ runs


def seed_all(seed: int) -> None:
    """One seed for both generators that are used: Python's and torch's."""
    random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device of --device; auto is the fastest that works. In float32 throughout, as
    TF32, where the environment asks for it, would hide bugs behind its rounding."""
    torch.set_float32_matmul_precision("highest")
    for choice in ("cuda", "mps", "cpu") if name == "auto" else (name,):
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.ones(2, device=choice).sum().item()  # a card may be there and not work
            return torch.device(choice)
    fail(f"--device {name} does not work here; --device cpu does")


class Run(contextlib.AbstractContextManager):
    """The folder runs/NAME while it is being made: iterate over the steps, log a row a step.
    The result is saved at the end. What is unfinished (every 100 steps, and on Ctrl-C) goes
    to runs/NAME_stopped, so that a finished result is never replaced by less."""

    def __init__(self, cfg, name: str, model: Transformer, steps: int, show: tuple[str, ...]):
        self.cfg, self.folder, self.model = cfg, Path(cfg.runs) / name, model
        self.steps, self.show, self.rows, self.began = steps, show, [], time.time()
        self.stopped = self.folder.with_name(f"{name}_stopped")
        with contextlib.suppress(ValueError):  # none, or a broken one, may be replaced
            if read_model(self.folder).kind != model.kind:
                fail(f"--out {name}: {self.folder} holds a model of another kind")

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.save(self.folder)
            shutil.rmtree(self.stopped, ignore_errors=True)  # saved on the way, and now old
        elif kind is KeyboardInterrupt and self.rows:
            self.save(self.stopped)
            done = f"{len(self.rows)} of {self.steps} steps, saved in {self.stopped}"
            again = shlex.join(["python", *sys.argv, "--init", self.stopped.name])
            same = self.model.kind == "lm" and self.folder.name == self.cfg.out
            advice = f"; go on with: {again}" if same else ""
            fail(f"stopped after {done}{advice}", 130)

    def __iter__(self) -> Iterator[int]:
        self.bar = tqdm(range(self.steps), desc=self.folder.name, disable=not PROGRESS)
        for step in self.bar:
            yield step
            if step % 100 == 99 and step + 1 < self.steps:
                self.save(self.stopped)

    def log(self, **row: float | Tensor | None) -> dict[str, float]:
        """A row of metrics.csv, returned as floats. None and a gold reward of NaN, which
        means outside the world, are empty cells; any other number must be finite."""
        names = [key for key, value in row.items() if isinstance(value, Tensor)]
        if names:  # one wait for the device, not one a number
            numbers = torch.stack([row[name].detach().float() for name in names])
            row |= dict(zip(names, numbers.tolist()))
        for key, value in row.items():
            if key.endswith("gold") and value != value:
                row[key] = None
            elif value is not None and not math.isfinite(value):
                where = f"{self.folder.name}, step {len(self.rows)}"
                fail(f"{where}: {key} is {value}; nothing is replaced, try a lower --lr", 1)
        cells = {key: "" if value is None else f"{value:.6g}" for key, value in row.items()}
        self.rows.append({"step": len(self.rows)} | cells)
        shown = "  ".join(f"{k} {row[k]:.3g}" for k in self.show if row[k] is not None)
        self.bar.set_postfix_str(shown, refresh=False)
        if not PROGRESS and len(self.rows) % max(1, self.steps // 10) == 0:
            say(f"{self.folder.name} {len(self.rows)}/{self.steps}  {shown}")
        return row

    def save(self, folder: Path) -> None:
        """The weights go last: if model.pt is there, so are the files about it."""
        table = csv.DictWriter(metrics := io.StringIO(), self.rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        how = dict(script=Path(sys.argv[0]).name, flags=asdict(self.cfg), steps=len(self.rows))
        how |= dict(torch=torch.__version__, python=sys.version.split()[0])
        how |= dict(device=str(self.model.device), seconds=round(time.time() - self.began, 1))
        config = json.dumps(how, indent=1) + "\n"
        about = {"metrics.csv": metrics.getvalue(), "config.json": config}
        save_model(folder, self.model, {"flags": how["flags"]}, about)


# ---------------------------------------------------------------------------------- inputs

RECIPE = ("sft", "reward_model")  # made when missing, by the script of that name
MAKERS = dict(base="sft", ppo="ppo", dpo="dpo", rejection_sampling="rejection_sampling")
PAIRS = 20_000  # comparisons that a missing file is filled with


def run_config(folder: Path) -> dict:
    """How a run was made: its config.json, or {} if it has none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "config.json").read_text())
    return {}


def check_inputs(cfg, *names: str) -> list[str]:
    """Return the missing models that the recipe can make. Fail if another model is missing, or
    if a missing one has an unfinished run on the reader's own data."""
    runs = Path(cfg.runs)
    missing = [x for x in names if ".py:" not in x and not (runs / x / "model.pt").exists()]
    for name in missing:
        if name not in RECIPE:
            maker = f"{MAKERS[name]}.py" if name in MAKERS else f"SCRIPT.py --out {name}"
            fail(f"{runs / name} is not there: python {maker} --runs {runs} makes it")
        flags = run_config(runs / f"{name}_stopped").get("flags", {})
        if flags.get("data") or flags.get("raw"):
            fail(f"{name} is needed, and {runs / name}_stopped unfinished: finish or delete it")
    return missing


def load_run(cfg, name: str, head: str, device: torch.device) -> Transformer:
    """The model in runs/NAME. If it is missing, its script in the recipe runs first, here."""
    if check_inputs(cfg, name):
        say(f"{cfg.runs}/{name} is not there: {name}.py makes it")
        script, argv = str(Path(__file__).resolve().with_name(f"{name}.py")), sys.argv
        sys.argv = [script, "--runs", cfg.runs, "--seed", str(cfg.seed), "--device", cfg.device]
        runpy.run_path(script, run_name="__main__")
        sys.argv = argv
    return load_model(Path(cfg.runs) / name, head, device)


def comparisons(cfg, context: int, device: torch.device) -> list[dict]:
    """The judged pairs of cfg.data, or in runs/NAME/comparisons.jsonl for each NAME of
    cfg.comparisons, "a,b". What is missing is collected, with answers of cfg.init."""
    if cfg.data and cfg.comparisons != type(cfg).comparisons:
        fail("--data and --comparisons: one of the two")
    rows, keys = [], ("prompt", "chosen", "rejected")
    if cfg.data:
        return read_jsonl(cfg.data, keys, context=context)
    for name in cfg.comparisons.split(","):
        path = Path(cfg.runs) / name / "comparisons.jsonl"
        if not path.exists():
            policy = load_run(cfg, cfg.init, "lm", device)
            say(f"{path}: {PAIRS} pairs of answers from {cfg.init}, judged")
            seed_all(cfg.seed)
            collect_comparisons(policy, PAIRS, path)
        rows += [row | {"source": name} for row in read_jsonl(path, keys, context=context)]
    return rows


def read_prompts(data: str | None, room: int, context: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts x: the reader's own, or the world's; after the longest of
    them `room` more tokens fit into the context."""
    rows = read_jsonl(data, ("prompt",), room, context) if data else []
    prompts = list(dict.fromkeys(row["prompt"] for row in rows)) or list(QUESTIONS)
    train, held = split([x for x in prompts if len(chat(x)) + room <= context])
    if not train or not held:
        fail(f"no prompt and {room} new tokens fit into {context}: lower --max-new-tokens")
    return train, held


def shuffled(prompts: list[str]) -> Iterator[str]:
    """Prompts without end, in an order shuffled anew when all were seen."""
    while True:
        yield from random.sample(prompts, len(prompts))


Reward = Callable[[list[str], Rollout], Tensor]  # (prompt of each row, answers) -> r (B,)


def load_reward(cfg, source: str, device: torch.device) -> Reward:
    """r(x, y): the score of a reward model under runs/, or a function in FILE.py:function
    of the reader's own, (prompts, completions) -> floats."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        model = load_run(cfg, source, "scalar", device).requires_grad_(False)

        def scores(prompts: list[str], rollout: Rollout) -> Tensor:
            T, context = rollout.tokens.shape[1], model.config.context
            if context < T:
                fail(f"{source} has a context of {context} tokens, and {T} are needed")
            return score(model, rollout.tokens, rollout.response_mask)

        return scores

    path = Path(file).resolve()

    @contextlib.contextmanager
    def naming_the_line():  # of the reader's file
        try:
            yield
        except (Exception, SystemExit) as error:
            calls = traceback.extract_tb(error.__traceback__)
            lines = [call.lineno for call in calls if call.filename == str(path)]
            line = lines[-1] if lines else getattr(error, "lineno", 0)
            fail(f"--reward {file}:{line}: {error!r}")

    sys.path.insert(0, str(path.parent))  # so that it can import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # pickle looks there; json stays json
    with naming_the_line():
        spec.loader.exec_module(module)
        function = getattr(module, name)

    @naming_the_line()
    def reward(prompts: list[str], rollout: Rollout) -> Tensor:
        texts = completions(rollout)
        values = torch.tensor([float(x) for x in function(list(prompts), list(texts))])
        if len(values) != len(texts):
            raise ValueError(f"{len(values)} numbers for {len(texts)} answers")
        for value, *answer in zip(values.tolist(), prompts, texts):
            if not math.isfinite(value):
                raise ValueError(f"{value} for {answer}")
        return values.to(rollout.tokens.device)

    return reward


# --------------------------------------------------------------------------- closing table

NUMBERS = ("reward", "gold", "log_ratio", "right", "length", "finished")


@torch.no_grad()
def evaluate(policy, reference, reward, prompts: list[str], limit: int, n: int = 4) -> dict:
    """n sampled answers to each of M prompts: `prompts`, `answers` as text, and (M, n) each
    of NUMBERS; log_ratio is log π(y|x) − log π_ref(y|x), length is in tokens."""
    torch.manual_seed(0)
    rows = []
    for asked, rollout in samples(policy, prompts, n, limit):
        mask, texts, finished = rollout.response_mask, completions(rollout), rollout.finished
        log_ratio = token_logprobs(policy, rollout.tokens, mask)
        log_ratio = (log_ratio - token_logprobs(reference, rollout.tokens, mask)).sum(1)
        r = reward(asked, rollout) if reward else torch.full_like(log_ratio, math.nan)
        gold = [gold_reward(*row) for row in zip(asked, texts, finished.tolist())]
        facts = [right(*row) for row in zip(asked, texts)]
        numbers = r, torch.tensor(gold), log_ratio, torch.tensor(facts), mask.sum(1), finished
        rows += zip(asked, texts, *(column.tolist() for column in numbers))
    asked, answers, *columns = zip(*rows)
    columns = dict(zip(NUMBERS, torch.tensor(columns).view(len(NUMBERS), -1, n)))
    return {"prompts": list(asked[::n]), "answers": list(answers)} | columns


def standard_error(values: Tensor, groups: list) -> float:
    """Clustered standard error of the mean of values (M, N); groups (M) are the clusters."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.bincount([number[x] for x in groups], (values - values.mean()).sum(1))
    n = len(sums)
    return math.sqrt(sums @ sums * n / max(1, n - 1)) / values.numel()


def win_rate(gold: Tensor, other: Tensor) -> Tensor:
    """Share of same-prompt pairs where gold > other, (M, 4), (M, 4) -> (); a tie counts ½."""
    gap = gold[:, :, None] - other[:, None, :]
    return torch.where(gap.isnan(), gap, (gap.sign() + 1) / 2).mean()


def print_table(cfg, found: dict[str, dict], ref: str, reward_name: str) -> None:
    """A row a run. ± is one standard error; answers about one fact, or to one prompt outside
    the world, are not independent."""
    prompts = found[ref]["prompts"]
    groups = [QUESTIONS.get(prompt, prompt) for prompt in prompts]
    say(f"\n{len(prompts)} held-out prompts × 4 answers; reward: {reward_name}; KL to: {ref}")
    line = "{:20}{:>15}{:>15}{:>15}{:>10}{:>8}{:>8}{:>10}{:>9}".format
    say(line("", "reward", "gold", "KL", "win rate", "right", "length", "finished", "seconds"))
    for name, run in found.items():
        mean = {key: run[key].mean() for key in NUMBERS}
        cells = [f"{mean[k]:.2f} ± {standard_error(run[k], groups):.2f}" for k in NUMBERS[:3]]
        cells += [f"{win_rate(run['gold'], found[ref]['gold']):.2f}", f"{mean['right']:.2f}"]
        cells += [f"{mean['length']:.1f}", f"{mean['finished']:.3f}"]
        cells += [f"{run_config(Path(cfg.runs) / name).get('seconds', math.nan):.0f}"]
        say(line(name, *("–" if "nan" in cell else cell for cell in cells)))


def table_reward(cfg, device: torch.device) -> tuple[Reward | None, str]:
    """The table's reward and its name: --reward, or runs/reward_model; None if that has not
    been made yet."""
    name = getattr(cfg, "reward", "reward_model")
    if name == "reward_model" and not (Path(cfg.runs) / name / "model.pt").exists():
        return None, "none yet"
    return load_reward(cfg, name, device), name


def closing_table(cfg, names: list[str], reward, reward_name: str, prompts, device) -> dict:
    """Evaluate these runs, the first of which is π_ref, and print their table; after a
    training also what was said before and after. A run that is no policy is left out."""
    ref, found = load_model(Path(cfg.runs) / names[0], "lm", device), {}
    names = [names[0], *(name for name in names if name != "base")]  # base knows no chat
    for name in tqdm(dict.fromkeys(names), disable=not PROGRESS):
        try:
            policy = read_model(Path(cfg.runs) / name).to(device)
            if policy.kind == "lm":
                found[name] = evaluate(policy, ref, reward, prompts[:400], cfg.max_new_tokens)
        except ValueError as error:
            say(f"skipped: {name}: {error}")
    print_table(cfg, found, names[0], reward_name)
    if getattr(cfg, "out", None) in found:
        before_and_after(cfg, found, device)
    return found


def before_and_after(cfg, found: dict[str, dict], device: torch.device) -> None:
    """Print what cfg.init and cfg.out answer to the 3 shortest prompts; samples.txt has 30."""
    asked = blocks = found[cfg.out]["prompts"][:30]
    for name in (cfg.init, cfg.out):
        if name in found:  # the first of four answers
            texts, ends = found[name]["answers"][::4], found[name]["finished"][:, 0]
            texts = [x if end else f"{x} … (unfinished)" for x, end in zip(texts, ends)]
        else:  # the base model knows no chat: it is shown the bare prompt
            base = load_model(Path(cfg.runs) / name, "lm", device)
            rollout = generate(base, [encode(prompt) for prompt in asked], cfg.max_new_tokens)
            texts = [f"{text.strip()} …" for text in completions(rollout)]
        texts = [text.replace("\n", "⏎") for text in texts]
        blocks = [f"{block}\n{name:>20}: {text}" for block, text in zip(blocks, texts)]
    say("\n" + "\n".join(blocks[:3]))
    write(Path(cfg.runs) / cfg.out / "samples.txt", "\n".join(blocks) + "\n")


# ---------------------------------------------------------------------------------- report

FIVE = ("sft", "rejection_sampling", "rs_random", "dpo", "ppo")  # drawn in colour
CURVES = ("J", "reward", "kl", "gold", "length")


def ideal_frontier(policy: Transformer, prompts: list[str], limit: int) -> tuple:
    """(KL, gold) of π* at many β (eq:dpo_opt_policy, with the gold reward in place of r): 256
    samples of π_ref to each prompt, weighted by e^{gold/β}. An estimate: with few samples the
    best answers are missing, and it lies too low."""
    gold = evaluate(policy, policy, None, prompts, limit, n=256)["gold"]
    beta = torch.logspace(-0.8, 1.3, 60).view(-1, 1, 1)
    weights = (gold / beta).softmax(-1)  # (β, prompt, sample)
    kl = torch.xlogy(weights, 256 * weights)
    return kl.sum(-1).mean(-1), (weights * gold).sum(-1).mean(-1)


def learning_curves(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv that are in CURVES, as 12 means each."""
    try:
        table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
        parts = np.array_split(table, min(12, len(table)))
    except (OSError, ValueError, TypeError):  # no such file, or a single step
        return {}
    found = [key for key in CURVES if key in table.dtype.names]
    return {key: np.array([part[key].mean() for part in parts]) for key in found}


def draw(cfg, found: dict[str, dict], device: torch.device) -> None:
    """runs/frontier.png: reward and gold against KL, a dot a run, and the path of its
    training. runs/curves.png: what metrics.csv has of J, reward, kl, gold and length."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        say("matplotlib is not installed, so no pictures are drawn")
        return
    frontier, axes = plt.subplot_mosaic([["reward", "gold"]], figsize=(12, 5), layout="tight")
    curves, panels = plt.subplot_mosaic([CURVES], figsize=(18, 3.6), layout="tight")
    for name, run in found.items():
        folder, known = Path(cfg.runs) / name, name in FIVE
        size, color = (9, f"C{FIVE.index(name)}") if known else (6, "0.7")
        style = {"color": color, "zorder": 2 + known}
        path, flags = learning_curves(folder), run_config(folder).get("flags", {})
        for key, axis in axes.items():
            x, y = run["log_ratio"].mean().item(), run[key].mean().item()
            axis.plot(x, y, "o", markersize=size, **style)
            side = "top" if name in FIVE[:2] else "bottom"  # so that near ones do not overlap
            axis.text(x, y, f"   {name}", fontsize=size, va=side, color=color)
            axis.set(xlabel=f"KL to {cfg.ref}, nats per response", ylabel=key)
            # a path has the rewards it was trained on, which may not be this table's
            same = key == "gold" or flags.get("reward") == cfg.reward
            if same and {"kl", key} <= path.keys():
                axis.plot(path["kl"], path[key], alpha=0.5, **style)
        for key, curve in path.items():
            share = np.linspace(0, 1, len(curve))
            panels[key].plot(share, curve, label=name if known else None, **style)
    for key, axis in panels.items():
        axis.set(title=key, xlabel="share of training")
    panels["reward"].legend(fontsize=7)
    prompts = found[cfg.ref]["prompts"]
    if prompts[0] in QUESTIONS:
        policy = load_model(Path(cfg.runs) / cfg.ref, "lm", device)
        ideal = ideal_frontier(policy, prompts[::6], cfg.max_new_tokens)
        axes["gold"].plot(*ideal, "k:", label="ideal")
        axes["gold"].legend()
    for figure, name in ((frontier, "frontier.png"), (curves, "curves.png")):
        figure.savefig(picture := io.BytesIO(), dpi=110)
        write(Path(cfg.runs) / name, picture.getvalue())
        say(f"{cfg.runs}/{name}")


def report(cfg) -> None:
    """The table over all policies under --runs, on the same prompts, and the pictures."""
    device = pick_device(cfg.device)
    reward = table_reward(cfg, device)
    reference = load_run(cfg, cfg.ref, "lm", device)
    prompts = read_prompts(cfg.data, cfg.max_new_tokens, reference.config.context)[1]
    names = sorted(path.parent.name for path in Path(cfg.runs).glob("*/model.pt"))
    draw(cfg, closing_table(cfg, [cfg.ref, *names], *reward, prompts, device), device)


def sample(cfg) -> None:
    """Print answers to a question, each with log π(y|x) and, with a reward model, r(x, y)."""
    device = pick_device(cfg.device)
    reward, _ = table_reward(cfg, device)
    policy = load_run(cfg, cfg.run, "lm", device)
    if len(chat(cfg.question)) + cfg.max_new_tokens > policy.config.context:
        fail(f"the question is too long for a context of {policy.config.context} tokens")
    if cfg.best and reward is None:
        fail("--best needs a reward model: python reward_model.py makes one")
    seed_all(cfg.seed)
    rollout = generate(policy, [chat(cfg.question)] * cfg.n, cfg.max_new_tokens)
    scores = reward([cfg.question] * cfg.n, rollout) if reward else torch.zeros(cfg.n)
    rows = zip(scores.tolist(), rollout.logprobs.sum(1).tolist(), completions(rollout))
    for r, logp, text in [max(rows)] if cfg.best else rows:
        said = f"   r {r:+.2f}" if reward else ""
        say(f"log π {logp:7.2f}{said}   " + text.replace("\n", "⏎"))


# ---------------------------------------------------------------------------------- export
# A model as transformers, TRL, vLLM and others load one: a Llama checkpoint, written by hand.

SPECIALS = ("<|eos|>", "<|user|>", "<|assistant|>", "<|pad|>")  # what ids 0 to 3 are called
CHAT_TEMPLATE = (  # `chat`, in Jinja; an answer that is there ends with EOS
    "{% for turn in messages %}{% if turn.role == 'user' %}<|user|>{{ turn.content }}"
    "{% elif turn.role == 'assistant' %}<|assistant|>{{ turn.content }}<|eos|>"
    "{% else %}{{ raise_exception('only user and assistant have turns') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = {  # our weight: Llama's name for it; a fused one is several of Llama's, stacked
    "embed": ["model.embed_tokens"],
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
    "norm": ["model.norm"],
    "scalar": ["score"],
}


def export(model: Transformer, folder: Path) -> None:
    """A policy as LlamaForCausalLM, a reward model as LlamaForSequenceClassification."""
    if os.path.exists(folder / "model.pt"):
        fail(f"{folder} is a run, whose config.json would be replaced; name another folder")
    c, policy = model.config, model.kind == "lm"
    kind = "CausalLM" if policy else "SequenceClassification"
    # every key is set, as Llama's defaults are other ones: its BOS, 1, would be our USER
    ids = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = dict(architectures=[f"LlamaFor{kind}"], model_type="llama", **ids)
    config |= dict(torch_dtype="float32", vocab_size=c.vocab_size, hidden_size=c.channels)
    config |= dict(intermediate_size=c.hidden, hidden_act="silu", num_hidden_layers=c.layers)
    config |= dict(num_attention_heads=c.heads, num_key_value_heads=c.kv_heads)
    config |= dict(head_dim=c.channels // c.heads, max_position_embeddings=c.context)
    config |= dict(attention_bias=False, mlp_bias=False, tie_word_embeddings=policy)
    config |= dict(rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta)  # for transformers 4, and
    config |= dict(rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta))  # for 5
    about = dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT_TEMPLATE)
    about |= dict(eos_token=SPECIALS[EOS], pad_token=SPECIALS[PAD], padding_side="left")
    about |= dict(model_max_length=c.context, clean_up_tokenization_spaces=False)
    about |= dict(model_input_names=["input_ids", "attention_mask"])
    files = {"tokenizer": _tokenizer(), "tokenizer_config": about, "config": config}
    if policy:  # generate() then samples as ours does: the whole softmax, at temperature 1
        law = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        files["generation_config"] = {**law, "max_new_tokens": c.context // 2, **ids}
    else:  # Llama's head has no bias: the reader of its number subtracts the mean to have r
        config |= dict(num_labels=1, mean=model.offset.item(), std=1.0)
    write(folder / "model.safetensors", _safetensors(model))
    for name, content in files.items():
        write(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")


def _safetensors(model: Transformer) -> bytes:
    """The header's length in 8 bytes; the header, JSON: where each weight is; the weights."""
    c, header, data = model.config, {"__metadata__": {"format": "pt"}}, bytearray()
    kv = c.channels // c.heads * c.kv_heads
    for ours, weight in model.named_parameters():  # blocks.i.part.weight, or part.weight
        *block, part, _ = ours.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        rows = [c.channels, kv, kv] if part == "qkv" else len(weight) // len(LLAMA[part])
        for name, w in zip(LLAMA[part], weight.detach().cpu().split(rows)):
            where = {"shape": list(w.shape), "data_offsets": [len(data), len(data) + w.nbytes]}
            header[f"{layer}{name}.weight"] = {"dtype": "F32", **where}
            data += w.numpy().astype("<f4").tobytes()  # little-endian
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the weights begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data


def _tokenizer() -> dict:
    """`encode` as a BPE without merges: a regex splits the text; a part that is a piece becomes
    its id (ignore_merges), any other the ids of its bytes. Specials are found in text by name,
    which `encode` never does: do not let a stranger's prompt spell <|assistant|>."""
    # JSON has no bytes. GPT-2's way: each has a letter, its own if Latin-1 can print it
    own, free = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = [chr(byte if byte in own else next(free)) for byte in range(256)]
    names = [*SPECIALS, *("".join(letters[byte] for byte in piece) for piece in PIECES[4:])]
    ids = {name: i for i, name in enumerate(names)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": x, "special": True, **plain} for i, x in enumerate(SPECIALS)]
    to_letters = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    to_letters["type"] = "ByteLevel"
    regex = {"Regex": r" ?[\p{L}\p{N}_]+|[\s\S]"}  # encode's: \w in Python is [\p{L}\p{N}_]
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, to_letters]}
    bpe = {"type": "BPE", "vocab": ids, "merges": [], "ignore_merges": True}
    return dict(added_tokens=added, pre_tokenizer=steps, model=bpe, decoder=to_letters)


def convert(cfg) -> None:
    """Write a policy or a reward model for whatever loads Llama models."""
    export(load_model(Path(cfg.runs) / cfg.run, None, "cpu"), Path(cfg.folder))
    say(f"{cfg.folder}: {cfg.run}, to be loaded as a Llama model")


# ---------------------------------------------------------------------------- command line


def arg(default, help: str, low: float = 0, high: float = 2**31, choices=None):
    """A Config field: its default, its book symbol and unit, what values it may have."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def parse(config: type, doc: str, words: list[str] | None = None):
    """The command line as a Config: one --flag per field; what has no default has no flag."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    parser.error = lambda text: fail(f"{parser.prog}: {text}; see python {parser.prog} --help")
    for f in fields(config):
        flag = "-n" if f.name == "n" else f"--{f.name.replace('_', '-')}"
        text, choices = f.metadata["help"].replace("%", "%%"), f.metadata["choices"]
        if f.default is MISSING:
            parser.add_argument(f.name, help=text, metavar=f.name.upper())
        elif f.default is False:
            parser.add_argument(flag, help=text, action="store_true")
        else:
            given = {"type": f.type, "default": f.default, "choices": choices}
            parser.add_argument(flag, help=f"{text} (default: %(default)s)", **given)
    cfg = config(**vars(parser.parse_args(words)))
    for f in fields(config):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if f.name in ("init", "ref", "out", "run", "comparisons"):
            names = value.split(",") if f.name == "comparisons" else [value]
            good = all(re.fullmatch(r"\w[\w.-]{0,60}", name) for name in names)
            wanted = "a plain folder name, under --runs,"
        elif isinstance(value, str):
            good, wanted = value.strip(), "some text"
        else:
            good = value is None or low <= value <= high
            wanted = f"a number from {low} to {high}"
        if not good:
            parser.error(f"--{f.name.replace('_', '-')} {value!r}: {wanted} is needed")
    return cfg


def start(main: Callable, config: type, doc: str) -> None:
    """Run a script. It stops at once if --out cannot be written, or names its own input or a
    default input of other scripts."""
    if sys.stdout is not None:  # a console without β prints \\u03b2
        sys.stdout.reconfigure(errors="backslashreplace")
    cfg = parse(config, doc)
    if hasattr(cfg, "out"):
        inputs = {"base", "sft", "comparisons", "reward_model"} - {config.out}
        if cfg.out in inputs | {getattr(cfg, x, None) for x in ("init", "ref", "reward")}:
            fail(f"--out {cfg.out}: this run or others start from it; choose another name")
        folder = Path(cfg.runs) / cfg.out
        there = next(x for x in (folder, *folder.absolute().parents) if x.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        if not writable or (folder / "model.pt").is_dir():
            fail(f"--out {cfg.out}: {there} cannot be written to")
        for left in folder.glob(".*.part"):  # of a run that was killed while writing
            if time.time() - left.stat().st_mtime > 600:
                left.unlink()
    try:
        main(cfg)
    except KeyboardInterrupt:
        fail("stopped; what was not saved yet is lost", 130)


@dataclass
class Report:
    """The flags of `report`."""

    ref: str = arg("sft", "π_ref of the KL and the win rate, under --runs")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
    data: str = arg(None, "held-out prompts from your own JSONL of {prompt}")
    max_new_tokens: int = arg(24, "longest answer, in tokens", low=1)
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


@dataclass
class Sample:
    """The words and flags of `sample`."""

    run: str = arg(MISSING, "a policy under --runs")
    question: str = arg(MISSING, "what it is asked")
    n: int = arg(4, "answers", low=1)
    best: bool = arg(False, "print only the answer with the highest r: best of n")
    reward: str = arg("reward_model", "r: a run under --runs, or FILE.py:function")
    max_new_tokens: int = arg(24, "longest answer, in tokens", low=1)
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


@dataclass
class Export:
    """The words and flags of `export`."""

    run: str = arg(MISSING, "a policy or a reward model, under --runs")
    folder: str = arg(MISSING, "where its files go")
    runs: str = arg("runs", "the folder of all runs")


if __name__ == "__main__":
    match sys.argv.pop(1) if len(sys.argv) > 1 else "--help":
        case "report":
            start(report, Report, report.__doc__)
        case "sample":
            start(sample, Sample, sample.__doc__)
        case "export":
            start(convert, Export, convert.__doc__)
        case "--help" | "-h":
            start(lambda cfg: say(__doc__), Report, __doc__)
        case word:
            fail(f"{word} is none of report, sample, export; see python common.py --help")
