"""common.py: tokens, Transformer, sampling, scores, steps, files, runs, inputs, table, flags.

Each test names the bug it catches, and checks against something independent: a slow
definition, the enumerable world of tiny.py, a number worked out by hand, an invariance.
"""

import csv
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
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

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
from common import ASSISTANT, EOS, PAD, USER, ModelConfig, Transformer
from data import zoo

CPU = torch.device("cpu")
SCRIPTS = (sft, reward_model, rejection_sampling, ppo, dpo)


@pytest.fixture
def stops(files, capsys):
    """stops(f, *args, code=2): f ends the program with that code and says one line, which is
    returned; every file is as it was."""

    def check(f, *args, code=2):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            f(*args)
        error = re.sub(r"usage:[\s\S]*?(?=\S+ error:)", "", capsys.readouterr().err)
        assert (stopped.value.code, error.count("\n")) == (code, 1)
        assert files() == before
        return error

    return check


def close(share: float, p: float, n: int) -> bool:
    """Is a share of n draws within four standard errors of p?"""
    return abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


# ---------------------------------------------------------------------------------- tokens


def test_any_utf8_text_round_trips_and_never_encodes_to_a_special():
    """Text that comes back changed; a prompt that ends its own turn and answers itself; half a
    character that cannot be printed; words of the zoo in four tokens in place of one."""
    rng = random.Random(0)
    texts = ["", "\x00\x01\x02\x03", "<eos>[USER]</s>", "  where  the\tzebra\r\nIS ", "ζέ 斑🦓"]
    for _ in range(300):
        points = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                  for _ in range(8)]  # fmt: skip
        words = [chr(point) for point in points] + rng.choices(zoo.WORDS, k=4) + [" "] * 4
        texts.append("".join(rng.sample(words, len(words))))
    for text in texts:
        ids = common.encode(text)
        assert common.decode(ids) == text
        assert all(i not in (EOS, USER, ASSISTANT, PAD) for i in ids)
        assert all(0 <= i < ModelConfig().vocab_size for i in ids)
        assert common.chat(text) == [USER, *ids, ASSISTANT]
    assert common.decode([USER, *common.encode("hi"), ASSISTANT, PAD, EOS]) == "hi"
    assert common.decode(common.encode("β")[:1]) == "\ufffd"
    for text in [*zoo.QUESTIONS, zoo.raw_text(0, 500)]:
        assert len(common.encode(text)) == len(re.findall(r" ?\w+|[.,?!]|\s", text))


def test_only_a_literal_false_means_that_an_answer_was_cut():
    """A cut answer taught to stop there; the flag of the other answer read; an empty cell of a
    reader's table read as "cut", so that no answer ends; rows padded on the left."""
    row = {"prompt": "q", "completion": "a", "chosen": "bb", "rejected": "c"}
    answers = {"completion", "chosen", "rejected"}
    for key in answers:
        whole = common.chat("q"), [*common.encode(row[key]), EOS]
        for flag in (None, "no", "false", 0, 0.0, [], True):
            assert common.answer_ids(row | {f"{key}_finished": flag}, key) == whole
        cut = row | {f"{key}_finished": False}
        assert common.answer_ids(cut, key) == (whole[0], whole[1][:-1])
        assert all(common.answer_ids(cut, other)[1][-1] == EOS for other in answers - {key})
    assert common.answer_ids(row) == common.answer_ids(row, "completion")
    tokens, mask = common.encode_pairs([row | {"rejected_finished": False}, row], CPU)
    start, bb, c = common.chat("q"), common.encode("bb"), common.encode("c")
    assert tokens[0].tolist() == [[*start, *bb, EOS], [*start, *c, PAD, PAD]]
    assert tokens[1].tolist() == [[*start, *bb, EOS], [*start, *c, EOS, PAD]]
    assert mask[0].int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert mask[1].int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


# ----------------------------------------------------------------------------- Transformer


def slow_forward(model, tokens):
    """The Llama-style Transformer, one position, head and row at a time."""
    c, w = model.config, model.state_dict()
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


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_is_the_slow_definition(tiny, kv_heads):
    """A wrong rotation, mask, norm, or key head of a query, grouped or not; θ and ε that are
    the usual ones and not the config's; a leak of the future, however small."""
    sizes = dict(vocab_size=11, channels=32, rope_theta=50.0, norm_eps=0.1)
    model = tiny(heads=4, kv_heads=kv_heads, **sizes).double()
    for weight in model.parameters():
        if weight.dim() == 1:  # the norms' scales are 1 at the start
            weight.mul_(torch.rand_like(weight) + 0.5)
    tokens = torch.randint(11, (2, 9))
    for row, logits in zip(tokens.tolist(), model(tokens)):
        torch.testing.assert_close(logits, slow_forward(model, row), atol=1e-5, rtol=0)
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 11
        assert ((model(changed) - model(tokens))[:, :t].abs() < 1e-13).all()


# the same tokens in another order (row 2) and one position later (3), and token 0 (4)
ALIKE = [[1, 5, 2, 7, 7, 3, 3], [1, 5, 2, 7, 8, 9, 3], [1, 2, 5, 7, 7, 3, 3],
         [0, 1, 5, 2, 7, 7, 3], [1, 5, 2, 7, 7, 0, 0], [1, 5, 2, 7, 8, 9, 3]]  # fmt: skip


@pytest.mark.parametrize("kept", [None, [(0, 3), (2, 1), (2, 5), (5, 0)]])
def test_prefixes_that_are_alike_share_a_node(kept):
    """A position that is given another beginning's hidden state: the same tokens in another
    order or elsewhere, one token more; one that is worked out twice, or that nobody needs."""
    tokens = torch.tensor(ALIKE)
    keep = torch.full_like(tokens, kept is None, dtype=torch.bool)
    for place in kept or ():
        keep[place] = True
    node, place = common.prefix_tree(tokens, keep)
    needed = {}  # node -> the one beginning that it stands for; None for what nobody needs
    for b, row in enumerate(ALIKE):
        for t in range(len(row)):
            beginning = tuple(row[: t + 1]) if keep[b, t:].any() else None
            assert needed.setdefault(node[b, t].item(), beginning) == beginning
    assert len(set(needed.values())) == len(needed) == len(place)
    assert torch.equal(node.flatten()[place], torch.arange(len(place)))


