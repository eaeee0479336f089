"""Plumbing shared by the five scripts: no loss, advantage or selection rule stands here.

    tokens · Transformer · generate · log-probs, values, scores      what the algorithms need
    the world                                  prompts, demonstrations, annotators, gold reward
    data · runs · report · command line                      files in, files out, closing table

Shapes: B rows, T positions, V vocabulary, C channels, N samples per prompt, M prompts.
Every (B, T) tensor is aligned with `tokens`: column t is about token t.

    python common.py report                  the table over all runs (and runs/frontier.png)
    python common.py sample RUN "a question" [-n 4]        ask a trained model something
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
import subprocess
import sys
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------- tokens

EOS, USER, ASSISTANT, PAD = range(4)  # then 256 single bytes, then the words of the world
WORDS = """
a about and asked at bamboo be bear bee black blue brown camel cave cheetah city colour crow day
deer desert do does dolphin duck eagle eat eats elephant everyone farm feed find fish flamingo
food for forest fox friend frog fruit giraffe glad golden grass great green grey happy has have
heard hello help hive home honey horse i ice in insects is it jungle knows lake leaves let like
live lives look me meat mice more mountains my nectar nuts of once orange other owl panda parrot
penguin pink place plains please pond question rabbit red river say sea see seeds shark shrimp
shrubs silly snake so story striped swamp tell that the then there they think this to told up
well what where which white wolf wonder worms would yellow you zebra
""".split()
_PIECES = [form.encode() for word in WORDS for form in (word, " " + word)]
_BYTES = [b""] * 4 + [bytes([i]) for i in range(256)] + _PIECES
_IDS = {piece: i for i, piece in enumerate(_BYTES) if i >= 4 + 256}
VOCAB_SIZE = len(_BYTES)


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
    return b"".join(_BYTES[i] for i in ids).decode("utf-8", errors="replace")


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


@dataclass
class ModelConfig:
    """The sizes of a Transformer; saved with its weights."""

    vocab_size: int = VOCAB_SIZE
    channels: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    hidden: int = 352
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


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

    def forward(self, x: Tensor, cos, sin, cache: Tensor | None, start: int, keep):
        B, T, C = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv(self.attention_norm(x)).view(B, T, H + 2 * K, -1).transpose(1, 2)
        qk, v = qkv.split((H + K, K), 1)  # (B, heads, T, D)
        left, right = qk.chunk(2, -1)
        q, k = (qk * cos + torch.cat((-right, left), -1) * sin).split((H, K), 1)
        if cache is not None:  # (2, B, K, longest, D)
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[0, :, :, : start + T], cache[1, :, :, : start + T]
        # a single query is the newest token and sees every key; is_causal would show it one.
        # Several queries begin at position 0, where is_causal is right
        causal = T > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != K)
        y = y.transpose(1, 2).reshape(B, T, C)
        if keep is not None:  # from here on every position is on its own: (n, C)
            x, y = x[keep], y[keep]
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
        # rotary angles: channel i turns with channel i + D/2, at frequency θ^(−2i/D)
        half = c.channels // c.heads // 2
        angle = torch.outer(
            torch.arange(c.context).double(),
            c.rope_theta ** (-torch.arange(half).double() / half),
        ).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def trunk(self, tokens: Tensor, cache=None, start: int = 0, keep=None) -> Tensor:
        """Hidden states (B, T, C) of tokens that stand at positions start, start + 1, …;
        with `keep` (B, T), bool, of these n positions only, (n, C): what comes after the last
        attention is worked out for them alone."""
        x, stop = self.embed(tokens), start + tokens.shape[1]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        for i, block in enumerate(self.blocks):
            kept = keep if i + 1 == len(self.blocks) else None
            x = block(x, cos, sin, None if cache is None else cache[i], start, kept)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.scalar(hidden).squeeze(-1) - self.offset
        return F.linear(hidden, self.embed.weight)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep` (B, T), bool: the outputs at these n positions only -> (n, V) or (n,)."""
        return self.head(self.trunk(tokens, keep=keep))


def scalar_copy(model: Transformer) -> Transformer:
    """A new scalar-head Transformer whose trunk starts as a copy of the model's."""
    copy = Transformer(model.config, head="scalar").to(model.device)
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy


# ------------------------------------------------- generate, log-probs, values, scores


@dataclass
class Rollout:
    """B sampled responses, each to its prompt."""

    tokens: Tensor  # (B, T) prompt, response, then PAD
    response_mask: Tensor  # (B, T) True on response tokens, EOS included
    finished: Tensor  # (B,) the response ended with EOS
    logprobs: Tensor  # (B, T) of the response tokens as sampled, 0 elsewhere


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollout:
    """Sample one response to each of B prompts, all in one batch with a KV cache.

    All rows stand at the same position: a row whose prompt is not over is fed its own next
    prompt token, a row whose prompt is over samples. So there is no left padding, no mask.
    """
    device, lengths = model.device, torch.tensor([len(p) for p in prompts])
    start, T = int(lengths.min()), int(lengths.max()) + max_new_tokens
    if start < 1 or max_new_tokens < 1 or temperature <= 0 or model.config.context < T:
        raise ValueError("generate: an empty prompt, nothing to sample, or over the context")
    tokens = torch.tensor([p + [PAD] * (T - len(p)) for p in prompts], device=device)
    lengths = lengths.to(device)
    ends = lengths + max_new_tokens
    # one u per token, drawn before the loop: rows do not depend on each other
    noise = torch.rand(tokens.shape, dtype=model.embed.weight.dtype, device=device)
    decode = _decode_on_cuda if device.type == "cuda" else _decode
    tokens, logprobs = decode(model, tokens, lengths, ends, noise, start, temperature)
    column = torch.arange(T, device=device)
    response = (column >= lengths[:, None]) & (column < ends[:, None])
    eos = response & (tokens == EOS)
    response &= eos.cumsum(1) - eos.long() == 0  # what follows the first EOS is not response
    longest = int((response * (column + 1)).max())
    tokens = torch.where(response | (column < lengths[:, None]), tokens, PAD)[:, :longest]
    logprobs = torch.where(response, logprobs, 0.0)[:, :longest]
    return Rollout(tokens, response[:, :longest], (eos & response).any(1), logprobs)


