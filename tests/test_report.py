"""tools/report.py: best-of-n and π* against the enumerable world, the data of the page against
the runs it is about, and the page in a browser. Each test names the bug it catches."""

import json
import math
import re
import shutil
import subprocess
import webbrowser
import zlib
from decimal import ROUND_HALF_UP, Decimal
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny as world
import torch

import common
import dpo
import ppo
from data import zoo
from tools import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
EVIL = [
    "x" * 5000,
    "שלום \u202e {{frontier}} 日本🙂 $x$",
    "</textarea><!--<script>",
    "<script>document.title = 'bad'</script><img src=x>",
]
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

    def expected(law):
        law = law.nan_to_num(0)  # of what was never sampled
        kl = torch.xlogy(law, law / p).nan_to_num(0)
        return [x.sum(1).mean().item() for x in (kl, law * r, law * gold)]

    best, star = report.frontier(r.gather(1, seen), gold.gather(1, seen))
    assert [point["n"] for point in best] == [1, 2, 4, 8, 16, 32, 64]
    for point in best:
        law = torch.stack([world.best_of(point["n"], *x) for x in zip(p.double(), r)])
        found = [point[key] for key in ("kl", "reward", "gold")]
        assert found == pytest.approx(expected(law), abs=1e-6)
        assert point["bound"] == pytest.approx(math.log(point["n"]) - 1 + 1 / point["n"])
        assert point["kl"] <= point["bound"] + 1e-9
    for point, beta in zip(star, torch.logspace(1.3, -0.8, 40).tolist(), strict=True):
        law = world.optimum(p.double().log(), gold, beta)[0].exp()
        found = [point[key] for key in ("kl", "reward", "gold")]
        assert found == pytest.approx(expected(law), abs=1e-6)
    nothing = torch.full((1, 4), math.nan)
    assert report.frontier(nothing, nothing) == ([], [])


# ------------------------------------------------------------------------- the traced prompt


def test_bytes_of_a_character_are_one_piece():
    """Half a character shown as �, its log-probs lost or averaged; EOS that shows as nothing;
    a clip that the next byte forgets; an invalid byte that swallows what comes after."""
    ids = [*common.encode("aé🙂"), 4 + 0xFF, *common.encode(" owl"), common.EOS]
    n = len(ids)
    answer = dict(tokens=ids, A=[0.5] * n, logprobs=[-1.0] * n, ref_logprobs=[-3.0] * n)
    answer |= dict(ratio=[2.0] * n, clipped=[0, 1] + [0] * (n - 2))
    found = report.pieces(answer)
    assert [piece[0] for piece in found[:3]] == ["a", "é", "🙂"]
    assert [piece[0] for piece in found[-1:]] == ["EOS"]
    assert "".join(piece[0] for piece in found[3:-1]).endswith(" owl")
    assert [piece[1:] for piece in found[:3]] == [
        [0.5, -1, -3, 2, ""],
        [0.5, -2, -6, 4, "clipped"],
        [0.5, -4, -12, 16, ""],
    ]
    assert found[-1][-1] == "special"
    assert sum(piece[2] for piece in found) == -n


