"""tools/report.py: best-of-n and π* against the enumerable world, the data of the page against
the runs it is about, and the page in a browser. Each test names the bugs it catches."""

import json
import math
import re
import shutil
import subprocess
import webbrowser
import zlib
from decimal import ROUND_HALF_UP, Decimal
from unittest.mock import MagicMock
from urllib.parse import unquote

import numpy as np
import pytest
import tiny as world
import torch

import common
import ppo
from data import zoo
from tools import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
EVIL = ["x" * 5000, "{{frontier}} \u2028 日本", "<!--<script>", "</script><img src=x>"]
FOX = "what does the fox eat?"  # mice


@torch.no_grad()
def test_best_of_n_and_the_ideal_are_those_of_the_enumerable_world():
    """Another power, ties that do not share, a KL that is the bound, inverted or a sum over
    prompts; gold that is r; a π* of another β. π is what 400 samples a prompt make of it."""
    p = world.logp(world.transformer(0, spread=3.0)).exp()
    seen = torch.multinomial(p, 400, True, generator=torch.Generator().manual_seed(0))
    p = torch.stack([row.bincount(minlength=p.shape[1]) for row in seen]) / 400.0
    r = (2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))).round() / 2
    gold = r.flip(1).double() + r

    def same(point, law):
        law = law.nan_to_num(0)  # of what was never sampled
        kl = torch.xlogy(law, law / p).nan_to_num(0)
        expected = [x.sum(1).mean().item() for x in (kl, law * r, law * gold)]
        assert [point[x] for x in ("kl", "reward", "gold")] == pytest.approx(expected, abs=1e-6)

    best, star = report.frontier(r.gather(1, seen), gold.gather(1, seen))
    assert [point["n"] for point in best] == [1, 2, 4, 8, 16, 32, 64]
    for point in best:
        same(point, torch.stack([world.best_of(point["n"], *x) for x in zip(p.double(), r)]))
        assert point["bound"] == pytest.approx(math.log(point["n"]) - 1 + 1 / point["n"])
    for point, beta in zip(star, torch.logspace(1.3, -0.8, 40).tolist(), strict=True):
        same(point, world.optimum(p.double().log(), gold, beta)[0].exp())


def test_bytes_of_a_character_are_shown_as_the_character():
    """Half a character shown as �, or a number that moves to another token; EOS that shows as
    nothing; a clip at another token."""
    ids = [*common.encode("aé"), 4 + 0xFF, *common.encode(" owl"), common.EOS]
    answer = dict(tokens=ids, clipped=[0, 1, 0, 0, 0, 0], ratio=range(6))
    answer |= dict.fromkeys(("A", "logprobs", "ref_logprobs"), [0] * 6)
    found = [(text, ratio, look) for text, _, _, _, ratio, look in report.pieces(answer)]
    texts, looks = ("a", "", "é", "�", " owl", "EOS"), ("", "clipped", "", "", "", "special")
    assert found == list(zip(texts, range(6), looks))


def traced(folder, golds, rewards, answers, **flags):
    """A run whose traced prompt has the same answers at its first step and its last: texts, or
    (text, R, V, A). Each is likelier than the one before it."""
    lines = ["reward,gold,kl,J,length\n"]
    for i, (r, g) in enumerate(zip(rewards, golds)):
        lines.append(f"{r},{g},{i / 10},{r - i / 40},9\n")
    common.write(folder / "metrics.csv", "".join(lines))
    how = dict(beta=0.25, estimator="value", reward="rm") | flags
    common.write(folder / "config.json", json.dumps({"flags": how}))
    said = []
    for answer, logp in zip(answers, range(-9, 0)):
        text, R, V, A = (answer, 0.75, -1.75, 2.5) if isinstance(answer, str) else answer
        ids = [*common.encode(text), common.EOS]
        columns = dict(A=A, V=V, ratio=1, ref_logprobs=-1, logprobs=logp / len(ids))
        y = {key: [x] * len(ids) for key, x in columns.items()}
        y |= dict(tokens=ids, clipped=[1] + [0] * (len(ids) - 1), r=1.0, kl=0.5, R=R)
        said.append(y | dict(text=text, finished=True))
    steps = [{"step": i, "prompt": FOX, "answers": said} for i in (0, len(golds) - 1)]
    lines = [json.dumps(step, ensure_ascii=False) + "\n" for step in steps]
    common.write(folder / "trace.jsonl", "".join(lines))


