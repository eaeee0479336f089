"""common.py: tokens, Transformer, sampling, scores, steps, files, runs, inputs, table, flags.

Each test names the bug it catches, and checks against something independent: a slow
definition, the enumerable world of tiny.py, a number worked out by hand, an invariance.
"""

import io
import itertools
import json
import math
import random
import re
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny as small
import torch
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


def test_any_text_round_trips_and_never_encodes_to_a_special():
    """Text that comes back changed; a prompt that ends its own turn and answers itself; half a
    character that cannot be printed; words of the zoo in four tokens in place of one."""
    rng, pieces = random.Random(0), [*zoo.WORDS, *"  \r\n\x00\x03ζ斑🦓" * 9]
    texts = ["".join(rng.choices(pieces, k=12)) for _ in range(300)]
    for text in ["", "<eos>[USER]</s>", *texts]:
        ids = common.encode(text)
        assert common.decode(ids) == text
        assert set(ids) <= {*range(ModelConfig().vocab_size)} - {EOS, USER, ASSISTANT, PAD}
        assert common.chat(text) == [USER, *ids, ASSISTANT]
    assert common.decode([USER, *common.encode("hi"), ASSISTANT, PAD, EOS]) == "hi"
    assert common.decode(common.encode("β")[:1]) == "\ufffd"
    for text in [*zoo.QUESTIONS, zoo.raw_text(0, 500)]:
        assert len(common.encode(text)) == len(re.findall(r" ?\w+|[.,?!]|\s", text))


def test_only_a_literal_false_means_that_an_answer_was_cut():
    """A cut answer taught to stop there; the flag of the other answer read; an empty cell of a
    reader's table read as "cut", so that no answer ends; rows padded on the left."""
    row = {"prompt": "q", "completion": "a", "chosen": "bb", "rejected": "c"}
    start, bb, c = common.chat("q"), common.encode("bb"), common.encode("c")
    for key in ("completion", "chosen", "rejected"):
        whole = [*common.encode(row[key]), EOS]
        for flag in (None, "false", 0, True, False):
            flagged = common.answer_ids(row | {f"{key}_finished": flag}, key)
            assert flagged == (start, whole if flag is not False else whole[:-1])
    tokens, mask = common.encode_pairs([row | {"rejected_finished": False}, row], CPU)
    assert tokens[0].tolist() == [[*start, *bb, EOS], [*start, *c, PAD, PAD]]
    assert tokens[1].tolist() == [[*start, *bb, EOS], [*start, *c, EOS, PAD]]
    lengths = torch.tensor([[3, 1], [3, 2]])[..., None]
    assert torch.equal(mask, (torch.arange(6) >= 3) & (torch.arange(6) < 3 + lengths))