def test_no_two_of_many_prefixes_are_taken_for_one():
    """Numbers of prefixes that collide: 32 bits are not enough for a batch of long rows."""
    tokens = torch.randint(528, (8_000, 30))
    _, place = common.prefix_tree(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert len(place) == len({tuple(x[:t]) for x in tokens.tolist() for t in range(1, 31)})


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_batch_that_begins_alike_has_the_outputs_and_gradients_of_its_rows(tiny, head):
    """Gradients that are lost, or counted once too often, where rows share hidden states;
    `keep` that takes its outputs from other places; a beginning that is worked out twice, or
    outputs of places that nobody asked for."""
    model, sizes = tiny(3, head, heads=2, kv_heads=1).double(), []
    for part in (model.blocks[0], model.norm):
        part.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    tokens, keep = torch.tensor(ALIKE), torch.rand(len(ALIKE), len(ALIKE[0])) < 0.4
    alone = torch.cat([model(row[None]) for row in tokens])
    weights = torch.randn_like(alone[keep])
    for outputs in (model(tokens)[keep], model(tokens, keep)):
        torch.testing.assert_close(outputs, alone[keep], atol=1e-12, rtol=0)
        expected = small.gradient((alone[keep] * weights).sum(), model)
        found = small.gradient((outputs * weights).sum(), model)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    prefixes = {tuple(row[: t + 1]) for row in ALIKE for t in range(len(row))}
    assert sizes[-4:-2] == [len(prefixes), keep.numel()]
    assert sizes[-1] == keep.sum()


def test_weights_start_at_their_stated_size():
    """Layers that add to the residual stream and start as large as the others; fan-out for
    fan-in: activations that grow with depth; a head of zeros, through which nothing learns."""
    torch.manual_seed(0)
    c = ModelConfig(channels=512, layers=3, hidden=256)
    for name, weight in Transformer(c, "scalar").named_parameters():
        if weight.dim() == 2:
            std = weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= (2 * c.layers) ** -0.5
            error = 4 / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(std, rel=max(0.005, error)), name


def test_scalar_copy_shares_no_storage(tiny):
    """Training a critic or reward model would train the policy too; a trunk that is new."""
    model, tokens = tiny(), torch.randint(4, 300, (2, 5))
    copy = common.scalar_copy(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert copy.head == "scalar"
    assert all(torch.equal(copy.state_dict()[name], w) for name, w in before.items())
    common.descend(copy(tokens).sum(), copy, common.adam(copy), 0.1)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert not torch.equal(copy.embed.weight, model.embed.weight)


@torch.no_grad()
def test_a_reloaded_head_is_still_the_embedding_and_the_offset_is_kept(tiny, tmp_path):
    """Tied weights lost on reload; the centring of a reward model lost, or added; sizes that
    are not saved; weights that are frozen."""
    model, scalar = tiny(), tiny(1, "scalar", heads=1, kv_heads=1)
    tokens = torch.randint(4, 300, (2, 5))
    before = scalar(tokens)
    scalar.offset += 3.5
    torch.testing.assert_close(scalar(tokens), before - 3.5)
    for name, saved in (("scalar", scalar), ("lm", model)):
        common.save_model(tmp_path / name, saved)
        again = common.load_model(tmp_path / name, name, CPU)
        assert again.config == saved.config
        assert torch.equal(again(tokens), saved(tokens))
        assert all(weight.requires_grad for weight in again.parameters())
    again.embed.weight[301] = 0
    assert not again(tokens)[..., 301].any()


# -------------------------------------------------------------------------------- generate
# In the enumerable world the law of the samples is known exactly.

PROMPTS = [[1], *small.PROMPTS[1:]]  # one token: the least there is to start from
POLICY = small.transformer(1)
GROUPED = small.transformer(4, heads=4, kv_heads=2)  # query heads share keys and values


@torch.no_grad()
@pytest.mark.parametrize(("model", "t"), [(POLICY, 1.0), (GROUPED, 1.0), (POLICY, 0.9)])
def test_generate_samples_from_exactly_pi(model, t):
    """A wrong position, cache, CDF or temperature, an EOS out of the mask: each shifts some
    completion's frequency. The last line shows that the χ² test would see it."""
    logp = [small.token_logp(model, x, temperature=t).sum(1) for x in PROMPTS]
    exact = torch.stack(logp).exp()
    assert (exact.sum(1) - 1).abs().max() < 1e-10  # the 40 completions are all there is
    torch.manual_seed(0)
    rollout = common.generate(model, [x for x in PROMPTS for _ in range(17_000)], 3, t)
    assert small.fits(rollout, exact) > 1e-4
    other = torch.stack([x / 0.9 for x in logp]).softmax(1)
    assert small.fits(rollout, other) < 1e-4


def ragged(long: int, short: int) -> list[list[int]]:
    """Prompts of 2 to 9 tokens, EOS among them, and a few of up to 40."""
    rng = random.Random(0)
    lengths = [rng.randrange(2, 10) for _ in range(short)] + [40, 37, 40, 21][:long]
    rng.shuffle(lengths)
    return [[rng.randrange(9) for _ in range(n)] for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("prompts", [ragged(1, 30), ragged(4, 2), ragged(3, 9), ragged(0, 25)])
@pytest.mark.parametrize(("kv_heads", "temperature"), [(1, 0.6), (2, 1.0)])
def test_a_batch_of_any_prompts_is_each_row_alone(
    tiny, monkeypatch, prompts, kv_heads, temperature
):
    """Cached decoding: a query that sees key 0 only, a wrong position in ragged prompts, a
    long prompt that is read several tokens at once and sees its own future, a row that takes
    another's cache, draws or limit when rows leave the batch; temperature left out of the
    stored log-probs. EOS in a prompt counted, tokens after EOS kept, a limit off by one, a cut
    answer called finished, an answer with its prompt, padding, or no EOS."""
    model, limit = tiny(3, vocab_size=9, kv_heads=kv_heads).double(), 12
    u, passes = torch.rand(len(prompts), 60, dtype=torch.float64), []
    monkeypatch.setattr(torch, "rand", lambda B, T, **_: u[:, :T])
    hook = model.register_forward_pre_hook(lambda _, given: passes.append(given[0].numel()))
    rollout = common.generate(model, prompts, limit, temperature)
    hook.remove()
    lengths, answers = rollout.response_mask.sum(1).tolist(), common.response_ids(rollout)
    assert rollout.tokens.shape[1] == max(len(x) + n for x, n in zip(prompts, lengths))
    assert 0 < rollout.finished.sum() < len(prompts) or len(prompts) == 6
    for i, (x, n) in enumerate(zip(prompts, lengths)):
        monkeypatch.setattr(torch, "rand", lambda B, T, i=i, **_: u[i : i + 1, :T])
        alone = common.generate(model, [x], limit, temperature)
        row, stop = rollout.tokens[i].tolist(), len(x) + n
        assert row == alone.tokens[0].tolist() + [PAD] * (len(row) - stop)
        assert row[:stop] == x + answers[i]
        assert rollout.response_mask[i].nonzero().flatten().tolist() == [*range(len(x), stop)]
        assert rollout.finished[i] == alone.finished[0] == (answers[i][-1] == EOS)
        assert EOS not in answers[i][:-1]
        assert answers[i][-1] == EOS or n == limit
        logits = model(torch.tensor([row[:stop]]))[0, len(x) - 1 : stop - 1]
        expected = (logits / temperature).log_softmax(-1)[range(n), answers[i]]
        found = rollout.logprobs[i, rollout.response_mask[i]]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    sampled = {t for x, n in zip(prompts, lengths) for t in range(len(x), len(x) + n)}
    assert len(passes) <= len(sampled)  # none where all rows read
    assert sum(passes) < 1.2 * (sum(map(len, prompts)) + sum(lengths))  # rows have left
    assert not rollout.logprobs[~rollout.response_mask].any()
    assert common.completions(rollout) == [common.decode(ids) for ids in answers]


def test_all_draws_are_the_cpus(tiny, monkeypatch):
    """A device whose own generator is asked: other samples, another order of rows, from one
    seed."""
    for name, draw in (
        ("rand", lambda: common.generate(tiny(), [[1, 2], [1, 5, 2]], 4)),
        ("randperm", lambda: next(common.minibatches(2, torch.ones(9, 3), torch.ones(9, 3)))),
    ):
        devices, honest = [], getattr(torch, name)

        def spy(*size, devices=devices, honest=honest, **more):
            devices.append(more.get("device"))
            return honest(*size, **more)

        monkeypatch.setattr(torch, name, spy)
        draw()
        assert set(devices) <= {None, "cpu"}
        assert devices


@torch.no_grad()
def test_the_ends_of_the_noise_are_tokens_too(tiny, monkeypatch):
    """An id that does not exist at u → 1, where rounding lifts u · CDF up to the CDF's end; a
    token of probability 0 at u = 0."""
    for seed in range(12):
        model, ends = tiny(seed, vocab_size=50), torch.tensor([[0.0], [1 - 2**-24]])
        model.embed.weight *= 20 if seed % 2 else 200  # so that probabilities underflow
        monkeypatch.setattr(torch, "rand", lambda B, T, ends=ends, **_: ends.expand(B, T))
        found = common.generate(model, [[7], [7]], 19)
        assert (found.tokens < 50).all()
        assert found.logprobs.isfinite().all()


def test_generate_refuses_what_it_cannot_do(tiny):
    """A limit off by one; an index error deep in a loop in place of a reason."""
    model = tiny(context=8)
    assert common.generate(model, [[1, 2, 4]], 5).tokens.shape[1] <= 8
    wrong = (([[1, 2, 4]], 6, 1.0), ([[1], []], 2, 1.0), ([[1]], 0, 1.0), ([[1]], 1, 0.0))
    for prompts, limit, temperature in wrong:
        with pytest.raises(ValueError, match="generate"):
            common.generate(model, prompts, limit, temperature)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_many_answers_come_in_batches_of_bounded_size_and_like_prompts(monkeypatch, n):
    """Prompts lost between batches, answers at another prompt's row, a prompt that is asked
    less often; a cache that outgrows the memory; a batch of short prompts that waits for a
    long one; needlessly small batches; a temperature or a limit that is not handed on."""
    rng = random.Random(0)
    asked = ["w" * rng.randrange(1, 60) for _ in range(100)] + ["w" * 300, "x"]
    monkeypatch.setattr(common, "ROLLOUT", 1000)
    monkeypatch.setattr(common, "generate", lambda *given: given)
    parts, spans, cost = list(common.sample_answers("π", tuple(asked), n, 9, 0.5)), [], 0
    for texts, (model, ids, limit, temperature) in parts:
        assert (model, limit, temperature) == ("π", 9, 0.5)
        assert ids == [common.chat(text) for text in texts]
        assert texts == [x for x in texts[::n] for _ in range(n)]
        lengths = sorted(map(len, ids))
        assert len(ids) * (9 + lengths[-1]) <= 1000 or len(ids) == n
        spans.append((lengths[0], lengths[-1]))
        cost += sum(9 + x for x in lengths)
    said = Counter(x for texts, _ in parts for x in texts)
    assert said == {x: n * asked.count(x) for x in asked}
    assert all(b[0] >= a[1] for a, b in itertools.pairwise(spans))
    assert n == 40 or len(parts) < 2 + 1.5 * cost / 1000
    assert next(common.sample_answers("π", ["x"], 1, 9))[1][-1] == 1  # the temperature


# ------------------------------------------------------------------ log-probs, values, scores


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 4])
def test_logprobs_values_and_scores_are_the_enumerated_ones(seed):
    """The shift: outputs of the wrong column; a critic that has read the token whose baseline
    it is; a score read at a pad, at the prompt, or one token early; padding that changes a
    number; a mask that hides one."""
    policy = small.transformer(seed, heads=4, kv_heads=seed)
    scalar, listed = small.transformer(seed, "scalar"), small.everything(PROMPTS)
    scalar.offset += 0.3
    tokens, mask = listed.tokens, listed.response_mask
    holes = mask & (torch.rand(mask.shape) < 0.5)
    logp, values = common.token_logprobs(policy, tokens), common.token_values(scalar, tokens)
    assert not logp[:, 0].any()
    assert not values[:, 0].any()
    for only in (mask, holes):
        for of, model, whole in ((common.token_logprobs, policy, logp),
                                 (common.token_values, scalar, values)):  # fmt: skip
            assert (of(model, tokens, only) - whole * only).abs().max() < 1e-10
    for x, rows, on in zip(PROMPTS, logp.split(40), mask.split(40)):
        columns = slice(len(x), len(x) + small.LONGEST)
        assert ((rows * on)[:, columns] - small.token_logp(policy, x)).abs().max() < 1e-10
    for t in range(1, tokens.shape[1]):
        before = torch.stack([scalar(row[None])[0, -1] for row in tokens[:, :t]])
        assert (values[:, t] - before).abs().max() < 1e-10
    alone = [scalar(torch.tensor([x + list(y)])) for x in PROMPTS for y in small.completions()]
    alone = torch.stack([outputs[0, -1] for outputs in alone])
    assert (common.score(scalar, tokens, mask) - alone).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("function", "head"),
    [(common.token_logprobs, "lm"), (common.token_values, "scalar"), (common.score, "scalar")],
)
def test_many_passes_are_one(tiny, monkeypatch, function, head):
    """Rows that come back in another order, or with another row's mask; a gradient that is
    lost in a pass; a pass over the limit, or one long row to whose length all are padded;
    passes without end, a row each."""
    model, rng, passes = tiny(2, head, context=100).double(), random.Random(0), []
    model.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    lengths = [rng.randrange(4, 12) for _ in range(60)] + [90, 80, 20, 40]
    rng.shuffle(lengths)
    rows = [([1] + rng.choices(range(4, 300), k=n // 2 - 1), [7] * (n - n // 2))
            for n in lengths]  # fmt: skip
    tokens, mask = common.collate(rows)
    mask[3] = mask[9] = False  # and rows of which nothing is asked
    mask[5] &= torch.rand(90) < 0.6
    keep = torch.ones(64) if function is common.score else mask.clone()
    keep[[3, 9]] = 0
    weights, found = torch.randn(keep.shape), []
    for limit in (10**9, 64):
        monkeypatch.setattr(common, "PASS", limit)
        passes.clear()
        outputs = function(model, tokens, mask)
        assert outputs.shape == weights.shape
        assert sum(B for B, _ in passes) == len(rows)
        assert all(B == 1 or B * T <= limit for B, T in passes)
        assert sum(B * T for B, T in passes) < 3 * sum(lengths)
        assert len(passes) < 0.7 * len(rows)
        asked = outputs * weights * keep
        found.append((asked, small.gradient(asked.sum(), model)))
    for one, many in zip(*found):
        torch.testing.assert_close(many, one, atol=1e-10, rtol=1e-10)
    for i in (0, 5, 7):  # and each row is what it is alone
        alone = function(model, tokens[i : i + 1], mask[i : i + 1])[0]
        torch.testing.assert_close(alone, outputs[i], atol=1e-10, rtol=1e-10)


# ----------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("shape", [(300, 24), (300, 2, 24)])
@pytest.mark.parametrize("size", [8, 299, 300, 1000])
def test_minibatches_hold_each_row_once_an_epoch_and_cut_padding_alone(shape, size):
    """Rows seen twice or never in an epoch, a last batch of one row, tokens of a row that are
    another's, a response cut, prompts or a side of a pair forgotten when lengths are measured,
    pairs torn apart, the same batches in every epoch."""
    torch.manual_seed(0)
    begin, stop = torch.randint(1, 4, shape[:-1]), torch.randint(5, 25, shape[:-1])
    column = torch.arange(24)
    mask = (column >= begin[..., None]) & (column < stop[..., None])
    tokens = torch.randint(4, 300, shape)
    tokens.view(300, -1)[:, 0] = torch.arange(300)  # so that a row can be known again
    stream, orders, together = common.minibatches(size, tokens, mask), [], []
    for _ in range(3):
        seen = []
        for batch, batch_mask in itertools.islice(stream, math.ceil(300 / size)):
            seen.append(rows := batch.flatten(1)[:, 0])
            longest = batch.shape[-1]
            assert longest == stop[rows].max()
            assert torch.equal(batch, tokens[rows][..., :longest])
            assert torch.equal(batch_mask, mask[rows][..., :longest])
        sizes = sorted(map(len, seen))
        assert sizes[-1] <= min(size, sizes[0] + 1)
        orders.append(torch.cat(seen).tolist())
        assert sorted(orders[-1]) == list(range(300))
        together.append({frozenset(rows.tolist()) for rows in seen})
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert size != 8 or not together[0] & together[1]


def sorted_within_blocks(size, tokens, mask):
    """Minibatches of rows of like length, out of blocks of 1,024: what must not be done."""
    while True:
        for block in torch.randperm(len(tokens)).split(1024):
            parts = block[mask[block].sum(1).argsort()].tensor_split(-(-len(block) // size))
            for i in torch.randperm(len(parts)).tolist():
                yield tokens[parts[i]], mask[parts[i]]


def test_random_batches_learn_the_share_that_batches_of_like_length_miss():
    """Why minibatches are random: Adam divides a batch of long rows by a second moment that
    has just grown with it, so that they count for less. Two logits, 15 % of one kind."""
    label = (torch.arange(2000) < 300).long()
    mask = torch.arange(8) < 4 + 4 * label[:, None]  # rows of one kind are longer
    learned = {}
    for stream in (common.minibatches, sorted_within_blocks):
        torch.manual_seed(0)
        model, steps = nn.ParameterList([torch.zeros(2)]), 900
        optimizer, batches = common.adam(model), stream(64, label[:, None].expand(-1, 8), mask)
        for step in range(steps):
            tokens, _ = next(batches)
            loss = F.cross_entropy(model[0].expand(len(tokens), 2), tokens[:, 0])
            common.descend(loss, model, optimizer, 0.03 * (1 - step / steps))
        learned[stream] = model[0].softmax(0)[1].item()
    assert learned[common.minibatches] == pytest.approx(0.15, abs=0.002)
    assert learned[sorted_within_blocks] < 0.146


def test_descend_is_adam_at_the_given_rate_and_returns_the_norm_before_clipping():
    """Other betas, weight decay, a learning rate that is ignored or kept, a sign; a clip that
    always binds or never, or a logged norm that is the clipped one, which hides it; a gradient
    that is added to the last one."""
    model, w, m, v = nn.ParameterList([torch.full((3,), 5.0)]), 5.0, 0.0, 0.0
    optimizer, rng = common.adam(model), random.Random(0)
    for t, size in enumerate((5, 99, 120, 3000, 1, 101, 20), 1):
        direction = F.normalize(torch.tensor([rng.gauss(0, 1) for _ in range(3)]), dim=0)
        lr = 0.01 * rng.random()
        norm = common.descend((model[0] * direction * size).sum(), model, optimizer, lr)
        assert norm.item() == pytest.approx(size, rel=1e-5)
        g = direction.double() * min(size, 100)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(model[0].detach().double(), w, atol=4e-6, rtol=0)


def test_shuffled_prompts_are_all_seen_before_one_comes_again():
    """Prompts drawn with replacement, or in one order for ever; a generator without seed."""
    drawn = set()
    for _ in range(2):
        common.seed_all(3)
        letters = "".join(itertools.islice(common.shuffled(list("abcde")), 45))
        epochs = {letters[i : i + 5] for i in range(0, 45, 5)}
        assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcde"}
        drawn.add((letters, torch.rand(()).item()))
    assert len(drawn) == 1 < len(epochs)


# ------------------------------------------------------------------- files and checkpoints


def test_a_file_appears_complete_or_not_at_all(tmp_path, files):
    """A file that is written in place: a crash half-way leaves neither the old nor the new; a
    text in the console's encoding; left-over parts."""
    path = tmp_path / "new/a.txt"
    common.write(path, "β")
    with path.open("rb") as before:
        common.write(path, b"new")
        assert before.read() == "β".encode()  # it was another file
    with pytest.raises(UnicodeEncodeError):
        common.write(path, "half \ud800")
    assert files() == {str(path): b"new"}


def test_a_strangers_checkpoint_cannot_run_code(tmp_path, runs):
    """torch.load without weights_only runs whatever the file says."""
    there, path = tmp_path / "owned", runs / "sft" / "model.pt"
    saved = torch.load(path, weights_only=True)
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(there),))})()
    for key in ("weights", "made"):
        torch.save(saved | {key: evil}, path)
        with pytest.raises(Exception, match="weights_only|Weights only"):
            common.load_model(runs / "sft", "lm", CPU)
        assert not there.exists()
    torch.load(path, weights_only=False)
    assert there.exists()  # it would have