@pytest.mark.parametrize("estimator", ["value", "rloo", "grpo", "reinforce", "gae"])
def test_the_baseline_is_what_was_subtracted(tmp_path, estimator):
    """A baseline of another estimator: the group's mean for the others', V where none is used;
    grpo's, which divides, as R − A."""
    R, V = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.0, 1.5])
    baseline = {"rloo": torch.tensor([4.0, 3.5, 1.5]), "grpo": R * 0 + 3, "reinforce": R * 0}
    baseline = baseline.get(estimator, V)
    A = (R - baseline) / (R.std(correction=0) if estimator == "grpo" else 1)
    A = A * 7 if estimator == "gae" else A  # of the first token alone
    answers = zip(("mice.", "meat.", "fish."), R.tolist(), V.tolist(), A.tolist())
    traced(tmp_path, [1, 2], [1, 2], answers, estimator=estimator)
    run = report.traced(tmp_path)
    assert all(x in run["about"] for x in (f"A by {estimator}", "β = 0.25", "r by rm"))
    for y, expected in zip(reversed(run["steps"][0]["answers"]), baseline, strict=True):
        assert y["numbers"][5] == pytest.approx(expected.item())


def test_the_last_step_as_text(tmp_path, capsys):
    """The first step, or another run's; an equation of other numbers, as of the first β where
    a column says that it moves; numbers under another head; equal answers more than once; a
    text that clears the screen; curves that lose or mix steps."""
    traced(tmp_path / "it", [1, 2, 3], [-1, 2, 3], ["mice.\u2028\x1b[2J"] * 2 + ["leaves."])
    (tmp_path / "it/model.pt").touch()
    path = tmp_path / "it/metrics.csv"
    said = path.read_text().replace("length\n", "length,beta\n").replace("9\n", "9,0.5\n")
    path.write_text(said)
    report.main(["--text", "it", "--runs", str(tmp_path)])
    said = capsys.readouterr().out
    assert "it, step 2 " in said
    assert "2.950 = 3.000 − 0.5 × 0.200" in said
    heads = " +r +log π +log π_ref +kl +R +baseline +A +y\n"
    numbers = r" +1.00 +-8.00 +-10.00 +0.50 +0.75 +-1.75 +2.50 +"
    numbers += r"'mice.\\u2028\\x1b\[2J' × 2\n.*leaves"
    assert re.search(heads + numbers, said)
    assert report.curve(list(range(24))) == [2 * i + 0.5 for i in range(12)]


@pytest.fixture
def page(runs, tiny, call, monkeypatch):
    """page(*words) -> the HTML of runs/report.html, and the data in it with what went into the
    pictures. runs/ has ppo, which does not start from sft, a run at β = 0, and dpo. 24 prompts
    are measured."""
    given, evaluate = {}, common.evaluate
    call(ppo, "--max-new-tokens 4 --init other --steps 3 --prompts 4 --samples 4")
    for i, name in enumerate(("at_0", "dpo"), 5):
        common.save_model(runs / name, tiny(i))
    traced(runs / "at_0", [1, 2, 2], [1, 2, 3], ["mice."], beta=0)
    common.write(runs / "sft/config.json", '{"flags": {"max_new_tokens": 4}}')
    common.write(runs / "dpo/config.json", '{"flags": {"beta": 0.7, "ref": "sft"}}')

    def short(policy, reference, reward, prompts, *given, **more):
        return evaluate(policy, reference, reward, prompts[:24], *given, **more)

    def gold(prompt, text, finished):  # one that depends on everything
        known = prompt in zoo.QUESTIONS
        return zlib.crc32(f"{prompt}{text}{finished}".encode()) % 6 - 3.0 if known else math.nan

    def pictures(*args):
        given.update(zip(("shown", "best", "star", "source"), args))
        return dict(frontier="<svg>frontier</svg>", curves="<svg>curves</svg>")

    monkeypatch.setattr(common, "evaluate", short)
    monkeypatch.setattr(zoo, "gold_reward", gold)
    monkeypatch.setattr(report, "SAMPLES", 8)
    monkeypatch.setattr(report, "pictures", pictures)

    def make(*words):
        report.main(["--runs", str(runs), *words])
        html = (runs / "report.html").read_text()
        return html, json.loads(re.search("const data = (.*);", html)[1]) | given

    return make


