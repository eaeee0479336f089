"""What each script, flag and exercise does: one table over several seeds.

    python tests/studies/outcomes.py             about an hour and a half on two cores
    python tests/studies/outcomes.py --quick     a tenth of all steps and pairs: does it work?

The README's table is of fewer runs and more seeds:

    python tests/studies/outcomes.py --seeds 0 1 2 3 4 --only ppo ppo_rloo ppo_gae ppo_grpo
        ppo_reinforce dpo rs rs_random ppo_weak ppo_2

Runs go to runs_outcomes/seedS/NAME; see runs.py. At the end, printed and in outcomes.md:

    1   every run beside the one that it changes: means over seeds of 4 answers to each held-out
        prompt, KL to SFT, and the difference of gold, seed by seed; ± is one SE over seeds
    2   reward models: held-out accuracy beside its ceiling
    3   gold at equal KL: best of n at inference, rejection sampling, DPO and PPO, each read off
        a line through the points that its knob gives (n; N; β; β), from SFT on
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import runs as study
import torch
from runs import HELD_OUT, common

import reward_model

SETS = {  # run: (what it changes, how it is made)
    "ppo": ("sft", "ppo.py"),
    "ppo_rloo": ("ppo", "ppo.py --estimator rloo"),
    "ppo_reinforce": ("ppo", "ppo.py --estimator reinforce"),
    "ppo_grpo": ("ppo", "ppo.py --estimator grpo"),
    "ppo_gae": ("ppo", "ppo.py --estimator gae"),
    "book_rloo": ("ppo_rloo", "ppo.py --estimator rloo --epochs 1 --minibatches 1"),
    "book_reinforce": (
        "ppo_reinforce",
        "ppo.py --estimator reinforce --epochs 1 --minibatches 1",
    ),
    **{f"beta_{beta}": ("ppo", f"ppo.py --beta {beta}") for beta in (0.05, 0.1, 0.2, 0.5, 1)},
    "ppo_10": ("ppo", "ppo.py --max-new-tokens 10"),
    "adaptive_beta": ("ppo", "adaptive_beta ppo.py"),
    "batch_mean": ("ppo_reinforce", "batch_mean ppo.py --estimator reinforce"),
    "brief": ("ppo", "brief ppo.py"),
    "cispo": ("ppo", "cispo ppo.py"),
    "clip_higher": ("ppo", "clip_higher ppo.py"),
    "critic_from_reward_model": ("ppo", "critic_from_reward_model ppo.py"),
    "dr_grpo": ("ppo_grpo", "dr_grpo ppo.py --estimator grpo"),
    "gspo": ("ppo_grpo", "gspo ppo.py --estimator grpo --clip 0.1"),
    "kl_in_loss": ("ppo_grpo", "kl_in_loss ppo.py --estimator grpo"),
    "missing_eos": ("ppo_10", "missing_eos ppo.py --max-new-tokens 10"),
    "per_batch_token": ("ppo", "per_batch_token ppo.py"),
    "per_sequence": ("ppo", "per_sequence ppo.py"),
    "per_token": ("ppo", "per_token ppo.py"),
    "whitening": ("ppo_gae", "whitening ppo.py --estimator gae"),
    "verifiable": ("ppo", f"ppo.py --reward {study.ROOT}/exercises/verifiable.py:right"),
    "ppo_margin": ("ppo", "ppo.py --reward rm_margin"),
    "ppo_weak": ("ppo", "ppo.py --beta 0 --reward rm_weak"),
    "ppo_2": ("beta_0.05", "ppo.py --beta 0.05 --reward rm_2"),
    "dpo": ("sft", "dpo.py"),
    "ipo": ("dpo", "dpo.py --loss ipo"),
    "hinge": ("dpo", "dpo.py --loss hinge"),
    "dpo_nll": ("dpo", "dpo.py --nll 1"),
    "dpo_smooth": ("dpo", "dpo.py --label-smoothing 0.2"),
    "orpo": ("dpo", "orpo dpo.py --nll 1"),
    "simpo": ("dpo", "simpo dpo.py --beta 2"),
    **{f"dpo_beta_{beta}": ("dpo", f"dpo.py --beta {beta}") for beta in (0.05, 0.1, 1)},
    "rs": ("sft", "rejection_sampling.py"),
    "rs_random": ("rs", "rejection_sampling.py --select random"),
    "rs_3": ("rs", "rejection_sampling.py --rounds 3"),
    "rs_top_k": ("rs", "rejection_sampling.py --select top_k"),
    "rs_random_k": ("rs_top_k", "rejection_sampling.py --select random_k"),
    **{f"rs_N{n}": ("rs", f"rejection_sampling.py --samples {n}") for n in (2, 4, 64)},
}
REWARD_MODELS = {
    "reward_model": "reward_model.py",
    "rm_margin": "reward_model.py --margin 1",
    "rm_once": "reward_model.py --epochs 1",
    "rm_weak": "reward_model.py --pairs 2000",
    # a second round: judged answers of a policy with a low price on KL, beside the old ones
    "rm_2": "reward_model.py --comparisons comparisons,comparisons_2 --pairs 40000",
}
RUNS = {"sft": "sft.py", "comparisons": "collect sft 20000"} | REWARD_MODELS
RUNS["comparisons_2"] = "collect beta_0.05 20000"
RUNS |= {
    name: words
    if "--reward" in words or "dpo.py" in words
    else f"{words} --reward reward_model"
    for name, (_, words) in SETS.items()
}
EQUAL_KL = (0.5, 1.0, 1.5, 2.0)
KNOBS = {  # the runs whose points make the line of a method
    "rejection sampling": ("rs_N2", "rs_N4", "rs", "rs_N64"),
    "DPO": ("dpo_beta_1", "dpo", "dpo_beta_0.1", "dpo_beta_0.05"),
    "PPO": ("beta_1", "beta_0.5", "ppo", "beta_0.2", "beta_0.1", "beta_0.05"),
}


def measure(folder: Path) -> dict:
    """Of one seed: means of the closing table's columns for each policy, the numbers of each
    reward model on held-out pairs, and gold of each method at equal KL."""
    torch.set_num_threads(1)
    table = {}
    for name in ("sft", *SETS):
        if study.is_done(folder, name):
            run = study.found(folder, name, "reward_model", HELD_OUT)
            table[name] = {key: run[key].mean().item() for key in common.NUMBERS}
    path = folder / "comparisons" / study.PAIRS
    rows = common.read_jsonl(path, ("prompt", "chosen", "rejected"), 512)
    held = common.split(rows, own=False)[1]
    made = [name for name in REWARD_MODELS if study.is_done(folder, name)]
    judges = {name: study.load(folder, name, "scalar") for name in made}
    accuracies = {name: reward_model.accuracies(judge, held) for name, judge in judges.items()}
    lines = {"best of n": best_of_n(folder)}
    for method, names in KNOBS.items():
        points = [table[name] for name in names if name in table]
        lines[method] = [(point["kl"], point["gold"]) for point in points]
    start = (0.0, table["sft"]["gold"])
    gold = {method: read_off([start, *sorted(points)]) for method, points in lines.items()}
    return {"table": table, "accuracies": accuracies, "equal_kl": gold}


def best_of_n(folder: Path) -> list[tuple[float, float]]:
    """(bound of the KL, gold) of the best of n = 2, 4, …, 64 answers of sft, by r."""
    run = study.found(folder, "sft", "reward_model", HELD_OUT, 64)
    gold = run["gold"].gather(1, run["reward"].argsort(1)).mean(0).tolist()  # worst first
    points = []
    for n in (2, 4, 8, 16, 32, 64):
        # the i-th worst of 64 is the best of n that are drawn from them
        chance = [math.comb(i, n - 1) / math.comb(64, n) for i in range(64)]
        points.append((math.log(n) - (n - 1) / n, float(np.dot(chance, gold))))
    return points


def read_off(line: list[tuple[float, float]]) -> list[float]:
    """Gold at each of EQUAL_KL; NaN where the line does not reach it."""
    kl, gold = zip(*line)
    return [np.interp(x, kl, gold) if x <= kl[-1] else math.nan for x in EQUAL_KL]


def mean_error(values: list[float], digits: int = 2) -> str:
    """Mean ± standard error over seeds."""
    if any(map(math.isnan, values)):
        return "–"
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def tables(seeds: list[dict]) -> list[str]:
    lines = ["| run | command | seeds | gold | KL | right | length | gold: difference to |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, (beside, words) in ({"sft": ("sft", "sft.py")} | SETS).items():
        made = [x["table"] for x in seeds if {name, beside} <= x["table"].keys()]
        if made:
            run = {key: [table[name][key] for table in made] for key in common.NUMBERS}
            gap = [table[name]["gold"] - table[beside]["gold"] for table in made]
            cells = [name, f"`{words}`", str(len(made))]
            cells += [mean_error(run["gold"]), mean_error(run["kl"])]
            cells += [f"{np.mean(run['right']):.2f}", f"{np.mean(run['length']):.1f}"]
            lines.append("| " + " | ".join([*cells, f"{beside}: {mean_error(gap)}"]) + " |")
    lines += ["", "| reward model | command | expected | ceiling | agrees with gold |"]
    lines += ["|---|---|---|---|---|"]
    for name in seeds[0]["accuracies"]:
        cells = [name, f"`{REWARD_MODELS[name]}`"]
        for key in ("expected", "ceiling", "agrees_with_gold"):
            cells.append(mean_error([seed["accuracies"][name][key] for seed in seeds], 3))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"| gold at KL | {' | '.join(map(str, EQUAL_KL))} |", "|---|---|---|---|---|"]
    for method in seeds[0]["equal_kl"]:
        columns = zip(*(seed["equal_kl"][method] for seed in seeds))
        lines.append(f"| {method} | " + " | ".join(map(mean_error, map(list, columns))) + " |")
    return lines


def main() -> None:
    args = study.arguments(__doc__, "runs_outcomes", [0, 1, 2])
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = study.with_needs(RUNS, args.only or list(RUNS))
    study.make_all(study.quick(wanted) if args.quick else wanted, args.folders, args.jobs)
    with study.get_context("spawn").Pool(args.jobs) as workers:
        seeds = workers.map(measure, args.folders.values())
    lines = tables(seeds)
    common.write(args.out / "outcomes.json", json.dumps(seeds, indent=1))
    common.write(args.out / "outcomes.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