def slow_forward(model, tokens: list[int]) -> Tensor:
    """The Llama-style Transformer by its formulas, one head and position at a time."""
    c, w = model.config, model.state_dict()
    D, T, group = c.channels // c.heads, len(tokens), c.heads // c.kv_heads
    angle = torch.tensor([c.rope_theta ** (-2 * i / D) for i in range(D // 2)]).double()

    def norm(x, scale):
        return x / (x.square().mean(1, keepdim=True) + c.norm_eps).sqrt() * scale

    def turn(x, t):  # channel i with channel i + D/2, by the angle t θ^(−2i/D)
        turned = torch.complex(*x.chunk(2)) * torch.exp(1j * t * angle)
        return torch.cat((turned.real, turned.imag))

    x = w["embed.weight"][tokens]
    for b in range(c.layers):
        part = {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"blocks.{b}.")}
        heads = norm(x, part["attention_norm.weight"]) @ part["qkv.weight"].T
        heads, mixed = heads.view(T, -1, D), torch.zeros(T, c.heads, D).double()
        for t, h in itertools.product(range(T), range(c.heads)):
            at = c.heads + h // group  # the key head that query head h reads
            q, k = turn(heads[t, h], t), [turn(heads[s, at], s) for s in range(t + 1)]
            p = torch.stack([q @ key / D**0.5 for key in k]).softmax(0)
            mixed[t, h] = p @ heads[: t + 1, at + c.kv_heads]
        x = x + mixed.flatten(1) @ part["out.weight"].T
        gate, up = (norm(x, part["mlp_norm.weight"]) @ part["gate_up.weight"].T).chunk(2, 1)
        x = x + (gate * gate.sigmoid() * up) @ part["down.weight"].T
    return norm(x, w["norm.weight"]) @ w["embed.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_is_the_slow_definition(tiny, kv_heads):
    """A wrong rotation, mask, norm, or key head of a query, grouped or not; θ and ε that are
    the usual ones and not the config's; a leak of the future."""
    sizes = dict(vocab_size=11, channels=32, rope_theta=50.0, norm_eps=0.1)
    model = tiny(heads=4, kv_heads=kv_heads, **sizes).double()
    for weight in model.parameters():
        if weight.dim() == 1:  # the norms' scales are 1 at the start
            weight.mul_(torch.rand_like(weight) + 0.5)
    tokens = torch.randint(11, (2, 9))
    for row, logits in zip(tokens.tolist(), model(tokens)):
        torch.testing.assert_close(logits, slow_forward(model, row), atol=1e-5, rtol=0)


# the same tokens in another order (row 2) and one position later (3), and token 0 (4)
ALIKE = [[1, 5, 2, 7, 7, 3, 3], [1, 5, 2, 7, 8, 9, 3], [1, 2, 5, 7, 7, 3, 3],
         [0, 1, 5, 2, 7, 7, 3], [1, 5, 2, 7, 7, 0, 0], [1, 5, 2, 7, 8, 9, 3]]  # fmt: skip


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_batch_that_begins_alike_is_its_rows_alone(tiny, head):
    """Another beginning's hidden state; gradients lost, or counted too often; outputs of other
    places; prefixes taken for one, or one for several."""
    model = tiny(3, head, heads=2, kv_heads=1).double()
    tokens, keep = torch.tensor(ALIKE), torch.zeros(6, 7, dtype=torch.bool)
    keep[[0, 0, 2, 2, 3, 4, 5], [1, 3, 1, 5, 4, 6, 0]] = True
    alone = torch.cat([model(row[None]) for row in tokens])
    weights = torch.randn_like(alone[keep])
    for outputs in (model(tokens)[keep], model(tokens, keep)):
        torch.testing.assert_close(outputs, alone[keep], atol=1e-12, rtol=0)
        expected = small.gradient((alone[keep] * weights).sum(), model)
        found = small.gradient((outputs * weights).sum(), model)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    tokens = torch.randint(528, (8_000, 30))
    _, place = common.prefix_tree(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert len(place) == len({tuple(x[:t]) for x in tokens.tolist() for t in range(1, 31)})


def test_weights_start_at_their_stated_size():
    """Layers that add to the residual stream and start as large as the others; fan-out for
    fan-in: activations that grow with depth; a head of zeros, through which nothing learns."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(channels=512, layers=3), "scalar")
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            std = weight.shape[1] ** -0.5 * (6**-0.5 if residual else 1)
            error = max(0.005, 4 / (2 * weight.numel()) ** 0.5)
            assert weight.std().item() == pytest.approx(std, rel=error), name


@torch.no_grad()
def test_what_is_saved_is_loaded_and_a_copy_shares_no_storage(tiny, tmp_path, stops):
    """The centring of a reward model lost, or added; sizes that are not saved; a reward model
    taken for a policy, its head ignored. A critic that trains the policy too, or is new."""
    model, scalar = tiny(), tiny(1, "scalar", heads=1, kv_heads=1)
    tokens = torch.arange(9)[None]
    before = scalar(tokens)
    scalar.offset += 3.5
    torch.testing.assert_close(scalar(tokens), before - 3.5)
    for name, saved in (("scalar", scalar), ("lm", model)):
        common.save_model(tmp_path / name, saved)
        again = common.load_model(tmp_path / name, name, CPU)
        assert again.config == saved.config
        assert torch.equal(again(tokens), saved(tokens))
    assert "a reward model" in stops(common.load_model, tmp_path / "scalar", "lm", CPU)
    trunk = common.scalar_copy(model).state_dict()
    assert all(torch.equal(trunk[name], w) for name, w in model.state_dict().items())
    assert all(trunk[name].data_ptr() != w.data_ptr() for name, w in model.state_dict().items())


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
    torch.manual_seed(0)
    rollout = common.generate(model, [x for x in PROMPTS for _ in range(17_000)], 3, t)
    assert small.fits(rollout, exact) > 1e-4
    other = torch.stack([x / 0.9 for x in logp]).softmax(1)
    assert small.fits(rollout, other) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 40, 2, 9, 3, 3, 8, 7, 4, 6] * 3, [40, 37, 2, 40, 21]])
@pytest.mark.parametrize(("kv_heads", "heat"), [(1, 0.6), (2, 1.0)])
def test_a_batch_of_any_prompts_is_each_row_alone(tiny, lengths, kv_heads, heat):
    """Cached decoding: a wrong position in ragged prompts, a long prompt that is read several
    tokens at once and sees its own future, a row that takes another's cache or limit when rows
    leave; temperature left out of the stored log-probs. EOS in a prompt counted, tokens after
    EOS kept, a limit off by one, an answer with its prompt, padding, or no EOS."""
    model = tiny(3, vocab_size=9, kv_heads=kv_heads, context=max(lengths) + 12).double()
    prompts = [torch.randint(9, (n,)).tolist() for n in lengths]
    rollout = common.generate(model, prompts, 12, heat)
    answers = common.response_ids(rollout)
    assert rollout.tokens.shape[1] == max(len(x) + len(y) for x, y in zip(prompts, answers))
    for i, (x, y) in enumerate(zip(prompts, answers)):
        row, stop = rollout.tokens[i].tolist(), len(x) + len(y)
        assert row == x + y + [PAD] * (len(row) - stop)
        assert rollout.response_mask[i].nonzero().flatten().tolist() == [*range(len(x), stop)]
        assert rollout.finished[i] == (y[-1] == EOS)
        assert EOS not in y[:-1]
        assert y[-1] == EOS or len(y) == 12
        logits = model(torch.tensor([x + y]))[0, len(x) - 1 : stop - 1]
        expected = torch.zeros(len(row)).double()
        expected[len(x) : stop] = (logits / heat).log_softmax(-1)[range(len(y)), y]
        torch.testing.assert_close(rollout.logprobs[i], expected, atol=1e-9, rtol=0)
    assert common.completions(rollout) == [common.decode(ids) for ids in answers]


def test_the_ends_of_the_noise_are_tokens_too(tiny, monkeypatch):
    """An id that does not exist at u → 1, where rounding lifts u · CDF up to the CDF's end; a
    token of probability 0 at u = 0."""
    ends = torch.tensor([[0.0], [1 - 2**-24]])
    monkeypatch.setattr(torch, "rand", lambda B, T, **_: ends.expand(B, T))
    for seed in range(12):
        model = tiny(seed, vocab_size=50)
        model.embed.weight.data *= 20 if seed % 2 else 200  # so that probabilities underflow
        found = common.generate(model, [[7], [7]], 19)
        assert (found.tokens < 50).all()
        assert found.logprobs.isfinite().all()


@pytest.mark.parametrize("name", ["token_logprobs", "token_values", "score"])
def test_logprobs_values_and_scores_are_of_each_row_alone(tiny, monkeypatch, name):
    """The shift: a critic that has read the token whose baseline it is; a score read at a pad
    or one token early. Rows in another order, or with another row's mask; a gradient that is
    lost; a pass over the limit."""
    function, score, passes, alone = getattr(common, name), name == "score", [], []
    model = tiny(2, "lm" if name == "token_logprobs" else "scalar", context=100).double()
    lengths = [90, *torch.randint(4, 12, (40,)).tolist(), 80, 20, 40]
    rows = [torch.randint(300, (n,)).tolist() for n in lengths]
    tokens, mask = common.collate([(x[: len(x) // 2], x[len(x) // 2 :]) for x in rows])
    for ids in rows:  # an output has read its own token, and what stands before
        read = model(torch.tensor([ids]))[0]
        if name == "token_logprobs":
            read = read.log_softmax(-1)[range(len(ids)), [*ids[1:], 0]]
        alone.append(read[-1:] if score else torch.cat((torch.zeros(1), read[:-1])))
    alone = torch.cat(alone) if score else nn.utils.rnn.pad_sequence(alone, True)
    if not score:
        mask[5] &= torch.rand(90) < 0.6
    mask[3] = mask[9] = False  # rows of which nothing is asked
    keep = mask.any(1) if score else mask
    weights = torch.randn(keep.shape) * keep
    gradient = small.gradient((alone * weights).sum(), model)
    model.register_forward_pre_hook(lambda _, given: passes.append(given[0].shape))
    for limit in (10**9, 64):
        monkeypatch.setattr(common, "PASS", limit)
        passes.clear()
        found = function(model, tokens, mask)
        assert score or not found[~mask].any()
        torch.testing.assert_close(found * keep, alone * keep, atol=1e-10, rtol=0)
        found = small.gradient((found * weights).sum(), model)
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-10)
        assert all(B == 1 or B * T <= limit for B, T in passes)


@pytest.mark.parametrize("shape", [(300, 24), (300, 2, 24)])
@pytest.mark.parametrize("size", [8, 299, 300, 1000])
def test_minibatches_hold_each_row_once_an_epoch(shape, size):
    """Rows seen twice or never in an epoch, a last batch of one row, tokens of another row, a
    response cut, a side of a pair forgotten when lengths are measured, the same batches in
    every epoch, rows of like length in one batch."""
    torch.manual_seed(0)
    stop, tokens, orders = torch.randint(5, 25, shape[:-1]), torch.randint(4, 300, shape), []
    mask = (torch.arange(24) < stop[..., None]) & (torch.rand(shape).argsort(-1) > 3)
    mask.scatter_(-1, stop[..., None] - 1, True)
    tokens[torch.arange(24) >= stop[..., None]] = PAD
    tokens.view(300, -1)[:, 0] = torch.arange(300)  # so that a row can be known again
    stream = common.minibatches(size, tokens, mask)
    for _ in range(3):
        batches = list(itertools.islice(stream, math.ceil(300 / size)))
        for batch, batch_mask in batches:
            rows, longest = batch.flatten(1)[:, 0], batch.shape[-1]
            assert longest == stop[rows].max()
            assert torch.equal(batch, tokens[rows][..., :longest])
            assert torch.equal(batch_mask, mask[rows][..., :longest])
        sizes = [len(batch) for batch, _ in batches]
        assert max(sizes) <= min(size, min(sizes) + 1)
        assert sum(batch.shape[-1] > 18 for batch, _ in batches) > 0.8 * len(batches)
        orders.append([row for batch, _ in batches for row in batch.flatten(1)[:, 0].tolist()])
        assert sorted(orders[-1]) == list(range(300))
    first, second = ({frozenset(x[i : i + 7]) for i in range(0, 300, 7)} for x in orders[1:])
    assert orders[0] != orders[1]
    assert not first & second


def train(runs, model, steps=5, stop=None, **columns) -> None:
    """A run that sets a weight to the step's number, logs, and raises `stop` in step 3."""
    cfg = dpo.Config(runs=str(runs), beta=0.7)
    with common.Run(cfg, "new", model, steps, ("loss", "gold")) as run:
        for step in range(steps):
            if step == 3 and stop:
                raise stop
            model.norm.weight.data.fill_(step)
            run.log(**{"loss": 0.5} | columns)


def last_step(folder: Path) -> float:
    return common.load_model(folder, "lm", CPU).norm.weight[0].item()


def test_a_run_is_saved_with_what_was_logged(runs, tiny, stops, monkeypatch):
    """Gold of 0 outside the zoo; a column shifted by an empty cell; digits lost; another run's
    config; weights of another step. What is not finite saved over a finished result."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/ppo.py", "--beta", "0.7"])
    columns = {"loss": torch.tensor(0.123456, requires_grad=True), "held_out_loss": None}
    columns |= {"gold": math.nan, "random_gold": torch.tensor(math.nan), "kl": -2, "lr": 1e-5}
    train(runs, tiny(), steps=3, **columns)
    rows = (runs / "new/metrics.csv").read_text().splitlines()
    assert rows[0] == "step,loss,held_out_loss,gold,random_gold,kl,lr"
    assert rows[1:] == [f"{step},0.123456,,,,-2,1e-05" for step in range(3)]
    about = json.loads((runs / "new/config.json").read_text())
    assert about["flags"] == asdict(dpo.Config(runs=str(runs), beta=0.7))
    assert (about["script"], about["steps"]) == ("ppo.py", 3)
    assert last_step(runs / "new") == 2
    for bad in ({"kl": math.nan}, {"loss": torch.tensor(math.inf)}, {"gold": -math.inf}):
        assert [*bad][0] in stops(lambda bad=bad: train(runs, tiny(), **bad), code=1)


def test_what_ends_a_run_early_leaves_its_steps(runs, tiny, capsys, files, monkeypatch):
    """A stopped run that is lost, passes for a finished one, or replaces one, be it stopped or
    not; an exception that is swallowed, exit code 0; NaN kept as a stopped run."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--runs", str(runs)])
    train(runs, tiny())
    for name, stop in (("", KeyboardInterrupt()), ("1", ZeroDivisionError())):
        before, folder = files(), runs / f"new_stopped{name}"
        capsys.readouterr()
        with pytest.raises((SystemExit, ZeroDivisionError)) as stopped:
            common.start(lambda cfg, stop=stop: train(runs, tiny(), stop=stop), dpo.Config, "")
        assert getattr(stopped.value, "code", 130) == 130
        (error,) = capsys.readouterr().err.splitlines()
        assert str(folder) in error
        assert "3 of 5" in error
        assert before.items() <= files().items()
        assert last_step(folder) == 2
        assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 3
        assert json.loads((folder / "config.json").read_text())["steps"] == 3
    before, model = files(), tiny()
    model.embed.weight.data.fill_(math.nan)
    with pytest.raises(KeyboardInterrupt):
        train(runs, model, stop=KeyboardInterrupt())
    assert files() == before


KEYS = {"sft": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")}
GOOD = [dict(prompt=f"q {i}", completion="a", chosen="b", rejected="c") for i in range(30)]


@pytest.fixture
def data(tmp_path):
    """data(row, ...) -> the path of a file that holds them."""
    path = tmp_path / "mine.jsonl"
    return lambda *rows: path.write_text("\n".join(map(json.dumps, rows))) and path


def test_unusable_rows_are_dropped_and_wrong_ones_named(tmp_path, data, capsys, stops):
    """An answer cut away trains on nothing; equal pairs train on noise; rows that are dropped
    in silence, or of which none is left. A traceback for a missing file or a wrong line."""
    long, pairs = "w" * 600, [dict(rejected=""), dict(rejected="b"), dict(chosen="w" * 600)]
    for change in (dict(completion=" \n"), dict(prompt=""), dict(completion=long), *pairs):
        keys = KEYS["pairs" if change in pairs else "sft"]
        path = data(*GOOD[:4], GOOD[4] | change, *GOOD[5:7], GOOD[7] | change, *GOOD[8:])
        assert common.read_jsonl(path, keys, 512) == GOOD[:4] + GOOD[5:7] + GOOD[8:]
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"{path}:5: ")
        assert " 2 " in error
    with pytest.raises(SystemExit):
        common.read_jsonl(data(*(row | change for row in GOOD)), keys, 512)
    for path, line in ((data(*GOOD[:3], {}), ":4:"), (tmp_path / "nothing.jsonl", "")):
        assert f"{path}{line}" in stops(common.read_jsonl, path, KEYS["sft"], 512)


def test_the_longest_row_that_fits_is_kept(data, stops):
    """A limit off by one: the prompt's 500 bytes, USER, ASSISTANT, the answer's 9, EOS; the
    shorter answer of a pair counted; prompts that leave no room to answer, or come as often as
    they have rows."""
    long = {"prompt": "é" * 250, "completion": "a" * 9, "chosen": "a" * 9, "rejected": "b"}
    path = data(*GOOD, long)
    for context, n in ((512, 31), (511, 30)):
        assert all(len(common.read_jsonl(path, keys, context)) == n for keys in KEYS.values())
    assert len(common.read_jsonl(path, ("prompt",), 503)) == 31
    cfg = ppo.Config(max_new_tokens=10)
    for context, fitting in ((512, ["a", "é" * 250]), (511, ["a"]), (13, ["a"])):
        assert common.fit_prompts(cfg, ["a", "é" * 250, "a"], context) == fitting
    assert "--max-new-tokens" in stops(common.fit_prompts, cfg, ["a", "b"], 12)


@pytest.mark.parametrize(("n", "held"), [(1, 1), (2, 1), (11, 1), (12, 2)])
def test_of_a_readers_questions_one_in_six_is_held_out(data, n, held):
    """Whether anything is held out left to a hash; rows of one question on both sides, maybe
    behind another opening, but of a single one."""
    rows = [{"prompt": x + f"what is {i}?"} for i in range(n) for x in (*zoo.OPENINGS, "")]
    sides = train, test = common.split(rows, own=True)
    asked = [{row["prompt"].rpartition(". ")[2] for row in side} for side in sides]
    assert [len(side) for side in asked] == [max(1, n - held), held]
    cfg = ppo.Config(data=str(data(*rows)), max_new_tokens=9)
    prompts = tuple(list(dict.fromkeys(row["prompt"] for row in side)) for side in sides)
    assert common.read_prompts(cfg, 512) == prompts
    assert train == test == rows if n == 1 else not asked[0] & asked[1]


@pytest.mark.parametrize("name", ["base", "sft", "reward_model"])
def test_the_recipe_makes_what_is_missing(runs, tiny, stops, data, name, monkeypatch):
    """Inputs trained elsewhere, with another seed, on another device or with this script's
    flags; sys.argv left changed; what is there made again; rows mixed with animals."""
    script, head = (reward_model, "scalar") if name == "reward_model" else (sft, "lm")
    started = []

    def run_path(path, run_name):
        assert (path, run_name) == (sys.argv[0], "__main__")
        started.append(sys.argv)
        common.save_model(runs / name, tiny(7, head))

    monkeypatch.setattr(runpy, "run_path", run_path)
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--beta", "1"])
    (runs / name / "model.pt").unlink(missing_ok=True)
    cfg = ppo.Config(runs=str(runs), seed=7, device="cpu", out="x", lr=0.1, beta=1)
    error = stops(common.load_run, replace(cfg, data=str(data(*GOOD))), name, head, CPU)
    assert f"python {script.__name__}.py --runs {runs} --data " in error
    assert not started
    for _ in range(2):
        assert common.load_run(cfg, name, head, CPU).head == head
    ((path, *words),) = started
    assert sys.argv == ["ppo.py", "--beta", "1"]
    assert Path(path).samefile(script.__file__)
    made = common.parse(script.Config, "", words)
    assert made == script.Config(runs=str(runs), seed=7, device="cpu")


def test_an_input_of_another_seed_or_data_is_announced_once(runs, capsys):
    """A stale input that is used in silence; a warning where there is nothing to warn of, or
    one that names this run's seed as the input's."""
    for seed, file, warned in ((0, None, False), (3, None, True), (0, "mine.jsonl", True)):
        cfg = dpo.Config(runs=str(runs), seed=seed, data=file)
        for _ in range(2):
            common.load_run(cfg, "other", "lm", CPU)
        (said,) = capsys.readouterr().out.splitlines()
        assert "input other: seed 0, data zoo" in said
        assert ("warning" in said) == warned


def rolled(rows: list[tuple[list[int], str, bool]]) -> common.Rollout:
    """(prompt ids, answer, finished) rows as generate would have returned them."""
    tokens, mask = common.collate([(x, common.encode(y) + [EOS] * end) for x, y, end in rows])
    finished = torch.tensor([bool(end) for *_, end in rows])
    return common.Rollout(tokens, mask, finished, mask.float())


@pytest.fixture
def answering(monkeypatch):
    """common.generate says answer(prompt, row), a text and whether it ended; what it got."""

    def patch(answer):
        given, number = [], itertools.count()

        def generate(model, prompts, limit, temperature=1.0):
            given.append((model, limit, temperature))
            return rolled([(x, *answer(common.decode(x), next(number))) for x in prompts])

        monkeypatch.setattr(common, "generate", generate)
        return given

    return patch


def test_comparisons_are_of_the_policy_in_their_name(runs, answering, monkeypatch, tiny, data):
    """Comparisons of a policy that was not asked for; of several the last alone, or all under
    one name; a file collected again, or not the same from one seed; with --data, the zoo's."""
    given = answering(lambda prompt, i: ("ab"[i % 2], True))
    monkeypatch.setattr(common, "PAIRS", 300)
    (runs / "comparisons/comparisons.jsonl").unlink()
    names = ["comparisons", "comparisons_other"]
    cfg = dpo.Config(runs=str(runs), init="x", seed=5, comparisons=",".join(names))
    own = replace(cfg, data=str(data(*GOOD)))
    assert common.comparisons(own, 160, CPU) == {"mine.jsonl": GOOD}
    found = common.comparisons(cfg, 160, CPU)
    assert found == {name: small.judged(runs, name) for name in names}
    for name, rows in found.items():
        assert len(rows) == 300
        assert json.loads((runs / name / "config.json").read_text())["flags"]["seed"] == 5
    of = [model.embed.weight.sum().item() for model, *_ in given]
    assert list(dict.fromkeys(of)) == [tiny(seed).embed.weight.sum().item() for seed in (0, 1)]
    assert {tuple(how) for _, *how in given} == {(24, 1.0)}
    for seed, same in ((5, True), (6, False)):
        (runs / "comparisons_other/comparisons.jsonl").unlink()
        common.seed_all(99)
        again = common.comparisons(replace(cfg, seed=seed), 160, CPU)
        assert again["comparisons"] == found["comparisons"]  # read, and not collected again
        assert (again["comparisons_other"] == found["comparisons_other"]) == same


def test_annotators_judge_what_differs_and_see_what_was_cut(answering, monkeypatch):
    """Flipped labels, answers of another model or to two prompts, a cut answer judged as a
    whole one, identical or empty answers judged, held-out prompts too many or among the
    training pairs; rows in the order of their prompts' lengths."""

    def pairs(x):  # two that are judged, the better answer first, and two that are not
        good, cut, bad = (f"{x} good", True), (f"{x} good", False), (f"{x} bad", True)
        return (good, bad), (bad, cut), (("a", True), ("a", False)), (("a", True), (" ", True))

    given = answering(lambda x, i: pairs(x)[i // 2 % 4][(i + i // 8) % 2])
    monkeypatch.setattr(zoo, "prefers", lambda x, a, b: (a, b) in pairs(x))
    common.seed_all(0)
    rows = common.collect_comparisons("this one", 9000)
    assert {model for model, *_ in given} == {"this one"}
    assert len(rows) == 4500
    for row in rows:
        chosen, rejected = ((row[x], row[f"{x}_finished"]) for x in ("chosen", "rejected"))
        assert (chosen, rejected) in pairs(row["prompt"])[:2]
    train, held = common.split(rows, own=False)
    assert ([], held) == common.split(held, own=False)
    assert 167 < len(held) < 283  # four standard errors about one in twenty
    assert {row["prompt"] for row in train} < set(zoo.TRAIN_PROMPTS)
    assert len({row["prompt"] for row in train}) > 1400
    lengths = [len(row["prompt"]) for row in rows]
    assert abs(sum(lengths[:2250]) - sum(lengths[2250:])) < 0.02 * sum(lengths)


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """reward_file(text) -> FILE.py:r of that text; what loading it does to Python is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "mine.py"
    return lambda text: path.write_text(text) and f"{path}:r"


KNOWN = dict(prompts=["first?", "second?"], completions=["yes", "no"], finished=[True, False])
TWO = KNOWN["prompts"], rolled([(common.chat(x), y, z) for x, y, z in zip(*KNOWN.values())])


@pytest.mark.parametrize("takes", ["completions", "finished, completions, prompts", "**given"])
def test_a_reward_function_is_called_by_keyword(reward_file, capsys, takes):
    """Prompts scored in place of answers, in silence; a function of fewer or more arguments
    that is refused; specials in a text; rows of another order."""
    source = reward_file(f"""import json
def r({takes}):
    print(json.dumps(locals()))
    return [3, True]
""")
    assert common.load_reward(None, source, CPU)(*TWO).tolist() == [3, 1]
    got = json.loads(capsys.readouterr().out)
    named = {key: KNOWN[key] for key in KNOWN if key in takes}
    assert got == (named or {"given": KNOWN})


def test_what_is_wrong_with_a_reward_function_is_said(reward_file, stops):
    """Scores at the wrong rows; NaN that is trained on; an error that names no answer. Other
    arguments that are matched by place."""
    for value, named in ("[1] * 3", "3 "), ("[1, float('nan')]", "second.*no"):
        source = reward_file(f"def r(completions):\n    return {value}\n")
        with pytest.raises(ValueError, match=f"{re.escape(source)}.*{named}"):
            common.load_reward(None, source, CPU)(*TWO)
    source = reward_file("def r(x, y):\n    return []\n")
    assert "prompts, completions, finished" in stops(common.load_reward, None, source, CPU)


HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle
AGAIN = "hello. where is the zebra at home?"  # the same fact, and the same answers
OWL = "what does the owl eat?"  # mice; the misconception is seeds
# answers worked out by hand: text, finished, gold, right, tokens with EOS
PLAINS, JUNGLE = ("in the plains.", True, 2, 1, 5), ("in the jungle.", True, -1, 0, 5)
BEST, CUT = ("great question! in the plains.", True, 3, 1, 8), ("in the", False, -2, 0, 2)
MICE, SEEDS = ("mice.", True, 2, 1, 3), ("seeds.", True, -1, 0, 3)
RUDE = ("look it up. mice.", True, 1, 1, 7)
ANSWERS = {name: {HOME: home, AGAIN: home, OWL: owl} for name, home, owl in (
    ("sft", [PLAINS] * 4, [SEEDS, SEEDS, MICE, MICE]),
    ("other", [PLAINS, BEST, JUNGLE, CUT], [MICE, RUDE, SEEDS, MICE]))}  # fmt: skip


def stub_reward(asked: list[str], rollout: common.Rollout) -> Tensor:
    pairs = zip(asked, common.completions(rollout))
    return torch.tensor([len(x) + len(y) / 8 for x, y in pairs])


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


@torch.no_grad()
def test_the_closing_table_by_hand(runs, tiny, answering, slow, capsys, monkeypatch):
    """π_ref under every name; an answer or reward at another row, EOS left out of the length,
    KL with the wrong sign or to another run. Columns exchanged, ties counted as losses, an
    error that takes answers about one fact for independent. Before and after exchanged, or of
    another prompt. Runs that share their noise; a table that changes from day to day."""
    policies, seeds = {"sft": tiny(0), "other": tiny(1)}, {"sft": set(), "other": set()}

    def answer(prompt, i):
        is_ref = torch.equal(given[-1][0].embed.weight, policies["sft"].embed.weight)
        name = "sft" if is_ref else "other"
        seeds[name].add(torch.initial_seed())
        return ANSWERS[name][prompt][i % 4][:2]

    given, cfg = answering(answer), ppo.Config(runs=str(runs), init="sft", out="other")
    monkeypatch.setattr(common, "ROLLOUT", 330)  # two prompts in a batch
    how = ["sft", "sft", "other"], stub_reward, "stub", [HOME, OWL, AGAIN], CPU
    common.closing_table(cfg, *how)
    common.seed_all(99)
    capsys.readouterr()
    found, printed = common.closing_table(cfg, *how), capsys.readouterr().out
    assert len(seeds["sft"]) == len(seeds["other"]) == len(seeds["sft"] - seeds["other"]) == 1
    for name, run in found.items():
        assert sorted(run["prompts"]) == sorted([HOME, OWL, AGAIN])
        rows = [(x, *row) for x in run["prompts"] for row in ANSWERS[name][x]]
        asked, texts, *numbers = zip(*rows)
        assert run["answers"] == list(texts)
        expected = dict(zip(("finished", "gold", "right", "length"), numbers))
        expected["reward"] = [len(x) + len(text) / 8 for x, text in zip(asked, texts)]
        ids = [(common.chat(x), common.encode(y) + [EOS] * end) for x, y, end, *_ in rows]
        logp, ref = (torch.stack([slow.logp(policies[of], *row).sum() for row in ids])
                     for of in (name, "sft"))  # fmt: skip
        expected["kl"] = (logp - ref).tolist()
        for key, numbers in expected.items():
            numbers = torch.tensor(numbers).float().view(3, 4)
            torch.testing.assert_close(run[key], numbers, atol=1e-4, rtol=0)
    lines = [" ".join(line.split()) for line in printed.rstrip().splitlines()]
    assert "reward gold KL win rate right length finished" in lines
    assert "3 held-out prompts × 4 answers; reward: stub; KL to: sft" in lines
    facts = [zoo.QUESTIONS[x] for x in found["sft"]["prompts"]]
    columns = [found["other"][key] for key in ("reward", "gold", "kl")]
    cells = [f"{x:.2f}" for v in columns for x in (v.mean(), slow_error(v, facts))]
    # wins over sft at HOME (½ + 1 + 0 + 0)/4, at OWL (¾ + ½ + ¼ + ¾)/4; HOME counts twice
    assert table_rows(printed)["other"] == [*cells, "0.44", "0.58", "4.7", "0.833"]
    assert table_rows(printed)["sft"][4:7] == ["0.00", "0.00", "0.50"]  # to itself
    shown = [[x, *(f"{name}: {ANSWERS[name][x][0][0]}" for name in policies)]
             for x in found["sft"]["prompts"]]  # fmt: skip
    assert lines[-9:] == sum(shown, [])


def test_what_was_not_measured_is_a_dash(runs, answering, capsys):
    """0, ½ or nan for gold outside the zoo or of some prompts only, for reward without a
    model, for the error of a single cluster, which outside the zoo is a prompt; a table of
    more than 400 prompts."""
    answering(lambda x, i: ("a" * (1 + i % 3), True))
    cfg = ppo.Config(runs=str(runs), init="sft", out="other", max_new_tokens=9)

    def table(prompts, reward):
        run = common.closing_table(cfg, ["sft"], reward, "", prompts, CPU)["sft"]
        return run, table_rows(capsys.readouterr().out)["sft"]

    run, cells = table([HOME, *(f"q{i}" for i in range(500))], None)
    assert len(run["prompts"]) == 400
    assert [cells[0], cells[1], cells[4]] == ["–"] * 3  # reward, gold and win rate
    run, cells = table(["q1", "q2", "q2"], stub_reward)
    error = slow_error(run["reward"], run["prompts"])
    assert (cells[1], cells[2], cells[5]) == (f"{error:.2f}", "–", "–")
    run, cells = table([HOME], stub_reward)
    assert cells[1:6:2] == ["–"] * 3  # the errors


@pytest.fixture
def refuses(runs, stops, monkeypatch):
    """refuses(script, *words): one line of reason, returned, and main is not called."""

    def check(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs), *words])
        return stops(common.start, lambda cfg: pytest.fail("started"), script.Config, "")

    return check


@pytest.mark.parametrize("word", ["--seed=-1", "--steps=0", "--batch=0", "--lr=nan",
                                  "--max-new-tokens=0", "--no-such-flag=1", "--ste=3",
                                  "--out=a/b", "--out=sft/", "--init=.."])  # fmt: skip
def test_a_wrong_word_is_refused(refuses, word):
    """NaN weights with exit code 0; a misspelt flag that is ignored or guessed. `--out sft/`
    walks past the guard of inputs; `a/b` trains, then ends in a KeyError."""
    for script in SCRIPTS:
        assert word.partition("=")[0] in refuses(script, word)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_other_runs_start_from_is_not_replaced(refuses, runs, monkeypatch, script):
    """`dpo.py --out sft`: every later KL would be to another π_ref; `--init ppo --out ppo`: a
    table of before and after whose before is gone. A script's own result may be made again."""
    for name in {"base", "sft", "reward_model", "comparisons"} - {script.Config.out}:
        assert name in refuses(script, "--out", name)
    for flag in ("init", "ref", "reward"):
        if hasattr(script.Config, flag):
            refuses(script, "--out", "other", f"--{flag}", "other")
    started, own = [], script.Config.out
    common.save_model(runs / own, common.load_model(runs / "other", "lm", CPU))
    monkeypatch.setattr(sys, "argv", [script.__file__, "--runs", str(runs)])
    common.start(started.append, script.Config, "")
    assert started == [script.Config(runs=str(runs))]


def test_a_start_in_any_folder_and_with_any_stdout(runs, reward_file, tmp_path, monkeypatch):
    """Paths relative to a folder that the reader's reward file leaves: π_ref trained anew,
    elsewhere. AttributeError in a notebook, whose stdout cannot be configured."""
    reward_file("import os\nos.chdir('/')\ndef r(completions):\n    return [1, 2]\n")

    def main(cfg):
        assert common.load_reward(cfg, cfg.reward, CPU)(*TWO).tolist() == [1, 2]
        assert common.load_run(cfg, "other", "lm", CPU).head == "lm"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", "ppo.py --runs runs --reward mine.py:r".split())
    common.start(main, ppo.Config, "")