@torch.no_grad()
def test_the_page_is_about_the_runs(page, runs, save, files):
    """A table that is not the scripts': other prompts, answers, reward, reference or errors;
    a reward model taken for a policy; best-of-n of another policy; comparisons that were
    trained on; r, or DPO's β log π/π_ref, of other answers or models; P of the rejected one;
    another run before ppo; a file touched."""
    pairs = world.judged(runs)
    held = world.parted(pairs)[1]
    held[0]["chosen_finished"] = False
    save("comparisons", pairs)
    before = files()
    html, found = page()
    assert [x for x, y in files().items() if before.get(x) != y] == [str(runs / "report.html")]
    assert re.findall("<svg>(.*?)</svg>", html) == ["frontier", "curves"]
    assert [run["name"] for run in found["traces"]] == ["ppo", "at_0"]

    names = ("sft", "at_0", "dpo", "other", "ppo")
    models = {name: common.load_model(runs / name, "lm", "cpu") for name in names}
    judge, tables = common.load_model(runs / "reward_model", "scalar", "cpu"), {}
    given = models["sft"], common.model_reward(judge), zoo.HELD_OUT_PROMPTS, 4
    heads, rows = found["table"]
    assert heads == ["", "reward", "gold", "KL", "win rate", "right", "length", "finished"]
    for name, (look, *cells) in zip(names, rows, strict=True):
        assert look["number"].split()[-1] == name
        run = common.evaluate(models[name], *given, seed=zlib.crc32(name.encode()))
        mean, tables[name] = {key: run[key].mean().item() for key in common.NUMBERS}, run
        groups = [zoo.QUESTIONS[prompt] for prompt in run["prompts"]]
        for key, cell in zip(("reward", "gold", "kl"), cells):
            expected = [mean[key], common.standard_error(run[key], groups)]
            assert [cell["number"], cell["error"]] == pytest.approx(expected, abs=1e-4)
        win = common.win_rate(run["gold"], tables["sft"]["gold"]).item()
        rest = [win, mean["right"], mean["length"], mean["finished"]]
        assert cells[3:] == pytest.approx(rest, abs=1e-4)
    assert "24 held-out prompts × 4 answers; reward: reward_model;" in found["about"]

    some = tables["sft"]["prompts"][::4]
    samples = common.evaluate(models["sft"], *given[:2], some, 4, n=8)
    assert (found["best"], found["star"]) == report.frontier(samples["reward"], samples["gold"])

    lines = (runs / "ppo/trace.jsonl").open()
    for step, line in zip(found["traces"][0]["steps"], map(json.loads, lines), strict=True):
        assert (step["step"], step["prompt"]) == (line["step"], line["prompt"])
        assert sum(y["times"] for y in step["answers"]) == 4
        said = {(step["prompt"], y["text"], y["finished"]) for y in line["answers"]}
        golds = sorted(y["gold"] for y in step["answers"])
        assert golds == sorted(zoo.gold_reward(*answer) for answer in said)

    for row, pair in zip(held[:12], found["pairs"], strict=True):
        sides = ("chosen", "rejected")
        assert all(pair[key] == row[key] for key in ("prompt", *sides))
        tokens, mask = common.collate([common.answer_ids(row, side) for side in sides])
        logp, log_ref = (common.token_logprobs(models[x], tokens, mask) for x in ("dpo", "sft"))
        finished = [row.get(f"{side}_finished", True) for side in sides]
        gold = [zoo.gold_reward(row["prompt"], row[x], y) for x, y in zip(sides, finished)]
        r, implicit = common.score(judge, tokens, mask), 0.7 * (logp - log_ref).sum(1)
        expected = {"gold": gold, "r": r.tolist(), "DPO": implicit.tolist()}
        for (name, *numbers), (key, said) in zip(pair["judges"], expected.items(), strict=True):
            gap = said[0] - said[1]
            said += [gap, 1 / (1 + math.exp(-gap))]
            assert (name, numbers) == (key, pytest.approx(said, abs=1e-3))


