"""Fixtures: tiny models, a folder with every input a script needs, scripts run in-process."""

import csv
import itertools
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import pytest
import tiny as world
import torch

import common
from common import ASSISTANT, EOS, PAD, USER, ModelConfig, Transformer
from data import zoo

torch.set_num_threads(1)  # the matrices here are tiny: a second thread would only wait

TINY = {"channels": 16, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 24, "context": 160}


@pytest.fixture
def tiny():
    """tiny(seed, head, **ModelConfig fields): random weights, large enough to matter."""

    def make(seed=0, head="lm", **fields):
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**TINY | fields), head)
        with torch.no_grad():
            for weight in model.blocks.parameters():
                weight *= 2
        return model

    return make


@pytest.fixture
def pairs():
    """pairs(n): comparisons of ragged answers; chosen words come before rejected in WORDS."""
    rng, sides = random.Random(0), {"chosen": zoo.WORDS[:60], "rejected": zoo.WORDS[60:]}

    def words(some):
        return " ".join(rng.choices(some, k=rng.randrange(1, 9)))

    return lambda n: [
        {"prompt": prompt, **{side: words(some) for side, some in sides.items()}}
        for prompt in rng.sample(list(zoo.QUESTIONS), n)
    ]


@pytest.fixture
def runs(tmp_path, tiny, pairs):
    """runs/ with sft, another policy, a reward model and 64 comparisons."""
    folder = tmp_path / "runs"
    models = {"sft": tiny(0), "other": tiny(1), "reward_model": tiny(2, "scalar")}
    for name, model in models.items():
        common.save_model(folder / name, model)
        common.write(folder / name / "config.json", '{"flags": {"seed": 0, "data": null}}')
    lines = "".join(json.dumps(row) + "\n" for row in pairs(64))
    common.write(folder / "comparisons" / "comparisons.jsonl", lines)
    return folder


@pytest.fixture
def call(runs, monkeypatch):
    """call(script, "--steps 2"): its command line, in this process, on the CPU. The closing
    table asks 4 prompts only. Returns the rows of the new metrics.csv."""
    evaluate = common.evaluate

    def short(policy, reference, reward, prompts, *given, **more):
        return evaluate(policy, reference, reward, prompts[:4], *given, **more)

    def run(script, flags=""):
        argv = [script.__file__, "--runs", str(runs), "--device", "cpu", *flags.split()]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(common, "evaluate", short)
        common.start(script.main, script.Config, script.__doc__)
        out = common.parse(script.Config, script.__doc__).out
        text = (runs / out / "metrics.csv").read_text()
        return list(csv.DictReader(text.splitlines()))

    return run


