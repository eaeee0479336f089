"""The runs at a glance: the closing table over all of them, and a page, runs/report.html.

    python -m tools.report --open     the table, and the page in a browser
    python -m tools.report --text     the last traced step of ppo; --text RUN: of another run

The page needs neither server nor network; matplotlib, if it is installed, draws its curves. A
part without its runs names the command that makes them. r is what ppo was trained on, or the
reward model; prompts are held-out ones of the data that sft, π_ref, was made of.
"""

import codecs
import csv
import io
import json
import math
import re
import webbrowser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from data import zoo
from tools.sample import find, find_reward, flags, parser

try:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot there is no window and no backend
except ImportError:
    matplotlib = None

SAMPLES = 256  # answers of π_ref to each prompt, for best-of-n and π*

# ------------------------------------------------------------------------- best-of-n and π*
# Laws on m samples of π_ref to each of M prompts: the weight of each sample, (M, m).


def best_of_n(r: Tensor, n: int) -> Tensor:
    """π_n(y) = π(y) (F(y)ⁿ − F⁻(y)ⁿ) / (F(y) − F⁻(y)), with F(y) = P(r(Y) ≤ r(y)) and
    F⁻(y) = P(r(Y) < r(y)): the best of n, where answers of equal reward share."""
    upto = (r[:, None] <= r[:, :, None]).double().mean(2)
    below = (r[:, None] < r[:, :, None]).double().mean(2)
    return (upto**n - below**n) / (upto - below) / r.shape[1]


def bargain(law: Tensor, r: Tensor, gold: Tensor) -> dict[str, float]:
    """What a law pays, KL(law ‖ π_ref), and what it buys, mean r and gold. From samples, so
    all three lie too low where the best answers are rare among them."""
    kl = torch.xlogy(law, law * law.shape[1]).sum(1).mean().item()
    reward, gold = ((law * x).sum(1).mean().item() for x in (r, gold))
    return dict(kl=kl, reward=reward, gold=gold)


def frontier(r: Tensor, gold: Tensor) -> tuple[list[dict], list[dict]]:
    """Points of best-of-n, with log n − (n−1)/n, a bound on its KL, and of π* at many β."""
    best, star = [], []
    for n in (1, 2, 4, 8, 16, 32, 64):
        bound = math.log(n) - (n - 1) / n
        best.append(bargain(best_of_n(r, n), r, gold) | dict(n=n, bound=bound))
    for beta in torch.logspace(1.3, -0.8, 40).tolist():
        # π*(y) ∝ π_ref(y) e^{gold(y)/β}                                   eq:dpo_opt_policy
        star.append(bargain((gold.double() / beta).softmax(1), r, gold))
    return best, star


# ------------------------------------------------------------------- one prompt, step by step

CURVES = ("J", "reward", "kl", "gold", "length")
NUMBERS = ("r", "log π", "log π_ref", "kl", "R", "baseline", "A")
SPECIALS = ("EOS", "USER", "ASSISTANT", "PAD")


def pieces(answer: dict) -> list[list]:
    """[text, A, log π, log π_ref, ρ, look] of each token; its look is special, clipped or
    none. A character of several tokens, as bytes are, is the text of the last of them."""
    characters, found = codecs.getincrementaldecoder("utf-8")("replace"), []
    columns = ("tokens", "clipped", "A", "logprobs", "ref_logprobs", "ratio")
    for i, clipped, *numbers in zip(*(answer[key] for key in columns)):
        text = SPECIALS[i] if i < 4 else characters.decode(common.PIECES[i])
        look = "clipped" if clipped else "special" if i < 4 else ""
        found.append([text, *numbers, look])
    return found


def distinct(step: dict, estimator: str) -> list[dict]:
    """The answers of a traced step, equal ones once: the most frequent first, then the
    likeliest under π."""
    mean, found = sum(y["R"] for y in step["answers"]) / len(step["answers"]), {}
    for y in step["answers"]:
        same = found.setdefault(tuple(y["tokens"]), {"text": y["text"], "times": 0})
        same["times"] += 1
        baseline = {"gae": y["V"][0], "grpo": mean}.get(estimator, y["R"] - y["A"][0])
        logp, ref_logp = sum(y["logprobs"]), sum(y["ref_logprobs"])
        same["numbers"] = [y["r"], logp, ref_logp, y["kl"], y["R"], baseline, y["A"][0]]
        same["gold"] = zoo.gold_reward(step["prompt"], y["text"], y["finished"])
        same["pieces"] = pieces(y)
    return sorted(found.values(), key=lambda y: (-y["times"], -y["numbers"][1]))