def test_a_part_without_its_runs_names_the_command_that_makes_them(page, runs):
    """A traceback where a run is missing, or a number that is not there; a part that is empty
    without a word, or with the command of another part or for other runs."""
    assert page()[1]["missing"] == {}
    for name in ("ppo", "at_0", "dpo", "comparisons", "reward_model"):
        shutil.rmtree(runs / name)
    _, found = page()
    assert (found["traces"], found["pairs"]) == ([], [])
    assert math.isnan(found["table"][1][0][1]["number"])
    assert "reward: none yet" in found["about"]
    scripts = dict(frontier="reward_model", curves="ppo", prompt="ppo", wrong="ppo")
    for part, script in (scripts | {"comparison": "dpo"}).items():
        assert f"python {script}.py --runs {runs}" in found["missing"][part]


def test_rows_of_the_readers_own_have_no_gold(page, runs, mine, tmp_path, monkeypatch):
    """A page about the zoo where the runs are not; gold of nothing; another reward than the
    reader's; --open that opens nothing, or another file."""
    opened, (path, _, held) = [], mine
    monkeypatch.setattr(webbrowser, "open", opened.append)
    (tmp_path / "r.py").write_text("def seven(completions): return [7] * len(completions)")
    made = {"sft": {"max_new_tokens": 4}, "dpo": {"beta": 1, "ref": "sft"}}
    made["ppo"] = {"reward": f"{tmp_path}/r.py:seven"}
    for name, flags in made.items():
        flags["data"] = str(path)
        common.write(runs / name / "config.json", json.dumps({"flags": flags}))
    (runs / "ppo/trace.jsonl").unlink()
    _, found = page("--open")
    assert opened == [(runs / "report.html").as_uri()]
    asked = {row["prompt"] for row in held}
    assert f"{len(asked)} held-out prompts × 4 answers; reward: r.py:seven;" in found["about"]
    for _, reward, gold, *_ in found["table"][1]:
        assert reward["number"] == 7
        assert math.isnan(gold["number"])
    assert [pair["prompt"] for pair in found["pairs"]] == [row["prompt"] for row in held[:12]]


def test_what_is_not_there_is_one_line(tmp_path, stops):
    """A typo that makes a folder, or trains; a traceback."""
    error = stops(report.main, ["--runs", f"{tmp_path}/typo"])
    assert f"python sft.py --runs {tmp_path}/typo" in error