@pytest.fixture
def files(tmp_path):
    """files() -> every file under the test's folder and its bytes."""
    return lambda: {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.fixture
def stops(files, capsys):
    """stops(f, *args, code=2): that exit code, one line, which is returned, no file changed."""

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


@pytest.fixture
def diverges(call, stops, monkeypatch):
    """diverges(script, flags, loss, n): the n-th value of that function of the script is NaN.
    That is no loss to step on, skip, or save: exit code 1, and every file as it was."""

    def check(script, flags, loss, n):
        honest, count = getattr(script, loss), itertools.count(1)
        planted = lambda *args: honest(*args) * (math.nan if next(count) >= n else 1)  # noqa: E731
        monkeypatch.setattr(script, loss, planted)
        return stops(call, script, flags, code=1)

    return check


@pytest.fixture
def repeats(call, runs):
    """repeats(script, flags): the same command twice gives the same metrics.csv, byte for
    byte."""

    def check(script, flags):
        call(script, f"{flags} --out new")
        first = (runs / "new/metrics.csv").read_bytes()
        call(script, f"{flags} --out new")
        assert (runs / "new/metrics.csv").read_bytes() == first

    return check


@pytest.fixture
def double():
    """Scripts in float64, so that sums in another order agree to 1e-10."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def steps(monkeypatch):
    """What reaches common.descend, each with the minibatch drawn before it; nothing moves."""
    reached, drawn, honest = [], [], common.minibatches

    def minibatches(size, *tensors):
        for batch in honest(size, *tensors):
            drawn.append(batch)
            yield batch

    def descend(loss, model, optimizer, lr):
        gradient, (tokens, mask) = world.gradient(loss, model), drawn[-1]
        found = dict(loss=loss.item(), gradient=gradient, tokens=tokens, mask=mask, lr=lr)
        reached.append(SimpleNamespace(**found))
        return gradient.norm()

    monkeypatch.setattr(common, "minibatches", minibatches)
    monkeypatch.setattr(common, "descend", descend)
    return reached


@pytest.fixture
def closing(monkeypatch):
    """The closing table is not made; what it was to be made of is here."""
    calls = []
    monkeypatch.setattr(common, "closing_table", lambda *given: calls.append(given))
    return calls


@pytest.fixture
def mine(tmp_path):
    """A reader's own rows for every --data, in another alphabet: 30 of 15 prompts, of
    which some answers were cut. Returns the file, the rows to train on, those held out."""
    rows = [
        {"prompt": f"где {'же ' * (i % 3)}{i % 15}?", "completion": "a" * (1 + i * i % 16),
         "chosen": "там" + "!" * (i % 4), "rejected": "нет" * (1 + i % 2)}
        for i in range(30)
    ]  # fmt: skip
    for i, key in enumerate(("completion", "chosen", "rejected") * 3):
        rows[3 * i][f"{key}_finished"] = (False, True, None)[i // 3]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = zoo.hold_out(row["prompt"] for row in rows)
    sides = ([row for row in rows if (row["prompt"] in held) == side] for side in (False, True))
    return tmp_path / "mine.jsonl", *sides


@pytest.fixture
def save(runs):
    """save(name, rows): comparisons in runs/NAME."""

    def write(name, rows):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        common.write(runs / name / "comparisons.jsonl", lines)

    return write


@pytest.fixture
def alike(call, runs, pairs, drawn, slow, save, closing):
    """alike(script, flags): --comparisons a,b reads both files, trains on no held-out pair of
    either, and --pairs takes from both alike."""

    def check(script, flags):
        rows = [row | {"chosen": "green."} for row in pairs(100)]
        save("second", rows)
        first, second = (
            {
                str((slow.ids(x, "chosen"), slow.ids(x, "rejected")))
                for x in world.parted(some)[0]
            }
            for some in (world.judged(runs), rows)
        )
        flags = f"{flags} --comparisons comparisons,second --out new --batch 999"
        call(script, f"{flags} --pairs 60")
        call(script, flags)  # all of them
        some, every = ({str(pair) for pair in batch} for batch in drawn)
        assert every == first | second
        assert (len(drawn[0]), len(some)) == (60, 60)
        assert some <= every
        assert 60 * 0.45 < len(some & second) < 60 * 0.75  # 100 of 164 pairs

    return check


@pytest.fixture
def remade(call, runs, closing, monkeypatch):
    """remade(script, flags): the same bytes whether or not comparisons had to be collected,
    which is done once, and whatever was drawn before; other bytes with another seed."""

    def check(script, flags):
        file, new = runs / "comparisons/comparisons.jsonl", runs / "new/metrics.csv"
        monkeypatch.setattr(common, "PAIRS", 60)
        flags, found = f"{flags} --pairs 20 --out new", []
        for there in (False, False, True):
            if not there:
                file.unlink()
            call(script, flags)
            found.append((new.read_bytes(), file.read_bytes()))
        assert found[0] == found[1] == found[2]
        call(script, f"{flags} --seed 1")
        assert new.read_bytes() != found[0][0]

    return check


@pytest.fixture
def ordered(monkeypatch):
    """Comparisons of the enumerable world: all ordered pairs of completions of at most two
    tokens, as rows that common.encode_pairs takes."""
    made = world.completions(2)
    ids = lambda row, side: (world.chat(row["prompt"]), list(made[row[side]]))  # noqa: E731
    monkeypatch.setattr(common, "answer_ids", ids)
    pairs = list(itertools.permutations(range(len(made)), 2))
    return [dict(prompt=x, chosen=c, rejected=r) for x in world.NAMES for c, r in pairs]


@pytest.fixture
def minimised():
    """minimised(model, loss): L-BFGS to the end, with no optimizer to blame."""

    def descend(model, loss, gradient=1e-6, steps=400):
        until = dict(max_iter=steps, tolerance_grad=gradient, tolerance_change=0)
        optimizer = torch.optim.LBFGS(
            model.parameters(), line_search_fn="strong_wolfe", **until
        )

        def closure():
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        optimizer.step(closure)

    return descend


@pytest.fixture
def drawn(monkeypatch):
    """Every minibatch of common.minibatches as it was drawn: rows (prompt ids, answer ids),
    unpadded, or pairs of such rows."""
    batches, honest = [], common.minibatches

    def parts(ids, on):
        first, last = on.index(True), len(on) - on[::-1].index(True)
        assert all(on[first:last])
        assert set(ids[last:]) <= {PAD}
        return ids[:first], ids[first:last]

    def minibatches(size, *tensors):
        for tokens, mask in honest(size, *tensors):
            flat = (part.flatten(0, -2).tolist() for part in (tokens, mask))
            rows = [parts(*row) for row in zip(*flat)]
            batches.append(list(zip(rows[::2], rows[1::2])) if tokens.dim() == 3 else rows)
            yield tokens, mask

    monkeypatch.setattr(common, "minibatches", minibatches)
    return batches


@pytest.fixture
def slow():
    """A run replayed the slow way: of the project only the Transformer's forward, on one row
    without padding; of torch only Adam."""

    def ids(row, key="completion"):
        """(prompt ids, answer ids) of a row of text."""
        end = [] if row.get(f"{key}_finished") is False else [EOS]
        prompt = [USER, *common.encode(row["prompt"]), ASSISTANT]
        return prompt, common.encode(row[key]) + end

    def logp(model, prompt, answer):
        """log π(y_t | x, y_<t) of every token of an answer."""
        logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        return torch.stack([logp[len(prompt) + t - 1, i] for t, i in enumerate(answer)])

    def token_mean(model, rows):
        """L of sft.py and rejection_sampling.py on rows of ids."""
        return -torch.cat([logp(model, *row) for row in rows]).mean()

    def score(model, prompt, answer):
        """r(x, y)."""
        return model(torch.tensor([prompt + answer]))[0, -1]

    def descent(model, lr, steps):
        """take(loss) is Adam's next step; returns its columns of metrics.csv."""
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
        rates = [lr * (steps - step) / steps for step in range(steps)]

        def take(loss):
            optimizer.zero_grad()
            loss.backward()
            weights = list(model.parameters())
            norm = torch.cat([weight.grad.flatten() for weight in weights]).norm().item()
            for weight in weights:
                weight.grad *= min(1, 100 / norm)
            optimizer.param_groups[0]["lr"] = rate = rates.pop(0)
            optimizer.step()
            return {"loss": loss.item(), "grad_norm": norm, "lr": rate}

        return take

    def same(row, numbers):
        """A row of metrics.csv has these numbers; None is an empty cell. It may have others."""
        known = {key: float(x) for key, x in numbers.items() if x is not None}
        assert not any(row[key] for key in numbers.keys() - known.keys())
        found = {key: float(row[key]) for key in known}
        assert found == pytest.approx(known, rel=6e-6, abs=1e-9)

    def same_weights(folder, model):
        """What was saved there is this model."""
        saved = torch.load(folder / "model.pt", weights_only=True)["weights"]
        torch.testing.assert_close(saved, dict(model.state_dict()), rtol=0, atol=1e-7)

    functions = (ids, logp, token_mean, score, descent, same, same_weights)
    return SimpleNamespace(**{function.__name__: function for function in functions})
