"""Many runs of the scripts for several seeds, which the studies beside this file look at.

A table says how each run is made: {name: words}. The words are a script with its flags, after
the name of an exercise if its diff is to be applied first ("dr_grpo ppo.py --estimator grpo");
or "collect POLICY N", about N judged pairs of that policy's answers. A run needs the runs that
its words name. What is there is not made again, so a study that was stopped goes on; after a
change of the scripts delete the folder.
"""

import argparse
import contextlib
import json
import re
import runpy
import sys
import zlib
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from data import zoo  # noqa: E402

PAIRS = "comparisons.jsonl"
CPU = torch.device("cpu")


def needs(table: dict[str, str], name: str) -> list[str]:
    """The runs of the table that this one starts from."""
    words = ["sft", "comparisons", *re.split("[ ,]", table[name])]
    words = words if name not in ("sft", "comparisons") else ["sft"]
    return [word for word in dict.fromkeys(words) if word in table and word != name]


def level(table: dict[str, str], name: str) -> int:
    """Runs of a level need those of lower levels alone."""
    return 1 + max([level(table, x) for x in needs(table, name)], default=0)


def with_needs(table: dict[str, str], names: list[str]) -> dict[str, str]:
    """The part of the table that makes these runs."""
    wanted, todo = set(), list(names)
    while todo:
        wanted.add(name := todo.pop())
        todo += needs(table, name)
    return {name: table[name] for name in table if name in wanted}


def is_done(folder: Path, name: str) -> bool:
    return any((folder / name / file).exists() for file in ("model.pt", PAIRS))


def patched(source: str, diff: str) -> str:
    """The source with the hunks of a unified diff applied."""
    for hunk in re.split(r"(?m)^@@.*\n", diff)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in signs) for signs in (" -", " +"))
        assert source.count(old) == 1, f"{source.count(old)} × {old}"
        source = source.replace(old, new)
    return source


def script(folder: Path, name: str, words: list[str]) -> tuple[str, list[str]]:
    """The script of a run, in a copy if an exercise changes it; and its flags."""
    exercise = words.pop(0) if not words[0].endswith(".py") else None
    source = (ROOT / words[0]).read_text()
    if exercise:
        source = patched(source, (ROOT / "exercises" / f"{exercise}.diff").read_text())
    common.write(folder / "scripts" / name / words[0], source)
    return str(folder / "scripts" / name / words[0]), words[1:]


def work(job: tuple[int, Path, str, str]) -> str:
    """Make one run in this process, but for its closing table, which takes as long. Returns
    what went wrong."""
    torch.set_num_threads(1)
    common.closing_table = lambda *_: None
    seed, folder, name, words = job
    log = folder / "scripts" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            log.open("w") as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            if words.startswith("collect "):
                _, policy, n = words.split()
                model = common.load_model(folder / policy, "lm", CPU)
                common.seed_all(seed + zlib.crc32(name.encode()))  # no two share their draws
                rows = common.collect_comparisons(model, 2 * int(n))[: int(n) * 11 // 10]
                lines = [json.dumps(row) + "\n" for row in rows]
                common.write(folder / name / PAIRS, "".join(lines))
            else:
                file, flags = script(folder, name, words.split())
                how = ["--runs", str(folder), "--out", name, "--seed", str(seed)]
                sys.argv = [file, *flags, *how, "--device", "cpu"]
                runpy.run_path(file, run_name="__main__")
    except (Exception, SystemExit) as error:
        return f"seed {seed}, {name}: {error!r}; see {log}"
    return ""


def make_all(table: dict[str, str], folders: dict[int, Path], jobs: int) -> None:
    """Make what is missing, of all seeds."""
    todo = [(s, f, name) for name in table for s, f in folders.items() if not is_done(f, name)]
    bar = tqdm(total=len(todo), unit="run", smoothing=0)
    with get_context("spawn").Pool(jobs) as workers:
        for k in range(max(level(table, name) for name in table)):
            now = [job for job in todo if level(table, job[2]) == k + 1]
            bar.set_postfix_str(", ".join(dict.fromkeys(name for *_, name in now))[:60])
            for wrong in workers.imap_unordered(work, [(*job, table[job[2]]) for job in now]):
                bar.update()
                if wrong:
                    bar.write(wrong)
        workers.close()  # and not terminated: a script that is, says that it was stopped
        workers.join()
    bar.close()


@cache
def load(folder: Path, name: str, head: str) -> common.Transformer:
    return common.load_model(folder / name, head, CPU)


@cache
def found(folder: Path, policy: str, judge: str, prompts: tuple[str, ...], n: int = 4) -> dict:
    """As in a closing table: n answers to each prompt; KL is to sft."""
    given = load(folder, policy, "lm"), load(folder, "sft", "lm")
    reward = common.model_reward(load(folder, judge, "scalar"))
    seed = zlib.crc32(policy.encode())
    return common.evaluate(*given, reward, list(prompts), 24, n, seed)


def arguments(doc: str, folder: str, seeds: list[int]) -> argparse.Namespace:
    """The command line of a study; its folders, one a seed, are .folders."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--folder", default=folder, help="where the runs go")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--only", nargs="+", help="these runs, and those that they need")
    parser.add_argument("--quick", action="store_true", help="a tenth of all steps and pairs")
    args = parser.parse_args()
    args.out = Path(args.folder + "_quick" * args.quick).resolve()
    args.folders = {seed: args.out / f"seed{seed}" for seed in args.seeds}
    return args


FEW = {"sft.py": "--steps 30", "reward_model.py": "--pairs 2000", "dpo.py": "--steps 60"}
FEW |= {"ppo.py": "--steps 6", "rejection_sampling.py": "--steps 10 --prompts 200"}


def quick(table: dict[str, str]) -> dict[str, str]:
    """The table with a tenth of all steps and pairs: does it work?"""
    few = {}
    for name, words in table.items():
        added = [flags for file, flags in FEW.items() if file in words and name != "sft"]
        few[name] = re.sub(r"(collect \w+ \d+)0\b", r"\1", " ".join([words, *added]))
    return few


HELD_OUT, TRAIN = tuple(zoo.HELD_OUT_PROMPTS), tuple(zoo.TRAIN_PROMPTS)
