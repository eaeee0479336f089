"""The runs at a glance: the closing table over all of them, and a page, runs/report.html.

    python -m tools.report --open     the table, and the page in a browser
    python -m tools.report --text     the last traced step of ppo; --text RUN: of another run

The page needs neither server nor network; matplotlib, if it is installed, draws its curves. A
part without its runs names the command that makes them. r is what ppo was trained on, or the
reward model; prompts are held-out ones of the data that sft, π_ref, was made of.
"""

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
        best.append(dict(n=n, bound=math.log(n) - (n - 1) / n))
        best[-1] |= bargain(best_of_n(r, n), r, gold)
    for beta in torch.logspace(1.3, -0.8, 40).tolist():
        # π*(y) ∝ π_ref(y) e^{gold(y)/β}                                   eq:dpo_opt_policy
        star.append(bargain((gold.double() / beta).softmax(1), r, gold))
    return [] if r.isnan().any() else best, [] if gold.isnan().any() else star


# ------------------------------------------------------------------- one prompt, step by step

CURVES = ("J", "reward", "kl", "gold", "length")
NUMBERS = ("r", "log π", "log π_ref", "kl", "R", "baseline", "A")
STORY = ("step", "reward", "gold", "kl", "likeliest answer", "its r", "its gold")


def pieces(answer: dict) -> list[list]:
    """[text, A, log π, log π_ref, ρ, look] of each token; its look is special, clipped or
    none. A character of several tokens, as bytes are, is one piece: log-probs add up, ρ
    multiply."""
    specials, found, begun = ("EOS", "USER", "ASSISTANT", "PAD"), [], b""
    columns = ("tokens", "A", "logprobs", "ref_logprobs", "ratio", "clipped")
    for i, A, logp, ref_logp, ratio, clipped in zip(*(answer[key] for key in columns)):
        if begun:
            *_, logp_0, ref_logp_0, ratio_0, look = found.pop()
            logp, ref_logp, ratio = logp_0 + logp, ref_logp_0 + ref_logp, ratio_0 * ratio
            clipped = clipped or look
        begun += common.PIECES[i]
        text = specials[i] if i < 4 else begun.decode("utf-8", errors="replace")
        look = "clipped" if clipped else "special" if i < 4 else ""
        found.append([text, A, logp, ref_logp, ratio, look])
        begun = begun if text == "\ufffd" and len(begun) < 4 else b""
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
    """A run with a trace.jsonl: what its traced prompt went through, and its curves. `fall` is
    how far gold fell from its peak while reward rose; NaN where there is no gold."""
    made, steps = flags(folder), []
    rows = list(csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")))
    columns = {key: [float(row[key] or "nan") for row in rows] for key in CURVES}
    for line in (folder / "trace.jsonl").open(encoding="utf-8"):
        step = json.loads(line)
        answers = distinct(step, made["estimator"])
        steps.append({key: column[step["step"]] for key, column in columns.items()})
        steps[-1] |= dict(step=step["step"], prompt=step["prompt"], answers=answers)
    path = {key: curve(column) for key, column in columns.items()}
    gold, reward, source = path["gold"], path["reward"], Path(made["reward"]).name
    top = int(np.argmax(gold))
    fall = gold[top] - gold[-1] if reward[-1] > reward[top] else 0 * gold[-1]
    about = f"A by {made['estimator']}, β = {made['beta']}, r by {source}"
    run = dict(name=folder.name, about=about, beta=made["beta"], reward=source, fall=fall)
    return run | dict(steps=steps, path=path, batch=made["prompts"] * made["samples"])


def as_text(run: dict) -> str:
    """The last traced step: its answers, and J."""
    step, wide = run["steps"][-1], "{:>11}".format
    lines = [f"{run['name']}, step {step['step']}   x: {step['prompt']!r}   {run['about']}"]
    lines.append("".join(map(wide, NUMBERS)) + "   y")
    for y in step["answers"]:
        numbers = "".join(wide(f"{x:.2f}") for x in y["numbers"])
        times = f" × {y['times']}" if y["times"] > 1 else ""
        lines.append(f"{numbers}   {y['text']!r}{times}")
    terms = f"{step['J']:.3f} = {step['reward']:.3f} − {run['beta']} × {step['kl']:.3f}"
    return "\n".join([*lines, f"\nJ = reward − β kl over the batch: {terms}"])


# ---------------------------------------------------------------------------- a comparison

JUDGED = ("", "chosen", "rejected", "gap", "P(chosen)", "agrees", "how often")


def judge(rows: list[dict], scores: dict[str, Tensor]) -> list[dict]:
    """A dozen comparisons as the page shows them, the answers in an order that says nothing,
    and what each judge says: its scores, (B, 2), chosen first, whether it agrees with the
    label that was drawn, and how often it does, a tie counting ½."""
    shown = []
    for row in rows[:12]:
        answers = sorted([(row["chosen"], "✓ chosen"), (row["rejected"], "rejected")])
        texts, labels = zip(*answers)
        shown.append(dict(texts=[row["prompt"], *texts], labels=labels, judges=[]))
    for name, pairs in scores.items():
        gaps = pairs[:, 0] - pairs[:, 1]
        often = f"{50 * (gaps[~gaps.isnan()].sgn() + 1).mean():.0f} %"
        columns = pairs.tolist(), gaps.tolist(), gaps.sigmoid().tolist()
        for row, (chosen, rejected), gap, p in zip(shown, *columns):
            said = ["✓ yes" if gap > 0 else "✗ no" if gap < 0 else "tie", often]
            said = ["–", "–"] if math.isnan(gap) else said
            row["judges"].append([name, chosen, rejected, gap, p, *said])
    return shown


def comparisons(runs: Path, names: list[str], reward, context: int, device) -> list[dict]:
    """Held-out comparisons, judged: those under runs/, or the reader's own that a run was
    trained on. None at all if there is no file."""
    own = [flags(runs / name).get("data") for name in ("reward_model", "dpo")]
    path = Path(next(filter(None, own), runs / "comparisons/comparisons.jsonl"))
    if not path.exists():
        return []
    rows = common.read_jsonl(path, ("prompt", "chosen", "rejected"), context)
    rows = common.split(rows, own=any(own))[1][:400]
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
    return judge(rows, {name: x.cpu().view(-1, 2) for name, x in scores.items()})


# ------------------------------------------------------------------------------- pictures

MARKS = {"●": "o", "▲": "^", "■": "s", "◆": "D", "▼": "v", "✚": "P", "✖": "X", "★": "*"}
INK, FAINT, COLOUR = "#f0f0ff", "#f0f0fe", "#f0f00{}"  # stand for the colours of the page


def drawn(found: dict[str, dict], traces: list[dict]) -> dict[str, dict]:
    """The runs of the pictures: look, means, path of training. base is not among them, as its
    KL is far off."""
    shown, known = {}, {run["name"]: run for run in traces}
    for i, name in enumerate(name for name in found if name != "base"):
        mark, colour = list(MARKS)[(i + i // 8) % 8], i % 8
        run = {key: found[name][key].mean().item() for key in ("kl", "reward", "gold")}
        run |= dict(mark=MARKS[mark], ink=COLOUR.format(colour), traced=known.get(name))
        shown[name] = run | dict(look={"number": f"{mark} {name}", "colour": colour})
    return shown


def picture(title: str, xlabel: str, draw, *given) -> str:
    """A panel that draw(axis, …) fills, as SVG in the colours of the page, light or dark."""
    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = dict.fromkeys(inked, INK) | {"grid.color": FAINT, "axes.grid": True, "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    style["svg.hashsalt"] = title  # ids of its own
    with matplotlib.rc_context(style):
        figure, file = Figure(figsize=(4.6, 3.4), layout="constrained"), io.StringIO()
        axis = figure.add_subplot()
        draw(axis, *given)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel(xlabel)
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue().replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(COLOUR.format("([0-7])"), r"var(--c\1)", svg[svg.index("<svg ") + 5 :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that other panels have too
    return f'<svg role="img" aria-label="{title}" {svg}'


def draw_frontier(axis, key: str, runs: dict, best: list, star: list, source: str) -> None:
    """Reward, if it is by the same source, or gold against KL: a mark for each run, its way
    through training, and two laws."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    for run in runs.values():
        trained = run["traced"]
        if trained and (key == "gold" or trained["reward"] == source):
            path = trained["path"]
            axis.plot(path["kl"], path[key], color=run["ink"], linewidth=1)
        how = dict(color=run["ink"], ms=8, clip_on=False)
        axis.plot(max(0, run["kl"]), run[key], run["mark"], **how)
    laws = {"best of n": (best, "kl", ".-"), "best of n, KL by formula": (best, "bound", "--")}
    laws |= {"π*, the ideal": (star, "kl", ":")} if key == "gold" else {}
    for label, (points, x, line) in laws.items():
        y = [point[key] for point in points]
        axis.plot([point[x] for point in points], y, line, color=INK, linewidth=1, label=label)
    for point in best[2::2]:
        place = dict(xytext=(4, -9), textcoords="offset points", fontsize=8)
        axis.annotate(f"n = {point['n']}", (point["kl"], point[key]), **place)
    axis.set_xlim(0)
    ticks = [x for x in (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128, 256) if x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, map(str, ticks))
    axis.legend(frameon=False, fontsize=8)


def draw_curve(axis, key: str, runs: list[dict]) -> None:
    """A column of metrics.csv over the course of training."""
    for run in runs:
        y = run["traced"]["path"][key]
        axis.plot(np.linspace(0, 1, len(y)), y, color=run["ink"])
        axis.plot(1, y[-1], run["mark"], color=run["ink"])


def pictures(runs: dict[str, dict], best: list, star: list, source: str) -> dict[str, str]:
    """The SVGs of parts 2 and 3. A number that no run has gets no panel."""
    parts, trained = {"frontier": "", "curves": ""}, [x for x in runs.values() if x["traced"]]
    for key in ("reward", "gold") if matplotlib else ():
        if not any(math.isnan(run[key]) for run in runs.values()):
            given = draw_frontier, key, runs, best, star, source
            parts["frontier"] += picture(f"{key} against KL", "KL(π ‖ π_ref), nats", *given)
    for key in CURVES if matplotlib else ():
        if any(not math.isnan(run["traced"]["path"][key][0]) for run in trained):
            parts["curves"] += picture(key, "share of training", draw_curve, key, trained)
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
        row += [common.win_rate(run["gold"], sft["gold"]).item(), mean["right"]]
        rows.append([*row, f"{mean['length']:.1f}", f"{mean['finished']:.3f}"])
    return [["", "reward", "gold", "KL", "win rate", "right", "length", "finished"], rows]


def missing(flags: str, best: list, traces: list[dict], pairs: list[dict]) -> dict[str, str]:
    """Part -> a sentence that says what is not there, and the command that makes it."""
    found = {}
    if not best:
        found["frontier"] = f"There is no r to choose by: python reward_model.py{flags}"
    if not traces:
        text = f"No run of ppo.py is here. This makes one: python ppo.py{flags}"
        found |= dict(curves=text, prompt=text, wrong=text)
    elif all(math.isnan(run["fall"]) for run in traces):
        found["wrong"] = "Answers to prompts of your own have no gold: read them, and judge."
    elif not any(run["fall"] > 0.25 for run in traces):
        weak = f"python reward_model.py --pairs 2000 --out rm_weak{flags}"
        weak += f"; python ppo.py --beta 0 --reward rm_weak --out ppo_weak{flags}"
        found["wrong"] = f"In no run does gold fall while reward rises. These make one: {weak}"
    if matplotlib is None:
        text = "matplotlib is not installed, so nothing is drawn here: pip install matplotlib"
        found |= dict(frontier=text, curves=text)
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
    reward, source = find_reward(runs, ["ppo", *names], device)

    # what is measured: the table, best-of-n and π*, comparisons
    found = common.closing_table(cfg, names, reward, source, prompts, device)
    asked = found["sft"]["prompts"]
    some = ([x for x in asked if x == zoo.without_opening(x)] or asked)[:84]
    print(f"\nbest of n: {SAMPLES} answers of sft to each of {len(some)} prompts")
    samples = common.evaluate(policy, policy, reward, some, cfg.max_new_tokens, n=SAMPLES)
    best, star = frontier(samples["reward"], samples["gold"])
    pairs = comparisons(runs, names, reward, policy.config.context, device)

    # what is shown: beside ppo, or another traced run, one with a low β and the same reward
    traces = [traced(runs / name) for name in names if (runs / name / "trace.jsonl").exists()]
    traces.sort(key=lambda run: run["name"] != "ppo")
    beside = sorted(traces[1:], key=lambda x: (x["beta"], x["reward"] != traces[0]["reward"]))
    worst = sorted(traces, key=lambda run: -run["fall"])
    shown = drawn(found, traces)
    looks = {x: [run["look"] for run in shown.values() if run["traced"] or x == "frontier"]
             for x in ("frontier", "curves")}  # fmt: skip
    again = f" --runs {runs}" + " --data YOUR.jsonl" * bool(cfg.data)
    about = f"{len(asked)} held-out prompts × 4 answers; reward: {source}; KL, win rate to: sft"
    page = dict(
        table=table(found, shown),
        about=f"{about}; ± is one standard error",
        legends=looks,
        traces=traces,
        chosen=[some[0]["name"] if some else None for some in (traces, beside, worst)],
        pairs=pairs,
        heads=dict(numbers=NUMBERS, story=STORY, judged=JUDGED),
        missing=missing(again, best, traces, pairs),
    )
    # numbers as short as they are shown, and null where there is none
    how = dict(parse_float=lambda x: round(float(x), 4), parse_constant=lambda _: None)
    data = json.dumps(json.loads(json.dumps(page), **how), ensure_ascii=False)
    parts = pictures(shown, best, star, source)
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
        folder = cfg.runs / cfg.text
        if not (folder / "trace.jsonl").exists():
            made = f"python ppo.py --runs {cfg.runs} --out {cfg.text} makes one"
            common.fail(f"{folder / 'trace.jsonl'} is not there; {made}")
        print(as_text(traced(folder)))
        return
    path = report(cfg)
    print(path)
    if cfg.open:
        webbrowser.open(path.as_uri())


if __name__ == "__main__":
    main()
