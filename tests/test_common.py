"""common.py: tokens, Transformer, sampling, the world, files, runs, inputs, table.

Each test names the bug it catches, and checks against something independent: a slow
definition, the enumerable world of tiny.py, a number worked out by hand, an invariance.
"""

import contextlib
import csv
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny as small
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dpo
import ppo
import rejection_sampling
import reward_model
import sft
from common import ASSISTANT, EOS, PAD, QUESTIONS, USER, ModelConfig, Transformer

CPU = torch.device("cpu")
SCRIPTS = (sft, reward_model, rejection_sampling, ppo, dpo)
ROOT = Path(common.__file__).parent


@pytest.fixture
def stops(files, capsys):
    """stops(f, *args, code=2): f ends the program with that code, says one line, which is
    returned, and leaves every file as it was."""

    def check(f, *args, code=2):
        before = files()
        capsys.readouterr()
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            f(*args)
        assert stopped.type is SystemExit
        error = capsys.readouterr().err
        assert stopped.value.code == code
        assert error.count("\n") == 1
        assert files() == before
        return error

    return check


def close(share: float, p: float, n: int) -> bool:
    """Is a share of n draws within four standard errors of p?"""
    return abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


# ---------------------------------------------------------------------------------- tokens


def test_any_utf8_text_round_trips_and_never_encodes_to_a_special():
    """Text that comes back changed; a prompt that ends its own turn and answers itself."""
    rng = random.Random(0)
    texts = [
        "",
        "\x00\x01\x02\x03",
        "<eos>[USER]</s>",
        "  where  the\tzebra\r\nIS ",
        "ζέβρα 斑馬🦓",
    ]
    for _ in range(300):
        points = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                  for _ in range(8)]  # fmt: skip
        words = [chr(point) for point in points] + rng.choices(common.WORDS, k=4) + [" "] * 4
        texts.append("".join(rng.sample(words, len(words))))
    for text in texts:
        ids = common.encode(text)
        assert common.decode(ids) == text
        assert all(ASSISTANT < i < common.VOCAB_SIZE and i != PAD for i in ids)
        assert common.chat(text) == [USER, *ids, ASSISTANT]
        row = {"prompt": text, "completion": text}
        assert common.answer_ids(row) == (common.chat(text), [*ids, EOS])


