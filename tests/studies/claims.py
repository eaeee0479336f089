"""The book's claims, checked in this world.

    python tests/studies/claims.py           five seeds, about an hour on two cores
    python tests/studies/claims.py --quick   a tenth of all steps and pairs: does it work?

Runs are the scripts themselves: RUNS says with what flags, and with which exercise. They go to
runs_claims/seedS/NAME; see runs.py. At the end: the table, printed and in claims.md; numbers
seed by seed in claims.json; gold against KL in claims.png (needs matplotlib).

A claim is a function that yields numbers of one seed. A number's name may end with a criterion,
written before any run: "> 0", "< 0.05", or "≈ 1", 0.9 to 1.1. A claim holds if all its criteria
hold for all of mean ± t SE over seeds, t at 5 % on one side (2.13 for five seeds): of twenty
claims that are false, one may pass. It does not hold if a criterion holds for none of that
range; else it is open, in part or all. In the table ± is one SE. Seeds differ in everything but
the prompts and draws of the measurements. No setting was chosen for the sake of a verdict.

    gold, length, KL, reward   common.evaluate: 4 answers to each held-out prompt, KL to SFT,
                               the reward model of 20,000 pairs; J = reward − 0.3 KL
    gain                       more than SFT has
    path                       columns of metrics.csv, on training prompts; means of 5 steps
    best-of-n                  64 answers of SFT to each held-out prompt, scored once: gold of
                               the best of n of them, a mean over all choices of n. Its KL is a
                               bound, log n − (n − 1)/n, and less where answers tie
    knowable                   (accuracy − ½) / (ceiling − ½) of a reward model over all pairs
                               of different answers to a prompt: 1 is as good as gold itself
"""

import json
import math
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import runs as study
import torch
from runs import HELD_OUT, PAIRS, TRAIN, common

import dpo
import ppo

# --------------------------------------------------------------------------- what is run

RL, MANY = "ppo.py --estimator rloo --steps 60", "--comparisons comparisons --pairs 20000"
FEW = "reward_model.py --comparisons old_a --pairs 2000"
RUNS = {
    "sft": "sft.py --steps 300 --base-steps 200",
    "comparisons": "collect sft 20000",
    "old_a": "collect sft 2000",
    "old_b": "collect sft 2000",
    "rm_20000": f"reward_model.py {MANY} --epochs 3",
    "rm_20000_once": f"reward_model.py {MANY} --epochs 1",
    "rm_2000": f"{FEW} --epochs 3",
    "rm_2000_once": f"{FEW} --epochs 1",
    "rm_2000_ten": f"{FEW} --epochs 10",
    "rm_500": "reward_model.py --comparisons old_a --pairs 500 --epochs 3",
    "rl_20000": f"{RL} --reward rm_20000 --beta 0",
    "rl_2000": f"{RL} --reward rm_2000 --beta 0",
    "rl_500": f"{RL} --reward rm_500 --beta 0",
    # β = 0.3 from here on. One thing changed:
    "rloo": f"{RL} --reward rm_20000",
    "no_clip": f"{RL} --reward rm_20000 --clip 1000000",
    "per_sequence": f"per_sequence {RL} --reward rm_20000",
    "kl_in_loss": f"kl_in_loss {RL} --reward rm_20000",
    "from_base": f"{RL} --reward rm_20000 --init base --ref base",
    "grpo": "ppo.py --estimator grpo --steps 60 --reward rm_20000",
    "grpo_no_std": "dr_grpo ppo.py --estimator grpo --steps 60 --reward rm_20000",
    "gae": "ppo.py --estimator gae --steps 60 --reward rm_20000",
    # as many answers and as many updates as PPO's, but on-policy
    "reinforce": "ppo.py --estimator reinforce --epochs 1 --minibatches 1 --prompts 16 "
    "--samples 1 --steps 480 --reward rm_20000",
    # a second round, on pairs of the policy as it is or on as many old ones
    "first": f"{RL} --reward rm_2000",
    "new": "collect first 2000",
    "rm_new": "reward_model.py --comparisons old_a,new --pairs 4000",
    "rm_old": "reward_model.py --comparisons old_a,old_b --pairs 4000",
    "rl_new": f"{RL} --reward rm_new --init first",
    "rl_old": f"{RL} --reward rm_old --init first",
    "dpo": f"dpo.py {MANY} --steps 600",
    "new_dpo": "collect dpo 4000",
    "dpo_new": "dpo.py --comparisons new_dpo --pairs 4000 --init dpo --steps 250",
    "dpo_old": "dpo.py --comparisons old_a,old_b --pairs 4000 --init dpo --steps 250",
}
SIZES = (500, 2000, 20000)