def test_a_mark_is_a_run_and_a_line_its_training(runs, monkeypatch):
    """Axes or columns that are swapped; a path of rewards by another model than the table's;
    the model before π_ref drawn, or two runs alike; one law in place of another; a panel left
    out; a traceback without matplotlib, or where there is no gold."""
    found = {name: dict.fromkeys(common.NUMBERS, torch.zeros(1, 4)) for name in ("sft", "base")}
    for i, name in enumerate(("ppo", "weak"), 1):
        traced(runs / name, [i, i + 0.5], [3 * i, 4 * i], ["mice."], reward=f"rm_{name}")
        means = {"kl": i / 4, "reward": i + 4, "gold": i + 7}
        found[name] = {key: torch.full((1, 4), float(x)) for key, x in means.items()}
    shown = report.drawn(found, [report.traced(runs / name) for name in ("weak", "ppo")])
    assert list(shown) == ["sft", "ppo", "weak"]
    assert len({(run["mark"], run["look"]["number"][0]) for run in shown.values()}) == 3
    best, star = [dict(n=2, kl=0.5, bound=0.6, reward=70, gold=80)], [dict(kl=0.7, gold=90)]

    def lines(draw, *given):
        axis = MagicMock()
        axis.get_xlim.return_value = (0, 1)
        draw(axis, *given)
        calls = (call.args[:2] for call in axis.plot.call_args_list)
        return sorted([np.ravel(x).tolist() for x in xy] for xy in calls)

    given = shown, best, star, "rm_ppo"
    dots, law = [[[0], [0]], [[0.25], [5]], [[0.5], [6]]], [[[0.5], [70]], [[0.6], [70]]]
    path = [[[0, 0.1], [3, 4]]]
    assert lines(report.draw_frontier, "reward", *given) == sorted(dots + law + path)
    dots, law = [[[0], [0]], [[0.25], [8]], [[0.5], [9]]], [[[0.5], [80]], [[0.6], [80]]]
    paths = [[[0, 0.1], [1, 1.5]], [[0, 0.1], [2, 2.5]], [[0.7], [90]]]
    assert lines(report.draw_frontier, "gold", *given) == sorted(dots + law + paths)
    curves = [[[0, 1], [3, 4]], [[1], [4]], [[0, 1], [6, 8]], [[1], [8]]]
    trained = [shown["ppo"], shown["weak"]]
    assert lines(report.draw_curve, "reward", trained) == sorted(curves)

    pytest.importorskip("matplotlib")
    for run in shown.values():
        run["gold"] = math.nan
    parts = report.pictures(*given)
    assert [parts[x].count("<svg ") for x in ("frontier", "curves")] == [2, 5]
    monkeypatch.setattr(report, "matplotlib", None)
    assert all("pip install" in part for part in report.pictures(*given).values())


PROBE = r"""<script>
const texts = css => all(css).map(x => x.textContent);
function choose(part, label, value) {
  const found = all(`#${part} label`).find(x => x.textContent.trim().startsWith(label));
  found.control.value = value;
  found.control.dispatchEvent(new Event("input", { bubbles: true }));
}
const found = { table: texts("#table td") };
found.wide = document.documentElement.scrollWidth - innerWidth;
found.steps = [0, 2].map(step => {
  choose("prompt", "step", step);
  return ["h3", "td", ".J"].map(x => texts(`#prompt ${x}`));
});
choose("prompt", "beside", "none");
choose("prompt", "policy", "evil");
for (const by of ["A", "log π − log π_ref"]) {
  choose("prompt", "colour", by);
  found[by] = all(".cards .token").map(
    x => [x.textContent, x.style.background, x.dataset.tip, x.className]);
}
choose("wrong", "policy", "evil");
found.story = texts("#wrong td");
choose("comparison", "pair", 1);
found.pair = [".text", "td"].map(x => texts(`#comparison ${x}`));
found.symbols = all("button").map(x => [x.textContent, x.dataset.tip, x.tabIndex]);
const right_key = new KeyboardEvent("keydown", { key: "ArrowRight" });
one("#prompt .cards .text:not(.x)").dispatchEvent(right_key);
found.focus = document.activeElement.textContent;
found.made = all("img, textarea, iframe").length;
document.body.textContent = encodeURIComponent(JSON.stringify(found));
</script>"""