@pytest.mark.parametrize("estimator", ["value", "rloo", "grpo", "reinforce", "gae"])
def test_the_numbers_of_an_answer_are_those_of_the_update(call, runs, estimator):
    """A column under another's name, log π of one token, the group's mean for the others'; J of
    another step; equal answers twice; answers in an order that is not by frequency."""
    flags = f"--steps 3 --prompts 4 --samples 4 --max-new-tokens 3 --estimator {estimator}"
    rows = call(ppo, flags + " --beta 0.5 --init other")
    run, lines = (
        report.traced(runs / "ppo"),
        (runs / "ppo/trace.jsonl").read_text().splitlines(),
    )
    judge = common.load_model(runs / "reward_model", "scalar", "cpu")
    reference = common.load_model(runs / "sft", "lm", "cpu")
    assert (run["name"], run["beta"], run["batch"]) == ("ppo", 0.5, 16)
    assert all(x in run["about"] for x in (estimator, "0.5", "reward_model"))
    for step, line, row in zip(run["steps"], lines, rows, strict=True):
        for key in ("reward", "gold", "kl", "J"):
            assert step[key] == float(row[key])
        made = json.loads(line)
        assert (step["step"], step["prompt"]) == (made["step"], made["prompt"])
        returns = [y["R"] for y in made["answers"]]
        assert sum(y["times"] for y in step["answers"]) == 4
        ranks = [(y["times"], y["numbers"][1]) for y in step["answers"]]
        assert ranks == sorted(ranks, reverse=True)
        for y in step["answers"]:
            same = [i for i, x in enumerate(made["answers"]) if x["text"] == y["text"]]
            i, chat = same[0], common.chat(step["prompt"])
            tokens, mask = common.collate([(chat, made["answers"][i]["tokens"])])
            r, logp, ref_logp, kl, R, baseline, A = y["numbers"]
            assert r == pytest.approx(common.score(judge, tokens, mask).item(), abs=1e-3)
            log_ref = common.token_logprobs(reference, tokens, mask).sum().item()
            assert ref_logp == pytest.approx(log_ref, abs=1e-3)
            assert kl == pytest.approx(logp - ref_logp, abs=1e-3)
            assert R == pytest.approx(r - 0.5 * kl, abs=1e-3)
            others = [x for j, x in enumerate(returns) if j != i]
            expected = {"rloo": sum(others) / 3, "grpo": sum(returns) / 4, "reinforce": 0}
            V = made["answers"][i]["V"][0]
            assert baseline == pytest.approx(expected.get(estimator, V), abs=1e-3)
            assert A == made["answers"][i]["A"][0]
            assert y["gold"] == zoo.gold_reward(step["prompt"], y["text"], tokens[0, -1] == 0)
            assert (
                "".join(x[0] for x in y["pieces"]).removesuffix("EOS") + y["rest"] == y["text"]
            )


def traced(folder, golds, rewards, texts, **flags):
    """A run whose traced prompt has the same answers at its first step and its last, each
    likelier than the one before it."""
    rows = [f"{r},{g},{i / 10},{r}\n" for i, (r, g) in enumerate(zip(rewards, golds))]
    common.write(folder / "metrics.csv", "reward,gold,kl,J\n" + "".join(rows))
    how = dict(beta=0.25, estimator="value", reward="rm", prompts=1, samples=2) | flags
    common.write(folder / "config.json", json.dumps({"flags": how}))
    answers = []
    for text, logp in zip(texts, range(-9, 0)):
        ids = [*common.encode(text), common.EOS]
        y = dict(text=text, finished=True, r=1.0, kl=0.5, R=0.75, tokens=ids)
        columns = dict(
            A=2.5, V=0, ratio=1, clipped=0, ref_logprobs=-1, logprobs=logp / len(ids)
        )
        y |= {key: [x] * len(ids) for key, x in columns.items()}
        answers.append(y | {"clipped": [1, *y["clipped"][1:]]})
    steps = [{"step": i, "prompt": FOX, "answers": answers} for i in (0, len(golds) - 1)]
    common.write(folder / "trace.jsonl", "".join(json.dumps(step) + "\n" for step in steps))


@pytest.mark.parametrize(("last_reward", "fall"), [(3, 2), (1, 0)])
def test_over_optimisation_is_gold_down_while_reward_goes_up(tmp_path, last_reward, fall):
    """Any fall of gold, or any rise of reward; the fall from the first step; without gold a
    crash; in the story the numbers of another step, the likeliest answer of all for the most
    frequent, an answer's gold for the batch's, bars of another length."""
    gold, reward = [-1, 2, 3, 1], [-1, 1, 2, last_reward]
    traced(tmp_path, gold, reward, ["mice.", "mice.", "leaves.", "look it up. mice."])
    run = report.traced(tmp_path)
    assert run["fall"] == fall
    found = [(y["text"], y["times"]) for y in run["steps"][0]["answers"]]
    assert found == [("mice.", 2), ("look it up. mice.", 1), ("leaves.", 1)]
    for i, (step, *bars, kl, text, r, its_gold) in zip((0, 3), run["story"], strict=True):
        assert (step, kl, text, r, its_gold) == (str(i), i / 10, {"text": "mice."}, 1.0, 2.0)
        assert [bar["number"] for bar in bars] == [reward[i], gold[i]]
        assert [bar["share"] for bar in bars] == [i / 3, i / 3]
    traced(tmp_path, [""] * 4, [0, 1, 2, 3], ["mice."])
    assert math.isnan(report.traced(tmp_path)["fall"])