# --------------------------------------------------------------------- how it is measured
# s is the folder of one seed


def load(s: Path, name: str) -> common.Transformer:
    return study.load(s, name, "scalar" if name.startswith("rm_") else "lm")


def found(s: Path, policy: str, judge: str = "rm_20000", prompts=HELD_OUT) -> dict:
    run = study.found(s, policy, judge, prompts)
    return run | {"KL": run["kl"], "J": run["reward"] - 0.3 * run["kl"]}


def mean(s: Path, policy: str, what: str) -> float:
    return found(s, policy)[what].double().mean().item()


def diff(s: Path, what: str, a: str, b: str = "sft") -> float:
    return mean(s, a, what) - mean(s, b, what)


@cache
@torch.no_grad()
def pool(s: Path) -> dict[str, torch.Tensor]:
    """64 answers of SFT to each of M prompts: gold, and r by every reward model, (M, 64)."""
    names = [name for name in RUNS if name.startswith("rm_") and study.is_done(s, name)]
    policy, judges = load(s, "sft"), {name: load(s, name) for name in names}
    columns = {name: [] for name in ("gold", *judges)}
    torch.manual_seed(0)
    for asked, rollout in common.sample_answers(policy, list(HELD_OUT), 64, 24):
        rows = zip(asked, common.completions(rollout), rollout.finished.tolist())
        columns["gold"] += [study.zoo.gold_reward(*row) for row in rows]
        for name, judge in judges.items():
            scores = common.score(judge, rollout.tokens, rollout.response_mask)
            columns[name] += scores.tolist()
    return {name: torch.tensor(x).double().view(-1, 64) for name, x in columns.items()}