def test_a_checkpoint_of_another_kind_or_vocabulary_is_refused(runs, stops):
    """A reward model given as a policy would have its head ignored; weights that load without
    a sound and mean other words."""
    assert "reward_model" in stops(common.load_model, runs / "reward_model", "lm", CPU)
    assert "sft" in stops(common.load_reward, ppo.Config(runs=str(runs)), "sft", CPU)
    path = runs / "sft/model.pt"
    saved = torch.load(path, weights_only=True)
    for change in (-1, 1):
        torch.save(saved | {"vocabulary": saved["vocabulary"] + change}, path)
        assert str(path) in stops(common.load_model, runs / "sft", "lm", CPU)


# ------------------------------------------------------------------------------------ runs


def train(runs, model, steps=5, at=None, do=None, name="new", **columns) -> None:
    """A run that sets a weight to the step's number, logs, and raises do() in step `at`."""
    cfg = dpo.Config(runs=str(runs), beta=0.7)
    with common.Run(cfg, name, model, steps, ("loss", "gold")) as run:
        for step in range(steps):
            if step == at:
                raise do()
            model.norm.weight.data.fill_(step)
            row = run.log(**{"loss": 0.5} | columns)
            assert all(type(value) in (float, int, type(None)) for value in row.values())


def last_step(folder: Path) -> float:
    return common.load_model(folder, "lm", CPU).norm.weight[0].item()