def curve(values: list[float]) -> list[float]:
    """A column as a dozen means, as single steps are noisy."""
    return [part.mean().item() for part in np.array_split(values, min(12, len(values)))]


def traced(folder: Path) -> dict:
    """A run with a trace.jsonl: what its traced prompt went through, and its curves."""
    made, steps = flags(folder), []
    rows = list(csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")))
    columns = {key: [float(row[key] or "nan") for row in rows] for key in CURVES}
    for line in (folder / "trace.jsonl").open(encoding="utf-8"):
        step = json.loads(line)
        means = {key: column[step["step"]] for key, column in columns.items()}
        means["beta"] = float(rows[step["step"]].get("beta") or made["beta"])  # if it moves
        steps.append(step | means | dict(answers=distinct(step, made["estimator"])))
    source = Path(made["reward"]).name
    about = f"A by {made['estimator']}, β = {made['beta']}, r by {source}"
    path = {key: curve(column) for key, column in columns.items()}
    run = dict(name=folder.name, about=about, beta=made["beta"], reward=source)
    return run | dict(steps=steps, path=path)


def as_text(run: dict) -> str:
    """The last traced step: its answers, and J."""
    step, wide = run["steps"][-1], "{:>11}".format
    lines = [f"{run['name']}, step {step['step']}   x: {step['prompt']!r}   {run['about']}"]
    lines.append("".join(map(wide, NUMBERS)) + "   y")
    for y in step["answers"]:
        numbers = "".join(wide(f"{x:.2f}") for x in y["numbers"])
        times = f" × {y['times']}" if y["times"] > 1 else ""
        lines.append(f"{numbers}   {y['text']!r}{times}")
    terms = f"{step['J']:.3f} = {step['reward']:.3f} − {step['beta']} × {step['kl']:.3f}"
    return "\n".join([*lines, f"\nJ = reward − β kl over the batch: {terms}"])


# ---------------------------------------------------------------------------- a comparison


def comparisons(runs: Path, names: list[str], reward, context: int, device) -> list[dict]:
    """A dozen held-out comparisons, of those under runs/ or the reader's own that a run was
    trained on, and their judges: [name, score of chosen, of rejected, gap, P(chosen)] each."""
    own = flags(runs / "reward_model").get("data") or flags(runs / "dpo").get("data")
    path = Path(own or runs / "comparisons/comparisons.jsonl")
    if not path.exists():
        return []
    rows = common.read_jsonl(path, ("prompt", "chosen", "rejected"), context)
    rows = common.split(rows, own=bool(own))[1][:12]
    tokens, mask = (x.flatten(0, 1) for x in common.encode_pairs(rows, device))
    asked = [row["prompt"] for row in rows for _ in range(2)]
    finished = ((tokens == common.EOS) & mask).any(1)
    answers = common.Rollout(tokens, mask, finished, torch.zeros(tokens.shape))
    said = zip(asked, common.completions(answers), finished.tolist())
    scores = {"gold": torch.tensor([zoo.gold_reward(*answer) for answer in said])}
    if reward:
        scores["r"] = reward(asked, answers)
    if "dpo" in names:  # r(x, y) = β log π(y|x)/π_ref(y|x): eq:dpo_reward
        made = flags(runs / "dpo")
        models = (common.load_model(runs / x, "lm", device) for x in ("dpo", made["ref"]))
        logp, ref_logp = (common.token_logprobs(x, tokens, mask).sum(1) for x in models)
        scores["DPO"] = made["beta"] * (logp - ref_logp)
    chosen, rejected = torch.stack([x.cpu().view(-1, 2) for x in scores.values()]).unbind(2)
    gap = chosen - rejected
    numbers = torch.stack((chosen, rejected, gap, gap.sigmoid()), 2)  # (judges, pairs, 4)
    for i, row in enumerate(rows):
        row["judges"] = [[name, *x] for name, x in zip(scores, numbers[:, i].tolist())]
    return rows


# ------------------------------------------------------------------------------- pictures

MARKS = {"●": "o", "▲": "^", "■": "s", "◆": "D", "▼": "v", "✚": "P", "✖": "X", "★": "*"}
COLOURS = "#1f5fa8 #b8420f #2b7048 #7446a5 #85600a #0b7280 #ad3169 #5b5b5b".split()
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.alpha": 0.4,
    "svg.fonttype": "none",
}


