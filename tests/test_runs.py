"""Whole runs as a reader starts them, with default settings, on a seed that nothing was tuned
on. Slow: python -m pytest -m slow"""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from data import zoo

pytestmark = pytest.mark.slow
ROOT, SEED, CPU = Path(common.__file__).parent, "5", torch.device("cpu")


def start(runs: Path, *words: str) -> subprocess.Popen:
    """A script in the folder above runs/, from which a reader may have started it."""
    command = [sys.executable, ROOT / words[0], *words[1:], "--seed", SEED, "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=runs.parent, **pipes)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> tuple[Path, str]:
    """runs/ after `python ppo.py` in an empty folder and the other two tools, and what they
    said."""
    runs, said = tmp_path_factory.mktemp("recipe") / "runs", ""
    for script in ("ppo.py", "dpo.py", "rejection_sampling.py"):
        process = start(runs, script)
        out, error = process.communicate()
        assert process.returncode == 0, error
        said += out
    return runs, said


def test_every_tool_buys_gold_reward_at_its_price(recipe):
    """A default that no longer learns, and a KL that runs away; a recipe that does not say
    what it makes; a table that shows other numbers than those of the saved runs."""
    runs, said = recipe
    made = {"base", "sft", "comparisons", "reward_model", "ppo", "dpo", "rejection_sampling"}
    assert {path.name for path in runs.iterdir()} == made
    assert re.findall(r"^(\w+) is not there: (\w+\.py) makes it", said, re.M) == [
        ("reward_model", "reward_model.py"), ("sft", "sft.py")]  # fmt: skip
    assert "warning" not in said
    judge = common.model_reward(common.load_model(runs / "reward_model", "scalar", CPU))
    reference, found = common.load_model(runs / "sft", "lm", CPU), {}
    for name in ("sft", "ppo", "dpo", "rejection_sampling"):
        policy = common.load_model(runs / name, "lm", CPU)
        run = common.evaluate(policy, reference, judge, zoo.HELD_OUT_PROMPTS, 24, seed=99)
        found[name] = mean = {key: run[key].mean().item() for key in common.NUMBERS}
        cells = [line.split() for line in said.splitlines() if line.split()[:1] == [name]]
        table = [cell for cell in cells if cell.count("±") == 3][-1]
        for key, cell in zip(("reward", "gold", "kl"), (table[1], table[4], table[7])):
            assert abs(mean[key] - float(cell)) < 0.25, (name, key)
    sft = found.pop("sft")
    assert sft["finished"] >= 0.98
    assert sft["kl"] == 0
    for name, gold, kl in (("ppo", 2.4, 3), ("dpo", 2.2, 3.5), ("rejection_sampling", 2, 2)):
        run = found[name]
        assert run["gold"] >= max(gold, sft["gold"] + 0.5), name
        assert 0.2 < run["kl"] <= kl, name
        assert run["reward"] > sft["reward"] + 0.5, name
        assert run["right"] > sft["right"], name
        assert run["finished"] >= 0.98, name
    expected, ceiling = re.search(r"expected ([\d.]+) +ceiling ([\d.]+)", said).groups()
    assert float(ceiling) - 0.03 <= float(expected) <= float(ceiling)


def test_ctrl_c_leaves_the_steps_so_far_and_all_that_was_there(recipe):
    """Steps that are lost, a finished run that is damaged; a run that has other numbers than
    the same command had when its inputs were made on the way; a tool that a
    stopped run breaks."""
    runs, _ = recipe
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    process = start(runs, "ppo.py")
    for line in process.stdout:
        if line.startswith("ppo 12/60"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "ppo_stopped" in error
    assert all(path.read_bytes() == data for path, data in before.items())
    whole, part = ((runs / x / "metrics.csv").read_text() for x in ("ppo", "ppo_stopped"))
    assert 12 <= part.count("\n") - 1 < 60
    assert whole.startswith(part)  # byte for byte
    for words in (["report"], ["sample", "ppo_stopped", "where does the owl live?"]):
        command = [sys.executable, "-m", f"tools.{words[0]}", *words[1:], "--runs", runs]
        subprocess.run(command, cwd=ROOT, check=True)