def said(x) -> str:
    """A number as the page shows it."""
    x = x if isinstance(x, str) else Decimal(x).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return str(x).replace("-0.00", "0.00").replace("-", "−")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_shows_what_the_data_says(page, runs, save, tmp_path):
    """A control that moves nothing, or something else; another run than the lowest β beside
    ppo; numbers of another step, answer, run or column; a colour of the other sign, a clip
    without its mark; text that is read as markup, or cut; a symbol that explains nothing, or
    not to the keyboard; a page that is wider than a telephone, or asks the network."""
    shutil.copytree(runs / "other", runs / "evil")
    traced(runs / "evil", [1, 2, 3, 2], [-1, 1, 2, 3], EVIL)
    rows = world.judged(runs)
    for row, i in zip([row for row in rows if zoo.held_out(row["prompt"])], (0, 1)):
        row["chosen"], row["rejected"] = EVIL[i + 2], EVIL[i + 1]
    save("comparisons", rows)
    html, data = page()
    assert not re.search(r'(?:src|href)="[^#]|@import|url\((?!#)', html)
    (tmp_path / "probe.html").write_text(html.replace("</html>", PROBE))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/user"]
    command += ["--window-size=400,900", (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    found = json.loads(unquote(re.search(r"<body>([^<]*)", dom)[1]))

    runs = {run["name"]: run for run in data["traces"]}
    look, *pairs = data["table"][1][1][:4]
    cells = [f"{said(x['number'])} ± {said(x['error'])}" for x in pairs]
    assert found["table"][8:12] == [look["number"], *cells]
    for (titles, cells, J), i in zip(found["steps"], (0, 2)):
        steps = [runs[name]["steps"][: i + 1][-1] for name in ("ppo", "at_0")]
        for title, name, line, step in zip(titles, ("ppo", "at_0"), J, steps, strict=True):
            assert title.startswith(f"{name}, step {step['step']}: ")
            terms = f"{said(step['reward'])} − {runs[name]['beta']:g} · {said(step['kl'])}"
            assert f"J = reward − β · kl = {terms} = {said(step['J'])}" in line
        numbers = [x for step in steps for y in step["answers"] for x in y["numbers"]]
        shown = [x for x in cells if re.fullmatch(r"−?\d+\.\d\d", x)]
        assert shown == [said(x) for x in numbers]
    last = runs["evil"]["steps"][-1]["answers"]
    expected = [piece for y in last for piece in y["pieces"]]
    for by in ("A", "log π − log π_ref"):
        for (text, colour, tip, look), piece in zip(found[by], expected, strict=True):
            assert text == piece[0]
            value = piece[1] if by == "A" else piece[2] - piece[3]
            assert ("plus" if value >= 0 else "minus") in colour
            numbers = zip(("A", "log π", "log π_ref", "ρ after the step"), piece[1:5])
            assert all(f"{name} {said(x)}" in tip for name, x in numbers)
            assert {piece[5] == "clipped"} == {"clipped" in look, "clipped" in tip}
    assert {"clipped", "special", ""} == {piece[5] for piece in expected}
    step = runs["evil"]["steps"][0]
    y, numbers = step["answers"][0], [said(step[key]) for key in ("reward", "gold", "kl")]
    numbers += [y["text"], said(y["numbers"][0]), said(y["gold"])]
    assert found["story"][:7] == ["0", *numbers]
    pair, (texts, judges) = data["pairs"][1], found["pair"]
    assert texts == [pair["prompt"], pair["chosen"], pair["rejected"]]
    words = {1: "✓ yes", 0: "tie", -1: "✗ no"}
    agrees = ["–" if math.isnan(x[3]) else words[np.sign(x[3])] for x in pair["judges"]]
    judges_said = zip(pair["judges"], agrees)
    assert judges == [said(x) for row, word in judges_said for x in (*row, word)]
    explained = {word for word, *_ in found["symbols"]}
    assert {*report.NUMBERS, "J", "reward", "β", "KL", "gold", "win rate"} <= explained
    assert all(tip and index == 0 for _, tip, index in found["symbols"])
    assert found["focus"] == expected[0][0]
    assert found["made"] == 0
    assert found["wide"] <= 0