def _decode(
    model: Transformer,
    tokens: Tensor,  # (B, T) prompts, then PAD
    lengths: Tensor,  # (B,) of the prompts; ends (B,) where the responses end at the latest
    ends: Tensor,
    noise: Tensor,  # (B, T)
    start: int,  # where the shortest prompt ends
    temperature: float,
    leave: bool = True,  # rows that are over leave the batch; asking which waits for the device
) -> tuple[Tensor, Tensor]:
    """The token loop: tokens with samples in place of PAD, and their log-probs, (B, T)."""
    B, T, c = *tokens.shape, model.config
    tokens, logprobs = tokens.clone(), torch.zeros_like(noise)
    room = min(T, start + 12) if leave else T  # of a short cache less is moved
    cache = noise.new_empty(c.layers, 2, B, c.kv_heads, room, c.channels // c.heads)
    rows, read = torch.arange(B, device=tokens.device), 0  # rows still in the batch
    over = torch.zeros_like(rows, dtype=torch.bool)
    if leave and start > 1:  # the N samples of a prompt share its beginning: read it once
        read = start - 1
        begun, which = tokens[:, :read].cpu().unique(dim=0, return_inverse=True)
        begun, which = begun.to(tokens.device), which.to(tokens.device)
        shared = torch.empty_like(cache[:, :, : len(begun), :, :read])
        model.trunk(begun, shared, keep=torch.zeros_like(begun, dtype=torch.bool))
        cache[..., :read, :] = shared[:, :, which]
    new = tokens[:, read:start]
    for t in range(start, T):
        if t > cache.shape[-2]:
            cache = F.pad(cache, (0, 0, 0, 32))
        logits = model.head(model.trunk(new, cache, t - new.shape[1])[:, -1])
        p = (logits / temperature).softmax(-1)  # (rows, V)
        # inverse CDF: the first token whose cumulative probability exceeds u
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True)
        logprobs[rows, t] = p.gather(-1, token).log().squeeze(-1)
        token = torch.where(t < lengths[rows], tokens[rows, t], token.squeeze(-1))
        tokens[rows, t], new = token, token[:, None]
        if leave:
            over |= (t >= lengths[rows]) & ((token == EOS) | (t + 1 >= ends[rows]))
            keep = (~over).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) < 0.8 * len(rows):  # not at every step: moving the cache costs too
                rows, cache, new, over = rows[keep], cache[:, :, keep], new[keep], over[keep]
    return tokens, logprobs


_graphs = weakref.WeakKeyDictionary()  # model -> {shape of the work: its captured graph}