def test_the_last_step_as_text(runs, capsys):
    """The first step, or another run's; an equation of other numbers; a text that clears the
    screen."""
    traced(runs / "other", [1, 2, 3, 1], [0, 1, 2, 3], ["mice.\x1b[2J", "leaves.", "leaves."])
    report.main(["--text", "other", "--runs", str(runs)])
    said = capsys.readouterr().out
    assert "other, step 3 " in said
    assert "3.000 = 3.000 − 0.25 × 0.300" in said
    assert "\x1b" not in said
    numbers = r" +1.00 +-7.00 +-3.00 +0.50 +0.75 +-1.75 +2.50 +'leaves.' × 2$"
    assert re.search(f"^{numbers}", said, re.M)


# ---------------------------------------------------------------------------- a comparison


def test_a_judge_is_shown_with_what_it_says_of_both_answers():
    """P of the rejected answer, a verdict by one score, a share of other pairs, ties that count
    as wrong; an order of the answers that gives the label away; gold of a stranger's prompt."""
    rows = [{"prompt": "x", "chosen": c, "rejected": r} for c, r in ("ab", "ba", "ab", "ab")]
    scores = {"gold": torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 1.0]])}
    scores["r"] = torch.full((4, 2), math.nan)
    found = report.judge(rows, scores)
    assert [pair["texts"] for pair in found] == [["x", "a", "b"]] * 4
    assert [pair["labels"].index("✓ chosen") for pair in found] == [0, 1, 0, 0]
    gold = [pair["judges"][0] for pair in found]
    assert [row[:4] for row in gold[:2]] == [["gold", 2, 1, 1], ["gold", 0, 3, -3]]
    assert [row[4] for row in gold] == [
        pytest.approx(1 / (1 + math.exp(-x))) for x in (1, -3, 0, 4)
    ]
    assert [row[5:] for row in gold] == [[x, "62 %"] for x in ("✓ yes", "✗ no", "tie", "✓ yes")]
    assert all(pair["judges"][1][5:] == ["–", "–"] for pair in found)


# ------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "runs"


@pytest.fixture
def page(store, runs, call, monkeypatch):
    """page(*words) -> the HTML of runs/report.html and the data in it, about a folder with ppo,
    ppo at β = 0 and dpo, none of which starts from sft. 24 prompts are measured."""
    honest, flags = common.evaluate, "--max-new-tokens 4 --init other --steps 3"
    if not store.exists():
        call(ppo, f"{flags} --prompts 4 --samples 4")
        call(ppo, f"{flags} --prompts 4 --samples 4 --beta 0 --out at_0")
        call(dpo, f"{flags} --batch 8 --beta 0.7")
        shutil.copytree(runs, store)
    shutil.copytree(store, runs, dirs_exist_ok=True)

    def short(policy, reference, reward, prompts, *given, **more):
        return honest(policy, reference, reward, prompts[:24], *given, **more)

    def gold(prompt, text, finished):  # one that depends on everything
        known = prompt in zoo.QUESTIONS
        return zlib.crc32(f"{prompt}{text}{finished}".encode()) % 6 - 3.0 if known else math.nan

    monkeypatch.setattr(common, "evaluate", short)
    monkeypatch.setattr(zoo, "gold_reward", gold)

    def make(*words):
        flags = "--samples 8 --max-new-tokens 4 --device cpu".split()
        report.main(["--runs", str(runs), *flags, *words])
        html = (runs / "report.html").read_text()
        return html, json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])

    return make