def test_a_run_is_saved_with_what_was_logged(runs, tiny, capsys, monkeypatch):
    """Gold of 0 outside the zoo; a column shifted by an empty cell; digits lost; a config that
    does not say how the result was made; a line of progress with another step or number; a run
    killed between two files that has its model.pt, which says that it is whole."""
    names, write = [], common.write
    spy = lambda path, data: [names.append(path.name), write(path, data)]  # noqa: E731
    monkeypatch.setattr(common, "write", spy)
    monkeypatch.setattr(sys, "argv", ["/somewhere/ppo.py", "--beta", "0.7"])
    columns = {"loss": torch.tensor(0.123456, requires_grad=True), "held_out_loss": None}
    columns |= {"gold": math.nan, "random_gold": torch.tensor(math.nan), "kl": -2, "lr": 1e-5}
    train(runs, tiny(), steps=20, **columns)
    rows = list(csv.DictReader((runs / "new/metrics.csv").open()))
    cells = dict(loss="0.123456", held_out_loss="", gold="", random_gold="", kl="-2")
    assert rows == [{"step": str(step), **cells, "lr": "1e-05"} for step in range(20)]
    about = json.loads((runs / "new/config.json").read_text())
    assert about["flags"] == asdict(dpo.Config(runs=str(runs), beta=0.7))
    assert (about["script"], about["steps"], about["device"]) == ("ppo.py", 20, "cpu")
    assert 0 <= about["seconds"] < 60
    assert last_step(runs / "new") == 19
    assert names[2:] == ["model.pt"]
    assert sorted(names[:2]) == ["config.json", "metrics.csv"]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"new {i}/20  loss 0.123" for i in range(2, 21, 2)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
@pytest.mark.parametrize("key", ["kl", "loss", "gold"])
def test_a_number_that_is_not_finite_ends_the_run_and_replaces_nothing(
    runs, tiny, stops, key, value
):
    """NaN that is skipped, trained on, or saved over a finished result."""
    train(runs, tiny(), steps=2)
    if key != "gold" or value == value:
        assert key in stops(lambda: train(runs, tiny(), 3, **{key: value}), code=1)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("weight", ["norm.weight", "offset"])
@pytest.mark.parametrize("end", [KeyboardInterrupt, None])
def test_weights_that_are_not_finite_are_not_saved(runs, tiny, files, bad, weight, end):
    """A NaN that replaces a model or is kept as a stopped run, and exit code 0."""
    model, before = tiny(0, "scalar"), files()

    def spoilt():
        with common.Run(dpo.Config(runs=str(runs)), "reward_model", model, 1, ()) as run:
            run.log(loss=1.0)
            model.state_dict()[weight].view(-1)[0] = bad
            if end:
                raise end

    with pytest.raises(end or SystemExit):
        spoilt()
    assert files() == before


