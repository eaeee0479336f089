"""Fixtures: tiny models, a folder with every input a script needs, scripts run in-process."""

import csv
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import tiny as world
import torch

import common
from common import ModelConfig, Transformer

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
    rng, sides = random.Random(0), {"chosen": common.WORDS[:60], "rejected": common.WORDS[60:]}

    def words(some):
        return " ".join(rng.choices(some, k=rng.randrange(1, 9)))

    return lambda n: [
        {"prompt": prompt, **{side: words(some) for side, some in sides.items()}}
        for prompt in rng.sample(list(common.QUESTIONS), n)
    ]


@pytest.fixture
def runs(tmp_path, tiny, pairs):
    """runs/ with sft, another policy, a reward model and 64 comparisons."""
    folder = tmp_path / "runs"
    models = {"sft": tiny(0), "other": tiny(1), "reward_model": tiny(2, "scalar")}
    for name, model in models.items():
        common.save_model(folder / name, model, {"flags": {}})
        common.write(folder / name / "config.json", '{"seconds": 0, "flags": {}}')
    lines = "".join(json.dumps(row) + "\n" for row in pairs(64))
    common.write(folder / "comparisons" / "comparisons.jsonl", lines)
    return folder


@pytest.fixture
def call(runs, monkeypatch):
    """call(script, "--steps 2"): its command line, in this process, on the CPU. The closing
    table asks 4 prompts only. Returns the rows of the new metrics.csv."""
    evaluate = common.evaluate

    def short(policy, reference, reward, prompts, limit):
        return evaluate(policy, reference, reward, prompts[:4], limit)

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
def refused(call, files, capsys):
    """refused(script, flags): exit code 2, one line on stderr, which is returned; nothing
    written, nothing changed."""

    def check(script, flags):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(script, flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.count("\n") == 1
        assert files() == before
        return error

    return check


@pytest.fixture
def diverges(call, files, monkeypatch, capsys):
    """diverges(script, flags, loss, n): the n-th value of that function of the script is NaN.
    That is no loss to step on, skip, or save: exit code 1, and every file as it was."""

    def check(script, flags, loss, n):
        honest, calls, before = getattr(script, loss), [], files()

        def planted(*args):
            calls.append(1)
            return honest(*args) * (math.nan if len(calls) >= n else 1)

        monkeypatch.setattr(script, loss, planted)
        with pytest.raises(SystemExit) as stopped:
            call(script, flags)
        assert stopped.value.code == 1
        assert files() == before
        return capsys.readouterr().err

    return check


@pytest.fixture
def repeats(call, runs):
    """repeats(script, flags): the same command twice gives the same metrics.csv, byte for
    byte. Returns its rows; the run is called new."""

    def check(script, flags):
        rows, first = (
            call(script, f"{flags} --out new"),
            (runs / "new/metrics.csv").read_bytes(),
        )
        call(script, f"{flags} --out new")
        assert (runs / "new/metrics.csv").read_bytes() == first
        return rows

    return check


@pytest.fixture
def moved(monkeypatch):
    """moved() -> for every model that common.load_model has given out, in order: was it
    trained since? The reference and the reward model must never be."""
    models, load = [], common.load_model

    def spy(*args):
        model = load(*args)
        models.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    monkeypatch.setattr(common, "load_model", spy)
    return lambda: [
        any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
        for model, before in models
    ]


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