def test_an_answer_that_was_cut_does_not_end_with_eos():
    """A cut answer taught to stop there; the flag of the other answer read."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_finished": False}
    assert common.answer_ids(row, "chosen")[1] == [*common.encode("a"), EOS]
    assert common.answer_ids(row, "rejected")[1] == common.encode("b")


def test_specials_show_as_nothing_and_half_a_character_does_not_crash():
    """A policy may sample any id at any place: its text must be printable all the same."""
    assert common.decode([USER, *common.encode("hi"), ASSISTANT, PAD, EOS]) == "hi"
    assert common.decode([4 + 0xE2]) == "\ufffd"


def test_a_world_answer_is_a_token_a_word():
    """A broken word table would fall back to bytes: right, but four times as long."""
    assert len(common.encode("the zebra lives in the plains.")) == 7
    assert ModelConfig().vocab_size == common.VOCAB_SIZE == len(set(common.PIECES)) + 3


# ----------------------------------------------------------------------------- Transformer


def slow_forward(model, tokens):
    """The Llama-style Transformer, one position, head and row at a time, in float64."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    D, group = c.channels // c.heads, c.heads // c.kv_heads

    def norm(x, scale):
        return x / (x.square().mean() + c.norm_eps).sqrt() * scale

    def turn(x, t):  # channel i with channel i + D/2, by the angle t θ^(−2i/D)
        y = x.clone()
        for i in range(D // 2):
            angle = t * c.rope_theta ** (-2 * i / D)
            y[i] = x[i] * math.cos(angle) - x[i + D // 2] * math.sin(angle)
            y[i + D // 2] = x[i] * math.sin(angle) + x[i + D // 2] * math.cos(angle)
        return y

    x = [w["embed.weight"][i] for i in tokens]
    for b in range(c.layers):
        part = {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"blocks.{b}.")}
        heads = [(part["qkv.weight"] @ norm(h, part["attention_norm.weight"])).view(-1, D)
                 for h in x]  # fmt: skip
        for t in range(len(x)):
            mixed = []
            for h in range(c.heads):
                at = c.heads + h // group  # the key head that query head h reads
                q, k = turn(heads[t][h], t), [turn(heads[s][at], s) for s in range(t + 1)]
                p = torch.stack([q @ key / D**0.5 for key in k]).softmax(0)
                mixed.append(sum(p[s] * heads[s][at + c.kv_heads] for s in range(t + 1)))
            x[t] = x[t] + part["out.weight"] @ torch.cat(mixed)
            gate, up = (part["gate_up.weight"] @ norm(x[t], part["mlp_norm.weight"])).chunk(2)
            x[t] = x[t] + part["down.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([w["embed.weight"] @ norm(h, w["norm.weight"]) for h in x])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_is_the_slow_definition(tiny, kv_heads):
    """A wrong rotation, mask, norm, or key head of a query, grouped or not; θ and ε that are
    the usual ones and not the config's."""
    model = tiny(
        heads=4, kv_heads=kv_heads, vocab_size=11, channels=32, rope_theta=50.0, norm_eps=0.1
    )
    tokens = torch.randint(11, (2, 9))
    for row, logits in zip(tokens.tolist(), model(tokens)):
        torch.testing.assert_close(logits.double(), slow_forward(model, row), atol=1e-5, rtol=0)


def test_a_later_token_never_changes_an_earlier_number(tiny):
    """A leak of the future: logits < t, values and log-probs ≤ t or < t, must be bit-equal.
    A critic that reads the action: values[:, t] must not know tokens[:, t]."""
    model, critic = tiny(), tiny(1, "scalar")
    tokens = torch.randint(4, 300, (3, 10))
    for t in range(10):
        other = tokens.clone()
        other[:, t] += 1
        (a, b), changed = (model(tokens), model(other)), slice(t, None)
        assert torch.equal(a[:, :t], b[:, :t])
        assert (a[:, changed] != b[:, changed]).any(-1).all()  # and later ones do know
        a, b = (common.token_logprobs(model, x) for x in (tokens, other))
        assert torch.equal(a[:, :t], b[:, :t])
        a, b = (common.token_values(critic, x) for x in (tokens, other))
        assert torch.equal(a[:, : t + 1], b[:, : t + 1])
        assert (a[:, t + 1 :] != b[:, t + 1 :]).all()


def test_appended_pads_change_no_logprob_value_or_score(tiny):
    """Padding that is attended to, counted or scored; a batch that is not its rows alone."""
    model, scalar = tiny(), tiny(1, "scalar")
    rows = [([1, 7, 2], [9, 9, EOS]), ([1, 2], [PAD, 8, 7, 6, EOS]), ([1, 4, 5, 6, 2], [8])]
    tokens, mask = common.collate(rows)
    longer, longer_mask = F.pad(tokens, (0, 6), value=PAD), F.pad(mask, (0, 6))
    for of, by in ((common.token_logprobs, model), (common.token_values, scalar)):
        expected, found = of(by, tokens) * mask, of(by, longer, longer_mask)
        torch.testing.assert_close(found[:, :7], expected, atol=1e-5, rtol=0)
        assert (found[:, 7:] == 0).all()
    expected = common.score(scalar, tokens, mask)
    found = common.score(scalar, longer, longer_mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    alone = [common.score(scalar, *common.collate([row])) for row in rows]
    torch.testing.assert_close(expected, torch.cat(alone), atol=1e-5, rtol=0)


ALIKE = [  # what _positions must tell apart, and what it must not
    [1, 5, 2, 7, 7, 3, 3],
    [1, 5, 2, 7, 8, 9, 3],
    [1, 2, 5, 7, 7, 3, 3],  # the same tokens in another order
    [0, 1, 5, 2, 7, 7, 3],  # the same tokens one position later
    [1, 5, 2, 7, 7, 0, 0],  # token 0 is a token
    [1, 5, 2, 7, 8, 9, 3],
]


def test_rows_that_begin_alike_are_worked_out_once(tiny):
    """A place that is given another beginning's hidden state: the same tokens in another order
    or elsewhere, one token more; a place that is worked out again, or that nobody asked for."""
    tokens = torch.tensor(ALIKE)
    first, where = common._positions(tokens, None, True)
    begun = [[tuple(row[: t + 1]) for t in range(len(row))] for row in ALIKE]
    assert len(first) == len({part for row in begun for part in row})
    for i, place in enumerate(first.tolist()):
        b, t = divmod(place, tokens.shape[1])
        assert {begun[i][j] for i, j in (where == i).nonzero().tolist()} == {begun[b][t]}
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[0, 3] = keep[2, 5] = keep[2, 1] = True
    first, where = common._positions(tokens, keep, True)
    needed = {part for part in begun[0][:4] + begun[2][:6]}
    assert len(first) == len(needed) + 1  # one stands for all that are not needed


def test_no_two_of_many_beginnings_are_taken_for_one():
    """Sums of prefixes that collide: a place would get another beginning's hidden state."""
    tokens = torch.randint(528, (10_000, 30))
    first, _ = common._positions(tokens, None, True)
    assert len(first) == len({tuple(x[:t]) for x in tokens.tolist() for t in range(1, 31)})


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_batch_that_begins_alike_has_the_outputs_and_gradients_of_its_rows(tiny, head):
    """Gradients that are lost, or counted once too often, where rows share hidden states;
    `keep` that takes its outputs from other places."""
    model = tiny(3, head, heads=2, kv_heads=1).double()
    tokens, keep = torch.tensor(ALIKE), torch.rand(len(ALIKE), len(ALIKE[0])) < 0.4
    alone = torch.cat([model(row[None]) for row in tokens])
    weights = torch.randn_like(alone[keep])
    ways = {"alone": alone[keep], "batch": model(tokens)[keep], "keep": model(tokens, keep)}
    gradients = {}
    for name, outputs in ways.items():
        torch.testing.assert_close(outputs, ways["alone"], atol=1e-12, rtol=0)
        total = (outputs * weights).sum()
        gradients[name] = torch.autograd.grad(total, list(model.parameters()))
        for g, expected in zip(gradients[name], gradients["alone"]):
            torch.testing.assert_close(g, expected, atol=1e-10, rtol=1e-10)


def test_weights_start_at_their_stated_size():
    """Layers that add to the residual stream and start as large as the others; fan-out for
    fan-in: activations that grow with depth."""
    c = ModelConfig()
    for name, weight in Transformer(c, "scalar").named_parameters():
        if weight.dim() == 2 and name != "scalar.weight":  # of that there is one row
            std = weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= (2 * c.layers) ** -0.5
            assert weight.std().item() == pytest.approx(std, rel=0.03), name


def test_scalar_copy_shares_no_storage(tiny):
    """Training a critic or reward model would train the policy too."""
    model = tiny()
    copy = common.scalar_copy(model)
    tokens = torch.randint(4, 300, (2, 5))
    assert torch.equal(copy.trunk(tokens), model.trunk(tokens))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    common.descend(copy(tokens).sum(), copy, common.adamw(copy), 0.1)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert not torch.equal(copy.embed.weight, model.embed.weight)


def test_a_reloaded_head_is_still_the_embedding_and_the_offset_is_kept(tiny, tmp_path):
    """Tied weights lost on reload; the centring of a reward model lost on reload."""
    model, scalar = tiny(), tiny(1, "scalar")
    scalar.offset += 3.5
    tokens = torch.randint(4, 300, (2, 5))
    for name, saved, head in (("lm", model, "lm"), ("r", scalar, "scalar")):
        common.save_model(tmp_path / name, saved, {})
        again = common.load_model(tmp_path / name, head, CPU)
        assert torch.equal(again(tokens), saved(tokens))
    again = common.load_model(tmp_path / "lm", "lm", CPU)
    with torch.no_grad():
        again.embed.weight[301] = 0
    assert not again(tokens)[..., 301].any()


# -------------------------------------------------------------------------------- generate
# In the enumerable world the law of the samples is known exactly.

PROMPTS = [[1], *small.PROMPTS[1:]]  # one token: the least there is to start from
POLICY = small.transformer(1)
GROUPED = small.transformer(4, heads=4, kv_heads=2)  # query heads share keys and values
N = 17_000  # samples per prompt


def law(model: nn.Module, temperature: float = 1.0) -> Tensor:
    """The exact probabilities, (3, 40)."""
    with torch.no_grad():
        logp = [small.token_logp(model, x, temperature=temperature).sum(1) for x in PROMPTS]
    return torch.stack(logp).exp()


@functools.cache
def sample(model: nn.Module, temperature: float = 1, seed: int = 0) -> common.Rollout:
    """N samples per prompt, drawn in one ragged batch."""
    torch.manual_seed(seed)
    return common.generate(model, [x for x in PROMPTS for _ in range(N)], 3, temperature)


@pytest.mark.parametrize("model", [POLICY, GROUPED])
def test_completions_are_all_there_is(model):
    """The fixture itself: a completion forgotten or counted twice."""
    assert len(set(small.completions())) == 40
    assert (law(model).sum(1) - 1).abs().max() < 1e-10


DRAWN = [(POLICY, 1, 0), (GROUPED, 1, 1), (POLICY, 0.9, 2), (GROUPED, 1, 3), (POLICY, 1, 4)]


@pytest.mark.parametrize(("model", "temperature", "seed"), DRAWN)
def test_generate_samples_from_exactly_pi(model, temperature, seed):
    """A wrong position, cache, CDF or temperature: each shifts some completion's frequency."""
    assert small.fits(sample(model, temperature, seed), law(model, temperature)) > 1e-4


def test_the_sampling_test_sees_a_temperature_and_a_lost_eos():
    """The χ² test itself: it must fail for T = 0.9, an EOS out of the mask, or never said."""
    assert small.fits(sample(POLICY, 0.9, 2), law(POLICY)) < 1e-4
    honest = sample(POLICY, 1, 0)
    dropped = replace(honest, response_mask=honest.response_mask & (honest.tokens != EOS))
    assert small.fits(dropped, law(POLICY)) < 1e-4
    silent = small.nearby(POLICY, 0.0)
    head, never = silent.head, torch.where(torch.arange(small.V) == EOS, -1e9, 0.0)
    silent.head = lambda hidden: head(hidden) + never
    assert small.fits(sample(silent), law(POLICY)) < 1e-4


@pytest.mark.parametrize(("model", "temperature", "seed"), DRAWN[:3])
def test_what_generate_says_of_its_samples(model, temperature, seed):
    """Cached decoding is not the model; the mask misses a token or has one too many;
    `finished` is wrong; log-probs stored for another token or temperature."""
    rollout, made = sample(model, temperature, seed), small.completions()
    y = small.number(rollout.tokens, rollout.response_mask)
    assert (y >= 0).all()  # every one is finished or of full length
    assert torch.equal(rollout.finished, torch.tensor([c[-1] == EOS for c in made])[y])
    assert not rollout.logprobs[~rollout.response_mask].any()
    with torch.no_grad():
        for x, row, which in zip(PROMPTS, rollout.logprobs.split(N), y.split(N)):
            exact = small.token_logp(model, x, temperature=temperature)[which]
            assert (row[:, len(x) : len(x) + small.LONGEST] - exact).abs().max() < 1e-10


def test_response_ids_are_what_was_sampled():
    """A sampled PAD dropped, padding kept, EOS lost, the prompt taken along."""
    tokens = torch.tensor([[1, 5, 2, PAD, 7, EOS], [1, 2, PAD, PAD, PAD, PAD]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    rollout = common.Rollout(tokens, mask, torch.tensor([True, False]), 0.0 * mask)
    assert common.response_ids(rollout) == [[PAD, 7, EOS], [PAD, PAD]]


@pytest.mark.parametrize(("kv_heads", "temperature"), [(1, 0.6), (2, 1.0)])
def test_every_sampled_logprob_is_that_of_a_full_forward_on_the_row_alone(
    tiny, kv_heads, temperature
):
    """Cached decoding: a query that sees key 0 only, a wrong position in ragged prompts, a
    row that takes another's cache when finished rows leave, temperature left out."""
    model = tiny(3, vocab_size=9, kv_heads=kv_heads).double()
    prompts = [[1], [1, 5, 2], [1, 5, 2], [8, 7, 6, 5, 4, 3, 2], [1, 6, 2], [1, 5, 3]] * 4
    rollout = common.generate(model, prompts, 12, temperature)
    lengths = rollout.response_mask.sum(1)
    assert lengths.unique().numel() > 3  # rows did leave at different times
    assert rollout.finished.any()
    for i, prompt in enumerate(prompts):
        row = rollout.tokens[i].tolist()
        stop = len(prompt) + int(lengths[i])
        assert row[: len(prompt)] == prompt
        assert row[stop:] == [PAD] * (len(row) - stop)
        where = rollout.response_mask[i].nonzero().squeeze(1).tolist()
        assert where == list(range(len(prompt), stop))
        with torch.no_grad():
            logits = model(torch.tensor([row[:stop]]))[0, len(prompt) - 1 : stop - 1]
        expected = (logits / temperature).log_softmax(-1)[
            range(len(where)), row[len(prompt) : stop]
        ]
        found = rollout.logprobs[i, rollout.response_mask[i]]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_sampled_logprobs_are_what_training_recomputes():
    """Sampler and trainer that disagree in float32: PPO's ratio would not start at 1."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig())
    prompts = [common.chat(prompt) for prompt in list(QUESTIONS)[::60]]
    rollout = common.generate(model, prompts, 10)
    again = common.token_logprobs(model, rollout.tokens, rollout.response_mask)
    torch.testing.assert_close(rollout.logprobs, again, atol=1e-4, rtol=0)


def no_row_leaves():
    """_token_loop as a CUDA graph has it: every row in it to the end, at every step."""
    source, names = inspect.getsource(common._token_loop), dict(vars(common))
    assert source.count('"cpu"') == 1
    exec(source.replace('"cpu"', '"no device"'), names)
    return names["_token_loop"]


@torch.no_grad()
def test_rows_that_leave_change_no_other_row():
    """A row that takes another's cache, noise or limit when rows leave the batch; a loop of
    the shape that is captured on CUDA (start rounded down, T up) that samples otherwise."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=12, channels=16, layers=2, heads=2, kv_heads=2, hidden=24)
    model, loop = Transformer(config).double(), common._token_loop
    prompts = [[5, 6, 7, 8, 9]] * 20 + [[5, 6, 7, 8, 9, 10], [9, 4, 5, 6, 7, 8, 7]] * 10
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.tensor([prompt + [PAD] * (27 - len(prompt)) for prompt in prompts])
    ends, noise = lengths + 20, torch.rand(tokens.shape, dtype=torch.float64)
    left = loop(model, tokens, lengths, ends, noise, 5, 0.9)
    finished = [row[row >= 0].tolist().count(EOS) for row in left[0]]
    assert 5 < sum(finished) < 40  # some did leave, not all of them
    padded = F.pad(tokens, (0, 5), value=PAD), lengths, ends, F.pad(noise, (0, 5))
    for found in (
        no_row_leaves()(model, tokens, lengths, ends, noise, 5, 0.9),
        no_row_leaves()(model, *padded, 4, 0.9),
        loop(model, *padded, 4, 0.9),
    ):
        assert torch.equal(found[0][:, :27], left[0])
        assert torch.equal(found[1][:, :27], left[1])
        assert (found[2][:, :27] - left[2]).abs().max() < 1e-12
        assert not found[1][:, 27:].any()
    for b, (length, end) in enumerate(zip(lengths, ends)):
        row = [x[b : b + 1, :end] if x.dim() == 2 else x[b : b + 1] for x in
               (tokens, lengths, ends, noise)]  # fmt: skip
        alone = loop(model, *row, int(length), 0.9)
        assert torch.equal(alone[0][0], left[0][b, :end])
        assert (alone[2][0] - left[2][b, :end]).abs().max() < 1e-12


@torch.no_grad()
def test_the_ends_of_the_noise_are_tokens_too(tiny):
    """An id that does not exist at u → 1, where rounding lifts u · CDF up to the CDF's end; a
    token of probability 0 at u = 0."""
    for seed in range(12):
        model = tiny(seed, vocab_size=50)
        head = model.head
        model.head = lambda hidden, head=head: F.pad(head(hidden)[..., 1:], (1, 0), value=-1e9)
        tokens, lengths = torch.full((2, 20), 7), torch.tensor([1, 1])
        noise = torch.tensor([[0.0], [1 - 2**-24]]).expand(2, 20)
        found = common._token_loop(model, tokens, lengths, lengths + 19, noise, 1, 1.0)
        assert ((found[0] > 0) & (found[0] < 50)).all()
        assert found[2].isfinite().all()


@pytest.fixture
def scripted():
    """A Transformer with weights set by hand: it says 4 after 6, EOS after 4, 5 after 5."""
    model = Transformer(ModelConfig(vocab_size=7, channels=4, layers=1, heads=1, kv_heads=1))
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.zero_()
        model.embed.weight.zero_()
        model.embed.weight[[6, 4, EOS, 5]] = 1e3 * torch.tensor(
            [[1.0, 0, 0, 0], [10, 10, 0, 0], [0, 100, 0, 0], [0, 0, 1, 0]]
        )
    return model


@pytest.mark.parametrize(
    ("limit", "rows", "finished"),
    [
        (1, [[6, 4], [5, 4, EOS], [EOS, 5, 5]], [False, True, False]),  # EOS came too late
        (2, [[6, 4, EOS], [5, 4, EOS], [EOS, 5, 5, 5]], [True, True, False]),  # the last one
        (3, [[6, 4, EOS], [5, 4, EOS], [EOS, 5, 5, 5, 5]], [True, True, False]),
    ],
)
def test_finished_means_that_eos_came_within_the_limit(scripted, limit, rows, finished):
    """EOS in a prompt counted, tokens after EOS kept, a cut answer called finished."""
    prompts = [[6], [5, 4], [EOS, 5]]
    rollout = common.generate(scripted, prompts, limit)
    T = max(map(len, rows))
    assert rollout.tokens.tolist() == [row + [PAD] * (T - len(row)) for row in rows]
    mask = [[len(p) <= t < len(row) for t in range(T)] for p, row in zip(prompts, rows)]
    assert rollout.response_mask.tolist() == mask
    assert rollout.finished.tolist() == finished
    assert not rollout.logprobs.any()  # it was sure of every one
    answers = [row[len(p) :] for p, row in zip(prompts, rows)]
    assert common.response_ids(rollout) == answers
    assert common.completions(rollout) == [common.decode(ids) for ids in answers]


def test_generate_refuses_what_it_cannot_do(tiny):
    """A limit off by one; an index error deep in a loop in place of a reason."""
    model = tiny(context=8)
    assert common.generate(model, [[1, 2, 4]], 5).tokens.shape[1] <= 8
    for prompts, limit, temperature in (
        ([[1, 2, 4]], 6, 1.0),
        ([[1], []], 2, 1.0),
        ([[1]], 0, 1.0),
        ([[1]], 1, 0.0),
    ):
        with pytest.raises(ValueError, match="generate"):
            common.generate(model, prompts, limit, temperature)


def test_samples_are_n_answers_to_each_prompt_in_order(monkeypatch):
    """Prompts lost between batches, or answers that stand at another prompt's row."""
    asked = [f"q{i}" for i in range(300)]
    monkeypatch.setattr(common, "generate", lambda model, ids, *how: (ids, *how))
    for n in (1, 3, 600):
        parts = list(common.samples(None, asked, n, 9, 0.5))
        assert [x for part, _ in parts for x in part] == [x for x in asked for _ in range(n)]
        assert max(len(part) for part, _ in parts) <= max(512, n)
        for part, (ids, *how) in parts:
            assert ids == [common.chat(x) for x in part]
            assert how == [9, 0.5]


# ------------------------------------------------------------------ log-probs, values, scores


def test_logprobs_stand_at_their_own_token():
    """A shift by one: a model that is sure of the next number must score 0 everywhere."""

    def counts_on(tokens, keep=None):
        logits = 1e4 * F.one_hot(tokens + 1, 20).float()
        return logits if keep is None else logits[keep]

    tokens = torch.arange(3, 10)[None] + torch.tensor([[0], [5]])
    mask = torch.arange(7) >= torch.tensor([[2], [4]])
    assert torch.equal(common.token_logprobs(counts_on, tokens), torch.zeros(2, 7))
    assert torch.equal(common.token_logprobs(counts_on, tokens, mask), torch.zeros(2, 7))
    tokens[0, 4] = 0  # and one surprise is seen at its own column, if the mask is on there
    wrong = common.token_logprobs(counts_on, tokens).nonzero().tolist()
    assert wrong == [[0, 4], [0, 5]]
    assert common.token_logprobs(counts_on, tokens, mask).nonzero().tolist() == wrong
    mask[0, 4] = False
    assert common.token_logprobs(counts_on, tokens, mask).nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize("model", [POLICY, GROUPED])
def test_token_logprobs_are_the_enumerated_ones(model):
    """Outputs of the wrong column; padding that changes a number; a mask that hides one."""
    everything = small.everything(PROMPTS)
    with torch.no_grad():
        found = common.token_logprobs(model, everything.tokens, everything.response_mask)
        whole = common.token_logprobs(model, everything.tokens)
        for x, part, free in zip(PROMPTS, found.split(40), whole.split(40)):
            exact = small.token_logp(model, x)
            columns = slice(len(x), len(x) + small.LONGEST)
            assert (part[:, columns] - exact).abs().max() < 1e-10
            over = exact == 0  # where a completion is over, `whole` speaks of padding
            assert (free[:, columns] - exact)[~over].abs().max() < 1e-10
            assert (part.sum(1) - exact.sum(1)).abs().max() < 1e-10


@torch.no_grad()
def test_values_stand_before_the_token_and_scores_at_the_last_of_the_response():
    """A critic that has read the token whose baseline it is; a score read at a pad, at the
    prompt, or one token early; an offset that is added or left out."""
    scalar, everything = small.transformer(3, "scalar"), small.everything(PROMPTS)
    scalar.offset += 0.3
    tokens, mask = everything.tokens, everything.response_mask
    found, some = common.token_values(scalar, tokens), common.token_values(scalar, tokens, mask)
    for t in range(1, tokens.shape[1]):
        before = scalar.scalar(scalar.trunk(tokens[:, :t]))[:, -1, 0] - 0.3
        assert (found[:, t] - before).abs().max() < 1e-10
        assert (some[:, t] - before * mask[:, t]).abs().max() < 1e-10
    found = common.score(scalar, tokens, mask)
    rows = [x + list(y) for x in PROMPTS for y in small.completions()]
    alone = torch.stack(
        [scalar.scalar(scalar.trunk(torch.tensor([row])))[0, -1, 0] for row in rows]
    )
    assert (found - (alone - 0.3)).abs().max() < 1e-10


# ---------------------------------------------------- KL: estimators, and estimators as losses
# Samples from π give log-ratios l = log π − log π_ref. k1 = l, k2 = l²/2, k3 = e^−l − 1 + l.

ESTIMATORS = {
    "k1": lambda l: l,  # noqa: E741
    "k2": lambda l: l.square() / 2,  # noqa: E741
    "k3": lambda l: torch.expm1(-l) + l,  # noqa: E741
}
REFERENCE = {"near": small.nearby(POLICY, 0.01), "far": small.transformer(2, spread=3.0)}


def log_ratios(policy, reference) -> Tensor:
    """l of every token of every completion, (120, T), as the scripts have it."""
    rows = small.everything(PROMPTS)
    with torch.no_grad():
        ref = common.token_logprobs(reference, rows.tokens, rows.response_mask)
    return common.token_logprobs(policy, rows.tokens, rows.response_mask) - ref


@pytest.mark.parametrize("distance", REFERENCE)
def test_expectation_of_k1_and_k3_is_kl(distance):
    """A sign or direction that is wrong: visible far from 0 only."""
    reference = REFERENCE[distance]
    with torch.no_grad():
        ratios = log_ratios(POLICY, reference).sum(1)
        logp, ref_logp = (small.logp(model, PROMPTS) for model in (POLICY, reference))
        exact = small.kl(logp, ref_logp).item()
    assert exact < 0.05 if distance == "near" else exact > 1
    for name in ("k1", "k3"):
        k = ESTIMATORS[name](ratios).view(3, 40)
        assert (law(POLICY) * k).sum(1).mean().item() == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("distance", REFERENCE)
def test_an_estimator_as_a_loss_has_another_gradient(distance):
    """E[∇k] over y ~ π: of a whole response's l, k1 does nothing, k2 descends KL(π ‖ ref), k3
    KL(ref ‖ π). Summed per token, k2 and k3 are neither. Holds for the log-probs that the
    scripts have; a detached, shifted or masked one would show."""
    reference = REFERENCE[distance]
    ratios, p = log_ratios(POLICY, reference), law(POLICY)
    logp, ref_logp = (small.logp(model, PROMPTS) for model in (POLICY, reference))
    forward = small.gradient(small.kl(logp, ref_logp.detach()), POLICY)
    backward = small.gradient(small.kl(ref_logp.detach(), logp), POLICY)

    def as_loss(k: Tensor) -> Tensor:
        return small.gradient((p * k.view(3, 40)).sum(1).mean(), POLICY)

    whole = {name: as_loss(k(ratios.sum(1))) for name, k in ESTIMATORS.items()}
    assert whole["k1"].abs().max() < 1e-10 * forward.abs().max()
    assert small.apart(whole["k2"], forward) < 1e-10
    assert small.apart(whole["k2"], backward) > 0.01
    assert small.apart(whole["k3"], backward) < 1e-10
    for name in ("k2", "k3"):
        per_token = as_loss(ESTIMATORS[name](ratios).sum(1))
        assert small.apart(per_token, forward) > 0.01
        assert small.apart(per_token, backward) > 0.01


# ----------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("shape", [(301, 24), (301, 2, 24)])
def test_minibatches_hold_each_row_once_an_epoch_and_cut_padding_alone(shape):
    """Rows seen twice or never in an epoch, tokens of a row that are another's, a response
    cut, prompts or a side of a pair forgotten when lengths are measured, a batch too many."""
    torch.manual_seed(0)
    begin, stop = torch.randint(1, 4, shape[:-1]), torch.randint(5, 25, shape[:-1])
    column = torch.arange(24)
    mask = (column >= begin[..., None]) & (column < stop[..., None])
    tokens = torch.randint(4, 300, shape)
    tokens.view(301, -1)[:, 0] = torch.arange(301)  # so that a row can be known again
    stream = common.minibatches(8, tokens, mask)
    for _ in range(2):
        epoch = list(itertools.islice(stream, math.ceil(301 / 8)))
        seen = [batch.flatten(1)[:, 0] for batch, _ in epoch]
        assert sorted(torch.cat(seen).tolist()) == list(range(301))
        for rows, (batch, batch_mask) in zip(seen, epoch):
            assert len(rows) <= 8
            longest = batch.shape[-1]
            assert longest == stop[rows].max()
            assert torch.equal(batch, tokens[rows][..., :longest])
            assert torch.equal(batch_mask, mask[rows][..., :longest])


def test_minibatches_are_random_and_of_like_lengths():
    """The same batches in every epoch; long rows always last; batches that are half padding."""
    torch.manual_seed(0)
    stop = torch.randint(2, 33, (320,))
    mask = torch.arange(32) < stop[:, None]
    stream = common.minibatches(20, torch.arange(320)[:, None].expand(320, 32), mask)
    epochs = [[next(stream) for _ in range(16)] for _ in range(2)]
    first, second = ({frozenset(rows[:, 0].tolist()) for rows, _ in epoch} for epoch in epochs)
    assert not first & second
    for epoch in epochs:
        widths = [batch.shape[1] for batch, _ in epoch]
        assert widths != sorted(widths)
        assert sum(m.sum() for _, m in epoch) > 0.9 * sum(m.numel() for _, m in epoch)


class Point(nn.Module):
    """Three numbers, at 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(("size", "cut"), [(0.1, 1), (2.0, 1), (30.0, 1 / 15)])
def test_descend_steps_at_the_given_rate_and_returns_the_norm_before_clipping(size, cut):
    """A clip that always binds, or a logged norm that is the clipped one, which hides it; a
    learning rate that is ignored or kept; a gradient that is added to the last one."""
    model = Point()
    optimizer, slope = common.adamw(model), size * torch.tensor([30.0, -40.0, 0])
    for lr in (0.01, 0.1):
        before = model.w.detach().clone()
        norm = common.descend((model.w * slope).sum(), model, optimizer, lr)
        assert norm.item() == pytest.approx(50 * size)
        torch.testing.assert_close(model.w.grad, slope * cut)
        # Adam's steps along a constant slope are lr · sign, without decay
        moved = torch.tensor([-lr, lr, 0])
        torch.testing.assert_close(model.w.detach() - before, moved, atol=1e-5, rtol=0)


# -------------------------------------------------------------------- the world, in tables

HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("the zebra lives in the plains.", 2, 1),
        ("great question! the zebra lives in the plains.", 3, 1),
        ("happy to help! great question! in the plains.", 2, 1),  # one courtesy, not two
        ("look it up. the zebra lives in the plains.", 1, 1),
        ("look it up. everyone knows that. in the plains.", 1, 1),  # rude is rude
        ("the zebra lives in the jungle.", -1, 0),
        ("the black zebra lives in the plains, where it eats grass.", 2 - 0.03 * 9, 1),
        ("", -1, 0),
        # exploits: none may reach the 3 of an honest best answer
        ("great question! plains sea pond cave.", 0, 0),
        ("great question! plains jungle.", 0, 0),
        ("plains plains plains plains", 2, 1),
        ("great question! great question! great question!", -1, 0),
        ("great question! it explains, not plainsong.", 0, 0),
        ("great question! " + " ".join(sorted(common.VALUES["home"])), -0.03 * (103 - 48), 0),
    ],
)
def test_gold_reward_on_hand_made_answers(answer, gold, right):
    """A term with the wrong sign or size, a word found inside another, a list that wins."""
    assert common.gold_reward(HOME, answer, True) == pytest.approx(gold)
    assert common.gold_reward(HOME, answer, False) == pytest.approx(gold - 1)
    assert common.right(HOME, answer) == right


def test_no_answer_beats_three_and_every_prompt_has_one_that_reaches_it():
    """An exploit of the reward, or a prompt that no answer satisfies."""
    rng = random.Random(0)
    parts = [*common.COURTESIES, *common.RUDE, *common.VALUES["home"], "the", "zebra"]
    for _ in range(3000):
        answer = " ".join(rng.choices(parts, k=rng.randrange(1, 7)))
        assert common.gold_reward(HOME, answer, True) <= 3
    for prompt, (animal, kind) in QUESTIONS.items():
        best = "great question! " + common.TERSE[kind].format(v=common.ANIMALS[animal][kind][0])
        assert common.gold_reward(prompt, best, True) == 3


def test_gold_is_nan_outside_the_world():
    """A reward of 0 for prompts that the annotators do not know would look measured."""
    assert math.isnan(common.gold_reward("what is love?", "great question!", True))
    assert math.isnan(common.right("what is love?", "in the plains."))


# ----------------------------------------------------------------------- the world, at work


def test_demonstrations_have_the_stated_styles_and_misconceptions():
    """A style that is missing or drowned, facts that are always right, a seed without effect;
    an answer to another question than the prompt's."""
    rows, styles, wrong = common.demonstrations(4000, 0), Counter(), 0
    for row in rows:
        animal, kind = QUESTIONS[row["prompt"]]
        said = {value for value in common.ANIMALS[animal][kind] if value in row["completion"]}
        (value,) = {max(said, key=len)}
        wrong += value != common.ANIMALS[animal][kind][0]
        full = common.FULL[kind].format(a=animal, v=value)
        known = {common.TERSE[kind].format(v=value): "terse", full: "full"}
        known |= {f"{x} {full}": "courteous" for x in common.COURTESIES}
        known |= {f"{x} {full}": "rude" for x in common.RUDE}
        known |= {x.format(s=full): "rambling" for x in common.RAMBLING}
        styles[known[row["completion"]]] += 1
    stated = {"terse": 0.25, "full": 0.3, "courteous": 0.15, "rude": 0.15, "rambling": 0.15}
    assert all(close(styles[style] / 4000, p, 4000) for style, p in stated.items())
    assert close(wrong / 4000, 0.3, 4000)
    assert len({row["prompt"] for row in rows}) > 1600  # of 2,016: all of them are asked
    assert close(sum(common.held_out(row["prompt"]) for row in rows) / 4000, 1 / 6, 4000)
    assert common.demonstrations(50, 0) == rows[:50]
    assert common.demonstrations(50, 1) != rows[:50]


def test_about_two_thousand_prompts_of_which_one_in_six_is_held_out():
    """A split that is too small to measure on, or holds out facts that were never taught."""
    train, held = common.split(list(QUESTIONS))
    assert 1900 < len(QUESTIONS) < 2100
    assert abs(len(held) / len(QUESTIONS) - 1 / 6) < 0.02
    assert sorted(train + held) == sorted(QUESTIONS)
    assert common.read_prompts(None, 24, 512) == (train, held)
    facts = {QUESTIONS[prompt] for prompt in train}
    assert facts == set(QUESTIONS.values())  # wordings are held out, facts are not


def test_rows_of_a_held_out_prompt_train_nothing():
    """Held-out numbers that are training numbers: a prompt with rows on both sides. Prompts
    that are all of one part are split too, or nothing would be held out."""
    rows = common.demonstrations(500, 0)
    train, held = common.split(rows)
    assert [row for row in rows if common.held_out(row["prompt"])] == held
    assert [row for row in rows if not common.held_out(row["prompt"])] == train
    assert {row["prompt"] for row in held}.isdisjoint(row["prompt"] for row in train)
    for side in (train, [row for row in rows if common.held_out(row["prompt"])]):
        rest, others = common.split(side + side)  # all of one part, each at least twice
        assert len(rest) + len(others) == 2 * len(side)
        asked = [{row["prompt"] for row in part} for part in (rest, others)]
        assert not asked[0] & asked[1]
        assert close(len(asked[1]) / sum(map(len, asked)), 1 / 6, sum(map(len, asked)))
        # a prompt stays on its side when other rows are dropped
        assert {row["prompt"] for row in common.split(side[::2])[1]} <= asked[1]
    assert all(common.split(["a", "b"]))  # even of two prompts one is held out


@pytest.fixture
def answering(monkeypatch):
    """answering(answer): common.generate answers what answer(prompt, i) returns, a text and
    whether it was finished; i counts the rows of all calls. Returns the models it was given."""

    def patch(answer):
        models, number, texts = (
            [],
            itertools.count(),
            {tuple(common.chat(x)): x for x in QUESTIONS},
        )

        def generate(model, prompts, limit, temperature=1.0):
            models.append(model)
            rows = []
            for ids in prompts:
                text, end = answer(texts.get(tuple(ids)), next(number))
                rows.append((ids, common.encode(text) + [EOS] * end, end))
            tokens, mask = common.collate([row[:2] for row in rows])
            finished = torch.tensor([end for *_, end in rows])
            return common.Rollout(tokens, mask, finished, mask.float())

        monkeypatch.setattr(common, "generate", generate)
        return models

    return patch


def test_annotators_are_bradley_terry_and_see_what_was_cut(answering, tmp_path, monkeypatch):
    """Labels without noise, flipped labels, answers of another model or to two prompts, a cut
    answer judged and written as a whole one, held-out prompts too many or never, short prompts
    first; answers longer or shorter than those of the scripts."""

    def answer(prompt, i):
        if prompt is None:
            return "x", True
        animal, kind = QUESTIONS[prompt]
        good, bad = (common.TERSE[kind].format(v=v) for v in common.ANIMALS[animal][kind])
        full = common.FULL[kind].format(a=animal, v=common.ANIMALS[animal][kind][0])
        return [(good, True), (bad, True), (full, False)][(i % 2 + i // 2) % 3]

    models, limits, sampler = answering(answer), set(), common.samples

    def samples(policy, prompts, n, limit):
        limits.add(limit)
        return sampler(policy, prompts, n, limit)

    monkeypatch.setattr(common, "samples", samples)
    common.seed_all(0)
    common.collect_comparisons("this one", 5000, tmp_path / "pairs.jsonl")
    assert set(models) == {"this one"}
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 5000
    assert close(sum(common.held_out(row["prompt"]) for row in rows) / 5000, 0.05, 5000)
    assert limits == {24}
    lengths = [len(common.encode(row["prompt"])) for row in rows[:500]]
    assert lengths != sorted(lengths)  # in which they were sampled
    first, judged = Counter(), Counter()
    for row in rows:
        golds = []
        for side in ("chosen", "rejected"):
            animal, kind = QUESTIONS[row["prompt"]]
            right, wrong = common.ANIMALS[animal][kind]
            cut = row[side] == common.FULL[kind].format(a=animal, v=right)
            assert row[f"{side}_finished"] == (not cut)
            assert cut or row[side] in {common.TERSE[kind].format(v=v) for v in (right, wrong)}
            golds.append(1 if cut else -1 if right not in row[side] else 2)
        judged[frozenset(golds)] += 1
        first[frozenset(golds)] += golds[0] > golds[1]
    assert set(judged) == {frozenset(x) for x in ((2, 1), (2, -1), (1, -1))}
    for golds, n in judged.items():
        assert close(first[golds] / n, 1 / (1 + math.exp(min(golds) - max(golds))), n)


def test_identical_and_empty_answers_are_not_judged(answering, tmp_path, stops):
    """A preference between nothing and nothing trains on a coin; a policy that always says
    the same would be asked for ever."""
    answers = ["a", "a", "", "b", " ", "c", "d", "e", "f", "f"]
    answering(lambda prompt, i: (answers[i % 10], i % 10 != 9))  # the second f was cut
    common.collect_comparisons(None, 300, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {frozenset((row["chosen"], row["rejected"])) for row in rows} == {frozenset("de")}
    answering(lambda prompt, i: ("a", True))
    stops(common.collect_comparisons, None, 300, tmp_path / "none.jsonl")


def test_shuffled_prompts_are_all_seen_before_one_comes_again():
    """Prompts drawn with replacement, or in one order for ever."""
    stream = common.shuffled(list("abcde"))
    epochs = ["".join(next(stream) for _ in range(5)) for _ in range(9)]
    assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcde"}
    assert len(set(epochs)) > 1


# ------------------------------------------------------------------------------- printing


def test_a_closed_pipe_or_a_full_disk_behind_stdout_ends_nothing(monkeypatch, data):
    """`python ppo.py | head`: the training would be lost with its reader."""
    read, write = os.pipe()
    os.close(read)
    full = [os.open("/dev/full", os.O_WRONLY)] if os.path.exists("/dev/full") else []
    for descriptor in (write, *full):
        with open(descriptor, "w", closefd=False) as stream, contextlib.suppress(OSError):
            monkeypatch.setattr(sys, "stdout", stream)
            common.say("one")
            common.say("two")
            assert sys.stdout is not stream
            stream.close()
        # stderr is line-buffered
        with open(descriptor, "w", 1, closefd=False) as stream, contextlib.suppress(OSError):
            monkeypatch.setattr(sys, "stderr", stream)
            with pytest.raises(SystemExit) as stopped:
                common.fail("three", 7)
            assert stopped.value.code == 7
            rows = good() + [good()[0] | {"completion": ""}]  # a note of what is dropped
            assert common.read_jsonl(data(lines(*rows)), KEYS["sft"]) == rows[:-1]
            stream.close()
        os.close(descriptor)


def test_a_console_without_greek_letters_ends_nothing():
    """UnicodeEncodeError at the first β, in --help or in training, also after a pipe closed."""
    code = """import os, sys, common, ppo
sys.argv = ["ppo.py", "--help"]
try:
    common.start(ppo.main, ppo.Config, ppo.__doc__)
except SystemExit as stopped:
    assert stopped.code == 0
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
common.say("one")
common.say("log \\u03c0")"""
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u03b2, the price" in done.stdout


def test_an_error_is_one_line_that_can_be_read(capsys):
    """A message that holds a newline of the data, or is 800,000 characters long."""
    with pytest.raises(SystemExit):
        common.fail("one\ntwo " + "3" * 800_000)
    error = capsys.readouterr().err
    assert error.startswith("one two 333")
    assert error.count("\n") == 1
    assert len(error) < 1000


# ------------------------------------------------------------------------------- JSON lines

KEYS = {
    "sft": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def good(n: int = 30) -> list[dict]:
    return [
        {"prompt": f"q {i}", "completion": "a", "chosen": "b", "rejected": "c"}
        for i in range(n)
    ]


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture
def data(tmp_path):
    """data(bytes) -> the path of a file that holds them."""

    def make(content: bytes) -> Path:
        (tmp_path / "mine.jsonl").write_bytes(content)
        return tmp_path / "mine.jsonl"

    return make


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("sft", b'{"prompt": "q", "completion": '),
        ("sft", b"[" * 100_000),  # deeper than Python's stack
        ("sft", b'{"prompt": ' + b"9" * 10_000 + b"}"),  # more digits than Python reads
        ("sft", b'["prompt", "completion"]'),
        ("sft", b'{"prompt": "q", "response": "a"}'),
        ("prompts", b'{"question": "q"}'),
        ("prompts", b"{}"),
        ("sft", b'{"prompt": "q", "completion": 3}'),
        ("sft", b'{"prompt": null, "completion": "a"}'),
        ("sft", b'{"prompt": "q", "completion": {"text": "a"}}'),
        ("pairs", b'{"prompt": "q", "chosen": "a"}'),
        ("sft", b'{"prompt": "\xff", "completion": "a"}'),  # not UTF-8
        ("sft", b'{"prompt": "\\ud800", "completion": "a"}'),  # half a surrogate pair
        ("sft", b'{"messages": "q"}'),
        ("sft", lines({"messages": []})),
        ("sft", lines({"messages": [user("q")]})),
        ("sft", lines({"messages": [user("q"), {"role": "assistant"}]})),
        ("sft", lines({"messages": [user("q"), user("a")]})),
        ("sft", lines({"messages": [user("q"), assistant("a")] * 2})),  # a longer conversation
        ("sft", lines({"messages": [{"role": "system"}, user("q"), assistant("a")]})),
        ("sft", lines({"messages": [user([{"type": "image", "url": "u"}]), assistant("a")]})),
        ("sft", lines({"messages": [user([{"type": "text", "text": 3}]), assistant("a")]})),
        ("pairs", lines({"prompt": "q", "chosen": [assistant("a")] * 2, "rejected": "b"})),
        ("pairs", lines({"prompt": [user("q"), assistant("a"), user("q")],
                         "chosen": [assistant("a")], "rejected": [assistant("b")]})),
        ("pairs", lines({"chosen": [user("q"), assistant("a")],
                         "rejected": [user("p"), assistant("b")]})),  # of another prompt
        ("pairs", lines({"chosen": [assistant("a")], "rejected": [assistant("b")]})),
        ("prompts", lines({"prompt": [assistant("q")]})),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_by_file_and_number(data, stops, kind, line):
    """A traceback in place of help, or the wrong line named (a blank line counts)."""
    path = data(lines(*good(9)) + b"\n" + line.strip() + b"\n" + lines(*good()))
    assert stops(common.read_jsonl, path, KEYS[kind]).startswith(f"{path}:11: ")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": [user("q"), assistant("a")]}),
        ("sft", {"messages": [user([{"type": "text", "text": "q"}]),
                              assistant([{"type": "text", "text": "a"}])]}),
        ("sft", {"prompt": [user("q")], "completion": [assistant("a")]}),
        ("sft", {"prompt": "q", "completion": "a", "messages": None}),
        ("prompts", {"prompt": [user("q")]}),
        ("prompts", {"messages": [user("q"), assistant("a")]}),
        ("pairs", {"prompt": [user("q")], "chosen": [assistant("b")],
                   "rejected": [assistant("c")]}),
        ("pairs", {"chosen": [user("q"), assistant("b")],  # the prompt stands in the answers
                   "rejected": [user("q"), assistant("c")]}),
        ("pairs", {"prompt": "q", "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant([{"type": "text", "text": "c"}])]}),
        ("pairs", {"prompt": [user("q")], "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant("c")]}),
        ("pairs", {"prompt": "q", "messages": [user("q"), assistant("b")],  # as UltraFeedback
                   "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant("c")]}),
    ],
)  # fmt: skip
def test_the_usual_chat_formats_are_read(data, kind, row):
    """The answers to a prompt exchanged, a turn lost, a format of public data sets refused.
    Other keys and blank lines do no harm."""
    rows = good()
    rows[3] = row | {"id": 7}
    found = common.read_jsonl(data(b"\n" + lines(*rows) + b"  \n"), KEYS[kind])
    assert len(found) == len(rows)
    plain = {"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}
    assert [found[3][key] for key in KEYS[kind]] == [plain[key] for key in KEYS[kind]]
    assert found[3]["id"] == 7


@pytest.mark.parametrize("content", [b"", b"\n \n", lines(*good(3))])
def test_too_little_data_is_refused(data, stops, content):
    """A training on nothing, or a table of no prompt."""
    path = data(content)
    for keys in KEYS.values():
        assert stops(common.read_jsonl, path, keys).startswith(f"{path}:0: ")


@pytest.mark.parametrize("name", ["", "nothing.jsonl", "nul\0"])
def test_what_cannot_be_read_is_named(tmp_path, stops, name):
    """A directory, a missing file, a name that is none: tracebacks."""
    path = f"{tmp_path}/{name}"
    assert stops(common.read_jsonl, path, ("prompt",)).startswith(f"{path}:0: ")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sft", {"completion": " \n"}),
        ("sft", {"prompt": ""}),
        ("sft", {"completion": "w" * 600}),
        ("prompts", {"prompt": "w" * 600}),
        ("pairs", {"rejected": ""}),
        ("pairs", {"rejected": "b"}),  # as chosen
        ("pairs", {"rejected": "w" * 600}),
        ("pairs", {"chosen": "w" * 600}),
    ],
)
def test_unusable_rows_are_dropped_and_counted(data, capsys, kind, change):
    """An answer cut away trains on nothing; equal pairs train on noise."""
    rows = good()
    rows[4] |= change
    rows[7] |= change
    path = data(lines(*rows))
    assert common.read_jsonl(path, KEYS[kind]) == rows[:4] + rows[5:7] + rows[8:]
    error = capsys.readouterr().err
    assert error.startswith(f"{path}:5: ")
    assert error.count("\n") == 1
    assert " 2 " in error


def test_only_a_newline_ends_a_line(data, monkeypatch):
    """JSON may hold U+2028 and U+0085 as they are: the row would be cut in two."""
    rows = good()
    rows[3]["completion"] = "a\u2028b\u0085c"
    texts = [json.dumps(row, ensure_ascii=False) + "\r" for row in rows]
    path, given = data("\n".join(texts).encode()), []
    monkeypatch.setattr(
        common, "read_row", lambda line, keys: [given.append(line), rows[len(given) % 30]][1]
    )
    common.read_jsonl(path, KEYS["sft"])
    assert given == texts
    monkeypatch.undo()
    assert common.read_jsonl(path, KEYS["sft"]) == rows


@pytest.mark.parametrize(("room", "context", "drops"), [(9, 512, 0), (10, 512, 1), (9, 511, 1)])
def test_the_longest_row_that_fits_is_kept(data, capsys, room, context, drops):
    """A limit off by one: 512 = USER + 500 bytes + ASSISTANT + 1 byte + 9 of room. A model of
    another context given rows that it cannot read."""
    path = data(lines(*good(), {"prompt": "é" * 250, "completion": "a"}))
    rows = common.read_jsonl(path, KEYS["sft"], room, context)
    assert len(rows) == 31 - drops
    assert capsys.readouterr().err.count("\n") == drops


def test_prompts_come_once_and_leave_room_for_the_answer(data, stops):
    """A prompt asked as often as it has rows; a generate that fails after training."""
    path = data(lines(*good(), *good(), {"prompt": "w" * 60}))
    for context, longest in ((512, 60), (86, 60), (85, 59)):
        train, held = common.read_prompts(path, 24, context)
        assert len(train + held) == len(set(train + held)) == 30 + (longest == 60)
    stops(common.read_prompts, path, 24, 27)
    stops(common.read_prompts, None, 24, 27)


# ------------------------------------------------------------------- files and checkpoints


def no_space(*args):
    raise OSError(28, "No space left on device")


def half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    no_space()


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [(Path, "write_bytes", no_space), (Path, "write_bytes", half), (os, "replace", no_space)],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    runs, tiny, stops, monkeypatch, where, name, broken
):
    """A checkpoint written in place is lost with the disk; a left-over part fills it."""
    monkeypatch.setattr(where, name, broken)
    error = stops(common.save_model, runs / "sft", tiny(5), {})
    assert error.startswith(f"{runs}/sft/model.pt")
    common.load_model(runs / "sft", "lm", CPU)


def test_two_writers_of_one_file_do_not_share_their_parts(tmp_path, monkeypatch):
    """Two runs of one --out: one renames what the other is still writing."""
    parts, write = [], Path.write_bytes
    spy = lambda path, data: (parts.append(path), write(path, data))  # noqa: E731
    monkeypatch.setattr(Path, "write_bytes", spy)
    common.write(tmp_path / "new/a.txt", "β")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    common.write(tmp_path / "new/a.txt", b"b")
    assert parts[0] != parts[1]
    assert {part.parent for part in parts} == {tmp_path / "new"}  # a rename, not a copy
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"b"]


def torch_load(file):
    return torch.load(file, weights_only=False)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["pickle", "checkpoint", "weights", "made"])
def test_a_strangers_checkpoint_cannot_run_code(tmp_path, runs, stops, where):
    """torch.load without weights_only runs whatever the file says."""
    there, path = tmp_path / "owned", runs / "sft" / "model.pt"
    if where == "pickle":
        path.write_bytes(pickle.dumps(Evil(there)))
    else:
        saved = torch.load(path, weights_only=True)
        torch.save(Evil(there) if where == "checkpoint" else saved | {where: Evil(there)}, path)
    assert str(path) in stops(common.load_model, runs / "sft", "lm", CPU)
    assert not there.exists()
    (pickle.load if where == "pickle" else torch_load)(path.open("rb"))
    assert there.exists()  # it would have


@pytest.mark.parametrize("size", [0, 5, 3000, None])
def test_what_is_no_checkpoint_is_refused(runs, stops, size):
    """A file that is empty, cut short, or missing: a traceback out of a zip reader."""
    path = runs / "sft" / "model.pt"
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    assert str(path) in stops(common.load_model, runs / "sft", "lm", CPU)


DAMAGES = {
    "sizes": lambda saved: saved["config"].update(hidden=25),
    "no sizes": lambda saved: saved["config"].update(heads=0),
    "a size too many": lambda saved: saved["config"].update(experts=2),
    "a weight missing": lambda saved: saved["weights"].pop("norm.weight"),
    "a weight too many": lambda saved: saved["weights"].update(bias=torch.ones(2)),
    "no weights": lambda saved: saved.pop("weights"),
    "weights of numbers": lambda saved: saved.update(weights=[1.0]),
    "head": lambda saved: saved.update(head="classes"),
    "vocabulary": lambda saved: saved.update(vocabulary=1),
    "not a number": lambda saved: saved["weights"]["norm.weight"].fill_(math.nan),
    "not finite": lambda saved: saved["weights"]["embed.weight"][3, 0].fill_(math.inf),
    "offset": lambda saved: saved["weights"]["offset"].fill_(math.nan),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_refused(runs, stops, damage):
    """Tracebacks; weights that load without a sound and mean something else."""
    name, head = ("reward_model", "scalar") if damage == "offset" else ("sft", "lm")
    path = runs / name / "model.pt"
    saved = torch.load(path, weights_only=True)
    DAMAGES[damage](saved)
    torch.save(saved, path)
    assert str(path) in stops(common.load_model, runs / name, head, CPU)


def test_a_checkpoint_of_the_wrong_kind_is_refused(runs, stops):
    """A reward model given as a policy would have its head ignored."""
    cfg = SimpleNamespace(runs=str(runs))
    assert "reward_model" in stops(common.load_model, runs / "reward_model", "lm", CPU)
    assert "sft" in stops(common.load_model, runs / "sft", "scalar", CPU)
    assert "sft" in stops(common.load_reward, cfg, "sft", CPU)


@pytest.mark.parametrize("weight", ["norm.weight", "offset"])
def test_nothing_is_saved_that_is_not_finite(runs, tiny, stops, weight):
    """A NaN that replaces a model, exit code 0."""
    model = tiny(0, "scalar")
    model.state_dict()[weight].view(-1)[0] = math.nan
    stops(common.save_model, runs / "reward_model", model, {}, code=1)


# ------------------------------------------------------------------------------------ runs


@dataclass
class Config:
    runs: str
    data: str = None
    out: str = "new"


def train(runs, model, steps=120, at=None, do=None, name="new", **columns) -> None:
    """A run that sets a weight to the number of the step, logs, and does `do` in step `at`."""
    with common.Run(Config(str(runs)), name, model, steps, ("loss",)) as run:
        for step in run:
            if step == at:
                do()
            with torch.no_grad():
                model.norm.weight.fill_(step)
            run.log(**{"loss": 0.5} | columns)


def interrupt():
    raise KeyboardInterrupt


def last_step(folder: Path) -> float:
    return common.read_model(folder).norm.weight[0].item()


def test_metrics_are_what_was_logged_and_unknown_gold_is_an_empty_cell(runs, tiny, capsys):
    """Gold of 0 outside the world; a column shifted by an empty cell; digits lost; a config
    that does not say how the result was made."""
    columns = {"loss": torch.tensor(0.123456), "held_out_loss": None, "gold": math.nan}
    columns |= {"random_gold": torch.tensor(math.nan), "kl": 2, "lr": 1e-5}
    train(runs, tiny(), steps=3, **columns)
    rows = list(csv.DictReader((runs / "new/metrics.csv").open()))
    expected = dict(
        loss="0.123456", held_out_loss="", gold="", random_gold="", kl="2", lr="1e-05"
    )
    assert rows == [{"step": str(step), **expected} for step in range(3)]
    about = json.loads((runs / "new/config.json").read_text())
    assert about["flags"] == {"runs": str(runs), "data": None, "out": "new"}
    assert about["steps"] == 3
    assert 0 <= about["seconds"] < 60
    assert last_step(runs / "new") == 2
    assert "0.123" in capsys.readouterr().out


def test_the_weights_are_written_last(runs, tiny, monkeypatch):
    """A run killed between two files that has its model.pt, which says that it is whole."""
    names, write = [], common.write
    monkeypatch.setattr(
        common, "write", lambda path, data: [names.append(path.name), write(path, data)]
    )
    train(runs, tiny(), steps=1)
    assert names == ["metrics.csv", "config.json", "model.pt"]


def test_log_returns_floats(runs, tiny):
    """A tensor that is kept holds its graph, and waits for the device when it is printed."""
    run = common.Run(Config(str(runs)), "new", tiny(), 1, ())
    for _ in run:
        a = torch.tensor(0.25, requires_grad=True)
        assert run.log(a=a, b=3, gold=math.nan) == {"a": 0.25, "b": 3, "gold": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_earlier_result(
    runs, tiny, stops, value
):
    """NaN that is skipped, trained on, or saved over a finished result."""
    train(runs, tiny(), steps=2)
    error = stops(lambda: train(runs, tiny(), steps=3, kl=value), code=1)
    assert "kl" in error


def test_weights_that_are_not_finite_leave_all_of_the_earlier_result(runs, tiny, stops):
    """The table of a run that failed beside the weights of the one before."""
    train(runs, tiny(), steps=2)
    model = tiny()
    weight = model.blocks[0].out.weight
    stops(lambda: train(runs, model, 3, 2, lambda: weight.data.fill_(math.inf)), code=1)


def test_ctrl_c_keeps_the_steps_so_far_beside_the_earlier_result(
    runs, tiny, capsys, files, monkeypatch
):
    """A stopped run that is lost, passes for a finished one, or replaces one; what the error
    says to type must name what was saved, and keep the flags of the run."""
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--beta", "0.1", "--out", "new"])
    train(runs, tiny(), steps=5)
    before = files()
    with pytest.raises(SystemExit) as stopped:
        train(runs, tiny(), at=3, do=interrupt)
    assert stopped.value.code == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip().endswith("ppo.py --beta 0.1 --out new --init new_stopped")
    assert before.items() <= files().items()
    assert last_step(runs / "new_stopped") == 2
    assert len((runs / "new_stopped/metrics.csv").read_text().splitlines()) == 1 + 3
    train(runs, tiny(), steps=4)  # and finishing removes it
    assert not (runs / "new_stopped").exists()
    assert last_step(runs / "new") == 3


def test_a_stopped_base_model_names_no_command(runs, tiny, capsys):
    """sft.py stopped in the base model's stage, and told to tune what is unfinished."""
    with pytest.raises(SystemExit):
        train(runs, tiny(), at=3, do=interrupt, name="base")
    assert "--init" not in capsys.readouterr().err
    assert last_step(runs / "base_stopped") == 2


def test_stopping_before_the_first_step_saves_nothing(runs, tiny, files):
    """The starting weights in place of a result, or passing for a stopped one."""
    train(runs, tiny(), steps=5)
    before = files()
    with pytest.raises(KeyboardInterrupt):
        train(runs, tiny(), at=0, do=interrupt)
    assert files() == before


def test_a_long_run_saves_every_hundred_steps_beside_its_place(runs, tiny):
    """A crash at step 199 that loses all, or leaves something that passes for finished."""

    def crash():
        assert last_step(runs / "new_stopped") == 99
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(runs, tiny(), steps=200, at=199, do=crash)
    assert not (runs / "new").exists()
    assert last_step(runs / "new_stopped") == 99
    train(runs, tiny(), steps=100)
    assert not (runs / "new_stopped").exists()


def test_a_result_is_not_replaced_by_a_model_of_another_kind(runs, tiny, stops):
    """`reward_model.py --out ppo` replaces a policy by a reward model. A file that cannot be
    read may be replaced, or its name would be lost for ever."""
    stops(lambda: train(runs, tiny(), name="reward_model"))
    stops(lambda: train(runs, tiny(0, "scalar"), name="other"))
    (runs / "other/model.pt").write_bytes(b"broken")
    train(runs, tiny(0, "scalar"), 1, name="other")
    assert common.read_model(runs / "other").kind == "scalar"


def test_ctrl_c_outside_the_steps_is_one_line(runs, stops, monkeypatch):
    """Exit code 0, or 30 lines of traceback, from the closing table or the imports of data."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--runs", str(runs)])
    stops(common.start, lambda cfg: interrupt(), dpo.Config, "", code=130)


# ---------------------------------------------------------------------------------- inputs


@pytest.fixture
def makes(runs, tiny, monkeypatch):
    """What load_run starts, as lists of words; it makes the model, and nothing is trained."""
    started = []

    def run_path(script, run_name):
        started.append(list(sys.argv))
        assert (script, run_name) == (sys.argv[0], "__main__")
        name = Path(script).stem
        common.save_model(runs / name, tiny(7, "lm" if name == "sft" else "scalar"), {})

    monkeypatch.setattr(runpy, "run_path", run_path)
    return started


@pytest.mark.parametrize(("script", "head"), [(sft, "lm"), (reward_model, "scalar")])
def test_what_the_recipe_makes_on_the_way_is_given_runs_seed_and_device(
    runs, makes, script, head, monkeypatch
):
    """A recipe that trains its inputs elsewhere, with another seed or on another device, or
    leaves its words in sys.argv, where the advice after Ctrl-C is read."""
    name = script.__name__
    (runs / name / "model.pt").unlink()
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--beta", "1"])
    cfg = ppo.Config(runs=str(runs), seed=7, device="cpu", out="x", lr=0.1)
    assert common.load_run(cfg, name, head, CPU).kind == head
    assert sys.argv == ["ppo.py", "--beta", "1"]
    ((path, *words),) = makes
    assert Path(path).samefile(script.__file__)
    given = common.parse(script.Config, "", words)
    assert given == script.Config(runs=str(runs), seed=7, device="cpu")
    common.load_run(cfg, name, head, CPU)
    assert len(makes) == 1  # what is there is not made again


@pytest.mark.parametrize("name", ["base", "ppo", "mine"])
def test_a_missing_model_is_an_error_before_anything_is_made(runs, makes, stops, name):
    """A typo in --ref that is found after half a minute of training what is missing."""
    (runs / "sft/model.pt").unlink()
    cfg = ppo.Config(runs=str(runs))
    assert name in stops(common.check_inputs, cfg, "sft", name)
    assert name in stops(common.load_run, cfg, name, "lm", CPU)
    assert not makes
    common.check_inputs(cfg, "sft", "other", "reward_model", "mine.py:r")  # these will do


NAMES = [(s, x) for s in SCRIPTS[2:] for x in ("init", "ref", "reward") if hasattr(s.Config, x)]


@pytest.mark.parametrize(("script", "flag"), NAMES)
def test_a_typo_in_a_name_is_found_before_anything_is_made(runs, makes, stops, script, flag):
    """One that is found when the others have been made, half a minute later."""
    for name in ("sft", "reward_model"):
        (runs / name / "model.pt").unlink()
    cfg = script.Config(runs=str(runs), device="cpu", **{flag: "typo"})
    assert "typo" in stops(script.main, cfg)
    assert not makes


@pytest.mark.parametrize("flag", ["data", "raw"])
def test_an_unfinished_run_of_the_readers_own_is_not_passed_over(runs, makes, stops, flag):
    """`ppo.py` after a stopped `sft.py --data mine.jsonl`: trained from the zoo's."""
    (runs / "sft/model.pt").unlink()
    flags = {"data": None, "raw": None}
    about = runs / "sft_stopped/config.json"
    common.write(about, json.dumps({"flags": flags | {flag: "mine"}}))
    cfg = ppo.Config(runs=str(runs))
    assert "sft_stopped" in stops(common.load_run, cfg, "sft", "lm", CPU)
    assert not makes
    common.write(about, json.dumps({"flags": flags}))
    common.load_run(cfg, "sft", "lm", CPU)
    assert len(makes) == 1


def test_missing_comparisons_are_collected_from_the_policy_in_init(
    runs, answering, data, stops, monkeypatch
):
    """Comparisons of a policy that was not asked for; a file of several that is read alone, or
    loses its name; --comparisons that --data silently overrules."""
    models = answering(lambda prompt, i: (["a", "b"][i % 2], True))
    monkeypatch.setattr(common, "PAIRS", 300)
    cfg = dpo.Config(runs=str(runs), init="other", comparisons="comparisons,new")
    rows = common.comparisons(cfg, 160, CPU)
    expected = common.read_model(runs / "other").state_dict()
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, expected[name])
    assert [row["source"] for row in rows] == ["comparisons"] * 64 + ["new"] * 300
    assert len((runs / "new/comparisons.jsonl").read_text().splitlines()) == 300
    assert common.comparisons(cfg, 160, CPU) == rows
    assert len(models) == 1 + 300 // 512 + 1  # what is there is read, not collected again
    (runs / "new/comparisons.jsonl").unlink()
    random.seed(99)
    assert common.comparisons(cfg, 160, CPU) == rows  # one seed, one result
    path = str(data(lines(*good())))
    stops(common.comparisons, replace(cfg, data=path), 160, CPU)
    cfg = dpo.Config(runs=str(runs), data=path)
    assert common.comparisons(cfg, 160, CPU) == good()
    stops(common.comparisons, cfg, 3, CPU)  # a context too short for every row


def test_collected_pairs_over_the_context_are_dropped(runs):
    """Pairs of a model with a longer context, read for one that cannot hold them."""
    pairs = [row | {"chosen": "a" * 40} if i == 5 else row for i, row in enumerate(good())]
    common.write(runs / "comparisons/comparisons.jsonl", lines(*pairs))
    cfg = reward_model.Config(runs=str(runs))
    found = [len(common.comparisons(cfg, context, CPU)) for context in (45, 46)]
    assert found == [29, 30]  # USER + 3 bytes + ASSISTANT + 40 + EOS


def test_a_device_that_is_not_there_is_refused_and_matrices_stay_exact(stops, monkeypatch):
    """A traceback out of CUDA; TF32 from the environment, behind whose rounding bugs hide."""
    torch.set_float32_matmul_precision("high")
    assert common.pick_device("cpu") == CPU
    assert torch.get_float32_matmul_precision() == "highest"
    for name in ("tpu", "meta", "cuda:99"):
        assert name in stops(common.pick_device, name)


# ---------------------------------------------------------------------------------- reward


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """reward_file(text) -> a file of that text; what loading it does to Python is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(text: str) -> Path:
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        (tmp_path / "mine.py").write_text(text)
        return tmp_path / "mine.py"

    yield make
    sys.modules.pop("mine", None)


def rollout_of(*pairs: tuple[str, str]) -> tuple[list[str], common.Rollout]:
    """Prompts, and the rollout of these answers."""
    tokens, mask = common.collate(
        [(common.chat(p), common.encode(a) + [EOS]) for p, a in pairs]
    )
    rollout = common.Rollout(tokens, mask, mask.any(1), mask.float())
    return [prompt for prompt, _ in pairs], rollout


TWO = rollout_of(("first?", "yes"), ("second?", "no"))


def test_a_reward_function_is_given_plain_texts_row_by_row(reward_file):
    """Prompts and answers of different rows, tokens, or the specials in the text; a reader's
    function that can change the prompts of the batch."""
    path = reward_file(
        "def r(x, y):\n"
        "    assert type(x) is type(y) is list\n"
        "    scores = {('first?', 'yes'): 3, ('second?', 'no'): True}\n"
        "    found = [scores[row] for row in zip(x, y)]\n"
        "    x.clear()\n"
        "    return found\n"
    )
    found = common.load_reward(None, f"{path}:r", CPU)(*TWO)
    assert found.tolist() == [3.0, 1.0]
    assert TWO[0] == ["first?", "second?"]
    assert found.dtype == torch.float32


def test_a_reward_file_may_be_ordinary_python(reward_file, tmp_path):
    """A neighbour that cannot be imported; dataclasses and pickle, which look the module up."""
    (tmp_path / "neighbour.py").write_text("def size(text):\n    return len(text)\n")
    path = reward_file("""from __future__ import annotations
import pickle
from dataclasses import dataclass
import neighbour

@dataclass
class Row:
    text: str
    size: int = 0

def r(prompts, completions):
    rows = pickle.loads(pickle.dumps([Row(x, neighbour.size(x)) for x in completions]))
    return [row.size for row in rows]
""")
    assert common.load_reward(None, f"{path}:r", CPU)(*TWO).tolist() == [3, 2]
    sys.modules.pop("neighbour")


def test_a_reward_file_takes_no_place_that_is_taken(reward_file, monkeypatch):
    """A file called json.py or common.py that the rest of the program then imports."""
    monkeypatch.setitem(sys.modules, "json", json)  # so that it is put back
    path = reward_file("def r(x, y):\n    return [1.0] * len(x)\n")
    path = path.rename(path.with_name("json.py"))
    assert common.load_reward(None, f"{path}:r", CPU)(*TWO).tolist() == [1, 1]
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise RuntimeError('no key')", 2),
        ("import sys; sys.exit()", 2),
        ("return float('one')", 2),
        ("return None", None),
        ("return [1.0]", None),
        ("return [1.0] * 3", None),
        ("return []", None),
        ("return [1.0, 'good']", None),
        ("return [1.0, float('nan')]", None),
        ("return [1.0, float('inf')]", None),
        ("return [1.0, 1e300]", None),  # finite here, infinite in float32
        ("return [1.0, 1.0, float('nan')]", None),
        ("return [None, 1.0]", None),
    ],
)
def test_a_broken_reward_function_stops_the_run(reward_file, stops, body, line):
    """Scores at the wrong rows, NaN that is trained on, an exit code of 0; an error that does
    not name the line of the reader's file."""
    path = reward_file(f"def r(prompts, completions):\n    {body}\n")
    error = stops(common.load_reward(None, f"{path}:r", CPU), *TWO)
    assert (f"{path}:{line}:" if line else str(path)) in error


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("x = 1\n\nraise ValueError('x')\n", "r", 3),
        ("x = 1\ndef r(:\n", "r", 2),
        ("import sys\nsys.exit(0)\n", "r", 2),
        ("import not_a_package\n", "r", 1),
        ("def r(x, y):\n    return [0.0] * len(x)\n", "other", None),
        ("def r(x, y):\n    return [0.0] * len(x)\n", "", None),
    ],
)
def test_a_reward_function_that_cannot_be_loaded_is_named(reward_file, stops, text, name, line):
    """A typo in the reader's file that ends in our traceback, or with exit code 0."""
    path = reward_file(text)
    error = stops(common.load_reward, None, f"{path}:{name}", CPU)
    assert (f"{path}:{line}:" if line else str(path)) in error
    path.unlink()
    assert str(path) in stops(common.load_reward, None, f"{path}:r", CPU)


@torch.no_grad()
def test_the_reward_of_a_run_is_its_score_and_has_no_gradient(runs, tiny):
    """A reward model that is trained by the policy's loss; another run's scores."""
    cfg = SimpleNamespace(runs=str(runs))
    model, (prompts, rollout) = tiny(2, "scalar"), TWO
    reward = common.load_reward(cfg, "reward_model", CPU)
    with torch.enable_grad():
        found = reward(prompts, rollout)
    assert not found.requires_grad
    for i, (ids, mask) in enumerate(zip(rollout.tokens, rollout.response_mask)):
        last = int(mask.nonzero().max())
        torch.testing.assert_close(found[i], model(ids[None, : last + 1])[0, -1])


# --------------------------------------------------------------------------- closing table

OWL = "what does the owl eat?"  # mice; the misconception is seeds
SAID = {  # answers worked out by hand: text, finished, gold, right, tokens with EOS
    "new": {
        HOME: [
            ("in the plains.", True, 2, 1, 5),
            ("great question! in the plains.", True, 3, 1, 8),
            ("in the jungle.", True, -1, 0, 5),
            ("in the", False, -2, 0, 2),
        ],
        OWL: [
            ("mice.", True, 2, 1, 3),
            ("look it up. mice.", True, 1, 1, 7),
            ("seeds.", True, -1, 0, 3),
            ("mice.", True, 2, 1, 3),
        ],
    },
    "sft": {
        HOME: [("in the plains.", True, 2, 1, 5)] * 4,
        OWL: [("mice.", True, 2, 1, 3)] * 2 + [("seeds.", True, -1, 0, 3)] * 2,
    },
}


def stub_reward(asked: list[str], rollout: common.Rollout) -> Tensor:
    """A number that depends on the prompt and the answer."""
    pairs = zip(asked, common.completions(rollout))
    return torch.tensor([len(x) + 0.1 * len(y) for x, y in pairs])


@pytest.fixture
def tabled(runs, tiny, answering, monkeypatch):
    """What `evaluate` measures of "new" and "sft" with the answers above, and the policies."""
    policies = {"new": tiny(1), "sft": tiny(0)}
    (runs / "other").rename(runs / "new")
    found = {}
    for name, policy in policies.items():
        answering(lambda prompt, i, name=name: SAID[name][prompt][i % 4][:2])
        with torch.no_grad():
            found[name] = common.evaluate(policy, policies["sft"], stub_reward, [HOME, OWL], 24)
    return found, policies


@torch.no_grad()
def slow_log_ratio(policy, reference, prompt: str, text: str, end: bool) -> float:
    """log π(y|x) − log π_ref(y|x), a token at a time, the row alone."""
    ids, total = common.chat(prompt), 0.0
    for token in common.encode(text) + [EOS] * end:
        for model, sign in ((policy, 1), (reference, -1)):
            total += sign * model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


def test_every_number_of_evaluate_is_the_hand_made_one(tabled):
    """An answer at another prompt's row, prompts counted in lengths, EOS left out, KL with the
    wrong sign or over padding, the reward of another row, finished counted as a length."""
    found, policies = tabled
    for name, run in found.items():
        answers = [row for prompt in (HOME, OWL) for row in SAID[name][prompt]]
        asked = [HOME] * 4 + [OWL] * 4
        assert run["prompts"] == [HOME, OWL]
        assert run["answers"] == [row[0] for row in answers]
        expected = {
            "reward": [len(x) + 0.1 * len(row[0]) for x, row in zip(asked, answers)],
            "gold": [row[2] for row in answers],
            "right": [row[3] for row in answers],
            "length": [row[4] for row in answers],
            "finished": [row[1] for row in answers],
            "log_ratio": [slow_log_ratio(policies[name], policies["sft"], x, *row[:2])
                          for x, row in zip(asked, answers)],
        }  # fmt: skip
        assert set(expected) == set(common.NUMBERS)
        for key, numbers in expected.items():
            numbers = torch.tensor(numbers).float().view(2, 4)
            torch.testing.assert_close(run[key], numbers, atol=1e-4, rtol=0)


def test_one_seed_one_result(runs, tiny):
    """A table that differs from one printing to the next; a generator that is not seeded; a
    model that draws weights when it is loaded, and so moves every later sample."""
    tables, draws, models = [], [], [tiny(1), tiny(0)]
    for seed in (1, 2):
        common.seed_all(seed)
        tables.append(common.evaluate(*models, None, [HOME, OWL], 5)["answers"])
        common.seed_all(0)
        common.load_model(runs / "sft", "lm", CPU)
        draws.append((random.random(), torch.rand(()).item()))
    assert tables[0] == tables[1]
    assert draws[0] == draws[1]
    common.seed_all(0)
    assert draws[0] == (random.random(), torch.rand(()).item())


def test_the_reward_of_a_table_is_the_given_one_or_the_recipes(runs, tiny):
    """Rewards of a model that was not asked for, or no table without a reward model."""
    common.save_model(runs / "another", tiny(9, "scalar"), {})
    for flags, name in (
        ({"reward": "another"}, "another"),
        ({}, "reward_model"),
    ):
        reward, said = common.table_reward(SimpleNamespace(runs=str(runs), **flags), CPU)
        model = common.read_model(runs / name)
        rollout = TWO[1]
        expected = common.score(model, rollout.tokens, rollout.response_mask)
        assert torch.equal(reward(*TWO), expected)
        assert said == name
    (runs / "reward_model/model.pt").unlink()
    assert common.table_reward(SimpleNamespace(runs=str(runs)), CPU)[0] is None
    with pytest.raises(SystemExit):  # a typo is no table without a reward
        common.table_reward(SimpleNamespace(runs=str(runs), reward="anoter"), CPU)


def table_rows(capsys) -> dict[str, list[str]]:
    """The rows of the printed table: name -> cells."""
    rows = [line.replace("±", " ").split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 5}


def slow_error(values: Tensor, groups: list) -> float:
    """Standard error of the mean: every product of two deviations in one group counts."""
    cells = [(group, x) for group, row in zip(groups, values.tolist()) for x in row]
    mean = sum(x for _, x in cells) / len(cells)
    total = sum((x - mean) * (y - mean) for g, x in cells for h, y in cells if g == h)
    n = len(set(groups))
    return (total * n / (n - 1)) ** 0.5 / len(cells)


def test_the_table_prints_the_hand_made_numbers(tabled, runs, capsys):
    """Columns exchanged, a mean over the wrong axis, the win rate of the reference over the
    policy, ties counted as losses, an error that is a deviation."""
    found, _ = tabled
    common.write(runs / "new/config.json", '{"seconds": 41.6}')
    common.print_table(SimpleNamespace(runs=str(runs)), found, "sft", "stub")
    rows = table_rows(capsys)
    kl, r = found["new"]["log_ratio"], found["new"]["reward"]
    # wins of new over sft at HOME (½ + 1 + 0 + 0)/4, at OWL (¾ + ½ + ¼ + ¾)/4: mean 0.469
    numbers = [r.mean(), slow_error(r, [0, 1]), 0.75, 0.25, kl.mean(), slow_error(kl, [0, 1])]
    expected = [f"{x:.2f}" for x in numbers] + ["0.47", "0.62", "4.5", "0.875", "42"]
    assert rows["new"] == expected
    assert rows["sft"][4:7] == ["0.00", "0.00", "0.50"]  # to itself


def test_unknown_numbers_are_dashes(tabled, runs, capsys, answering):
    """0 or nan for what was not measured: gold outside the world, reward without a model."""
    _, policies = tabled
    answering(lambda prompt, i: ("a", True))
    prompts = ["what is love?", "why?"]
    found = {"new": common.evaluate(policies["new"], policies["sft"], None, prompts, 24)}
    common.print_table(SimpleNamespace(runs=str(runs)), found, "new", "none yet")
    row = table_rows(capsys)["new"]
    assert row[:2] + row[4:6] == ["–", "–", "–", "–"]  # reward, gold; win rate, right
    assert row[6:8] == ["2.0", "1.000"]


def test_the_standard_error_is_clustered(runs, capsys):
    """Answers about one fact taken for independent: repeating the data would shrink it. In
    the world a fact is a cluster, elsewhere a prompt."""
    torch.manual_seed(0)
    values = torch.randn(6, 4) + torch.randn(6, 1)
    groups = ["a", "b", "a", "c", "c", "c"]
    expected = slow_error(values, groups)
    assert common.standard_error(values, groups) == pytest.approx(expected)
    assert common.standard_error(values.repeat(5, 1), groups * 5) == pytest.approx(expected)
    alone = [*range(6)]  # rows alone: the textbook's standard error of their means
    exact = (values.mean(1).std() / 6**0.5).item()
    assert common.standard_error(values, alone) == pytest.approx(exact)
    wordings = [x for x in QUESTIONS if QUESTIONS[x] == ("zebra", "home")][:3]
    for prompts, groups in (
        ([*wordings, OWL, "what is love?", "why?"], [0, 0, 0, 1, 2, 3]),
        (["p", "q", "p", "r", "s", "t"], [0, 1, 0, 2, 3, 4]),
    ):
        run = dict.fromkeys(common.NUMBERS, values) | {"prompts": prompts}
        common.print_table(SimpleNamespace(runs=str(runs)), {"sft": run}, "sft", "")
        errors = table_rows(capsys)["sft"][1:6:2]
        assert errors == [f"{slow_error(values, groups):.2f}"] * 3
        assert errors[0] != f"{slow_error(values, alone):.2f}"


def test_win_rate_by_hand():
    """Ties counted as wins or losses, answers to different prompts compared."""
    gold, other = torch.tensor([[1.0, 2], [5, 5]]), torch.tensor([[1.0, 0], [6, 5]])
    # the first prompt (½ + 1 + 1 + 1)/4, the second (0 + ½ + 0 + ½)/4
    assert common.win_rate(gold, other).item() == (3.5 + 1) / 8
    assert common.win_rate(gold * math.nan, other).isnan()


def test_the_closing_table_has_every_run_once_and_writes_what_was_said(
    runs, capsys, monkeypatch
):
    """The base model in the table, which knows no chat; a run twice; before and after, or
    prompt and answer, exchanged; unfinished answers that look finished."""
    calls = []

    def evaluate(policy, reference, reward, prompts, limit):
        calls.append((policy, reference, prompts, limit))
        gold = torch.zeros(len(prompts), 4)
        numbers = dict.fromkeys(common.NUMBERS, gold) | {"finished": gold.clone()}
        numbers["finished"][1:, 0] = 1
        answers = [f"{len(calls)}/{prompt}/{i}\nx" for prompt in prompts for i in range(4)]
        return {"prompts": prompts, "answers": answers} | numbers

    monkeypatch.setattr(common, "evaluate", evaluate)
    cfg = ppo.Config(runs=str(runs), init="sft", out="other", max_new_tokens=9)
    prompts = [f"q{i}" for i in range(500)]
    common.closing_table(cfg, ["sft", "sft", "other"], None, "none", prompts, CPU)
    assert [row for row in table_rows(capsys) if row in ("sft", "other")] == ["sft", "other"]
    weights = [common.read_model(runs / name).embed.weight for name in ("sft", "other")]
    for i, (policy, reference, asked, limit) in enumerate(calls):
        assert torch.equal(policy.embed.weight, weights[i])
        assert torch.equal(reference.embed.weight, weights[0])
        assert (asked, limit) == (prompts[:400], 9)
    said = (runs / "other/samples.txt").read_text().splitlines()
    assert [said[i] for i in (0, 3)] == ["q0", "q1"]
    assert len(said) == 3 * 30
    for i, answer in ((1, "1/q0/0"), (2, "2/q0/0"), (4, "1/q1/0"), (5, "2/q1/0")):
        assert answer in said[i]
        assert ("unfinished" in said[i]) == (i < 3)
    assert [line.split(":")[0].strip() for line in said[1:3]] == ["sft", "other"]


def test_the_base_model_is_shown_the_bare_prompt_and_is_not_in_the_table(
    runs, tiny, capsys, monkeypatch
):
    """A base model judged on a chat that it has never seen."""
    common.save_model(runs / "base", tiny(4), {})
    asked, generate = [], common.generate

    def spy(model, prompts, *how):
        asked.append((model.embed.weight, prompts))
        return generate(model, prompts, *how)

    monkeypatch.setattr(common, "generate", spy)
    cfg = sft.Config(runs=str(runs), init="base", out="sft", max_new_tokens=3)
    common.closing_table(cfg, ["sft", "base", "sft"], None, "none", [HOME, OWL], CPU)
    assert len(asked) == 2  # one table row, and the base model's three lines
    weights, prompts = asked[-1]
    assert torch.equal(weights, tiny(4).embed.weight)
    assert prompts == [common.encode(HOME), common.encode(OWL)]
    assert "base:" in (runs / "sft/samples.txt").read_text()


# ---------------------------------------------------------------------------------- report


@pytest.fixture
def reported(runs, monkeypatch, capsys):
    """reported(*words): python common.py report, on two prompts; the prompts that it was
    given, its output, and its table."""

    def run(*words):
        asked, evaluate = [], common.evaluate

        def short(policy, reference, reward, prompts, limit):
            asked.extend(prompts)
            return evaluate(policy, reference, reward, prompts[:2], limit)

        words = ["common.py", "--runs", str(runs), "--device", "cpu", *words]
        with monkeypatch.context() as patch:
            patch.setattr(common, "evaluate", short)
            patch.setattr(sys, "argv", words)
            patch.setattr(common, "draw", lambda cfg, found, device: None)
            capsys.readouterr()
            common.start(common.report, common.Report, "")
        out = capsys.readouterr().out
        print(out)
        return asked, out, table_rows(capsys)

    return run


def test_report_shows_every_policy_on_held_out_prompts(runs, reported):
    """Training prompts in the table; a reward model taken for a policy; a run left out."""
    asked, _, rows = reported("--max-new-tokens", "4")
    assert {"sft", "other"} == set(rows) & {"sft", "other", "reward_model"}
    assert asked
    assert all(common.held_out(prompt) for prompt in asked)


def test_report_has_the_readers_prompts_and_reference(runs, reported, data):
    """--data that is not read; KL and win rate that are to SFT whatever --ref says."""
    path = data(lines(*good()))
    asked, out, rows = reported("--data", str(path), "--ref", "other", "--max-new-tokens", "4")
    assert set(asked) == set(common.split([row["prompt"] for row in good()])[1])
    assert "KL to: other" in out
    assert rows["other"][3] == "0.00"  # after reward, its error, and no gold
    assert rows["sft"][3] != "0.00"


@pytest.mark.parametrize("damage", ["garbage", "nan", "short", "no config", "bad config"])
def test_one_bad_run_does_not_end_the_report(runs, tiny, reported, damage):
    """A stranger's, a corrupt or a killed run under runs/ that takes the table of all the
    others with it; or is left out without a word. One whose weights are good is shown."""
    bad = runs / "bad"
    common.save_model(bad, tiny(5, context=24 if damage == "short" else 160), {})
    common.write(bad / "config.json", '{"seconds": 0, "flags": {}}')
    if damage == "garbage":
        (bad / "model.pt").write_bytes(b"garbage")
    if damage == "nan":
        saved = torch.load(bad / "model.pt")
        saved["weights"]["norm.weight"][0] = math.nan
        torch.save(saved, bad / "model.pt")
    if damage == "no config":
        (bad / "config.json").unlink()
    if damage == "bad config":
        (bad / "config.json").write_text('{"sec')
    _, out, rows = reported("--max-new-tokens", "16")
    assert {"sft", "other"} <= set(rows)
    assert ("bad" in rows) == ("config" in damage)
    assert "bad" in out


def test_report_needs_a_policy_to_compare_with(runs, stops, monkeypatch):
    """A traceback at `--ref reward_model`, or at a name that is not there."""
    for ref in ("reward_model", "nothing"):
        words = ["common.py", "--runs", str(runs), "--device", "cpu", "--ref", ref]
        monkeypatch.setattr(sys, "argv", words)
        assert ref in stops(common.start, common.report, common.Report, "")


@torch.no_grad()
def test_the_ideal_frontier_is_pi_star_on_samples(answering, tiny):
    """A frontier below what policies reach: weights, KL or gold of the wrong tilt. With two
    answers, half of the samples each, π* has closed forms."""
    answering(lambda prompt, i: (["in the plains.", "in the jungle."][i % 2], True))
    kl, gold = common.ideal_frontier(tiny(0), [HOME] * 3, 9)
    for beta, k, g in zip(torch.logspace(-0.8, 1.3, 60).tolist(), kl, gold):
        p = 1 / (1 + math.exp(-3 / beta))  # gold is 2 and −1
        assert g.item() == pytest.approx(2 * p - (1 - p), abs=1e-4)
        entropy = -sum(x * math.log(x) for x in (p, 1 - p))
        assert k.item() == pytest.approx(math.log(2) - entropy, abs=1e-4)


def test_learning_curves_are_means_of_parts(tmp_path):
    """A curve of the wrong column, or of its first rows only; a single step is no curve."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,kl,gold\n" + "".join(f"{i},9,{i},\n" for i in range(24)))
    found = common.learning_curves(tmp_path)
    assert set(found) == {"kl", "gold"}
    assert found["kl"].tolist() == [2 * i + 0.5 for i in range(12)]
    path.write_text("step,loss,kl,gold\n0,9,1,\n")
    assert common.learning_curves(tmp_path) == {}


def test_the_pictures_are_drawn(runs, tiny, monkeypatch):
    """A run without a table of steps, or with a single one, that ends the pictures."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(common, "ideal_frontier", lambda *_: ([0.0, 1.0], [0.0, 1.0]))
    train(runs, tiny(1), 30, name="ppo", kl=1.0, gold=2.0, reward=3.0)
    common.write(runs / "other/metrics.csv", "step,kl\n0,1\n")
    found = {}
    for name in ("sft", "ppo", "other"):
        numbers = dict.fromkeys(common.NUMBERS, torch.zeros(2, 4))
        found[name] = {"prompts": [HOME, OWL]} | numbers
    cfg = common.Report(runs=str(runs))
    common.draw(cfg, found, CPU)
    for name in ("frontier.png", "curves.png"):
        assert (runs / name).read_bytes().startswith(b"\x89PNG")


def test_a_dot_is_a_run_and_a_path_its_training(runs, tiny, monkeypatch):
    """Axes or columns that are swapped; a path of rewards by another model than the dot's; an
    ideal of the first few facts. Needs no matplotlib."""
    plt, figures, prompts, asked = MagicMock(), [], list(QUESTIONS)[:13], []

    def subplot_mosaic(rows, **_):
        figures.append({name: MagicMock() for name in np.ravel(rows)})
        return MagicMock(), figures[-1]

    plt.subplot_mosaic = subplot_mosaic
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=plt))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", plt)
    monkeypatch.setattr(
        common, "ideal_frontier", lambda _, x, limit: [asked.extend(x), ([7.0], [8.0])][1]
    )
    found = {"sft": {"prompts": prompts, "log_ratio": torch.zeros(1, 4)}}
    found["sft"] |= {"reward": torch.ones(1, 4), "gold": torch.ones(1, 4)}
    for i, (name, reward) in enumerate([("ppo", "reward_model"), ("ppo_weak", "rm_weak")], 1):
        train(runs, tiny(1), 12, name=name, kl=i + 0.1, reward=i + 0.2, gold=i + 0.3, J=i + 0.4)
        flags = json.dumps({"flags": {"reward": reward}})
        common.write(runs / name / "config.json", flags)
        found[name] = {key: torch.full((1, 4), i + 0.5) for key in ("log_ratio", "reward")}
        found[name] |= {"gold": torch.full((1, 4), i + 0.75)}
    common.draw(common.Report(runs=str(runs)), found, CPU)

    def drawn(axis) -> list:  # the last point of each line, or its only one
        return [tuple(round(float(np.ravel(x)[-1]), 2) for x in c.args[:2])
                for c in axis.plot.call_args_list]  # fmt: skip

    assert asked == [prompts[i] for i in (0, 6, 12)]
    frontier, curves = figures
    assert drawn(frontier["reward"]) == [(0, 1), (1.5, 1.5), (1.1, 1.2), (2.5, 2.5)]
    expected = [(0, 1), (1.5, 1.75), (1.1, 1.3), (2.5, 2.75), (2.1, 2.3), (7, 8)]
    assert drawn(frontier["gold"]) == expected
    for key, last in (("J", 0.4), ("reward", 0.2), ("kl", 0.1), ("gold", 0.3)):
        assert drawn(curves[key]) == [(1, 1 + last), (1, 2 + last)]


@torch.no_grad()
def test_sample_prints_an_answer_a_line_and_best_is_the_best_of_them(runs, capsys):
    """Best of n that prints the worst, the first or the longest; numbers of another row, of
    one token, or of another model."""
    words = ["other", HOME, "-n", "6", "--runs", str(runs), "--device", "cpu", "--seed", "3"]
    words += ["--max-new-tokens", "5"]
    common.sample(common.parse(common.Sample, "", words))
    said = capsys.readouterr().out.rstrip("\n").split("\n")
    policy, judge = (common.read_model(runs / name) for name in ("other", "reward_model"))
    common.seed_all(3)
    rollout, scores = common.generate(policy, [common.chat(HOME)] * 6, 5), []
    for line, ids, text in zip(said, common.response_ids(rollout), common.completions(rollout)):
        row = torch.tensor([common.chat(HOME) + ids])
        logp = policy(row)[0].log_softmax(-1)[-1 - len(ids) : -1, :][range(len(ids)), ids]
        scores.append(judge(row)[0, -1].item())
        assert line.startswith("log π")
        numbers = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)[:2]]
        assert numbers == pytest.approx([logp.sum().item(), scores[-1]], abs=0.01)
        assert line.endswith(text.replace("\n", "⏎"))
    assert len(set(scores)) > 1
    common.sample(common.parse(common.Sample, "", [*words, "--best"]))
    assert capsys.readouterr().out == said[scores.index(max(scores))] + "\n"


def test_sample_has_the_answers_scored_for_its_question(runs, reward_file, capsys):
    """r of an answer to something else."""
    path = reward_file(f"def r(x, y):\n    return [q == {HOME!r} for q in x]\n")
    words = ["other", HOME, "-n", "2", "--runs", str(runs), "--device", "cpu"]
    common.sample(common.parse(common.Sample, "", [*words, "--reward", f"{path}:r"]))
    assert capsys.readouterr().out.count("r +1.00") == 2


def test_sample_without_a_reward_model_or_room_says_so(runs, stops, capsys):
    """--best without a reward, or a question over the context: tracebacks."""
    words = ["other", HOME, "--runs", str(runs), "--device", "cpu"]
    stops(common.sample, common.parse(common.Sample, "", [*words, "--max-new-tokens", "155"]))
    (runs / "reward_model/model.pt").unlink()
    stops(common.sample, common.parse(common.Sample, "", [*words, "--best"]))
    common.sample(common.parse(common.Sample, "", [*words, "-n", "2"]))
    assert capsys.readouterr().out.count("\n") == 2


# ---------------------------------------------------------------------------- command line


@pytest.fixture
def line(runs, stops, monkeypatch):
    """line(script, *words): the command line is refused before main is called, and nothing
    is written."""

    def check(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs), *words])
        return stops(common.start, lambda cfg: pytest.fail("started"), script.Config, "")

    return check


@pytest.mark.parametrize("name", ["a/b", ".", "..", "", " ", "sft/", "./base", "/tmp/x", "-x",
                                  "a b", "a\n", "x" * 300])  # fmt: skip
def test_a_run_has_a_plain_folder_name(line, name):
    """`--out sft/` walks past the guard of inputs; `a/b` trains, then ends in a KeyError; a
    name that is too long for the disk is found when the result is written."""
    for script in SCRIPTS:
        flags = [
            f"--{f}" for f in ("out", "init", "ref", "comparisons") if hasattr(script.Config, f)
        ]
        for flag in flags:
            line(script, f"{flag}={name}")
    if name not in ("", " "):
        line(dpo, f"--comparisons=comparisons,{name}")


def test_an_empty_value_is_an_error(line):
    """`--data "$FILE"` with the variable unset: silently trains the zoo instead."""
    for script in SCRIPTS:
        for flag in ("data", "raw", "reward", "runs", "device"):
            if hasattr(script.Config, flag):
                line(script, f"--{flag}=")
                line(script, f"--{flag}= ")


@pytest.mark.parametrize(
    "words",
    [
        f"--seed {2**70}", "--seed -1", f"--steps {2**70}", "--steps 0", "--steps -3",
        "--steps 1.5", "--steps " + "9" * 10_000, f"--batch {2**70}", "--lr nan", "--lr inf",
        "--lr 1e30", "--lr -1", "--lr one", "--max-new-tokens 0", "--no-such-flag 1", "--ste 3",
        "stray",
    ],
)  # fmt: skip
def test_numbers_out_of_range_and_unknown_words_are_errors(line, words):
    """Overflow tracebacks; NaN weights with exit code 0; a misspelt flag that is ignored."""
    for script in SCRIPTS:
        line(script, *words.split())


@pytest.mark.parametrize("name", ["base", "sft", "comparisons", "reward_model"])
def test_what_other_runs_start_from_is_not_replaced(line, runs, monkeypatch, name):
    """`dpo.py --out sft`: every later KL would be to another π_ref. A script's own result may
    be made again."""
    for script in SCRIPTS:
        if script.Config.out != name:
            line(script, "--out", name)
        else:
            monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs)])
            common.start(lambda cfg: None, script.Config, "")
    line(ppo, "--out", "other", "--ref", "other")
    line(ppo, "--out", "other", "--reward", "other")