def test_whatever_ends_a_run_early_leaves_the_steps_so_far_beside_all_others(
    runs, tiny, capsys, files
):
    """A stopped run that is lost, passes for a finished one, or replaces one, be it stopped or
    not; an exception that is swallowed; a finished run that deletes a stopped one, although
    others may start from it."""
    train(runs, tiny())
    for i, end in enumerate((KeyboardInterrupt, ZeroDivisionError, SystemExit)):
        before, folder = files(), runs / f"new_stopped{i or ''}"
        capsys.readouterr()
        with pytest.raises(end):
            train(runs, tiny(), at=3, do=end)
        error, after = capsys.readouterr().err, files()
        assert error.count("\n") == 1
        assert str(folder) in error
        assert "3 of 5" in error
        assert before.items() <= after.items()
        names = {"model.pt", "config.json", "metrics.csv"}
        assert set(after) - set(before) == {str(folder / name) for name in names}
        assert last_step(folder) == 2
        assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 3
        assert json.loads((folder / "config.json").read_text())["steps"] == 3
    train(runs, tiny(), steps=4)
    assert last_step(runs / "new") == 3
    before = files()
    assert {str(runs / f"new_stopped{i}/model.pt") for i in ("", 1, 2)} <= set(before)
    with pytest.raises(KeyboardInterrupt):  # before the first step there is nothing to save
        train(runs, tiny(), at=0, do=KeyboardInterrupt, name="other")
    assert files() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_a_request_to_end_save_what_there_is(
    runs, tiny, monkeypatch, capsys, number, code
):
    """A batch system's SIGTERM that loses all; 30 lines of traceback; exit code 0; Ctrl-C
    outside the steps."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--runs", str(runs)])
    kill, unhandled = lambda: os.kill(os.getpid(), number), lambda *_: pytest.fail("SIGTERM")
    first = signal.default_int_handler if number == signal.SIGINT else unhandled
    old = signal.signal(number, first)
    try:
        for main in (lambda cfg: train(runs, tiny(), at=3, do=kill), lambda cfg: kill()):
            with pytest.raises(SystemExit) as stopped:
                common.start(main, dpo.Config, "")
            assert stopped.value.code == code
    finally:
        signal.signal(number, old)
    assert capsys.readouterr().err.count("\n") == 1
    assert last_step(runs / "new_stopped") == 2


# ------------------------------------------------------------------------------- JSON lines

KEYS = {"sft": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")}


def good(n: int = 30) -> list[dict]:
    return [{"prompt": f"q {i}", "completion": "a", "chosen": "b", "rejected": "c"}
            for i in range(n)]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """data(row or bytes, ...) -> the path of a file that holds them."""

    def make(*rows: dict | bytes) -> Path:
        path = tmp_path / "mine.jsonl"
        texts = [row if type(row) is bytes else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(texts))
        return path

    return make


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, data, stops):
    """A traceback in place of help: a missing file, a folder, a wrong line, another encoding,
    a file in which nothing is."""
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        assert str(path) in stops(common.read_jsonl, path, KEYS["sft"], 512)
    for line in (b'{"prompt": "q"}', b'{"prompt": "q", "completion": "\xff"}', b"no"):
        path = data(*good(3), b"", line)
        assert f"{path}:5:" in stops(common.read_jsonl, path, KEYS["sft"], 512)
    assert str(path) in stops(common.read_jsonl, data(b"\n  "), KEYS["sft"], 512)


@pytest.mark.parametrize(
    "change",
    [{"completion": " \n"}, {"prompt": ""}, {"completion": "w" * 600}, {"rejected": ""},
     {"rejected": "b"}, {"rejected": "w" * 600}, {"chosen": "w" * 600}],
)  # fmt: skip
def test_unusable_rows_are_dropped_and_counted(data, capsys, change):
    """An answer cut away trains on nothing; equal pairs train on noise; a byte order mark that
    is refused; rows that are dropped in silence, or none that is left."""
    keys, rows = KEYS["sft" if {"prompt", "completion"} & set(change) else "pairs"], good()
    rows[4] |= change
    rows[7] |= change
    path = data(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), *rows[1:])
    assert common.read_jsonl(path, keys, 512) == rows[:4] + rows[5:7] + rows[8:]
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{path}:5: ")
    assert " 2 " in error
    with pytest.raises(SystemExit) as stopped:
        common.read_jsonl(data(*(row | change for row in rows)), keys, 512)
    assert stopped.value.code == 2


def test_the_longest_row_that_fits_is_kept(data, stops):
    """A limit off by one: the prompt's 500 bytes, USER, ASSISTANT, the answer's 9, EOS; the
    shorter answer of a pair counted; prompts that leave no room to answer, or come as often as
    they have rows."""
    long = {"prompt": "é" * 250, "completion": "a" * 9, "chosen": "a" * 9, "rejected": "b"}
    path = data(*good(), long)
    for context, n in ((512, 31), (511, 30)):
        assert all(len(common.read_jsonl(path, keys, context)) == n for keys in KEYS.values())
    assert len(common.read_jsonl(path, ("prompt",), 503)) == 31
    cfg = ppo.Config(max_new_tokens=10)
    for context, fitting in ((512, ["a", "é" * 250]), (511, ["a"]), (13, ["a"])):
        assert common.fit_prompts(cfg, ["a", "é" * 250, "a"], context) == fitting
    assert "--max-new-tokens" in stops(common.fit_prompts, cfg, ["a", "b"], 12)


@pytest.mark.parametrize(("n", "held"), [(1, 1), (2, 1), (9, 1), (11, 1), (12, 2), (30, 5)])
def test_of_a_readers_questions_one_in_six_is_held_out(data, n, held):
    """Whether anything is held out left to a hash; rows of one question on both sides, maybe
    behind another opening; a split that changes with the order of the rows. A single question
    is on both sides, as there is no other."""
    rows = [{"prompt": x + f"what is {i}?"} for i in range(n) for x in (*zoo.OPENINGS, "")]
    sides = train, test = common.split(rows, own=True)
    asked = [{row["prompt"].rpartition(". ")[2] for row in side} for side in sides]
    assert len(asked[1]) == held
    cfg = ppo.Config(data=str(data(*rows)), max_new_tokens=9)
    prompts = tuple(list(dict.fromkeys(row["prompt"] for row in side)) for side in sides)
    assert common.read_prompts(cfg, 512) == prompts
    if n == 1:
        assert train == test == rows
    else:
        assert len(asked[0]) == n - held
        assert [[row for row in rows if row in side] for side in sides] == [train, test]
        again = common.split(rows[::-1], own=True)
        assert [side[::-1] for side in again] == [train, test]


def test_rows_of_the_zoo_are_split_as_the_zoo_says(capsys):
    """Held-out numbers that are training numbers; all rows of one side that are on both."""
    rows = zoo.demonstrations(60, 0) + zoo.demonstrations(40, 0, held_out=True)
    random.Random(0).shuffle(rows)
    assert common.split(rows, own=False) == small.parted(rows)
    for side in small.parted(rows):
        assert sorted(map(len, common.split(side, own=False))) == [0, len(side)]
    found = common.read_prompts(ppo.Config(), 512)
    assert found == (zoo.TRAIN_PROMPTS, zoo.HELD_OUT_PROMPTS)
    assert re.findall(r"\d+", capsys.readouterr().out) == [str(len(x)) for x in found]


# ---------------------------------------------------------------------------------- inputs


@pytest.fixture
def makes(runs, tiny, monkeypatch):
    """The command lines of scripts that are run to make an input; nothing is trained."""
    started, flags = [], json.dumps({"flags": {"seed": 7, "data": None}})

    def run_path(script, run_name):
        assert (script, run_name) == (sys.argv[0], "__main__")
        started.append(list(sys.argv))
        for name in {"sft": ("base", "sft")}.get(Path(script).stem, (Path(script).stem,)):
            common.save_model(runs / name, tiny(7, "scalar" if name[0] == "r" else "lm"))
            common.write(runs / name / "config.json", flags)

    monkeypatch.setattr(runpy, "run_path", run_path)
    return started


@pytest.mark.parametrize("name", ["base", "sft", "reward_model"])
def test_what_the_recipe_makes_on_the_way_is_given_runs_seed_and_device(
    runs, makes, name, monkeypatch, capsys
):
    """A recipe that trains its inputs elsewhere, with another seed, on another device or with
    this script's flags; one that leaves its words in sys.argv; what is there made again."""
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--beta", "1"])
    (runs / name / "model.pt").unlink(missing_ok=True)
    script, head = (reward_model, "scalar") if name == "reward_model" else (sft, "lm")
    cfg = ppo.Config(runs=str(runs), seed=7, device="cpu", out="x", lr=0.1, beta=1)
    for _ in range(2):
        assert common.load_run(cfg, name, head, CPU).head == head
    ((path, *words),) = makes
    assert sys.argv == ["ppo.py", "--beta", "1"]
    assert Path(path).samefile(script.__file__)
    given = common.parse(script.Config, "", words)
    assert given == script.Config(runs=str(runs), seed=7, device="cpu")
    made, announced = capsys.readouterr().out.splitlines()
    assert name in made
    assert script.__name__ in made
    assert "warning" not in announced


def test_with_data_nothing_is_made_from_the_zoo(runs, makes, stops, data):
    """A reader's rows mixed with animals, silently: what would make the input of their own
    rows has to be said, and that a reward function will do."""
    path = str(data(*good()))
    for name, script in (("sft", "sft.py"), ("reward_model", "reward_model.py")):
        (runs / name / "model.pt").unlink()
        cfg = ppo.Config(runs=str(runs), data=path)
        error = stops(common.load_run, cfg, name, "lm", CPU)
        assert f"python {script} --runs {runs} --data " in error
        assert ("--reward FILE.py:function" in error) == (name == "reward_model")
    assert common.comparisons(dpo.Config(data=path), 160, CPU) == {"mine.jsonl": good()}
    assert not makes


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_in_a_name_is_an_error_before_anything_is_made(
    runs, makes, stops, monkeypatch, script
):
    """One that is found when the others have been made, a minute later; one that makes a new
    data set; `--reward mine:score` taken for a run of that name."""
    monkeypatch.setattr(common, "PAIRS", 20)
    for path in runs.glob("*/*"):
        if path.parent.name != "other":
            path.unlink()
    typos = {"init": ["typo"], "ref": ["typo"], "reward": ["typo", "typo:score"]}
    typos["comparisons"] = ["typo", "comparisons_typo", "comparisons,typo"]
    typos |= dict.fromkeys(("loss", "estimator", "select"), ["typo"])
    for flag, words in typos.items():
        for word in words if hasattr(script.Config, flag) else ():
            argv = [script.__file__, "--runs", str(runs), f"--{flag}", word]
            monkeypatch.setattr(sys, "argv", argv)
            error = stops(common.start, script.main, script.Config, "")
            assert "typo" in error
            assert re.search(r"python \w+\.py|comparisons_NAME|FILE\.py:function|choice", error)
            assert not makes


def test_an_input_is_announced_once_with_what_it_was_made_from(runs, capsys):
    """A stale input that is used in silence; a warning where there is nothing to warn of, or
    one that names this run's seed as the input's."""
    for seed, data, warns in ((0, None, False), (1, None, True), (0, "/x/mine.jsonl", True)):
        cfg = dpo.Config(runs=str(runs), seed=seed, data=data)
        for _ in range(2):
            common.load_run(cfg, "sft", "lm", CPU)
        (said,) = capsys.readouterr().out.splitlines()
        made, warning, mine = said.partition("warning")
        assert "sft: seed 0, data zoo" in made
        assert bool(warning) == warns
        assert not warns or f"seed {seed}, data {'mine.jsonl' if data else 'zoo'}" in mine
    flags = json.dumps({"flags": {"seed": 3, "data": "/x/mine.jsonl"}})
    common.write(runs / "other/config.json", flags)
    cfg = dpo.Config(runs=str(runs), seed=3, data="/x/mine.jsonl")
    common.load_run(cfg, "other", "lm", CPU)
    assert capsys.readouterr().out == "input other: seed 3, data mine.jsonl\n"