@torch.no_grad()
def test_the_page_is_about_the_runs(page, runs, files):
    """A table that is not the scripts': other prompts, answers, reward, reference or errors;
    a reward model taken for a policy; best-of-n of another policy; comparisons that were
    trained on; r, or DPO's β log π/π_ref, of other answers or models; a file touched."""
    pairs = world.judged(runs)
    held = world.parted(pairs)[1]
    held[0]["chosen_finished"] = False
    lines = "".join(json.dumps(row) + "\n" for row in pairs)
    common.write(runs / "comparisons/comparisons.jsonl", lines)
    before = files()
    _, found = page()
    after = files()
    assert after.keys() - before.keys() == {str(runs / "report.html")}
    assert before.items() <= after.items()

    heads = {"lm": ("sft", "at_0", "dpo", "other", "ppo"), "scalar": ("reward_model",)}
    models = {
        x: common.load_model(runs / x, head, "cpu") for head in heads for x in heads[head]
    }
    reward = common.model_reward(models["reward_model"])
    given, tables = (models["sft"], reward, zoo.HELD_OUT_PROMPTS, 4), {}
    names, rows = found["table"]
    assert names == ["", "reward", "gold", "KL", "win rate", "right", "length", "finished"]
    assert [row[0].split()[-1] for row in rows] == list(heads["lm"])
    for name, (_, *cells) in zip(heads["lm"], rows):
        run = common.evaluate(models[name], *given, seed=zlib.crc32(name.encode()))
        tables[name], mean = run, {key: run[key].mean().item() for key in common.NUMBERS}
        groups = [zoo.QUESTIONS[prompt] for prompt in run["prompts"]]
        assert len(set(groups)) < len(groups)
        for key, cell in zip(("reward", "gold", "kl"), cells):
            error = common.standard_error(run[key], groups)
            assert [cell["number"], cell["error"]] == pytest.approx(
                [mean[key], error], abs=1e-4
            )
        win = common.win_rate(run["gold"], tables["sft"]["gold"]).item()
        assert cells[3:5] == pytest.approx([win, mean["right"]], abs=1e-4)
        assert cells[5:] == [f"{mean['length']:.1f}", f"{mean['finished']:.3f}"]
    assert "24 held-out prompts" in found["about"]

    bare = [x for x in tables["sft"]["prompts"] if x == zoo.without_opening(x)]
    samples = common.evaluate(models["sft"], models["sft"], reward, bare, 4, n=8)
    means = [samples[key].mean().item() for key in ("reward", "gold")]
    assert found["best"][1][0] == ["1", 0, 0, *(pytest.approx(x, abs=1e-4) for x in means)]

    for row, pair in zip(held[:12], found["pairs"], strict=True):
        assert pair["texts"] == [row["prompt"], *sorted([row["chosen"], row["rejected"]])]
        sides = ("chosen", "rejected")
        tokens, mask = common.collate([common.answer_ids(row, side) for side in sides])
        logp, log_ref = (common.token_logprobs(models[x], tokens, mask) for x in ("dpo", "sft"))
        finished = [row.get(f"{side}_finished", True) for side in sides]
        gold = [zoo.gold_reward(row["prompt"], row[x], y) for x, y in zip(sides, finished)]
        r = common.score(models["reward_model"], tokens, mask).tolist()
        said = {"gold": gold, "r": r}
        said["DPO"] = (0.7 * (logp - log_ref).sum(1)).tolist()
        shown = {name: scores for name, *scores, _, _, _, _ in pair["judges"]}
        assert shown == {x: pytest.approx(scores, abs=1e-3) for x, scores in said.items()}


def test_a_part_without_its_runs_names_the_command_that_makes_them(page, runs):
    """A traceback where a run is missing, a part that is empty without a word, or that is shown
    beside the word; a command that is another part's, or for other runs. Where nothing is
    missing, other runs first: ppo beside the lowest β, and what over-optimises most."""
    shutil.copytree(runs / "other", runs / "over")
    traced(runs / "over", [1, 2, 3, 1], [0, 1, 2, 3], ["mice."])
    _, found = page()
    assert [found[x] for x in ("first", "second", "worst")] == ["ppo", "at_0", "over"]
    assert found["missing"] == {}
    assert found["empty"] == []
    said = report.missing("", [1], [{"fall": 0.0}], found["pairs"])
    assert "--out rm_weak" in said["wrong"]
    for name in ("ppo", "at_0", "over", "dpo", "comparisons", "reward_model"):
        shutil.rmtree(runs / name)
    _, found = page()
    scripts = dict(frontier="reward_model", curves="ppo", prompt="ppo", wrong="ppo")
    for part, script in (scripts | {"comparison": "dpo"}).items():
        assert f"python {script}.py --runs {runs}" in found["missing"][part]
    assert sorted(found["empty"]) == ["comparison", "frontier", "prompt", "wrong"]
    assert found["table"][1][0][1]["number"] is None


def test_prompts_of_the_readers_own_have_no_gold(page, runs, tmp_path, monkeypatch):
    """A page about the zoo where the runs are not; gold of nothing, which is no JSON number;
    --open that opens nothing, or another file."""
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"prompt": "{i} + {i}?"}}\n' for i in range(12)))
    common.write(runs / "sft/config.json", json.dumps({"flags": {"data": str(path)}}))
    _, found = page("--open")
    assert opened == [(runs / "report.html").as_uri()]
    assert "2 held-out prompts" in found["about"]
    assert all(row[2]["number"] is None for row in found["table"][1])
    assert all(line[4] is None for line in found["best"][1])


