"""The runs at a glance: the closing table over all of them, and a page, runs/report.html.

    python -m tools.report --open     the table, and the page in a browser
    python -m tools.report --text     the last traced step of ppo; --text RUN: of another run

On the page, which needs neither server nor network: the table; reward and gold against KL,
beside best-of-n and π*; learning curves; one prompt through training; how it goes wrong; a
comparison as the annotator saw it. A part without its runs names the command that makes them.
matplotlib, if it is installed, draws the curves.

Every policy has a row, also one that was stopped; reward models have none. Prompts are held-out
ones of the data that π_ref was made of, unless --data gives others.
"""

import csv
import importlib.util
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
from tools.sample import find, find_reward, parser, where

# ------------------------------------------------------------------------- what runs leave


def flags(folder: Path) -> dict:
    """The flags that a run was made with."""
    path = folder / "config.json"
    return json.loads(path.read_text("utf-8"))["flags"] if path.exists() else {}


def metrics(folder: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv; an empty cell is NaN."""
    path = folder / "metrics.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    return {key: [float(row[key] or "nan") for row in rows] for key in (rows or [{}])[0]}


def curve(values: list[float]) -> list[float]:
    """A column as a dozen means, as single steps are noisy."""
    return [part.mean().item() for part in np.array_split(values, min(12, len(values)))]


def policies(runs: Path) -> dict[str, int]:
    """The runs that are policies, each with the context length of its model."""
    found = {}
    for path in sorted(runs.glob("*/model.pt")):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["head"] == "lm":
            found[path.parent.name] = saved["config"]["context"]
    return found


# ------------------------------------------------------------------------- best-of-n and π*
# Laws on m samples of π_ref to each of M prompts: the weight of each sample, (M, m) -> (M, m).


def best_of_n(r: Tensor, n: int) -> Tensor:
    """π_n(y) = π(y) (F(y)ⁿ − F⁻(y)ⁿ) / (F(y) − F⁻(y)), with F(y) = P(r(Y) ≤ r(y)) and
    F⁻(y) = P(r(Y) < r(y)): the best of n, where answers of equal reward share."""
    upto = (r[:, None] <= r[:, :, None]).double().mean(2)
    below = (r[:, None] < r[:, :, None]).double().mean(2)
    return (upto**n - below**n) / (upto - below) / r.shape[1]


def ideal(gold: Tensor, beta: float) -> Tensor:
    """π*(y) ∝ π_ref(y) e^{gold(y)/β}: eq:dpo_opt_policy."""
    return (gold.double() / beta).softmax(1)


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
        star.append(bargain(ideal(gold, beta), r, gold))
    return [] if r.isnan().any() else best, [] if gold.isnan().any() else star


# ------------------------------------------------------------------- one prompt, step by step

NUMBERS = ("r", "log π", "log π_ref", "kl", "R", "baseline", "A")


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
        parts = pieces(y)
        same["pieces"] = parts[:160]
        same["rest"] = "".join(text for text, *_, look in parts[160:] if look != "special")
    return sorted(found.values(), key=lambda y: (-y["times"], -y["numbers"][1]))


def traced(folder: Path) -> dict:
    """A run with a trace.jsonl: what its traced prompt went through. `fall` is how far gold
    fell from its peak while reward rose; NaN where there is no gold."""
    made, columns, steps = flags(folder), metrics(folder), []
    for line in (folder / "trace.jsonl").read_text("utf-8").splitlines():
        step = json.loads(line)
        batch = {key: columns[key][step["step"]] for key in ("reward", "gold", "kl", "J")}
        answers = distinct(step, made["estimator"])
        steps.append(dict(step=step["step"], prompt=step["prompt"], answers=answers) | batch)
    gold, reward = curve(columns["gold"]), curve(columns["reward"])
    top = int(np.argmax(gold))
    fall = gold[top] - gold[-1] if reward[-1] > reward[top] else 0 * gold[-1]
    run = dict(name=folder.name, steps=steps, story=story(steps), fall=fall)
    run["reward"] = Path(made["reward"]).name
    run["about"] = f"A by {made['estimator']}, β = {made['beta']}, r by {run['reward']}"
    return run | dict(beta=made["beta"], batch=made["prompts"] * made["samples"])


STORY = ("step", "reward", "gold", "kl", "likeliest answer", "its r", "its gold")


def story(steps: list[dict]) -> list[list]:
    """A row a step, with its likeliest answer; reward and gold have bars."""
    rows, bars = [], {}
    for key in ("reward", "gold"):
        column = [step[key] for step in steps]
        low, high = min(0, *column), max(column)
        bars[key] = [(x - low) / (high - low or 1) for x in column]
    for i, step in enumerate(steps):
        y, row = step["answers"][0], [str(step["step"])]
        row += [{"number": step[key], "share": bars[key][i]} for key in bars]
        rows.append([*row, step["kl"], {"text": y["text"]}, y["numbers"][0], y["gold"]])
    return rows


def as_text(run: dict) -> str:
    """The last traced step: its answers, and J."""
    step, wide = run["steps"][-1], "{:>11}".format
    lines = [f"{run['name']}, step {step['step']}   x: {step['prompt']!r}   {run['about']}"]
    lines.append("".join(map(wide, NUMBERS)) + "   y")
    for y in step["answers"]:
        times = f" × {y['times']}" if y["times"] > 1 else ""
        lines.append(
            "".join(wide(f"{x:.2f}") for x in y["numbers"]) + f"   {y['text']!r}{times}"
        )
    terms = f"{step['J']:.3f} = {step['reward']:.3f} − {run['beta']} × {step['kl']:.3f}"
    return "\n".join([*lines, f"\nJ = reward − β kl over the batch: {terms}"])


# ---------------------------------------------------------------------------- a comparison

JUDGED = ("", "chosen", "rejected", "gap", "P(chosen)", "agrees", "how often")


def judge(rows: list[dict], scores: dict[str, Tensor]) -> list[dict]:
    """Comparisons as the page shows them, the answers in an order that says nothing, and what
    each judge says: its scores, (B, 2), chosen first, whether it agrees with the label that
    was drawn, and how often it does, a tie counting ½."""
    shown = []
    for row in rows[:12]:
        answers = sorted([(row["chosen"], "✓ chosen"), (row["rejected"], "rejected")])
        texts, labels = zip(*answers)
        shown.append(dict(texts=[row["prompt"], *texts], labels=labels, judges=[]))
    for name, pairs in scores.items():
        gaps = pairs[:, 0] - pairs[:, 1]
        often = (gaps[~gaps.isnan()].sgn() + 1).mean() / 2
        columns = pairs.tolist(), gaps.tolist(), gaps.sigmoid().tolist()
        for row, (chosen, rejected), gap, p in zip(shown, *columns):
            agrees = "✓ yes" if gap > 0 else "✗ no" if gap < 0 else "tie" if gap == 0 else "–"
            share = f"{100 * often:.0f} %" if gap == gap else "–"
            row["judges"].append([name, chosen, rejected, gap, p, agrees, share])
    return shown


def comparisons(cfg, names: list[str], reward, context: int, device) -> list[dict]:
    """Held-out comparisons, judged: those under --runs, or the reader's own that a run was
    trained on. None at all if there is no file."""
    runs = Path(cfg.runs)
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

CURVES = ("J", "reward", "kl", "gold", "length")
MARKS = {"●": "o", "▲": "^", "■": "s", "◆": "D", "▼": "v", "✚": "P", "✖": "X", "★": "*"}
INK, FAINT, COLOUR = "#f0f0ff", "#f0f0fe", "#f0f00{}"  # stand for the colours of the page


def drawn(cfg, found: dict[str, dict]) -> dict[str, dict]:
    """The runs of the pictures: look, means, path of training. The model that π_ref was made
    from is not among them, as its KL is far off."""
    runs, first = {}, flags(Path(cfg.runs) / cfg.ref).get("init")
    for i, name in enumerate(name for name in found if name != first):
        columns = metrics(Path(cfg.runs) / name)
        runs[name] = {key: found[name][key].mean().item() for key in ("kl", "reward", "gold")}
        known = CURVES if len(set(columns.get("kl", ()))) > 1 else ()  # a single round is none
        runs[name]["path"] = {key: curve(columns[key]) for key in known if key in columns}
        runs[name]["reward by"] = Path(flags(Path(cfg.runs) / name).get("reward") or "").name
        runs[name] |= dict(mark=list(MARKS)[(i + i // 8) % 8], colour=i % 8)
    return runs


def picture(title: str, xlabel: str, draw, *given) -> str:
    """A panel that draw(axis, …) fills, as SVG in the colours of the page, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot there is no window and no backend

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = dict.fromkeys(inked, INK) | {"grid.color": FAINT, "axes.grid": True, "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    style |= {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure, file = Figure(figsize=(4.6, 3.4), layout="constrained"), io.StringIO()
        axis = figure.add_subplot()
        draw(axis, *given)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel(xlabel)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue().replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(COLOUR.format("([0-7])"), r"var(--c\1)", svg[svg.index("<svg ") + 5 :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that other panels have too
    return f'<svg role="img" aria-label="{title}" {svg}'


def draw_frontier(axis, key: str, runs: dict, best: list, star: list, source: str) -> None:
    """Reward, if it is by the same source, or gold against KL: a mark for each run, its way
    through training, and two laws."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    for run in runs.values():
        path, colour = run["path"], COLOUR.format(run["colour"])
        if {"kl", key} <= path.keys() and (key == "gold" or run["reward by"] == source):
            axis.plot(path["kl"], path[key], color=colour, linewidth=1)
        axis.plot(max(0, run["kl"]), run[key], MARKS[run["mark"]], color=colour, ms=8)
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


def draw_curve(axis, key: str, runs: dict[str, dict]) -> None:
    """A column of metrics.csv over the course of training."""
    for run in (run for run in runs.values() if key in run["path"]):
        y, colour = run["path"][key], COLOUR.format(run["colour"])
        axis.plot(np.linspace(0, 1, len(y)), y, color=colour)
        axis.plot(1, y[-1], MARKS[run["mark"]], color=colour)


def pictures(runs: dict[str, dict], best: list, star: list, source: str) -> dict[str, str]:
    """The SVGs of parts 2 and 3. A number that no run has gets no panel."""
    parts = {"frontier": "", "curves": ""}
    if importlib.util.find_spec("matplotlib") is None:
        return parts
    for key in ("reward", "gold"):
        if not any(math.isnan(run[key]) for run in runs.values()):
            given = draw_frontier, key, runs, best, star, source
            parts["frontier"] += picture(f"{key} against KL", "KL(π ‖ π_ref), nats", *given)
    for key in CURVES:
        if not all(math.isnan(run["path"].get(key, [math.nan])[0]) for run in runs.values()):
            parts["curves"] += picture(key, "share of training", draw_curve, key, runs)
    return parts


# ------------------------------------------------------------------------------- the page


def table(found: dict, ref: str, runs: dict) -> list:
    """The closing table, with the marks of the runs that are drawn."""
    groups, rows = [zoo.QUESTIONS.get(prompt, prompt) for prompt in found[ref]["prompts"]], []
    for name, run in found.items():
        mean = {key: run[key].mean().item() for key in common.NUMBERS}
        rows.append([f"{runs[name]['mark']} {name}" if name in runs else name])
        for key in common.NUMBERS[:3]:
            error = common.standard_error(run[key], groups)
            rows[-1].append({"number": mean[key], "error": error})
        rows[-1] += [common.win_rate(run["gold"], found[ref]["gold"]).item(), mean["right"]]
        rows[-1] += [f"{mean['length']:.1f}", f"{mean['finished']:.3f}"]
    return [["", "reward", "gold", "KL", "win rate", "right", "length", "finished"], rows]


def missing(again: str, best: list, traces: list[dict], pairs: list[dict]) -> dict[str, str]:
    """Part -> a sentence that says what is not there, and the command that makes it."""
    found = {}
    if not best:
        found["frontier"] = (
            f"Without a reward model no n has a best: python reward_model.py{again}"
        )
    if not traces:
        text = f"No run of ppo.py is here. This makes one: python ppo.py{again}"
        found |= dict(curves=text, prompt=text, wrong=text)
    elif all(math.isnan(run["fall"]) for run in traces):
        found["wrong"] = "Answers to prompts of your own have no gold: read them, and judge."
    elif not any(run["fall"] > 0.25 for run in traces):
        weak = f"python reward_model.py --pairs 2000 --out rm_weak{again}"
        weak += f"; python ppo.py --beta 0 --reward rm_weak --out ppo_weak{again}"
        found["wrong"] = (
            f"In no run here does gold fall while reward rises. These make one: {weak}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        text = "matplotlib is not installed, so nothing is drawn here: pip install matplotlib"
        found |= dict(frontier=text, curves=text)
    if not pairs:
        found["comparison"] = f"No comparisons are here. This makes some: python dpo.py{again}"
    elif len(pairs[0]["judges"]) < 3:
        found["comparison"] = (
            f"Not all judges are here: python reward_model.py{again}; python dpo.py{again}"
        )
    return found


def plain(x):
    """As JSON has it: numbers rounded, and null where there is none."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, float):
        return round(x, 4) if math.isfinite(x) else None
    return [plain(value) for value in x] if isinstance(x, list | tuple) else x


def write_page(path: Path, page: dict, **parts: str) -> None:
    """report.html with `page` as its data. No text in the data can end the script."""
    data = json.dumps(plain(page), ensure_ascii=False, allow_nan=False)
    parts["data"] = data.replace("<", "\\u003c")
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    common.write(path, re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template))


@torch.no_grad()
def report(cfg) -> Path:
    """Measure, print the table, write the page."""
    runs = Path(cfg.runs)
    sft, again = find(cfg.runs, cfg.ref), where(cfg.runs)
    device, contexts = common.pick_device(cfg.device), policies(runs)
    names, context = [cfg.ref, *sorted(contexts.keys() - {cfg.ref})], min(contexts.values())
    cfg.data = cfg.data or flags(sft).get("data")
    again += " --data YOUR.jsonl" if cfg.data else ""
    prompts = common.read_prompts(cfg, context)[1]
    if cfg.reward is None and (runs / "reward_model/model.pt").exists():
        cfg.reward = "reward_model"
    reward = find_reward(cfg, cfg.reward, device) if cfg.reward else None
    source = Path(cfg.reward).name if cfg.reward else "none yet"

    # what is measured: the table, best-of-n and π*, comparisons
    cfg.init = cfg.ref  # beside whose answers the table shows those of the newest run
    cfg.out = max(names, key=lambda name: (runs / name / "model.pt").stat().st_mtime)
    found = common.closing_table(cfg, names, reward, source, prompts, device)
    asked, policy = found[cfg.ref]["prompts"], common.load_model(sft, "lm", device)
    bare = [x for x in asked if x == zoo.without_opening(x)]  # each question once
    some = (bare or asked)[:84]
    print(f"\nbest of n: {cfg.samples} answers of {cfg.ref} to each of {len(some)} prompts")
    samples = common.evaluate(policy, policy, reward, some, cfg.max_new_tokens, n=cfg.samples)
    best, star = frontier(samples["reward"], samples["gold"])
    pairs = comparisons(cfg, names, reward, context, device)

    # what is shown: beside ppo, or another traced run, one with a low β and the same reward
    traces = [traced(runs / name) for name in names if (runs / name / "trace.jsonl").exists()]
    first = min(traces, key=lambda run: run["name"] != "ppo", default=None)
    others = [run for run in traces if run is not first]
    second = min(
        others, key=lambda x: (x["beta"], x["reward"] != first["reward"]), default=None
    )
    worst = max(traces, key=lambda run: run["fall"], default=None)
    shown = drawn(cfg, found)
    looks = {x: [f"{run['mark']} {x}", f"var(--c{run['colour']})"] for x, run in shown.items()}
    curved = [looks[name] for name, run in shown.items() if run["path"]]
    bought = [[str(x["n"]), x["kl"], x["bound"], x["reward"], x["gold"]] for x in best]
    parts = dict(frontier=best, prompt=traces, wrong=traces, comparison=pairs)
    page = {
        "table": table(found, cfg.ref, shown),
        "about": f"{len(asked)} held-out prompts × 4 answers; reward: {source}; KL, win rate "
        f"to: {cfg.ref}; ± is one standard error",
        "colours": [looks[name][1] if name in looks else "inherit" for name in found],
        "legends": {"frontier": list(looks.values()), "curves": curved},
        "best": [["n", "KL", "log n − (n−1)/n", "reward", "gold"], bought],
        "traces": traces,
        "pairs": pairs,
        "heads": {"numbers": NUMBERS, "story": STORY, "judged": JUDGED},
        "missing": missing(again, best, traces, pairs),
        "empty": [part for part, there in parts.items() if not there],
    }
    chosen = {"first": first, "second": second, "worst": worst}
    page |= {key: run and run["name"] for key, run in chosen.items()}
    write_page(runs / "report.html", page, **pictures(shown, best, star, source))
    return runs / "report.html"


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    about = "only print the last traced step of a run (default: ppo)"
    options.add_argument("--text", nargs="?", const="ppo", metavar="RUN", help=about)
    options.add_argument("--open", action="store_true", help="open the page in a browser")
    options.add_argument("--ref", default="sft", help="π_ref (default: sft)")
    options.add_argument(
        "--reward", help="r: a run, or FILE.py:function (default: reward_model)"
    )
    options.add_argument("--data", help="held-out prompts from your own JSONL of {prompt}")
    options.add_argument("--max-new-tokens", type=int, default=24, help="(default: 24)")
    about = "answers to each prompt, for best-of-n and π* (default: 256)"
    options.add_argument("--samples", type=int, default=256, help=about)
    options.add_argument("--device", default="auto")
    cfg = options.parse_args(words)
    if cfg.text:
        folder = Path(cfg.runs) / cfg.text
        if not (folder / "trace.jsonl").exists():
            made = f"python ppo.py{where(cfg.runs)} makes one"
            common.fail(f"{folder / 'trace.jsonl'} is not there; {made}")
        print(as_text(traced(folder)))
        return
    path = report(cfg)
    print(path)
    if cfg.open:
        webbrowser.open(path.as_uri())


if __name__ == "__main__":
    main()