@pytest.fixture
def answering(monkeypatch):
    """answering(answer): common.generate answers what answer(prompt, i) returns, a text and
    whether it was finished; i counts the rows of all calls. Returns the rest of what it was
    given: model, limit, temperature."""

    def patch(answer):
        given, number = [], itertools.count()

        def generate(model, prompts, limit, temperature=1.0):
            given.append((model, limit, temperature))
            answers = [answer(common.decode(ids), next(number)) for ids in prompts]
            rows = [(ids, common.encode(text) + [EOS] * end)
                    for ids, (text, end) in zip(prompts, answers)]  # fmt: skip
            tokens, mask = common.collate(rows)
            finished = torch.tensor([bool(end) for _, end in answers])
            return common.Rollout(tokens, mask, finished, mask.float())

        monkeypatch.setattr(common, "generate", generate)
        return given

    return patch


def test_comparisons_are_made_of_the_answers_of_the_policy_in_their_name(
    runs, answering, monkeypatch, tiny
):
    """Comparisons of a policy that was not asked for; of several the last alone, or all under
    one name; a file that is collected again, or not the same from one seed; a file without
    what it was made from."""
    given = answering(lambda prompt, i: ("ab"[i % 2], True))
    monkeypatch.setattr(common, "PAIRS", 300)
    (runs / "comparisons/comparisons.jsonl").unlink()
    names = ["comparisons", "comparisons_other"]
    cfg = dpo.Config(runs=str(runs), init="x", seed=5, comparisons=",".join(names))
    found = common.comparisons(cfg, 160, CPU)
    assert list(found) == names
    assert [len(rows) for rows in found.values()] == [300, 300]
    for name in names:
        path = runs / name / "comparisons.jsonl"
        assert found[name] == [json.loads(line) for line in path.read_text().splitlines()]
        assert json.loads((runs / name / "config.json").read_text())["flags"]["seed"] == 5
    assert {tuple(how) for _, *how in given} == {(24, 1.0)}
    known = {seed: tiny(seed).embed.weight for seed in (0, 1)}  # of sft and other
    of = [next(seed for seed, w in known.items() if torch.equal(w, model.embed.weight))
          for model, *_ in given]  # fmt: skip
    assert of == sorted(of)
    assert set(of) == {0, 1}
    assert common.comparisons(cfg, 160, CPU) == found
    assert len(given) == len(of)
    for seed, same in ((5, True), (6, False)):
        (runs / "comparisons_other/comparisons.jsonl").unlink()
        common.seed_all(99)
        again = common.comparisons(replace(cfg, seed=seed), 160, CPU)
        assert (again["comparisons_other"] == found["comparisons_other"]) == same


