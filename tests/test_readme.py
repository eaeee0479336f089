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
    if not (ROOT / file).exists():
        pytest.skip(f"{file} is not there")
    source = (ROOT / file).read_text()
    assert source.count(old) == 1
    assert len((old + new).splitlines()) <= 15
    compile(source.replace(old, new), file, "exec")


def test_every_flag_that_is_named_exists():
    """A flag renamed or dropped in the code alone."""
    commands = re.findall(r"python (\w+\.py)(.*)", README)
    assert len(commands) > 5
    for file, rest in commands:
        if file == "common.py" or not (ROOT / file).exists():
            continue
        for flag in re.findall(r"--([a-z-]+)", rest):
            field = rf"^    {flag.replace('-', '_')}: \w+ = arg\("
            assert re.search(field, (ROOT / file).read_text(), re.M), f"{file} --{flag}"