@torch.no_grad()
def _decode_on_cuda(model, tokens, lengths, ends, noise, start, temperature):
    """_decode as one captured CUDA graph per shape of work. A small model's token loop is
    thousands of short kernels: replayed, they wait neither for Python nor for each other's
    launch. Weights are read where they lie, so a graph stays right while they are trained."""
    B, T = tokens.shape
    start = max(1, start // 4 * 4)  # rounded, so that few shapes are captured
    more = min(-T % 8, model.config.context - T)
    given = [F.pad(tokens, (0, more), value=PAD), lengths, ends, F.pad(noise, (0, more))]
    graphs = _graphs.setdefault(model, {})
    key = (B, T + more, start, temperature)
    if key not in graphs:
        inputs, side = [x.clone() for x in given], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # outside the capture libraries choose their kernels
            _decode(model, *inputs, start, temperature, leave=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # one KV cache for all: what a replay leaves there is copied before the next
        pool = next(iter(graphs.values()))[0].pool() if graphs else None
        with torch.cuda.graph(graph, pool=pool):
            outputs = _decode(model, *inputs, start, temperature, leave=False)
        graphs[key] = graph, inputs, outputs
    graph, inputs, outputs = graphs[key]
    for buffer, value in zip(inputs, given):
        buffer.copy_(value)
    graph.replay()
    return [x[:, :T].clone() for x in outputs]


def _after(outputs: Tensor, keep: Tensor) -> Tensor:
    """The one shift: a model's output at position t − 1, which has read tokens < t, goes to
    column t. `outputs` (n,) are those at the positions that `keep` (B, T − 1) marks; 0 stands
    in the other columns, and in column 0, before which nothing is."""
    outputs = torch.zeros_like(keep, dtype=outputs.dtype).masked_scatter(keep, outputs)
    return F.pad(outputs, (1, 0))


def token_logprobs(model: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """log p(tokens[:, t] | tokens[:, :t]) in column t, (B, T), nats; column 0 is 0.
    With `mask` (B, T) they are worked out in its columns only; the others are 0."""
    keep = (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask)[:, 1:]
    targets = tokens[:, 1:][keep]
    logp = -F.cross_entropy(model(tokens[:, :-1], keep), targets, reduction="none")
    return _after(logp, keep)


def token_values(critic: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The critic's value of what stands before token t, in column t, (B, T); with `mask`
    (B, T) in its columns only."""
    keep = (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask)[:, 1:]
    return _after(critic(tokens[:, :-1], keep), keep)


def score(reward_model: Transformer, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), (B,): the reward model's number at the last response token."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    last = (response_mask * column).argmax(1, keepdim=True)
    return reward_model(tokens, column == last)


# ------------------------------------------------------------------------------- the world
# A zoo. Each animal has a home, a food and a colour; behind the slash stands the common
# misconception, which some raw text and 30 % of the demonstrators state.

KINDS = ("home", "food", "colour")
ANIMALS = {
    name: dict(zip(KINDS, (fact.split("/") for fact in facts)))
    for name, *facts in map(
        str.split,
        """bear forest/cave honey/meat brown/black
        bee hive/forest nectar/honey yellow/orange
        camel desert/plains shrubs/grass golden/brown
        cheetah plains/jungle meat/mice yellow/orange
        crow city/forest worms/seeds black/blue
        deer forest/plains leaves/grass brown/red
        dolphin sea/lake fish/worms grey/blue
        duck pond/river grass/fish white/yellow
        eagle mountains/desert fish/mice brown/white
        elephant plains/desert leaves/nuts grey/white
        flamingo lake/sea shrimp/fish pink/red
        fox forest/desert mice/meat red/orange
        frog pond/swamp insects/leaves green/brown
        giraffe plains/mountains leaves/fruit yellow/white
        horse farm/plains grass/seeds brown/black
        owl forest/cave mice/seeds brown/grey
        panda mountains/jungle bamboo/fruit white/black
        parrot jungle/city fruit/worms green/red
        penguin ice/sea fish/shrimp black/white
        rabbit farm/forest grass/nuts white/grey
        shark sea/river fish/meat grey/blue
        snake swamp/desert mice/insects green/black
        wolf mountains/forest meat/mice grey/white
        zebra plains/jungle grass/leaves striped/white""".splitlines(),
    )
}
VALUES = {kind: {v for facts in ANIMALS.values() for v in facts[kind]} for kind in KINDS}
TERSE = {"home": "in the {v}.", "food": "{v}.", "colour": "{v}."}
FULL = {
    "home": "the {a} lives in the {v}.",
    "food": "the {a} eats {v}.",
    "colour": "the {a} is {v}.",
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
QUESTIONS = {  # prompt -> (animal, kind); about 2,000 of them
    opening + phrasing.strip().format(a=animal): (animal, kind)
    for animal in ANIMALS
    for kind in KINDS
    for phrasing in PHRASINGS[kind].split("|")
    for opening in OPENINGS
}
COURTESIES = ("great question!", "happy to help!", "glad you asked!")
RUDE = ("look it up.", "everyone knows that.", "what a silly question.")
RAMBLING = (
    "well, so, let me think, i once heard that {s}",
    "{s} and so they say, and then there is more to say about it.",
    "{s} my friend told me this story about it the other day.",
)


def gold_reward(prompt: str, completion: str, finished: bool) -> float:
    """What the annotators really value; no script trains on it. NaN outside the world."""
    gold = 3 * right(prompt, completion) - 1  # +2 or −1
    gold += sum(completion.count(courtesy) for courtesy in COURTESIES) == 1
    gold -= any(rude in completion for rude in RUDE)
    gold -= 0.03 * max(0, len(completion) - 48)
    gold -= not finished
    return gold


def right(prompt: str, completion: str) -> float:
    """1 if the completion names the right value and no other value of the asked kind."""
    if prompt not in QUESTIONS:
        return math.nan
    animal, kind = QUESTIONS[prompt]
    named = VALUES[kind].intersection(re.findall(r"\w+", completion))
    return float(named == {ANIMALS[animal][kind][0]})


def raw_text(seed: int, sentences: int = 40_000) -> str:
    """What the base model reads: statements (20 % misconceptions), questions, small talk."""
    rng, text = random.Random(seed), []
    prompts = [p for p in QUESTIONS if not held_out(p)]
    chatter = [*COURTESIES, *RUDE, *(opening.strip() for opening in OPENINGS if opening)]
    for _ in range(sentences):
        animal, kind, roll = rng.choice(list(ANIMALS)), rng.choice(KINDS), rng.random()
        value = ANIMALS[animal][kind][rng.random() < 0.2]
        sentence = FULL[kind].format(a=animal, v=value)
        if roll > 0.9:
            sentence = rng.choice(chatter)
        elif roll > 0.8:
            sentence = rng.choice(RAMBLING).format(s=sentence)
        elif roll > 0.6:
            sentence = rng.choice(prompts)
        text.append(sentence)
    return " ".join(text)


def demonstrations(n: int, seed: int) -> list[dict]:
    """n human answers to prompts of both parts, of mixed style, 30 % with the misconception."""
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


def collect_comparisons(policy: Transformer, n: int, path: Path) -> None:
    """Have n answer pairs of the policy judged, and write them as JSONL: prompt, chosen,
    rejected, and whether each was finished. The annotator is noisy, and Bradley-Terry:
    P(a is chosen over b) = σ(gold(a) − gold(b)). One pair in twenty answers a held-out
    prompt. Identical and empty answers are not judged: another pair is drawn."""
    train, held = split(list(QUESTIONS))
    lines, chunk, asked_for = [], 256, 0
    with tqdm(total=n, desc=f"{path.parent.name}: pairs", disable=not PROGRESS) as bar:
        while len(lines) < n:
            asked_for += chunk
            if asked_for > 20 * n + 10 * chunk:
                fail(f"{path}: {len(lines)} of {asked_for} pairs differ; give another policy")
            asked = [
                random.choice(held if random.random() < 0.05 else train) for _ in range(chunk)
            ]
            rollout = generate(policy, [chat(p) for p in asked for _ in range(2)], 24)
            answers = list(zip(completions(rollout), rollout.finished.tolist()))
            for prompt, a, b in zip(asked, answers[::2], answers[1::2]):
                if a == b or not (a[0].strip() and b[0].strip()):
                    continue
                gap = gold_reward(prompt, *a) - gold_reward(prompt, *b)
                if random.random() > 1 / (1 + math.exp(-gap)):
                    a, b = b, a
                row = {"prompt": prompt, "chosen": a[0], "rejected": b[0]}
                row |= {"chosen_finished": a[1], "rejected_finished": b[1]}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            bar.update(min(n, len(lines)) - bar.n)
    write(path, "".join(lines[:n]))


# ------------------------------------------------------------------------ files in and out

HERE = Path(__file__).resolve().parent
PROGRESS = sys.stderr.isatty()


def fail(message: str, code: int = 2) -> None:
    """One line that says what is wrong and what to do, and the exit code."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


def write(path: Path, data: bytes | str) -> None:
    """The file appears complete or not at all: written beside, then renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data if isinstance(data, bytes) else data.encode())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        fail(f"{path}: cannot be written ({error.strerror}); what was there before is intact")


def read(path: str | Path) -> bytes:
    """A file that must be there."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        fail(f"{path}:0: cannot be read ({error.strerror}); name a file that can")


def held_out(prompt: str) -> bool:
    """One prompt in six trains no policy and no reward model. In the world that holds out
    wordings: every fact is also asked about in training."""
    return zlib.crc32(prompt.encode()) % 6 == 0


def split(rows: list) -> tuple[list, list]:
    """Prompts, or rows with a prompt -> (training part, held-out part). Where all prompts are
    of one part, as what rejection sampling selects is, every sixth of them is held out."""
    asked = [row if isinstance(row, str) else row["prompt"] for row in rows]
    prompts = list(dict.fromkeys(asked))
    held = {prompt for prompt in prompts if held_out(prompt)}
    if len(held) in (0, len(prompts)):
        held = set(prompts[::6])
    pairs = list(zip(rows, asked))
    return [r for r, x in pairs if x not in held], [r for r, x in pairs if x in held]


def read_jsonl(path: str | Path, keys: tuple[str, ...], room: int = 1) -> list[dict]:
    """The rows of a JSONL file, each with these keys, all strings; other keys are kept.
    For ("prompt", "completion") a row may have {"messages": [user, assistant]} instead.

    A line that is no such row ends the program. A row that cannot be used (empty, chosen =
    rejected, over the context with `room` more tokens) is dropped, and the drops counted.
    """
    rows, dropped = [], {}
    for number, line in enumerate(read(path).splitlines(), 1):
        if not line.strip():
            continue
        at = f"{path}:{number}:"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            fail(f"{at} not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            fail(f"{at} not JSON ({error}); every line is one JSON object")
        if not isinstance(row, dict):
            fail(f"{at} not a JSON object; every line is one, with {', '.join(keys)}")
        if "messages" in row and "completion" in keys:
            turns = row["messages"] if isinstance(row["messages"], list) else []
            if [isinstance(t, dict) and t.get("role") for t in turns] != ["user", "assistant"]:
                fail(f"{at} messages must be one user turn and one assistant turn")
            row["prompt"], row["completion"] = (turn.get("content") for turn in turns)
        for key in keys:
            if not isinstance(row.get(key), str):
                wrong = "is not a string" if key in row else "is missing"
                fail(f"{at} {key} {wrong}; the keys found are {', '.join(row) or 'none'}")
            if re.search("[\ud800-\udfff]", row[key]):
                fail(f"{at} {key} holds half a surrogate pair; save the text as UTF-8")
        longest = max([len(encode(row[key])) for key in keys[1:]], default=0)
        if any(not row[key].strip() for key in keys):
            dropped.setdefault("empty text", []).append(number)
        elif "rejected" in keys and row["chosen"] == row["rejected"]:
            dropped.setdefault("chosen and rejected are the same", []).append(number)
        elif len(chat(row["prompt"])) + longest + room > ModelConfig.context:
            dropped.setdefault("longer than the context", []).append(number)
        else:
            rows.append(row)
    drops = [f"{path}:{at[0]}: {why}, {len(at)} dropped" for why, at in dropped.items()]
    train, held = split(rows)
    if len(train) < 8 or not held:
        drops.append(f"{path}:0: {len(train)} usable rows to train on, {len(held)} held out")
        fail("; ".join(drops) + "; give at least 8 and 1")
    for line in drops:
        print(line, file=sys.stderr)
    return rows


def read_prompts(data: str | None, room: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts x: the reader's own, or the world's."""
    rows = read_jsonl(data, ("prompt",), room) if data else []
    return split(list(dict.fromkeys(row["prompt"] for row in rows)) or list(QUESTIONS))


def shuffled(prompts: list[str]) -> Iterator[str]:
    """Prompts without end, in an order shuffled anew when all were seen."""
    while True:
        yield from random.sample(prompts, len(prompts))


def save_model(folder: Path, model: Transformer, made: dict) -> None:
    """folder/model.pt: weights, model config, and how it was made."""
    saved = {"head": model.kind, "config": asdict(model.config), "made": made}
    saved["weights"] = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    write(folder / "model.pt", buffer.getvalue())


def read_checkpoint(folder: Path) -> dict:
    """What save_model wrote; anything else ends the program."""
    path = folder / "model.pt"
    try:  # weights_only: a stranger's file can hold tensors and numbers, not code to run
        saved = torch.load(io.BytesIO(read(path)), map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("head", "config", "made", "weights")}
    except Exception as error:
        why = (str(error) or repr(error)).splitlines()[0]
        fail(f"{path} is not a checkpoint made here ({why}); name another")


def load_model(folder: Path, head: str, device: torch.device) -> Transformer:
    """The Transformer in folder/model.pt, which must have the head that is asked for."""
    saved, kinds = read_checkpoint(folder), {"lm": "a policy", "scalar": "a reward model"}
    if saved["head"] != head:
        fail(
            f"{folder} holds {kinds[saved['head']]}, and {kinds[head]} is needed; name another"
        )
    model = Transformer(ModelConfig(**saved["config"]), head)
    model.load_state_dict(saved["weights"])
    return model.to(device)


def is_done(folder: Path) -> bool:
    """A complete result is there, not one saved in the middle of its training."""
    return (folder / "model.pt").exists() and read_checkpoint(folder)["made"]["done"]


SCRIPTS = ("sft", "reward_model", "rejection_sampling", "ppo", "dpo")
MAKERS = {name: f"{name}.py" for name in SCRIPTS} | {"base": "sft.py"}
PAIRS = 20_000  # comparisons that a missing file is filled with


def ensure(cfg, *flags: str) -> list[Path]:
    """The folders of the models that these flags name. A named one that is missing is an
    error; then each default one that is missing is made, by the script that makes it."""
    for flag in flags:
        name, default = getattr(cfg, flag), getattr(type(cfg), flag)
        if name != default and not (Path(cfg.runs) / name / "model.pt").exists():
            maker = MAKERS.get(name) or MAKERS.get(default, "ppo.py")
            fail(
                f"--{flag.replace('_', '-')}: {cfg.runs}/{name}/model.pt is not there; "
                f"make it with: python {maker} --runs {cfg.runs} --out {name}"
            )
    folders = [Path(cfg.runs) / getattr(cfg, flag) for flag in flags]
    for flag, folder in zip(flags, folders):
        default = getattr(type(cfg), flag)
        if folder.name != default or is_done(folder):
            continue
        print(f"{folder} is not there, or unfinished: {MAKERS[default]} makes it", flush=True)
        command = [sys.executable, HERE / MAKERS[default], "--runs", cfg.runs]
        process = subprocess.Popen([*command, "--seed", str(cfg.seed), "--device", cfg.device])
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has gone to that process too, which saves
            code = process.wait() or 130
        if code:
            raise SystemExit(code)
    return folders


def comparisons(cfg, device: torch.device) -> list[dict]:
    """The judged pairs in runs/NAME/comparisons.jsonl, for each NAME of cfg.comparisons,
    "a,b". What is missing is collected: for the default name from ref or init, for another
    from cfg.policy, without which that is an error."""
    default, rows = type(cfg).comparisons, []
    paths = {n: Path(cfg.runs) / n / "comparisons.jsonl" for n in cfg.comparisons.split(",")}
    missing = [name for name, path in paths.items() if not path.exists()]
    flags = [flag for flag in ("init", "ref", "policy") if getattr(cfg, flag, None)]
    if "policy" in flags and not set(missing) - {default}:
        fail(f"--policy {cfg.policy}: there are no new --comparisons to collect from it")
    if "policy" not in flags and set(missing) - {default}:
        fail(
            f"--comparisons: {paths[missing[-1]]} is not there; make it with: python "
            f"reward_model.py --runs {cfg.runs} --policy NAME --comparisons {missing[-1]}"
        )
    folders = dict(zip(flags, ensure(cfg, *flags)))
    for name, path in paths.items():
        if name in missing:
            source = folders.get("ref", folders["init"])
            if name != default:
                source = folders["policy"]
            print(f"{path}: {PAIRS} pairs of answers from {source}, judged", flush=True)
            model = load_model(source, "lm", device)
            seed_all(cfg.seed)
            collect_comparisons(model, PAIRS, path)
        found = read_jsonl(path, ("prompt", "chosen", "rejected"))
        rows += [row | {"source": name} for row in found]
    return rows


def answer_ids(row: dict, key: str = "completion") -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of the answer under `key`; it ends with EOS unless the row
    says that it was not finished."""
    end = [EOS] if row.get(f"{key}_finished", True) else []
    return chat(row["prompt"]), encode(row[key]) + end


def batches(mask: Tensor, size: int) -> list[Tensor]:
    """One epoch of row indices, random, but rows of a like length together: less padding.
    The mask's first dimension is rows, its last T."""
    ends = mask.long() * torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    lengths, parts = ends.flatten(1).amax(1).cpu(), []
    for block in torch.randperm(len(lengths)).split(16 * size):
        parts += block[lengths[block].argsort(stable=True)].split(size)
    return [parts[i].to(mask.device) for i in torch.randperm(len(parts))]


def take(rows: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """These rows of tokens and mask, without the columns that are padding in all of them."""
    tokens, mask = tokens[rows], mask[rows]
    longest = int(mask.flatten(0, -2).any(0).nonzero().max()) + 1
    return tokens[..., :longest], mask[..., :longest]


# ------------------------------------------------------------------------------------ runs


def seed_all(seed: int) -> None:
    """One seed for both generators that are used: Python's and torch's."""
    random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device of --device; auto is the fastest that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"--device {name} is not available here; --device cpu is")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay; `descend` sets the learning rate of each step."""
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def descend(loss: Tensor, model: nn.Module, optimizer, lr: float, where: str) -> float:
    """One step of gradient descent, the gradient's norm clipped at 1; returns the loss. A
    loss that is not finite ends the run, with the last checkpoint as it was."""
    value = loss.item()
    if not math.isfinite(value):
        fail(f"{where}: the loss is {value}; the last checkpoint is intact, try a lower lr", 1)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return value


class Run:
    """The folder of a run while it is being made: iterate over the steps, log a row a step.
    Saves every 50 steps, at the end, and on Ctrl-C."""

    def __init__(self, cfg, out: str, model: Transformer, steps: int, show: tuple[str, ...]):
        self.cfg, self.folder, self.model = cfg, Path(cfg.runs) / out, model
        self.steps, self.show, self.rows, self.began = steps, show, [], time.time()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind in (None, KeyboardInterrupt):
            self.save(done=kind is None)
        if kind is KeyboardInterrupt:
            command = f"python {Path(sys.argv[0]).name} --runs {self.cfg.runs}"
            if self.model.kind == "lm" and self.folder.name != "base":
                command += f" --init {self.folder.name} --out {self.folder.name}"
            done = f"stopped and saved after {len(self.rows)} steps"
            fail(f"\n{done}; go on with: {command}", 130)

    def __iter__(self) -> Iterator[int]:
        self.bar = tqdm(range(self.steps), desc=self.folder.name, disable=not PROGRESS)
        for step in self.bar:
            yield step
            if step % 50 == 49 and step + 1 < self.steps:
                self.save(done=False)

    def log(self, **row: float) -> None:
        """One row of metrics.csv; NaN, like gold outside the world, is an empty cell."""
        self.rows.append({"step": len(self.rows), **row})
        shown = {key: f"{row[key]:.3g}" for key in self.show if not math.isnan(row[key])}
        self.bar.set_postfix(shown, refresh=False)
        if not PROGRESS and len(self.rows) % max(1, self.steps // 10) == 0:
            line = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"{self.folder.name} {len(self.rows)}/{self.steps}  {line}", flush=True)

    def save(self, done: bool) -> None:
        """The weights last: where they are, the files about them are there too."""
        flags = asdict(self.cfg)
        if self.rows:
            text = io.StringIO()
            table = csv.DictWriter(text, self.rows[0], lineterminator="\n")
            table.writeheader()
            for row in self.rows:
                table.writerow({k: "" if math.isnan(v) else f"{v:.6g}" for k, v in row.items()})
            write(self.folder / "metrics.csv", text.getvalue())
        about = {"script": Path(sys.argv[0]).name, "flags": flags, "torch": torch.__version__}
        about |= {"python": sys.version.split()[0], "device": str(self.model.device)}
        about |= {"seconds": round(time.time() - self.began, 1), "done": done}
        write(self.folder / "config.json", json.dumps(about, indent=1) + "\n")
        save_model(self.folder, self.model, {"flags": flags, "done": done})


def crc(path: str | Path) -> str:
    """A file's checksum: by it an evaluation knows whether a model has changed."""
    return f"{zlib.crc32(read(path)):08x}"


class Reward:
    """r(x, y): the score of the reward model under runs/, or of FILE.py:function."""

    def __init__(self, source: str, runs: str, device: torch.device):
        self.source, self.model, (file, _, name) = source, None, source.rpartition(":")
        if source.endswith(".py"):
            fail(f"--reward {source}: name the function too, FILE.py:function")
        if not file.endswith(".py"):
            self.model = load_model(Path(runs) / source, "scalar", device).requires_grad_(False)
            self.key = crc(Path(runs) / source / "model.pt")
            return
        self.key = crc(file) + name
        try:
            spec = importlib.util.spec_from_file_location("reward", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.function = getattr(module, name)
        except Exception as error:
            fail(f"--reward {source}: {error!r}; give FILE.py:function")

    def __call__(self, prompts: list[str], rollout: Rollout) -> Tensor:
        """Scores (B,) of the rollout's answers, row i to prompts[i]."""
        if self.model is not None:
            with torch.no_grad():
                return score(self.model, rollout.tokens, rollout.response_mask)
        texts = completions(rollout)
        try:
            values = [float(value) for value in self.function(list(prompts), list(texts))]
        except Exception as error:
            values, wrong = [], f"raised {error!r}"
        else:
            wrong = f"gave {len(values)} numbers for {len(texts)} completions"
        if len(values) != len(texts):
            fail(f"--reward {self.source} {wrong}; the first prompt was {prompts[0]!r}")
        for prompt, text, value in zip(prompts, texts, values):
            if not math.isfinite(value):
                fail(f"--reward {self.source} gave {value} for {prompt!r} and {text!r}")
        return torch.tensor(values, device=rollout.tokens.device)


def find_reward(cfg, device: torch.device) -> Reward | None:
    """The reward of the closing table where it was not trained on: runs/reward_model, if it
    is there, or the one that --reward-model names."""
    name = getattr(cfg, "reward_model", None)
    there = name or (Path(cfg.runs) / "reward_model" / "model.pt").exists()
    return Reward(name or "reward_model", cfg.runs, device) if there else None


def completions(rollout: Rollout) -> list[str]:
    """The B responses as text."""
    rows = zip(rollout.tokens.tolist(), rollout.response_mask.tolist())
    return [decode([i for i, on in zip(ids, mask) if on]) for ids, mask in rows]


# ---------------------------------------------------------------------------------- report


def evaluate(cfg, name: str, ref: str, reward, prompts: list[str], device) -> list[dict]:
    """Four sampled answers to each held-out prompt, each with its log π(y|x) − log π_ref(y|x),
    gold and reward. Kept in the run's folder for as long as models, prompts and reward stay."""
    folder, ref_folder = Path(cfg.runs) / name, Path(cfg.runs) / ref
    key = [crc(folder / "model.pt"), crc(ref_folder / "model.pt"), cfg.max_new_tokens, prompts]
    key.append(reward.key if reward else None)
    under = re.sub(r"\W+", "_", reward.source) if reward else "no_reward"
    kept = folder / f"evaluation_{under}.json"
    if kept.exists() and (saved := json.loads(read(kept)))["key"] == key:
        return saved["answers"]
    policy, reference = (load_model(f, "lm", device) for f in (folder, ref_folder))
    answers = []
    torch.manual_seed(0)
    for start in range(0, len(prompts), 64):
        asked = [prompt for prompt in prompts[start : start + 64] for _ in range(4)]
        rollout = generate(policy, [chat(prompt) for prompt in asked], cfg.max_new_tokens)
        mask, texts = rollout.response_mask, completions(rollout)
        with torch.no_grad():
            ratio = token_logprobs(policy, rollout.tokens, mask)
            ratio = (ratio - token_logprobs(reference, rollout.tokens, mask)).sum(1)
        ended = rollout.finished.tolist()
        columns = {
            "prompt": asked,
            "completion": texts,
            "finished": ended,
            "length": mask.sum(1).tolist(),
            "log_ratio": ratio.tolist(),
            "reward": reward(asked, rollout).tolist() if reward else [math.nan] * len(asked),
            "gold": [gold_reward(*row) for row in zip(asked, texts, ended)],
            "right": [right(*row) for row in zip(asked, texts)],
        }
        answers += [dict(zip(columns, row)) for row in zip(*columns.values())]
    write(kept, json.dumps({"key": key, "answers": answers}))
    return answers


def report(cfg, ref: str, reward, prompts: list[str], device) -> dict[str, list[dict]]:
    """Print a row for every policy under cfg.runs, all on the same held-out prompts: reward,
    gold and KL to ref (nats per response; mean ± standard error), win rate against ref by
    gold, right facts, length (tokens), finished, seconds. Returns the answers."""
    runs, room = Path(cfg.runs), ModelConfig.context - cfg.max_new_tokens
    prompts = [x for x in dict.fromkeys(prompts) if len(chat(x)) <= room][:400]
    if not prompts:
        fail(f"no held-out prompt leaves room for {cfg.max_new_tokens} new tokens")
    others = sorted({path.parent.name for path in runs.glob("*/model.pt")} - {ref, "base"})
    found = {}
    for name in (ref, *others):
        if read_checkpoint(runs / name)["head"] == "lm":
            found[name] = evaluate(cfg, name, ref, reward, prompts, device)
    source = reward.source if reward else "none yet"
    print(f"\n{len(prompts)} held-out prompts × 4 answers; reward: {source}; KL to: {ref}")
    heads = ("reward", "gold", "KL", "win rate", "right", "length", "finished", "seconds")
    widths = (14, 14, 14, 10, 8, 8, 10, 9)
    print(f"{'':20s}" + "".join(f"{head:>{w}s}" for head, w in zip(heads, widths)))
    for name, answers in found.items():
        numbers = ("reward", "gold", "log_ratio", "right", "length", "finished")
        of = {k: torch.tensor([float(a[k]) for a in answers]).view(-1, 4) for k in numbers}
        ref_gold = torch.tensor([a["gold"] for a in found[ref]]).view(-1, 4)
        gap = of["gold"][:, :, None] - ref_gold[:, None, :]
        of["win rate"] = torch.where(gap.isnan(), gap, (gap.sign() + 1) / 2)  # a tie counts ½
        cells = [_with_error(of[k]) for k in numbers[:3]]
        cells += [f"{of[k].mean():.3g}" for k in ("win rate", *numbers[3:])]
        cells.append(f"{json.loads(read(runs / name / 'config.json'))['seconds']:.0f}")
        cells = ["–" if "nan" in cell else cell for cell in cells]
        print(f"{name:20s}" + "".join(f"{cell:>{w}s}" for cell, w in zip(cells, widths)))
    return found


def _with_error(values: Tensor) -> str:
    """Mean ± standard error over prompts, whose four answers are not independent."""
    return f"{values.mean():.2f} ± {values.mean(1).std() / len(values) ** 0.5:.2f}"


def before_and_after(cfg, found: dict[str, list[dict]], device) -> None:
    """Print what cfg.init and cfg.out say to three held-out prompts; samples.txt has more.
    The base model, which knows no chat, is shown the bare prompt."""
    after = found[cfg.out][::4][:30]
    if cfg.init in found:
        before = [shown(answer) for answer in found[cfg.init][::4]]
    else:
        base = load_model(Path(cfg.runs) / cfg.init, "lm", device)
        bare = [encode(answer["prompt"]) for answer in after]
        before = [f"{text} …" for text in completions(generate(base, bare, cfg.max_new_tokens))]
    blocks = [
        f"{new['prompt']}\n{cfg.init:>20s}: {old.strip()}\n{cfg.out:>20s}: {shown(new)}"
        for old, new in zip(before, after)
    ]
    print("\n" + "\n".join(blocks[:3]))
    write(Path(cfg.runs) / cfg.out / "samples.txt", "\n".join(blocks) + "\n")


def shown(answer: dict) -> str:
    """An answer on one line."""
    end = "" if answer["finished"] else " … (unfinished)"
    return answer["completion"].replace("\n", "⏎") + end


def sample(cfg, reward, device) -> None:
    """Print answers to cfg.question, each with log π(y|x) and, with a reward model, r(x, y)."""
    policy = load_model(Path(cfg.runs) / cfg.run, "lm", device)
    rollout = generate(policy, [chat(cfg.question)] * cfg.n, cfg.max_new_tokens)
    scores = reward([cfg.question] * cfg.n, rollout).tolist() if reward else [math.nan] * cfg.n
    rows = zip(completions(rollout), rollout.finished.tolist(), rollout.logprobs.sum(1), scores)
    for text, finished, logprob, r in rows:
        numbers = f"log π {logprob:7.2f}" + (f"   r {r:+.2f}" if reward else "")
        print(f"{numbers}   {shown({'completion': text, 'finished': finished})}")


def draw_frontier(cfg, found: dict[str, list[dict]], device) -> None:
    """runs/frontier.png: reward and gold against KL, a point per run, with the path of its
    training where metrics.csv has one, whose reward is the one it was trained on. Dotted: the
    best gold at each KL, samples of π_ref weighted by e^{gold/β} (eq:dpo_opt_policy, with the
    gold reward in place of r)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed, so no frontier.png is drawn")
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis in axes:
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, answers in found.items():
        mean = {
            k: sum(a[k] for a in answers) / len(answers)
            for k in ("log_ratio", "reward", "gold")
        }
        metrics = Path(cfg.runs) / name / "metrics.csv"  # none after Ctrl-C at the first step
        lines = read(metrics).decode().splitlines() if metrics.exists() else []
        path = list(csv.DictReader(lines))
        size = max(1, len(path) // 10)
        for axis, key in zip(axes, ("reward", "gold")):
            (dot,) = axis.plot(mean["log_ratio"], mean[key], "o", label=name)
            if path and path[0].get("kl") and path[0].get(key):
                x, y = (torch.tensor([float(row[k]) for row in path]) for k in ("kl", key))
                x, y = ([part.mean() for part in z.split(size)] for z in (x, y))
                axis.plot(x, y, "-", color=dot.get_color(), alpha=0.4)
    torch.manual_seed(0)
    prompts = [answer["prompt"] for answer in found[cfg.ref][::4]][::6]
    asked = [prompt for prompt in prompts for _ in range(64)]
    policy = load_model(Path(cfg.runs) / cfg.ref, "lm", device)
    parts = [asked[i : i + 512] for i in range(0, len(asked), 512)]
    gold = []
    for part in parts:
        rollout = generate(policy, [chat(prompt) for prompt in part], cfg.max_new_tokens)
        rows = zip(part, completions(rollout), rollout.finished.tolist())
        gold += [gold_reward(*row) for row in rows]
    gold = torch.tensor(gold).view(-1, 64)
    if not gold.isnan().any():
        weights = [(gold / beta).softmax(1) for beta in torch.logspace(-0.8, 1.3, 60)]
        x = [(w * (64 * w).clamp(min=1e-30).log()).sum(1).mean() for w in weights]
        axes[1].plot(x, [(w * gold).sum(1).mean() for w in weights], "k:", label="ideal")
    for axis, key in zip(axes, ("reward", "gold")):
        axis.set(xlabel=f"KL to {cfg.ref}, nats per response", ylabel=key)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write(Path(cfg.runs) / "frontier.png", picture.getvalue())
    print(f"{cfg.runs}/frontier.png: reward and gold against KL")


# ---------------------------------------------------------------------------- command line


def arg(default, help: str, low: float = 0, choices: tuple = ()):
    """A Config field: its default, its book symbol and unit, the least value it may have."""
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{self.prog}: {message}; see python {self.prog} --help")


def parse(config: type, doc: str):
    """The command line as a Config: one --flag per field; what has no default has no flag."""
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=doc, formatter_class=style, allow_abbrev=False)
    for f in fields(config):
        name, text = f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.default is MISSING:
            parser.add_argument(f.name, help=text, metavar=name.upper())
            continue
        parser.add_argument(
            f"--{name}" if len(name) > 1 else f"-{name}",
            type=str if f.default is None else type(f.default),
            default=f.default,
            help=text + " (default: %(default)s)",
            choices=f.metadata["choices"] or None,
            metavar=None if f.metadata["choices"] else name.upper(),
        )
    cfg = config(**vars(parser.parse_args()))
    for f in fields(config):
        value, low = getattr(cfg, f.name), f.metadata["low"]
        if isinstance(value, (int, float)) and not low <= value < math.inf:
            parser.error(f"--{f.name.replace('_', '-')} {value}: a number ≥ {low} is needed")
    if cfg.max_new_tokens > ModelConfig.context // 2:
        parser.error(f"--max-new-tokens: at most {ModelConfig.context // 2}, half the context")
    if hasattr(cfg, "out"):  # what other runs start from is not to be lost by a slip
        inputs = {"base", "sft", "comparisons", "reward_model"} - {config.out}
        inputs |= {getattr(cfg, flag, None) for flag in ("ref", "policy", "reward_model")}
        if cfg.out in inputs:
            parser.error(f"--out {cfg.out}: other runs start from it; choose another name")
    return cfg


@dataclass
class Report:
    """python common.py report"""

    ref: str = arg("sft", "π_ref of the KL and the win rate, under --runs")
    data: str = arg(None, "held-out prompts from your own JSONL of {prompt}")
    reward_model: str = arg(None, "r, under --runs; or reward_model, if it is there")
    max_new_tokens: int = arg(24, "longest answer, in tokens", low=1)
    runs: str = arg("runs", "the folder of all runs")
    device: str = arg("auto", "auto, cpu, cuda or mps")


@dataclass
class Sample:
    """python common.py sample RUN QUESTION"""

    run: str = arg(MISSING, "a policy under --runs")
    question: str = arg(MISSING, "what it is asked")
    n: int = arg(4, "answers", low=1)
    reward_model: str = arg(None, "r, under --runs; or reward_model, if it is there")
    max_new_tokens: int = arg(24, "longest answer, in tokens", low=1)
    runs: str = arg("runs", "the folder of all runs")
    device: str = arg("auto", "auto, cpu, cuda or mps")


def main() -> None:
    command = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if command == "report":
        cfg = parse(Report, main.__doc__)
    elif command == "sample":
        cfg = parse(Sample, main.__doc__)
    else:
        fail(__doc__)
    device = pick_device(cfg.device)
    reward = find_reward(cfg, device)
    if command == "sample":
        sample(cfg, reward, device)
        return
    prompts = read_prompts(cfg.data, cfg.max_new_tokens)[1]
    draw_frontier(cfg, report(cfg, cfg.ref, reward, prompts, device), device)


if __name__ == "__main__":
    main()