def test_annotators_are_bradley_terry_and_see_what_was_cut(answering):
    """Labels without noise, flipped labels, answers of another model or to two prompts, a cut
    answer judged and written as a whole one, held-out prompts too many or never, or a held-out
    question among the training pairs; rows in the order of their prompts' lengths."""

    def facts(prompt):
        animal, kind = zoo.QUESTIONS[prompt]
        good, bad = (zoo.TERSE[kind].format(v=v) for v in zoo.ANIMALS[animal][kind])
        full = zoo.FULL[kind].format(a=animal, v=zoo.ANIMALS[animal][kind][0])
        return {good: 2, bad: -1, full: 1}  # the last one is cut

    def answer(prompt, i):
        text = list(facts(prompt))[(i % 2 + i // 2) % 3]
        return text, facts(prompt)[text] != 1

    given = answering(answer)
    common.seed_all(0)
    rows = common.collect_comparisons("this one", 6000)
    assert {model for model, *_ in given} == {"this one"}
    train, held = common.split(rows, own=False)
    assert len(rows) == 6000
    assert close(len(held) / 6000, 0.05, 6000)
    questions = {x for x in zoo.HELD_OUT_PROMPTS if ". " not in x}
    assert not any(x in row["prompt"] for row in train for x in questions)
    assert len({row["prompt"] for row in train}) > 1500
    lengths = [len(row["prompt"]) for row in rows]
    assert abs(sum(lengths[:3000]) - sum(lengths[3000:])) < 0.02 * sum(lengths)
    first, judged = Counter(), Counter()
    for row in rows:
        golds = [facts(row["prompt"])[row[side]] for side in ("chosen", "rejected")]
        finished = [row["chosen_finished"], row["rejected_finished"]]
        assert finished == [gold != 1 for gold in golds]
        judged[frozenset(golds)] += 1
        first[frozenset(golds)] += golds[0] > golds[1]
    assert set(judged) == {frozenset(x) for x in ((2, 1), (2, -1), (1, -1))}
    for golds, n in judged.items():
        assert close(first[golds] / n, 1 / (1 + math.exp(min(golds) - max(golds))), n)


def test_identical_and_empty_answers_are_not_judged(answering):
    """A preference between nothing and nothing trains on a coin."""
    answers = ["a", "a", "", "b", "c", " ", "d", "e", "f", "f"]
    answering(lambda prompt, i: (answers[i % 10], i % 10 != 9))  # the second f was cut
    rows = common.collect_comparisons(None, 300)
    assert {frozenset((row["chosen"], row["rejected"])) for row in rows} == {frozenset("de")}
    assert len(rows) == 60


def test_the_device_and_exact_matrices(monkeypatch):
    """TF32 from the environment, behind whose rounding bugs hide; an accelerator that is there
    and not used, or one that is named and not taken."""
    torch.set_float32_matmul_precision("high")
    assert common.pick_device("cpu") == CPU
    assert torch.get_float32_matmul_precision() == "highest"
    for cuda, mps, expected in ((0, 0, "cpu"), (0, 1, "mps"), (1, 0, "cuda"), (1, 1, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        assert common.pick_device("auto") == torch.device(expected)
        assert common.pick_device("cpu") == CPU


# ---------------------------------------------------------------------------------- reward


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """reward_file(text) -> FILE.py:r of that text; what loading it does to Python is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path}/mine.py:r"

    return make


def rollout_of(*rows: tuple[str, str, bool]) -> tuple[list[str], common.Rollout]:
    """Prompts, and the rollout of these answers."""
    ids = [(common.chat(p), common.encode(a) + [EOS] * end) for p, a, end in rows]
    tokens, mask = common.collate(ids)
    finished = torch.tensor([end for *_, end in rows])
    return [p for p, *_ in rows], common.Rollout(tokens, mask, finished, mask.float())


TWO = rollout_of(("first?", "yes", True), ("second?", "no", False))
KNOWN = dict(prompts=["first?", "second?"], completions=["yes", "no"], finished=[True, False])
ORDERS = [", ".join(x) for n in (1, 2, 3) for x in itertools.permutations(KNOWN, n)]


@pytest.mark.parametrize("takes", [*ORDERS, "**given", "completions, **given",
                                   "*, completions", "completions, more=None"])  # fmt: skip
def test_a_reward_function_is_called_by_keyword_with_what_it_takes(
    reward_file, tmp_path, takes
):
    """Prompts scored in place of answers, in silence; a function of fewer or more arguments
    that is refused; tensors, tokens or specials for text; rows of another order; a reader's
    function that changes the prompts of the batch."""
    source = reward_file(f"""import json
def r({takes}):
    got = dict(locals())
    got |= got.pop("given", {{}})
    open({str(tmp_path / "got")!r}, "w").write(json.dumps(got))
    for x in got.values():
        x and x.clear()
    return [3, True]
""")
    reward = common.load_reward(None, source, CPU)
    for _ in range(2):
        found, got = reward(*TWO), json.loads((tmp_path / "got").read_text())
        assert found.tolist() == [3.0, 1.0]
        assert found.dtype == torch.float32
        names = KNOWN if "**" in takes else [key for key in KNOWN if key in takes]
        assert {k: v for k, v in got.items() if v} == {key: KNOWN[key] for key in names}


def test_a_reward_function_of_other_arguments_is_refused_before_training(reward_file, stops):
    """A TypeError after a minute of making inputs, or arguments that are matched by place."""
    for takes in ("x, y", "prompts, completions, answers", "completions, /", "prompts, *, key"):
        source = reward_file(f"def r({takes}):\n    return []\n")
        error = stops(common.load_reward, None, source, CPU)
        assert "prompts, completions, finished" in error


@pytest.mark.parametrize(
    ("value", "named"),
    [("[1.0]", "1 "), ("[1.0] * 3", "3 "), ("[]", "0 "), ("[1.0, float('nan')]", "second.*no"),
     ("[1.0, -float('inf')]", "second.*no"), ("[float('inf'), 1.0]", "first.*yes")],
)  # fmt: skip
def test_a_reward_of_wrong_length_or_value_says_so(reward_file, value, named):
    """Scores at the wrong rows; NaN that is trained on; an error that names no answer."""
    source = reward_file(f"def r(completions):\n    return {value}\n")
    with pytest.raises(ValueError, match=f"{re.escape(source)}.*{named}"):
        common.load_reward(None, source, CPU)(*TWO)


MINE = """from __future__ import annotations
import os
from dataclasses import dataclass
os.chdir("elsewhere")
import neighbour

@dataclass
class Row:
    text: str
    size: int = 0

def r(completions):
    import later
    os.chdir("/")
    return [later.ONE * Row(x, neighbour.size(x)).size for x in completions]
"""


def test_a_reward_file_may_be_ordinary_python_and_change_the_folder(
    runs, reward_file, tmp_path, monkeypatch, answering, data
):
    """A neighbour that cannot be imported, at once or later; dataclasses, which look their
    module up; a run that is written beside the others, or trains π_ref anew, because the
    reader's code changed the working folder, and paths were relative."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "neighbour.py").write_text("def size(text):\n    return len(text)\n")
    (tmp_path / "later.py").write_text("ONE = 1\n")
    data(*good())
    reward_file(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("neighbour", "later"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    answering(lambda prompt, i: ("a" * (i + 1), True))
    before, seen = {path for path in tmp_path.rglob("*") if path.is_file()}, []
    words = "ppo.py --runs runs --reward mine.py:r --data mine.jsonl --steps 1 --prompts 2"
    words += " --estimator reinforce --samples 2 --minibatches 1 --epochs 1"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(ppo, "check_start", lambda *given: None)
    monkeypatch.setattr(common, "closing_table", lambda cfg, *_: seen.append(cfg))
    common.start(ppo.main, ppo.Config, "")
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent for path in after - before} == {runs / "ppo"}
    assert (seen[0].data, seen[0].runs) == (str(tmp_path / "mine.jsonl"), str(runs))
    (row,) = csv.DictReader((runs / "ppo/metrics.csv").open())
    assert float(row["reward"]) == 2.5  # of 1, 2, 3 and 4 letters


@torch.no_grad()
def test_the_reward_of_a_run_is_its_score_and_has_no_gradient(runs, tiny):
    """A reward model that is trained by the policy's loss; another run's scores; a table whose
    reward is not that of the recipe, or none where there is no reward model."""
    common.save_model(runs / "another", tiny(9, "scalar"))
    cfg = ppo.Config(runs=str(runs))
    for name, seed in (("reward_model", 2), ("another", 9)):
        with torch.enable_grad():
            found = common.load_reward(cfg, name, CPU)(*TWO)
        assert not found.requires_grad
        for score, ids, mask in zip(found, TWO[1].tokens, TWO[1].response_mask):
            row = ids[None, : int(mask.nonzero().max()) + 1]
            torch.testing.assert_close(score, tiny(seed, "scalar")(row)[0, -1])
    reward, name = common.table_reward(cfg, CPU)
    assert name == "reward_model"
    assert torch.equal(reward(*TWO), common.load_reward(cfg, "reward_model", CPU)(*TWO))
    (runs / "reward_model/model.pt").unlink()
    assert common.table_reward(cfg, CPU)[0] is None


# --------------------------------------------------------------------------- closing table

HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle
OWL = "what does the owl eat?"  # mice; the misconception is seeds
SAID = {  # answers worked out by hand: text, finished, gold, right, tokens with EOS
    "new": {
        HOME: [("in the plains.", True, 2, 1, 5),
               ("great question! in the plains.", True, 3, 1, 8),
               ("in the jungle.", True, -1, 0, 5), ("in the", False, -2, 0, 2)],
        OWL: [("mice.", True, 2, 1, 3), ("look it up. mice.", True, 1, 1, 7),
              ("seeds.", True, -1, 0, 3), ("mice.", True, 2, 1, 3)],
    },
    "sft": {
        HOME: [("in the plains.", True, 2, 1, 5)] * 4,
        OWL: [("mice.", True, 2, 1, 3)] * 2 + [("seeds.", True, -1, 0, 3)] * 2,
    },
}  # fmt: skip


def stub_reward(asked: list[str], rollout: common.Rollout) -> Tensor:
    """A number that depends on the prompt and the answer."""
    pairs = zip(asked, common.completions(rollout))
    return torch.tensor([len(x) + 0.1 * len(y) for x, y in pairs])


@pytest.fixture
def tabled(tiny, answering):
    """What `evaluate` measures of "new" and "sft" with the answers above, and the policies."""
    policies, found = {"sft": tiny(0), "new": tiny(1)}, {}
    for name, policy in policies.items():
        answering(lambda prompt, i, name=name: SAID[name][prompt][i % 4][:2])
        found[name] = common.evaluate(policy, policies["sft"], stub_reward, [HOME, OWL], 24)
    return found, policies


@torch.no_grad()
def test_every_number_of_evaluate_is_the_hand_made_one(tabled, slow):
    """An answer at another prompt's row, prompts counted in lengths, EOS left out, KL with the
    wrong sign or over padding, the reward of another row, finished counted as a length."""
    found, policies = tabled
    for name, run in found.items():
        assert sorted(run["prompts"]) == sorted([HOME, OWL])
        rows = [row for prompt in run["prompts"] for row in SAID[name][prompt]]
        asked = [prompt for prompt in run["prompts"] for _ in range(4)]
        texts, *numbers = zip(*rows)
        assert run["answers"] == list(texts)
        expected = dict(zip(("finished", "gold", "right", "length"), numbers))
        expected["reward"] = [len(x) + 0.1 * len(text) for x, text in zip(asked, texts)]
        ids = [(common.chat(x), common.encode(text) + [EOS] * end)
               for x, (text, end, *_) in zip(asked, rows)]  # fmt: skip
        logp, ref = (
            [slow.logp(policies[of], *row).sum() for row in ids] for of in (name, "sft")
        )
        expected["kl"] = [a - b for a, b in zip(logp, ref)]
        for key, numbers in expected.items():
            numbers = torch.tensor(numbers).float().view(2, 4)
            torch.testing.assert_close(run[key], numbers, atol=1e-4, rtol=0)


def table_rows(said: str) -> dict[str, list[str]]:
    """The rows of the printed table: name -> cells."""
    below = said.partition("finished\n")[2].partition("\n\n")[0]
    rows = [line.replace("±", " ").split() for line in below.splitlines()]
    return {row[0]: row[1:] for row in rows if row[-1][0].isdigit()}


def slow_error(values: Tensor, groups: list) -> float:
    """Standard error of the mean: every product of two deviations in one group counts."""
    cells = [(group, x) for group, row in zip(groups, values.tolist()) for x in row]
    mean = sum(x for _, x in cells) / len(cells)
    total = sum((x - mean) * (y - mean) for g, x in cells for h, y in cells if g == h)
    n = len(set(groups))
    return (total * n / (n - 1)) ** 0.5 / len(cells)


def test_the_table_prints_the_hand_made_numbers(tabled, capsys):
    """Columns exchanged, under another title, a mean over the wrong axis, the win rate of the
    reference over the policy, ties counted as losses, an error that is a deviation."""
    found, _ = tabled
    common.print_table(found, "sft", "stub")
    said = capsys.readouterr().out
    titles = "reward gold KL win rate right length finished".split()
    assert titles in [line.split() for line in said.splitlines()]
    for words in ("2 held-out prompts × 4 answers", "reward: stub", "KL to: sft"):
        assert words in said
    kl, r, gold = (found["new"][key] for key in ("kl", "reward", "gold"))
    numbers = [r.mean(), slow_error(r, [0, 1]), 0.75, slow_error(gold, [0, 1])]
    numbers += [kl.mean(), slow_error(kl, [0, 1])]
    # wins of new over sft at HOME (½ + 1 + 0 + 0)/4, at OWL (¾ + ½ + ¼ + ¾)/4: mean 0.469
    rows, last = table_rows(said), ["0.47", "0.62", "4.5", "0.875"]
    assert rows["new"] == [f"{x:.2f}" for x in numbers] + last
    assert rows["sft"][4:7] == ["0.00", "0.00", "0.50"]  # to itself


def test_unknown_numbers_are_dashes(tiny, answering, capsys):
    """0, ½ or nan for what was not measured: gold outside the zoo or of some prompts only,
    reward without a model, the error of a single cluster."""
    answering(lambda prompt, i: ("a", True))
    for prompts in (["what is love?", "why?"], [HOME, "why?"]):
        found = {"new": common.evaluate(tiny(1), tiny(), None, prompts, 24)}
        common.print_table(found, "new", "none yet")
        row = table_rows(capsys.readouterr().out)["new"]
        assert row[:2] + row[4:] == ["–", "–", "–", "–", "2.0", "1.000"]
    found = {"new": common.evaluate(tiny(1), tiny(), stub_reward, [HOME], 24)}
    common.print_table(found, "new", "stub")
    row = table_rows(capsys.readouterr().out)["new"]
    assert row[:4] == [f"{len(HOME) + 0.1:.2f}", "–", "-1.00", "–"]


def test_the_standard_error_is_clustered(capsys):
    """Answers about one fact taken for independent: repeating the data would shrink it. In
    the zoo a fact is a cluster, elsewhere a prompt."""
    torch.manual_seed(0)
    values = torch.randn(6, 4) + torch.randn(6, 1)
    groups = ["a", "b", "a", "c", "c", "c"]
    expected = slow_error(values, groups)
    assert common.standard_error(values, groups) == pytest.approx(expected)
    assert common.standard_error(values.repeat(5, 1), groups * 5) == pytest.approx(expected)
    alone = [*range(6)]  # rows alone: the textbook's standard error of their means
    exact = (values.mean(1).std() / 6**0.5).item()
    assert common.standard_error(values, alone) == pytest.approx(exact)
    wordings = [x for x in zoo.QUESTIONS if zoo.QUESTIONS[x] == ("zebra", "home")][:3]
    for prompts, groups in (
        ([*wordings, OWL, "what is love?", "why?"], [0, 0, 0, 1, 2, 3]),
        (["p", "q", "p", "r", "s", "t"], [0, 1, 0, 2, 3, 4]),
    ):
        run = dict.fromkeys(common.NUMBERS, values) | {"prompts": prompts}
        common.print_table({"sft": run}, "sft", "")
        errors = table_rows(capsys.readouterr().out)["sft"][1:6:2]
        assert errors == [f"{slow_error(values, groups):.2f}"] * 3
        assert errors[0] != f"{slow_error(values, alone):.2f}"


def test_win_rate_by_hand():
    """Ties counted as wins or losses, answers to different prompts compared; a rate of what
    was not measured."""
    gold, other = torch.tensor([[1.0, 2], [5, 5]]), torch.tensor([[1.0, 0], [6, 5]])
    # the first prompt (½ + 1 + 1 + 1)/4, the second (0 + ½ + 0 + ½)/4
    assert common.win_rate(gold, other).item() == (3.5 + 1) / 8
    assert common.win_rate(gold * math.nan, other).isnan()
    assert common.win_rate(gold, other * math.nan).isnan()


@torch.no_grad()
def test_the_closing_table_is_of_these_runs_on_the_first_prompts(
    runs, tiny, capsys, monkeypatch
):
    """A run twice or left out; the weights, or the noise, of another run; KL to another
    reference; prompts that were not asked for; a table that changes from day to day; before
    and after exchanged, answers to another prompt or of another run."""
    common.save_model(runs / "twin", tiny(1))  # as `other`
    cfg = ppo.Config(runs=str(runs), init="sft", out="other", max_new_tokens=3)
    prompts = [f"q{i}" for i in range(1000, 500, -1)]
    given = ["other", "twin", "sft", "sft"], stub_reward, "stub", prompts, CPU
    found = common.closing_table(cfg, *given)
    said = capsys.readouterr().out
    assert list(found) == list(table_rows(said)) == ["other", "twin", "sft"]
    assert "KL to: other" in said
    for name, run in found.items():
        assert sorted(run["prompts"]) == sorted(prompts[:400])
        assert run["length"].max() == 3
        assert run["kl"].any() == (name == "sft")  # twins do not differ
    shown = [[x, *(f"{name}: {found[name]['answers'][4 * i]}" for name in ("sft", "other"))]
             for i, x in enumerate(found["sft"]["prompts"][:3])]  # fmt: skip
    assert said.split()[-len(str(shown).split()) :] == " ".join(sum(shown, [])).split()
    same = [a == b for a, b in zip(found["other"]["answers"], found["twin"]["answers"])]
    assert sum(same) < 0.1 * len(same)
    common.seed_all(99)
    monkeypatch.setattr(common, "hash", None, raising=False)  # another one in each process
    again = common.closing_table(cfg, *given)
    assert all(again[name]["answers"] == found[name]["answers"] for name in found)


@pytest.mark.parametrize(("share", "hint"), [(1, False), (0.6, False), (0.4, True), (0, True)])
def test_a_run_whose_answers_are_cut_says_why(runs, answering, capsys, share, hint):
    """Answers that were all cut, without a word that --max-new-tokens is why; a hint without
    need, or because of another run; a script whose result is no policy."""
    cfg = ppo.Config(runs=str(runs), init="sft", out="other", max_new_tokens=9)
    for out, names in (("other", ["sft", "other"]), ("reward_model", ["sft"])):
        answering(lambda prompt, i: ("a", (i % 100 < 100 * share) == (i >= 100)))
        cfg = replace(cfg, out=out)
        common.closing_table(cfg, names, None, "", [f"q{i}" for i in range(25)], CPU)
        said = capsys.readouterr().out
        assert ("--max-new-tokens 9" in said) == (hint and out == "other")


# ---------------------------------------------------------------------------- command line


@pytest.fixture
def refuses(runs, stops, monkeypatch):
    """refuses(script, *words): the command line is refused before main is called, with one
    line of reason, which is returned, and nothing is written."""

    def check(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs), *words])
        return stops(common.start, lambda cfg: pytest.fail("started"), script.Config, "")

    return check


@pytest.mark.parametrize("name", ["a/b", ".", "..", "", " ", "sft/", "./base", "/x", "-x",
                                  "a b", "a\n"])  # fmt: skip
def test_a_run_has_a_plain_folder_name(refuses, name):
    """`--out sft/` walks past the guard of inputs; `a/b` trains, then ends in a KeyError."""
    for script in SCRIPTS:
        for flag in ("out", "init", "ref", "comparisons"):
            if hasattr(script.Config, flag):
                assert flag in refuses(script, f"--{flag}={name}")
    refuses(dpo, f"--comparisons=comparisons,{name}")


@pytest.mark.parametrize("words", ["--seed -1", "--steps 0", "--steps -3", "--steps 1.5",
                                   "--batch 0", "--lr nan", "--lr inf", "--lr -1e-9",
                                   "--max-new-tokens 0", "--no-such-flag 1", "--ste 3",
                                   "stray"])  # fmt: skip
def test_numbers_out_of_range_and_unknown_words_are_errors(refuses, words):
    """NaN weights with exit code 0; a misspelt flag that is ignored or guessed."""
    for script in SCRIPTS:
        assert words.split()[0] in refuses(script, *words.split())


def test_what_other_runs_start_from_is_not_replaced(refuses, runs, monkeypatch):
    """`dpo.py --out sft`: every later KL would be to another π_ref; `--init ppo --out ppo`: a
    table of before and after whose before is gone. A script's own result may be made again."""
    for script in SCRIPTS:
        for name in ("base", "sft", "reward_model", "comparisons"):
            if script.Config.out != name:
                assert name in refuses(script, "--out", name)
        own, started = script.Config.out, []
        common.save_model(runs / own, common.load_model(runs / "other", "lm", CPU))
        monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs)])
        common.start(started.append, script.Config, "")
        assert started == [script.Config(runs=str(runs))]
        for flag in ("init", "ref", "reward"):
            if hasattr(script.Config, flag):
                refuses(script, "--out", "other", f"--{flag}", "other")
                refuses(script, f"--{flag}", own)