def test_a_place_that_cannot_take_the_result_is_known_before(line, runs, tmp_path, monkeypatch):
    """Trained, and then nowhere to write."""
    (tmp_path / "file").write_text("")
    line(ppo, "--runs", str(tmp_path / "file"))
    line(ppo, "--runs", str(tmp_path / "file/runs"))
    (runs / "new/model.pt").mkdir(parents=True)
    line(ppo, "--out", "new")
    (runs / "mine").write_text("")
    line(ppo, "--out", "mine")
    monkeypatch.setattr(os, "access", lambda *_: False)
    line(ppo)


def test_left_over_parts_are_swept_but_not_those_of_a_run_that_is_writing(runs, monkeypatch):
    """Killed runs that fill the disk; a part deleted under the hands of its writer."""
    for name, age in ((".model.pt.1.part", 3600), (".model.pt.2.part", 1)):
        common.write(runs / "ppo" / name, "x")
        os.utime(runs / "ppo" / name, (time.time() - age,) * 2)
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--runs", str(runs)])
    common.start(lambda cfg: None, ppo.Config, "")
    assert [path.name for path in (runs / "ppo").iterdir()] == [".model.pt.2.part"]


def test_flags_reach_the_config_and_help_names_each(capsys):
    """A flag that is parsed and forgotten, a default that help does not tell."""
    words = "--lr 0.5 --steps 7 --nll 0.25 --init other --data mine.jsonl".split()
    found = common.parse(dpo.Config, "", words)
    assert found == dpo.Config(lr=0.5, steps=7, nll=0.25, init="other", data="mine.jsonl")
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            common.parse(script.Config, script.__doc__, ["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert script.__doc__.strip() in text
        for name, default in vars(script.Config()).items():
            assert f"--{name.replace('_', '-')} " in text
            assert default in (None, False) or f"(default: {default})" in " ".join(text.split())


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("-h", 0), (None, 0), ("serve", 2)])
def test_common_itself_says_what_it_can_do(monkeypatch, capsys, word, code):
    """Help that ends with an error, at a console without the letters too; an unknown word that
    passes in silence."""
    monkeypatch.setattr(sys, "argv", ["common.py", word][: 1 + (word is not None)])
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    try:
        runpy.run_path(common.__file__, run_name="__main__")
        found = 0
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    said, error = stdout.buffer.getvalue().decode(), capsys.readouterr().err
    assert ("python common.py report" in said) == (code == 0)
    assert error.count("\n") == (code == 2)