def drawn(found: dict[str, dict], traces: list[dict]) -> dict[str, dict]:
    """The runs of the pictures: look, means, path of training. base is not among them, as its
    KL is far off."""
    shown, known = {}, {run["name"]: run for run in traces}
    for i, name in enumerate(name for name in found if name != "base"):
        mark, colour = list(MARKS)[(i + i // 8) % 8], COLOURS[i % 8]
        run = {key: found[name][key].mean().item() for key in ("kl", "reward", "gold")}
        run |= dict(mark=MARKS[mark], colour=colour, traced=known.get(name))
        shown[name] = run | dict(look={"number": f"{mark} {name}", "colour": colour})
    return shown


def picture(title: str, draw, *given) -> str:
    """A panel that draw(axis, …) fills, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, file = Figure(figsize=(4.6, 3.4), layout="constrained"), io.StringIO()
        draw(figure.add_subplot(title=title), *given)
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    return svg[svg.index("<svg ") :]


def draw_frontier(axis, key: str, runs: dict, best: list, star: list, source: str) -> None:
    """Reward, if it is by the same source, or gold against KL: a mark for each run, its way
    through training, and two laws."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    for run in runs.values():
        trained = run["traced"]
        if trained and (key == "gold" or trained["reward"] == source):
            path = trained["path"]
            axis.plot(path["kl"], path[key], color=run["colour"], linewidth=1)
        axis.plot(run["kl"], run[key], run["mark"], color=run["colour"], ms=8, clip_on=False)
    laws = [("best of n = 1, 2, 4, …, 64", best, "kl", ".-")]
    laws += [("its KL by formula, a bound", best, "bound", "--")]
    laws += [("π*, the ideal", star, "kl", ":")] if key == "gold" else []
    for label, points, x, line in laws:
        xs, ys = ([point[column] for point in points] for column in (x, key))
        axis.plot(xs, ys, line, color="black", linewidth=1, label=label)
    axis.set_xlim(0)
    ticks = [x for x in (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128, 256) if x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xlabel("KL(π ‖ π_ref), nats")
    axis.legend(frameon=False, fontsize=8)


def draw_curve(axis, key: str, runs: list[dict]) -> None:
    """A column of metrics.csv over the course of training."""
    for run in runs:
        y = run["traced"]["path"][key]
        axis.plot(np.linspace(0, 1, len(y)), y, color=run["colour"])
        axis.plot(1, y[-1], run["mark"], color=run["colour"])
    axis.set_xlabel("share of training")


def pictures(runs: dict[str, dict], best: list, star: list, source: str) -> dict[str, str]:
    """The SVGs of parts 2 and 3."""
    if matplotlib is None:
        why = "matplotlib is not installed, so nothing is drawn here: pip install matplotlib"
        return dict(frontier=why, curves=why)
    parts, trained = {"frontier": "", "curves": ""}, [x for x in runs.values() if x["traced"]]
    for key in ("reward", "gold"):
        given = draw_frontier, key, runs, best, star, source
        parts["frontier"] += picture(f"{key} against KL", *given)
    for key in CURVES if trained else ():
        parts["curves"] += picture(key, draw_curve, key, trained)
    return parts


# ------------------------------------------------------------------------------- the page


def table(found: dict[str, dict], shown: dict[str, dict]) -> list:
    """The closing table, with the marks of the runs that are drawn."""
    sft = found["sft"]
    groups, rows = [zoo.QUESTIONS.get(prompt, prompt) for prompt in sft["prompts"]], []
    for name, run in found.items():
        mean = {key: run[key].mean().item() for key in common.NUMBERS}
        row = [shown[name]["look"] if name in shown else name]
        for key in ("reward", "gold", "kl"):
            row.append(dict(number=mean[key], error=common.standard_error(run[key], groups)))
        row.append(common.win_rate(run["gold"], sft["gold"]).item())
        rows.append([*row, mean["right"], mean["length"], mean["finished"]])
    return [["", "reward", "gold", "KL", "win rate", "right", "length", "finished"], rows]


def missing(flags: str, reward, traces: list[dict], pairs: list[dict]) -> dict[str, str]:
    """Part -> a sentence that says what is not there, and the command that makes it."""
    found = {}
    if reward is None:
        found["frontier"] = f"There is no r to choose by: python reward_model.py{flags}"
    if not traces:
        why = f"No run of ppo.py is here. This makes one: python ppo.py{flags}"
        found |= dict.fromkeys(("curves", "prompt", "wrong"), why)
    if not pairs or len(pairs[0]["judges"]) < 3:
        commands = f"python reward_model.py{flags}; python dpo.py{flags}"
        found["comparison"] = f"Pairs or judges are missing. These make them: {commands}"
    return found


@torch.no_grad()
def report(cfg) -> Path:
    """Measure, print the table, write the page."""
    runs, sft, device = cfg.runs, find(cfg.runs, "sft"), common.pick_device("auto")
    saved = {path.parent.name: torch.load(path, map_location="cpu", weights_only=True)["head"]
             for path in sorted(runs.glob("*/model.pt"))}  # fmt: skip
    names = sorted((x for x in saved if saved[x] == "lm"), key=lambda x: x != "sft")
    policy, made = common.load_model(sft, "lm", device), flags(sft)
    cfg.data, cfg.max_new_tokens = made.get("data"), made.get("max_new_tokens", 24)
    cfg.init, cfg.out = "sft", "ppo"  # whose answers stand under the table
    prompts = common.read_prompts(cfg, policy.config.context)[1]
    reward, source = find_reward(runs, "ppo", device)

    # what is measured: the table, best-of-n and π*, comparisons
    found = common.closing_table(cfg, names, reward, source, prompts, device)
    asked = found["sft"]["prompts"]
    given = policy, policy, reward, asked[::4], cfg.max_new_tokens
    samples = common.evaluate(*given, n=SAMPLES)
    best, star = frontier(samples["reward"], samples["gold"])
    pairs = comparisons(runs, names, reward, policy.config.context, device)

    # what is shown: ppo first, then, as the one beside it, the run that pays least for KL
    traces = [traced(runs / name) for name in names if (runs / name / "trace.jsonl").exists()]
    traces.sort(key=lambda run: (run["name"] != "ppo", run["beta"]))
    shown = drawn(found, traces)
    again = f" --runs {runs}" + " --data YOUR.jsonl" * bool(cfg.data)
    about = f"{len(asked)} held-out prompts × 4 answers; reward: {source}; KL, win rate to: sft"
    page = dict(
        table=table(found, shown),
        about=f"{about}; ± is one standard error",
        legend=[run["look"] for run in shown.values()],
        traces=traces,
        numbers=NUMBERS,
        pairs=pairs,
        missing=missing(again, reward, traces, pairs),
    )
    parts = pictures(shown, best, star, source)
    data = json.dumps(page, ensure_ascii=False)
    parts["data"] = data.replace("<", "\\u003c")  # so no text in it can end the script
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    html = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)
    common.write(runs / "report.html", html)
    return runs / "report.html"


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    about = "only print the last traced step of a run (default: ppo)"
    options.add_argument("--text", nargs="?", const="ppo", metavar="RUN", help=about)
    options.add_argument("--open", action="store_true", help="open the page in a browser")
    cfg = options.parse_args(words)
    if cfg.text:
        print(as_text(traced(find(cfg.runs, cfg.text))))
        return
    path = report(cfg)
    print(path)
    if cfg.open:
        webbrowser.open(path.absolute().as_uri())


if __name__ == "__main__":
    main()