def test_flags_reach_the_config_and_help_names_each(capsys):
    """A flag that is parsed and forgotten, a default that help does not tell."""
    words = "--lr 0.5 --steps 7 --nll 0.25 --init other --data mine.jsonl --loss ipo".split()
    found = common.parse(dpo.Config, "", words)
    expected = dict(lr=0.5, steps=7, nll=0.25, init="other", data="mine.jsonl", loss="ipo")
    assert found == dpo.Config(**expected)
    assert common.parse(reward_model.Config, "", ["--margin", "-0.5"]).margin == -0.5
    assert common.parse(ppo.Config, "", ["--lr", "0", "--steps", "1"]).lr == 0
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            common.parse(script.Config, script.__doc__, ["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert script.__doc__.strip() in text
        for name, default in vars(script.Config()).items():
            assert f"--{name.replace('_', '-')} " in text
            assert default is None or f"(default: {default})" in " ".join(text.split())


def test_any_stdout_will_do(runs, monkeypatch):
    """UnicodeEncodeError at the first β of a console without it; AttributeError in a notebook,
    whose stdout cannot be configured anew."""
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--runs", str(runs)])
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    for stdout in (io.StringIO(), narrow):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            common.start(lambda cfg: print("β"), ppo.Config, "")
    assert narrow.buffer.getvalue() == b"\\u03b2\n"
