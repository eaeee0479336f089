"""Ask a policy a question, and see its answers y with log π(y|x) and, where there is a reward
model, r(x, y).

    python -m tools.sample ppo "where does the owl live?"
    python -m tools.sample sft "where does the owl live?" -n 16 --best     best-of-n, by r
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import common


def parser(doc: str, *words: tuple[str, str]) -> argparse.ArgumentParser:
    """The command line of a tool: the words it needs, and --runs."""
    if hasattr(sys.stdout, "reconfigure"):  # a console may lack β and π
        sys.stdout.reconfigure(errors="backslashreplace")
    style = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    for name, about in words:
        found.add_argument(name, help=about)
    # absolute, as a reward function of the reader's own may change the working folder
    found.add_argument("--runs", type=os.path.abspath, default=os.path.abspath("runs"),
                       help="the folder of all runs (default: runs)")  # fmt: skip
    return found


def where(runs: str) -> str:
    """What a command needs to find these runs again."""
    short = os.path.relpath(runs)
    return "" if short == "runs" else f" --runs {runs if short.startswith('..') else short}"


def find(runs: str, name: str) -> Path:
    """The folder of a run. Tools never train: if it is not there, a line says what makes it."""
    folder, script = Path(runs) / name, {"base": "sft"}.get(name, name)
    if not (folder / "model.pt").exists():
        known = (Path(common.__file__).parent / f"{script}.py").exists()
        script = f"{script}.py" if known else f"SCRIPT.py --out {name}"
        common.fail(f"{folder} is not there; what makes it is python {script}{where(runs)}")
    return folder


def find_reward(cfg, source: str, device: torch.device) -> common.Reward:
    """r(x, y) by a run under --runs, or by FILE.py:function."""
    if ".py:" in source:
        return common.load_reward(cfg, source, device)
    return common.model_reward(common.load_model(find(cfg.runs, source), "scalar", device))


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    options = parser(__doc__, ("run", "a policy under --runs"), ("question", "the prompt x"))
    options.add_argument("-n", type=int, default=4, help="answers (default: 4)")
    options.add_argument("--best", action="store_true", help="only the one with the highest r")
    options.add_argument(
        "--reward", help="r: a run, or FILE.py:function (default: reward_model)"
    )
    options.add_argument("--max-new-tokens", type=int, default=24, help="longest answer")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="auto")
    cfg = options.parse_args(words)
    device = common.pick_device(cfg.device)
    policy = common.load_model(find(cfg.runs, cfg.run), "lm", device)
    if cfg.n < 1 or cfg.max_new_tokens < 1:
        common.fail("-n and --max-new-tokens must be 1 or more")
    if len(common.chat(cfg.question)) + cfg.max_new_tokens > policy.config.context:
        common.fail(f"question and answer are over the context of {policy.config.context}")
    reward = None
    if cfg.best or cfg.reward or (Path(cfg.runs) / "reward_model/model.pt").exists():
        reward = find_reward(cfg, cfg.reward or "reward_model", device)

    common.seed_all(cfg.seed)
    rollout = common.generate(policy, [common.chat(cfg.question)] * cfg.n, cfg.max_new_tokens)
    logp = rollout.logprobs.sum(1)
    r = reward([cfg.question] * cfg.n, rollout) if reward else logp * float("nan")
    answers = list(zip(r.tolist(), logp.tolist(), common.completions(rollout)))
    for r, logp, text in [max(answers, key=lambda x: x[0])] if cfg.best else answers:
        scored = f"r {r:+.2f}   " if reward else ""
        print(f"{scored}log π {logp:7.2f}   {text!r}")


if __name__ == "__main__":
    main()
