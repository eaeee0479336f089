"""Plant known bugs, one at a time, and see whether the test that must catch each does.

    python tests/studies/mutations.py [--jobs 2]   ten minutes on two cores; not part of CI

Each bug of bugs.py is an edit in a copy of the project. The test named beside it is run alone
in that copy and must fail with an assertion: an import error or a crash in the code does not
count as a catch. First every test named is run on the project as it is, and passes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bugs import FORMULAS, WIRING, WORLD

ROOT = Path(__file__).resolve().parents[2]
ASSERTION = "assert", "AssertionError", "Failed: DID NOT"


def run(folder: str | Path, *tests: str) -> tuple[bool, str]:
    """(passed, why not) of tests in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", *tests]
    # pytest cuts its summary's lines to the terminal
    env = os.environ | {"COLUMNS": "999", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    why = re.findall(r"^(?:FAILED|ERROR) .*? - (.*)", done.stdout, re.M)
    caught = [line for line in why if line.startswith(ASSERTION)]
    return done.returncode == 0, (caught or why or [done.stdout[-200:]])[0]


def plant(bug: tuple[str, str, str, str, str]) -> tuple[bool, str]:
    """(caught, a row of the table) of one bug."""
    name, file, line, planted, test = bug
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        unneeded = shutil.ignore_patterns(".*", "runs*", "__pycache__", "*.png")
        shutil.copytree(ROOT, copy, ignore=unneeded)
        source = (copy / file).read_text()
        assert source.count(line) == 1, f"{file}: {source.count(line)} × {line}"
        (copy / file).write_text(source.replace(line, planted))
        passed, why = run(copy, test)
    caught = not passed and why.startswith(ASSERTION)
    by = test.removeprefix("tests/test_").replace(".py::test_", ": ")
    return caught, f"| {name} | {by if caught else 'NOT CAUGHT: ' + why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    jobs, bugs = parser.parse_args().jobs, [*FORMULAS, *WIRING, *WORLD]
    passed, why = run(ROOT, *sorted({bug[-1] for bug in bugs}))
    assert passed, f"a test fails without any bug: {why}"
    caught = 0
    print("| bug | caught by |\n|---|---|")
    with ThreadPoolExecutor(jobs) as pool:
        for hit, row in pool.map(plant, bugs):
            caught += hit
            print(row, flush=True)
    print(f"\n{caught} of {len(bugs)} caught")
    sys.exit(caught != len(bugs))


if __name__ == "__main__":
    main()
