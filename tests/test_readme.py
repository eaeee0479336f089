"""README.md: what it shows must be what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def diffs() -> list[tuple[str, str, str]]:
    """(file, the lines as they are, the lines after the change) of the README's exercises."""
    found = []
    for file, block in re.findall(r"```diff\n# (\w+\.py)\n(.*?)```", README, re.S):
        lines = block.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in signs) for signs in (" -", " +"))
        found.append((file, old, new))
    return found


def test_there_are_six_exercises():
    assert len(diffs()) == 6


@pytest.mark.parametrize(("file", "old", "new"), diffs())
def test_the_exercises_apply_and_are_python(file, old, new):
    """A script that has moved on while the README has not."""
    source = (ROOT / file).read_text()
    assert source.count(old) == 1
    assert len((old + new).splitlines()) <= 15
    compile(source.replace(old, new), file, "exec")


def test_every_flag_that_is_named_exists():
    """A flag renamed or dropped in the code alone."""
    scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
    commands = re.findall(
        r"python (?:ppo|dpo|sft|reward_model|rejection_sampling)\.py.*", README
    )
    flags = {flag for line in commands for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags
    for flag in flags:
        assert re.search(rf"^    {flag.replace('-', '_')}: \w+ = arg\(", scripts, re.M), flag