@pytest.mark.parametrize("flags", ["", "--ref typo", "--reward typo", "--text sft"])
def test_what_is_not_there_is_one_line(runs, files, capsys, flags, tmp_path):
    """A typo that makes a folder, or trains; a traceback."""
    before = files()
    with pytest.raises(SystemExit) as stopped:
        report.main(["--runs", str(runs if flags else tmp_path / "typo"), *flags.split()])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert "python " in error
    assert files() == before


# ------------------------------------------------------------------------------- pictures


def test_a_mark_is_a_run_and_a_line_its_training(runs):
    """Axes or columns that are swapped; a path of rewards by another model than the table's;
    the model before π_ref drawn, or two runs alike; one law in place of another."""
    found = {name: dict.fromkeys(common.NUMBERS, torch.zeros(1, 4)) for name in ("sft", "base")}
    common.write(runs / "sft/config.json", json.dumps({"flags": {"init": "base"}}))
    for i, name in enumerate(("ppo", "weak"), 1):
        traced(runs / name, [i, i + 0.5], [3 * i, 4 * i], ["mice."], reward=f"rm_{name}")
        means = {"kl": i / 4, "reward": i + 4, "gold": i + 7}
        found[name] = {key: torch.full((1, 4), float(x)) for key, x in means.items()}
    shown = report.drawn(SimpleNamespace(runs=runs, ref="sft"), found)
    assert list(shown) == ["sft", "ppo", "weak"]
    assert len({run["mark"] for run in shown.values()}) == 3
    best, star = [dict(n=2, kl=0.5, bound=0.6, reward=70, gold=80)], [dict(kl=0.7, gold=90)]

    def lines(draw, *given):
        axis = MagicMock()
        axis.get_xlim.return_value = (0, 1)
        draw(axis, *given)
        both = [
            [np.ravel(x).tolist() for x in call.args[:2]] for call in axis.plot.call_args_list
        ]
        return sorted(both)

    given = shown, best, star, "rm_ppo"
    dots, law = [[[0], [0]], [[0.25], [5]], [[0.5], [6]]], [[[0.5], [70]], [[0.6], [70]]]
    path = [[[0, 0.1], [3, 4]]]
    assert lines(report.draw_frontier, "reward", *given) == sorted(dots + law + path)
    dots, law = [[[0], [0]], [[0.25], [8]], [[0.5], [9]]], [[[0.5], [80]], [[0.6], [80]]]
    paths = [[[0, 0.1], [1, 1.5]], [[0, 0.1], [2, 2.5]], [[0.7], [90]]]
    assert lines(report.draw_frontier, "gold", *given) == sorted(dots + law + paths)
    curves = [[[0, 1], [3, 4]], [[1], [4]], [[0, 1], [6, 8]], [[1], [8]]]
    assert lines(report.draw_curve, "reward", shown) == sorted(curves)
    assert report.curve(list(range(24))) == [2 * i + 0.5 for i in range(12)]


def test_pictures_are_svg_in_the_colours_of_the_page(page):
    """A colour that is not seen in the dark, an id that occurs twice, a panel left out."""
    pytest.importorskip("matplotlib")
    html, _ = page()
    panels = re.findall(r"<svg .*?</svg>", html, re.S)
    assert len(panels) == 7
    known = {"none", "currentColor", "var(--line)", *(f"var(--c{i})" for i in range(8))}
    for panel in panels:
        ElementTree.fromstring(panel)
        assert set(re.findall(r"(?:fill|stroke): (#\w+|[\w()-]+)", panel)) <= known
        assert "var(--c1)" in panel
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


# ------------------------------------------------------------------------------ the browser

PROBE = r"""<script>
const texts = css => all(css).map(x => x.textContent);
function choose(part, label, value) {
  const found = all(`#${part} label`).find(x => x.textContent.trim().startsWith(label));
  found.control.value = value;
  found.control.dispatchEvent(new Event("input", { bubbles: true }));
}
const look = () => all("#prompt .cards .token")
  .map(x => [x.textContent, x.style.background, x.dataset.tip, x.className]);
const found = { table: texts("#table td"), name: document.title };
found.wide = document.documentElement.scrollWidth - innerWidth;
found.hidden = all("[hidden]").map(x => x.parentElement.id);
found.steps = [0, 2].map(step => {
  choose("prompt", "step", step);
  return ["h3", "td", ".J"].map(x => texts(`#prompt ${x}`));
});
choose("prompt", "beside", "none");
choose("prompt", "policy", "evil");
for (const by of ["A", "log π − log π_ref"]) {
  choose("prompt", "colour", by);
  found[by] = look();
}
found.whole = texts("#prompt .cards .text:not(.x)");
found.worst = texts("#wrong td");
choose("wrong", "policy", "ppo");
choose("comparison", "pair", 1);
found.wrong = texts("#wrong td");
found.pair = ["h3", ".text", "td"].map(x => texts(`#comparison ${x}`));
found.made = [document.scripts.length, all("img, textarea, iframe").length];
document.body.textContent = encodeURIComponent(JSON.stringify(found));
</script>"""


