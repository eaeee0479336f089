"""Ask a policy a question, and see its answers y with log π(y|x) and r(x, y). r is the reward
that the policy was trained on, else the reward model, if it is there.

    python -m tools.sample ppo "where does the owl live?"
    python -m tools.sample sft "where does the owl live?" -n 16 --best     best-of-n, by r
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import common


def parser(doc: str, *words: tuple[str, str]) -> argparse.ArgumentParser:
    """The command line of a tool: the words it needs, and --runs."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none; a console may lack β
        sys.stdout.reconfigure(errors="backslashreplace")
    style = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=doc, formatter_class=style)
    for name, about in words:
        options.add_argument(name, help=about)
    options.add_argument("--runs", type=Path, default="runs", help="default: runs")
    return options


def find(runs: Path, name: str) -> Path:
    """The folder of a run. Tools never train: if it is not there, a line says what makes it."""
    if not (runs / name / "model.pt").exists():
        script = common.RECIPE.get(name, f"{name}.py")
        known = Path(common.__file__).with_name(script).exists()
        command = script if known else f"SCRIPT.py --out {name}"
        common.fail(f"{runs / name} is not there: python {command} --runs {runs} makes it")
    return runs / name


def flags(folder: Path) -> dict:
    """The flags that a run was made with."""
    path = folder / "config.json"
    return json.loads(path.read_text("utf-8"))["flags"] if path.exists() else {}


def find_reward(runs: Path, name: str, device) -> tuple[common.Reward | None, str]:
    """r(x, y) and its name: what this run was trained on, else the reward model; None if it
    is not there."""
    source = flags(runs / name).get("reward", "reward_model")
    if ".py:" in source:
        return common.load_reward(None, source, device), Path(source).name
    if not (runs / source / "model.pt").exists():
        return None, "none yet"
    return common.model_reward(common.load_model(runs / source, "scalar", device)), source


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    options = parser(__doc__, ("run", "a policy under --runs"), ("question", "the prompt x"))
    options.add_argument("-n", type=int, default=4, help="answers (default: 4)")
    options.add_argument("--best", action="store_true", help="only the one with the highest r")
    options.add_argument("--seed", type=int, default=0)
    cfg = options.parse_args(words)
    device, folder = common.pick_device("auto"), find(cfg.runs, cfg.run)
    policy = common.load_model(folder, "lm", device)
    reward, _ = find_reward(cfg.runs, cfg.run, device)
    if cfg.best and reward is None:
        find(cfg.runs, "reward_model")  # fails: it is not there

    common.seed_all(cfg.seed)
    longest = flags(folder).get("max_new_tokens", 24)
    rollout = common.generate(policy, [common.chat(cfg.question)] * cfg.n, longest)
    logp = rollout.logprobs.sum(1)
    r = reward([cfg.question] * cfg.n, rollout) if reward else logp * float("nan")
    answers = list(zip(r.tolist(), logp.tolist(), common.completions(rollout)))
    for r, logp, text in [max(answers)] if cfg.best else answers:
        scored = f"r {r:+.2f}   " if reward else ""
        print(f"{scored}log π {logp:7.2f}   {text!r}")


if __name__ == "__main__":
    main()