def best_of(s: Path, judge: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the best of n = 1, 2, 4, …, 64: the bound of its KL, and its gain of gold."""
    gold = pool(s)["gold"].gather(1, pool(s)[judge].argsort(1)).mean(0).numpy()  # worst first
    sizes = [2**k for k in range(7)]
    chance = [[math.comb(i, n - 1) / math.comb(64, n) for i in range(64)] for n in sizes]
    return np.array([math.log(n) - (n - 1) / n for n in sizes]), chance @ gold - gold.mean()


def metrics(s: Path, name: str) -> np.ndarray:
    return np.genfromtxt(s / name / "metrics.csv", delimiter=",", names=True)


def smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(min(5, len(values))) / min(5, len(values)), "valid")


def path(s: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and gain of gold at every step of an RL run, not smoothed."""
    start = found(s, "sft", prompts=TRAIN)["gold"].mean().item()
    return metrics(s, name)["kl"].clip(0), metrics(s, name)["gold"] - start


PATH = ("gold", "kl", "reward")


def peak(s: Path, n: int) -> dict[str, float]:
    """Where gold is highest on RL's path. It is looked for in even steps and read off in odd
    ones: the largest of many noisy numbers would always lie above the last."""
    run = metrics(s, f"rl_{n}")
    top, odd = smooth(run["gold"][::2]).argmax(), {k: smooth(run[k][1::2]) for k in PATH}
    later = {f"{key} later": odd[key][-1] - odd[key][top] for key in PATH}
    return {key: odd[key][top] for key in PATH} | later


def form(d: np.ndarray, kind: str) -> np.ndarray:
    """Gao's forms, d(α − β ln d) for RL and d(α − β d) for best-of-n: columns (., 2) whose
    weights are α and β."""
    return np.stack([d, -d * (np.log(d.clip(1e-6)) if kind == "RL" else d)], 1)


def fit(kl: np.ndarray, gold: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """α and β by least squares, and the root mean square of what is left."""
    columns = form(np.sqrt(kl), kind)
    weights = np.linalg.lstsq(columns, gold, rcond=None)[0]
    return weights, float(np.sqrt(np.mean((columns @ weights - gold) ** 2)))


def knowable(rewards: torch.Tensor, gold: torch.Tensor) -> float:
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1)
    gap, gold_gap = rewards[:, i] - rewards[:, j], (gold[:, i] - gold[:, j]).double()
    apart = gap.abs() > 1e-4  # the same answer has the same score, but for rounding
    accuracy, ceiling = torch.sigmoid(gold_gap * gap.sign()), torch.sigmoid(gold_gap.abs())
    return ((accuracy[apart].mean() - 0.5) / (ceiling[apart].mean() - 0.5)).item()


# ----------------------------------------------------------------------------- the claims

CLAIMS = []
OVER, DAA = "Over-Optimization", "Direct Alignment Algorithms"
PG, OVERVIEW = "Reinforcement Learning", "Training Overview"


def claim(chapter: str, runs: str):
    """The decorated function yields numbers of one seed; its docstring is the claim."""
    return lambda f: CLAIMS.append((f.__doc__, chapter, runs.split(), f))


@claim(OVER, "rl_500 rl_2000 rl_20000")
def _(s):
    """the reward model's score keeps rising while gold turns and falls"""
    for n in SIZES:
        yield f"{n} pairs: fall of gold from its peak > 0", -peak(s, n)["gold later"]
        yield f"{n} pairs: rise of reward meanwhile > 0", peak(s, n)["reward later"]


@claim(OVER, "rl_500 rl_2000 rl_20000")
def _(s):
    """the more comparisons, the further a reward model can be optimised (Gao et al.)"""
    for a, b in zip(SIZES, SIZES[1:]):
        yield f"gold at the peak, {b} − {a} pairs > 0", peak(s, b)["gold"] - peak(s, a)["gold"]
    for n in SIZES:
        yield f"KL there, {n}", peak(s, n)["kl"]


@claim(OVER, "rl_500 rl_2000 rl_20000 rm_500 rm_2000 rm_20000")
def _(s):
    """with d = √KL gold gains d(α − β ln d) by RL and d(α − βd) by best-of-n (Gao et al.)"""
    for own, other in (("RL", "best-of-n"), ("best-of-n", "RL")):
        curves = [path(s, f"rl_{n}") if own == "RL" else best_of(s, f"rm_{n}") for n in SIZES]
        a, b = (np.mean([fit(*curve, kind)[1] for curve in curves]) for kind in (own, other))
        yield f"{own}: error of the other form − of this one > 0", b - a
        yield f"{own}: error of this one", a


@claim(OVER, "rl_2000 rl_20000 rm_2000 rm_20000")
def _(s):
    """best-of-n pays fewer nats for the same gold than RL"""
    for n in SIZES[1:]:
        (kl, gold), (bound, target) = map(smooth, path(s, f"rl_{n}")), best_of(s, f"rm_{n}")
        for k in (2, 4):
            there = np.flatnonzero(gold >= target[k])  # never: it costs more than all it paid
            paid = kl[there[0]] if len(there) else kl[-1]
            yield f"{n} pairs: nats of RL − of best of {2**k} > 0", paid - bound[k]


@claim(OVER, "rloo rl_20000")
def _(s):
    """at a given KL, a price on KL reduces over-optimisation"""
    (kl, gold), (free_kl, free_gold) = (map(smooth, path(s, x)) for x in ("rloo", "rl_20000"))
    kl, gold = kl[-6:].mean(), gold[-6:].mean()  # of the last ten steps
    same = np.interp(kl, np.maximum.accumulate(free_kl), free_gold)
    yield "gold at the same KL, β 0.3 − β 0 > 0", gold - same
    yield "that KL", kl


@claim(OVER, "rl_2000 rl_20000 rm_2000 rm_20000")
def _(s):
    """a reward model's accuracy falls on answers of a policy that it trained"""
    for n in SIZES[1:]:
        runs = [found(s, policy, f"rm_{n}") for policy in ("sft", f"rl_{n}")]
        before, after = (knowable(run["reward"], run["gold"]) for run in runs)
        yield f"{n} pairs: knowable, SFT's − the policy's > 0", before - after
        yield f"{n} pairs: of SFT's", before


@claim("Reward Modeling", "rm_20000 rm_20000_once rm_2000_once rm_2000_ten")
def _(s):
    """a reward model should see its comparisons once: more epochs overfit"""
    for n, many, name in ((20000, "three", "rm_20000"), (2000, "ten", "rm_2000_ten")):
        a, b = (knowable(pool(s)[x], pool(s)["gold"]) for x in (f"rm_{n}_once", name))
        yield f"{n} pairs: knowable, one epoch − {many} > 0", a - b
        yield f"{n} pairs: one epoch", a


@claim(DAA, "dpo comparisons")
def _(s):
    """DPO lowers the log-probability of chosen answers, and that of rejected ones more"""
    rows = common.read_jsonl(s / "comparisons" / PAIRS, ("prompt", "chosen", "rejected"), 512)
    with torch.no_grad():
        pairs = common.encode_pairs(common.split(rows, own=False)[1], "cpu")
        sft, after = (dpo.response_logprobs(load(s, x), *pairs).mean(0) for x in ("sft", "dpo"))
    chosen, rejected = (sft - after).tolist()
    yield "fall of log π(chosen) > 0", chosen
    yield "fall of log π(rejected) − that > 0", rejected - chosen


@claim(DAA, "dpo dpo_new dpo_old")
def _(s):
    """iterated DPO: comparisons of the current policy beat as many old ones"""
    yield "gold, new − old > 0", diff(s, "gold", "dpo_new", "dpo_old")
    yield "old − first round", diff(s, "gold", "dpo_old", "dpo")


@claim(OVERVIEW, "first rm_new rm_old rl_new rl_old")
def _(s):
    """a second reward model: comparisons of the current policy beat as many old ones"""
    runs = [found(s, "first", judge) for judge in ("rm_new", "rm_old")]
    new, old = (knowable(run["reward"], run["gold"]) for run in runs)
    yield "gold, new − old > 0", diff(s, "gold", "rl_new", "rl_old")
    yield "old − first round", diff(s, "gold", "rl_old", "first")
    yield "knowable of the first round's answers, new − old > 0", new - old


@claim(DAA, "rloo dpo")
def _(s):
    """policy gradients are a hair ahead of DPO"""
    yield "gold, RLOO − DPO > 0", diff(s, "gold", "rloo", "dpo")
    yield "KL, RLOO − DPO", diff(s, "KL", "rloo", "dpo")


@claim(PG, "rloo per_sequence")
def _(s):
    """1/|a| in the loss makes wrong answers longer"""
    runs = [found(s, policy) for policy in ("per_sequence", "rloo")]
    a, b = (run["length"][run["right"] == 0].mean().item() for run in runs)
    yield "tokens of wrong answers, with − without > 0", a - b
    yield "of all, with − without", diff(s, "length", "per_sequence", "rloo")
    yield "gold, with − without", diff(s, "gold", "per_sequence", "rloo")


@claim(PG, "grpo grpo_no_std rm_20000")
def _(s):
    """GRPO's std favours prompts with all answers right or wrong; J is better without it"""
    right = (pool(s)["gold"] > 0.5).view(-1, 4)  # a wrong answer has 0 at most
    alike = (right.all(1) | ~right.any(1)).repeat_interleave(4)
    A = [function(pool(s)["rm_20000"].flatten(), 4).abs() for function in (ppo.grpo, ppo.rloo)]
    a, b = (x[alike].sum() / x.sum() for x in A)
    yield "share of |A| on such prompts at the start, with − without > 0", (a - b).item()
    yield "without", b.item()
    yield "J, without − with > 0", diff(s, "J", "grpo_no_std", "grpo")


@claim(PG, "rloo kl_in_loss")
def _(s):
    """the KL may stand in the reward or, as k3 per token, in the loss"""
    yield "gain of J, loss / reward ≈ 1", diff(s, "J", "kl_in_loss") / diff(s, "J", "rloo")
    yield "KL, loss − reward", diff(s, "KL", "kl_in_loss", "rloo")


@claim(OVERVIEW, "rloo from_base")
def _(s):
    """RL needs an instruction-tuned start"""
    yield "gold, RL from SFT − from base > 0", diff(s, "gold", "rloo", "from_base")
    yield "gold, SFT − RL from base > 0", diff(s, "gold", "sft", "from_base")
    yield "finished, from base", mean(s, "from_base", "finished")


@claim(PG, "rloo no_clip")
def _(s):
    """clipping hardly ever matters from a good start"""
    yield "share of tokens clipped < 0.05", metrics(s, "rloo")["clipped"].mean()
    yield "gain of gold, off / on ≈ 1", diff(s, "gold", "no_clip") / diff(s, "gold", "rloo")


@claim(PG, "gae reinforce")
def _(s):
    """REINFORCE is as good as PPO from a good start"""
    yield "gain of gold, its / PPO's ≈ 1", diff(s, "gold", "reinforce") / diff(s, "gold", "gae")
    yield "KL, its − PPO's", diff(s, "KL", "reinforce", "gae")


# ---------------------------------------------------------------- verdicts, table, picture


def measure(s: Path) -> dict:
    """The numbers of one seed; a claim whose runs have failed has none."""
    torch.set_num_threads(1)
    claims, curves = {}, {}
    for text, _, runs, numbers in CLAIMS:
        if all(study.is_done(s, name) for name in ("sft", "rm_20000", *runs)):
            claims[text] = {name: float(number) for name, number in numbers(s)}
    for n in SIZES:
        if all(study.is_done(s, name) for name in (f"rl_{n}", "rm_20000")):
            both = {"RL": path(s, f"rl_{n}"), "best-of-n": best_of(s, f"rm_{n}")}
            curves[n] = {kind: np.stack(curve).tolist() for kind, curve in both.items()}
    return {"claims": claims, "curves": curves}


def verdict(text: str, chapter: str, runs: list[str], seeds: dict[int, dict]) -> dict:
    rows = {seed: x["claims"][text] for seed, x in seeds.items() if text in x["claims"]}
    about = {"claim": text, "chapter": chapter, "runs": runs, "seeds": rows}
    if len(rows) < 2:
        return about | {"out": "", "verdict": "not judged: it takes two seeds"}
    t, out = (6.31, 2.92, 2.35, 2.13, 2.02)[min(len(rows), 6) - 2], []
    right, wrong, unclear = [], [], []
    for name in next(iter(rows.values())):
        numbers = np.array([row[name] for row in rows.values()])
        middle, error = numbers.mean(), numbers.std(ddof=1) / math.sqrt(len(numbers))
        what, sign, limit = re.fullmatch(r"(.*?)(?: ([<>≈]) (\S+))?", name).groups("0")
        digits = 2 if error > 0.02 else 3
        out.append(f"{what} = {middle:.{digits}f} ± {error:.{digits}f}")
        low = {">": float(limit), "≈": float(limit) - 0.1}.get(sign, -math.inf)
        high = {"<": float(limit), "≈": float(limit) + 0.1}.get(sign, math.inf)
        bottom, top = middle - t * error, middle + t * error
        if top <= low or high <= bottom:
            wrong.append(f"{what} is not {sign} {limit}")
        elif sign != "0":
            (right if low < bottom <= top < high else unclear).append(what)
    decided = "holds in part; open: " if right else "open: "
    decided = decided + "; ".join(unclear) if unclear else "holds"
    if wrong:
        decided = f"does not hold here, because {'; '.join(wrong)}"
    return about | {"out": "; ".join(out), "verdict": decided}


def draw(seeds: dict[int, dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="tight")
    for axis, n in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES):
        for colour, kind in enumerate(("RL", "best-of-n")):
            curves = [x["curves"][n][kind] for x in seeds.values() if n in x["curves"]]
            if curves:
                kl, gold = np.concatenate(curves, 1)
                (a, b), error = fit(kl, gold, kind)
                d, law = np.linspace(0, np.sqrt(kl.max()), 99), "ln d" if kind == "RL" else "d"
                axis.plot(np.sqrt(kl), gold, ".", color=f"C{colour}", alpha=0.4)
                label = f"{kind}: d(α − β {law}), α {a:.2f}, β {b:.2f}, error {error:.2f}"
                axis.plot(d, form(d, kind) @ (a, b), color=f"C{colour}", label=label)
        axis.set(title=f"reward model of {n} pairs", xlabel="d = √KL", ylabel="gain of gold")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    args = study.arguments(__doc__, "runs_claims", [0, 1, 2, 3, 4])
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = study.with_needs(RUNS, args.only or list(RUNS))
    study.make_all(study.quick(wanted) if args.quick else wanted, args.folders, args.jobs)
    with study.get_context("spawn").Pool(args.jobs) as workers:
        seeds = dict(zip(args.folders, workers.map(measure, args.folders.values())))
    judged = [verdict(text, chapter, runs, seeds) for text, chapter, runs, _ in CLAIMS]
    common.write(args.out / "claims.json", json.dumps(judged, indent=1, ensure_ascii=False))
    lines = ["| claim | chapter | what came out | verdict |", "|---|---|---|---|"]
    for row in judged:
        cells = [row[key] for key in ("claim", "chapter", "out", "verdict")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    common.write(args.out / "claims.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(seeds, args.out / "claims.png")


if __name__ == "__main__":
    main()