def said(x) -> str:
    """A number as the page shows it."""
    x = x if isinstance(x, str) else Decimal(x).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return str(x).replace("-0.00", "0.00").replace("-", "−")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_shows_what_the_data_says(page, runs, tmp_path):
    """A control that moves nothing, or something else; numbers of another step, answer, run or
    column; a colour of the other sign, a clip without its mark; text that is read as markup, or
    cut; a page that is wider than a telephone, or that asks the network for something."""
    shutil.copytree(runs / "other", runs / "evil")
    traced(runs / "evil", [1, 2, 3, 1], [0, 1, 2, 3], EVIL)
    rows = world.judged(runs)
    for row, i in zip([row for row in rows if zoo.held_out(row["prompt"])], (0, 1)):
        row["chosen"], row["rejected"] = EVIL[i + 2], EVIL[i + 1]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    common.write(runs / "comparisons/comparisons.jsonl", lines)
    html, data = page()
    assert not re.search(r'(?:src|href)="[^#]|@import|url\((?!#)', html)
    (tmp_path / "probe.html").write_text(html.replace("</html>", PROBE))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/user"]
    command += ["--window-size=400,900", (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(unquote(re.search(r"<body>([^<]*)", dom)[1]))

    runs = {run["name"]: run for run in data["traces"]}
    name, *pairs = data["table"][1][1][:4]
    cells = [f"{said(x['number'])} ± {said(x['error'])}" for x in pairs]
    assert found["table"][8:12] == [name, *cells]
    for (titles, cells, J), i in zip(found["steps"], (0, 2)):
        steps = [runs[name]["steps"][i] for name in ("ppo", "at_0")]
        for title, name, line, step in zip(titles, ("ppo", "at_0"), J, steps, strict=True):
            assert title.startswith(f"{name}, step {i}: ")
            terms = f"{said(step['reward'])} − {runs[name]['beta']:g} · {said(step['kl'])}"
            assert f"J = reward − β · kl = {terms} = {said(step['J'])}" in line
        numbers = [y["numbers"] for step in steps for y in step["answers"]]
        assert [x for x in cells if re.fullmatch(r"−?\d+\.\d\d", x)] == [
            said(x) for row in numbers for x in row
        ]
    best = runs["evil"]["steps"][-1]["answers"]
    expected = [piece for y in best for piece in y["pieces"]]
    for by in ("A", "log π − log π_ref"):
        for (text, colour, tip, look), piece in zip(found[by], expected, strict=True):
            assert text == piece[0]
            value = piece[1] if by == "A" else piece[2] - piece[3]
            assert ("plus" if value >= 0 else "minus") in colour
            numbers = zip(("A", "log π", "log π_ref", "ρ after the step"), piece[1:5])
            assert all(f"{name} {said(x)}" in tip for name, x in numbers)
            assert {piece[5] == "clipped"} == {"clipped" in look, "clipped" in tip}
    assert {"clipped", "special", ""} == {piece[5] for piece in expected}
    assert found["whole"] == [f"{x}EOS" for x in EVIL[:0:-1]] + EVIL[:1]
    for cells, name in ((found["worst"], "evil"), (found["wrong"], "ppo")):
        story = [x if isinstance(x, dict) else {"number": x} for x in runs[name]["story"][0]]
        assert cells[:7] == [said(x.get("number", x.get("text"))) for x in story]
    pair = data["pairs"][1]
    labels, texts, judges = found["pair"]
    assert labels == pair["labels"]
    assert texts == pair["texts"]
    assert judges == [said(x) for row in pair["judges"] for x in row]
    assert found["hidden"] == []
    assert found["made"] == [3, 0]  # the page's two scripts and this test's
    assert found["name"] == "The objective at work"
    assert found["wide"] <= 0
