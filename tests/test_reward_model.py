"""reward_model.py: Bradley-Terry, what is trained on, centring, accuracy, whole runs."""

import json
import math
import random
import re

import pytest
import tiny as world
import torch
from tiny import NAMES, PROMPTS

import common
import reward_model
from common import ASSISTANT, EOS, PAD, USER, Transformer

TINY = "--epochs 1 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")
TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(world.completions(TWO))
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


# ------------------------------------------------------------------------------- the maths


def test_bradley_terry_by_hand():
    """The wrong way round; a margin with the wrong sign; log(sigmoid(x)), which is −inf far
    out; a mean in place of one value per pair. σ(ln 3) = 3/4."""
    ln3 = math.log(3)
    chosen, rejected = torch.tensor([ln3, -500.0]), torch.tensor([0.0, 500.0])
    loss = reward_model.bradley_terry_loss(chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(4 / 3), 1000.0])
    asked = [
        reward_model.bradley_terry_loss(chosen, rejected, m)[0].item() for m in (ln3, 2 * ln3)
    ]
    assert asked == pytest.approx([math.log(2), math.log(4)])


def test_bradley_terry_gradient_is_how_wrong_it_was():
    """∂L/∂r_c = −σ(r_r − r_c): towards chosen, and little where it is sure already."""
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([0.0, 5.0], [0.0, 0.0]))
    reward_model.bradley_terry_loss(chosen, rejected).sum().backward()
    expected = [-0.5, -1 / (1 + math.exp(5))]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-x for x in expected])


def test_reward_is_recovered_up_to_a_constant_per_prompt():
    """Chosen and rejected swapped; a score read at a pad or at another token."""
    rows = world.listed([(x, y) for x in PROMPTS for y in world.completions(TWO) for _ in "cr"])
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    model = world.transformer(7, "scalar", channels=16, hidden=32, layers=1)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=250,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def scores():  # each completion stands twice, as its own pair
        chosen, rejected = reward_model.pair_scores(model, tokens, mask)
        assert (chosen - rejected).abs().max() < 1e-12
        return chosen.view(3, N)

    def closure():
        optimizer.zero_grad()
        r = scores()
        loss = reward_model.bradley_terry_loss(r[:, FIRST], r[:, SECOND])
        value = (PREFERRED * loss).sum() / PREFERRED.sum()
        value.backward()
        return value

    optimizer.step(closure)
    error = scores().detach() - R
    assert (error - error.mean(1, keepdim=True)).abs().max() < 1e-2


def test_what_train_descends_in_the_enumerable_world(double, steps, monkeypatch, tmp_path):
    """A score read at the last token that is no PAD, which in this world is a word; a mask from
    `!= PAD`; chosen and rejected swapped; a margin with the wrong sign: the gradient of train's
    own step, on all ordered pairs, is the enumerated one."""
    made, model = world.completions(TWO), world.transformer(3, "scalar")
    ids = lambda row, side: (world.chat(row["prompt"]), list(made[row[side]]))  # noqa: E731
    monkeypatch.setattr(common, "answer_ids", ids)
    monkeypatch.setattr(reward_model, "center", lambda *_: None)
    sides = list(zip(FIRST.tolist(), SECOND.tolist()))
    rows = [dict(prompt=x, chosen=c, rejected=r) for x in NAMES for c, r in sides]
    cfg = reward_model.Config(runs=str(tmp_path), epochs=1, batch=len(rows), margin=0.4)
    reward_model.train(cfg, model, rows)
    r = torch.stack(
        [model(torch.tensor([x + list(y)]))[0, -1] for x in PROMPTS for y in made]
    ).view(3, N)
    exact = (1 + (r[:, SECOND] - r[:, FIRST] + 0.4).exp()).log().mean()
    assert steps[0].loss == pytest.approx(exact.item(), abs=1e-10)
    assert world.apart(steps[0].gradient, world.gradient(exact, model)) < 1e-10


def alone(model, row, side):
    """r of one answer, unpadded; EOS is its last token, unless it was cut off."""
    end = [EOS] * row.get(f"{side}_finished", True)
    ids = [USER, *common.encode(row["prompt"]), ASSISTANT, *common.encode(row[side]), *end]
    return model(torch.tensor([ids]))[0, -1]


def test_each_answer_of_a_pair_is_scored_as_if_alone(tiny, pairs):
    """Chosen and rejected swapped by a reshape; a score read from padding; EOS left out, or
    there where the answer was cut off."""
    model, rows = tiny(0, "scalar"), pairs(9)
    rows[4]["rejected_finished"] = False
    found = reward_model.pair_scores(model, *common.encode_pairs(rows, CPU))
    for side, scores in zip(("chosen", "rejected"), found):
        for row, r in zip(rows, scores.tolist()):
            assert r == pytest.approx(alone(model, row, side).item(), abs=1e-5)


def test_padding_and_the_order_of_pairs_change_no_gradient(tiny, pairs):
    """Losses that depend on who else is in the batch."""

    def gradient(rows, pad):
        model = tiny(0, "scalar")
        tokens, mask = common.encode_pairs(rows, CPU)
        tokens = torch.nn.functional.pad(tokens, (0, pad), value=PAD)
        mask = torch.nn.functional.pad(mask, (0, pad))
        scores = reward_model.pair_scores(model, tokens, mask)
        reward_model.bradley_terry_loss(*scores).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = pairs(6)
    assert (gradient(rows, 0) - gradient(rows[::-1], 7)).abs().max() < 1e-5


# ----------------------------------------------------------------- a whole script, by hand


@pytest.fixture
def demonstrated(monkeypatch):
    """Of the 1000 demonstrations that r is centred on the first 9 are drawn; the arguments."""
    calls, honest = [], common.demonstrations

    def few(n, seed):
        calls.append((n, seed))
        return honest(9, seed)

    monkeypatch.setattr(common, "demonstrations", few)
    return calls


@pytest.fixture
def mine(tmp_path):
    """--data: 40 pairs in another alphabet. Returns the file and its rows."""
    rows = [{"prompt": f"где {i}?", "chosen": "там" + "!" * (i % 4), "rejected": "нет"}
            for i in range(40)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.jsonl", rows


@pytest.mark.parametrize("own", [False, True])
def test_every_column_and_the_weights_by_hand(
    own, call, runs, double, closing, demonstrated, mine
):
    """A column of metrics.csv that is something else; held-out pairs trained on; --init,
    --epochs, --margin or --lr that does not arrive, or with the wrong sign; a head that is
    not random; an offset off the demonstrations, or off the chosen answers of one's own data;
    a learning rate that does not fall to 0: three passes, as AdamW alone does them."""
    file, rows = mine
    train, _ = world.parted(rows if own else world.judged(runs))
    flags = f"--data {file}" if own else ""
    flags += " --init other --epochs 3 --batch 99 --lr 0.01 --margin 0.3 --seed 4 --out new"
    table = call(reward_model, flags)
    torch.manual_seed(4)
    policy = common.load_model(runs / "other", "lm", CPU)
    model = Transformer(policy.config, "scalar")
    model.load_state_dict(policy.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    assert len(table) == 3
    for step, row in enumerate(table):
        chosen, rejected = (
            torch.stack([alone(model, row, side) for row in train])
            for side in ("chosen", "rejected")
        )
        loss, lr = (1 + (rejected - chosen + 0.3).exp()).log().mean(), 0.01 * (3 - step) / 3
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        optimizer.step()
        by_hand = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        by_hand["accuracy"] = sum(map(float.__gt__, chosen.tolist(), rejected.tolist()))
        by_hand["accuracy"] /= len(train)
        assert {k: float(v) for k, v in row.items()} == pytest.approx(by_hand, rel=2e-5)
    new = common.load_model(runs / "new", "scalar", CPU)
    for name, weight in new.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=1e-9)
    if own:
        scores = [alone(model, row, "chosen").item() for row in train]
    else:
        rows = common.demonstrations(9, 4)
        scores = [alone(model, row, "completion").item() for row in rows]
        assert demonstrated[0] == (1000, 4)
    assert new.offset.item() == pytest.approx(sum(scores) / len(scores), abs=1e-9)


def test_pairs_come_from_all_files_alike(call, steps, closing, runs, pairs, demonstrated):
    """--pairs that takes the first file's only, or that is ignored; --batch or --epochs that
    is; a second file that is not read; a held-out pair trained on, or a pair in no epoch."""
    second = [row | {"chosen": "green."} for row in pairs(100)]
    lines = "".join(json.dumps(row) + "\n" for row in second)
    common.write(runs / "second/comparisons.jsonl", lines)
    both = "--comparisons comparisons,second --out new --batch 7"
    rows = call(reward_model, f"{both} --pairs 60 --epochs 2")
    assert [len(step.mask) for step in steps].count(7) == 2 * 8
    assert len(rows) == len(steps) == 2 * math.ceil(60 / 7)
    epochs = [sum(map(world.pair_texts, part), []) for part in (steps[:9], steps[9:])]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 60
    texts = [
        {(row["prompt"], row["chosen"], row["rejected"]) for row in world.parted(some)[0]}
        for some in (world.judged(runs), second)
    ]
    of_second = len(set(epochs[0]) & texts[1])
    assert len(set(epochs[0]) & texts[0]) + of_second == 60
    assert 60 * 0.45 < of_second < 60 * 0.75  # 100 of 164 pairs
    steps.clear()
    call(reward_model, f"{both} --epochs 1")  # all of them
    assert {pair for step in steps for pair in world.pair_texts(step)} == texts[0] | texts[1]


def test_missing_comparisons_are_answers_of_init(
    call, steps, closing, runs, pairs, monkeypatch
):
    """Comparisons collected from another model than --init, or as many as they happen to be;
    a file that is there collected anew; random numbers used up on the way."""
    made = []

    def collect(policy, n, path):
        made.append((policy.embed.weight.clone(), n, path))
        torch.rand(3), random.random()
        lines = "".join(json.dumps(row) + "\n" for row in pairs(50))
        common.write(path, lines)

    monkeypatch.setattr(common, "collect_comparisons", collect)
    flags = f"{TINY} --init other --out new --comparisons"
    call(reward_model, f"{flags} comparisons,fresh")
    other = common.load_model(runs / "other", "lm", CPU)
    assert [(n, path) for _, n, path in made] == [
        (common.PAIRS, runs / "fresh/comparisons.jsonl")
    ]
    assert torch.equal(made[0][0], other.embed.weight)
    first = (runs / "new/metrics.csv").read_bytes()
    call(reward_model, f"{flags} comparisons,fresh")
    assert len(made) == 1
    assert (runs / "new/metrics.csv").read_bytes() == first


# --------------------------------------------------------------------- accuracy and its ceiling


class Scores:
    """Stands for a reward model: a number for each (prompt, answer, finished), at every
    position."""

    device = CPU

    def __init__(self, function):
        self.function = function

    def __call__(self, tokens, keep):
        numbers = []
        for row in tokens.tolist():
            ids = row[: row.index(PAD)] if PAD in row else row
            end, at = ids[-1] == EOS, ids.index(ASSISTANT)
            numbers.append(self.function(common.decode(ids[:at]), common.decode(ids[at:]), end))
        return torch.tensor(numbers)[:, None].expand(tokens.shape)[keep]


RIGHT, WRONG = "in the plains.", "in the jungle."  # gold 2 and −1
SIDES = [(RIGHT, WRONG)] * 3 + [(WRONG, RIGHT), (RIGHT, "the plains.")]


def zebra(sides):
    prompt = "where does the zebra live?"
    return [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in sides]


@pytest.mark.parametrize("sign", [1, -1])
def test_accuracy_stands_beside_a_ceiling_free_of_label_noise(sign):
    """With the gold reward as scores accuracy is the ceiling, mean σ(|Δgold|), whatever the
    labels; with its negative, 1 − ceiling. Ties in gold have no order; a cut answer is worth
    1 less."""
    rows = zebra(SIDES)
    rows += [rows[0] | {"rejected": RIGHT, "rejected_finished": False}]  # gold 2 and 1
    judge = Scores(lambda *answer: sign * common.gold_reward(*answer))
    s3, s1 = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))
    ceiling = (4 * s3 + 0.5 + s1) / 6
    by_hand = {"labels": 4 / 6 if sign > 0 else 1 / 6, "ceiling": ceiling}
    by_hand |= {"accuracy": ceiling if sign > 0 else 1 - ceiling, "order": float(sign > 0)}
    assert reward_model.accuracies(judge, rows) == pytest.approx(by_hand, abs=1e-6)


def test_accuracies_of_a_judge_that_is_sometimes_wrong():
    """labels and order mixed up; a mean over some of the rows, which are scored 256 at a time.
    The judge likes long answers: of 6 pairs it has no opinion on 4, and orders one as labelled
    (a tie in gold) and one as gold does."""
    rows = zebra([*SIDES, ("blue.", "it is in the plains.")] * 60)
    s = 1 / (1 + math.exp(-3))
    by_hand = {"labels": 1 / 6, "accuracy": (4 * 0.5 + 0.5 + s) / 6}
    by_hand |= {"ceiling": (5 * s + 0.5) / 6, "order": 1 / 5}
    found = reward_model.accuracies(Scores(lambda _, answer, __: float(len(answer))), rows)
    assert found == pytest.approx(by_hand, abs=1e-6)


def test_ones_own_pairs_have_no_gold(mine):
    """A gold reward made up where there is none."""
    found = reward_model.accuracies(Scores(lambda _, x, __: float(len(x))), mine[1])
    assert found == {"labels": 30 / 40}  # "там" is no longer than "нет"


def test_accuracies_are_of_held_out_pairs_file_by_file(
    call, runs, capsys, closing, pairs, demonstrated
):
    """Training pairs in the held-out accuracy; files mixed up; the accuracies of the model
    that is there under the new one's name."""
    second = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(90)]
    lines = "".join(json.dumps(row) + "\n" for row in second)
    common.write(runs / "second/comparisons.jsonl", lines)
    call(reward_model, f"{TINY} --out new --comparisons comparisons,second --lr 0.01")
    said = capsys.readouterr().out.split("held-out pairs of ")
    files = (world.judged(runs), "comparisons"), (second, "second")
    for part, (rows, name) in zip(said[1:], files):
        assert part.startswith(name)
        for run in ("reward_model", "new"):
            model = common.load_model(runs / run, "scalar", CPU)
            found = reward_model.accuracies(model, world.parted(rows)[1])
            printed = re.search(rf"^ +{run}: (.*)", part, re.M)[1].split()
            numbers = dict(zip(printed[::2], map(float, printed[1::2])))
            assert numbers == pytest.approx(found, abs=6e-4)
    held = world.parted(world.judged(runs))[1]
    assert int(said[0].rsplit("\n", 1)[1]) == len(held)
    for row in held[:3]:  # model is the new one
        for side in ("chosen", "rejected"):
            assert f"{alone(model, row, side):+.2f}: {row[side]}\n" in said[-1]


@pytest.mark.parametrize("own", [False, True])
def test_the_closing_table_asks_held_out_prompts(own, call, closing, runs, mine, steps):
    """A table of training prompts, of another policy than --init, or with another reward than
    the model that was just trained."""
    file, rows = mine
    call(reward_model, f"{TINY} --init other --out new" + f" --data {file}" * own)
    cfg, names, reward, reward_name, prompts, device = closing[0]
    held = [x for x in common.QUESTIONS if common.held_out(x)]
    assert prompts == ([row["prompt"] for row in world.parted(rows)[1]] if own else held)
    assert names == ["other"]
    model = common.load_model(runs / "new", "scalar", CPU)
    rollout = world.listed([(PROMPTS[0], (2, 3, 0)), (PROMPTS[2], (1,))])
    found = reward(["", ""], rollout).tolist()
    ids = [[*PROMPTS[0], 2, 3, 0], [*PROMPTS[2], 1]]
    alone = [model(torch.tensor([x]))[0, -1].item() for x in ids]
    assert found == pytest.approx(alone, abs=1e-5)
    assert reward_name == "new"


# ------------------------------------------------------------------------------- whole runs


def test_a_run_learns_is_centred_and_repeats_itself(repeats, runs, moved):
    """A score whose level is arbitrary; a policy trained along; a seed that is not set."""
    rows = repeats(reward_model, f"{TINY} --epochs 10 --lr 0.01")
    n = len(rows) // 10
    first, last = (
        sum(float(row["loss"]) for row in part) / n for part in (rows[:n], rows[-n:])
    )
    assert first == pytest.approx(math.log(2), abs=0.2)
    assert last < 0.3
    assert not any(moved())
    model = common.load_model(runs / "new", "scalar", CPU)
    ids = [common.answer_ids(row) for row in common.demonstrations(1000, 0)]
    with torch.no_grad():
        scores = common.score(model, *common.collate(ids))
    assert abs(scores.mean().item()) < 1e-5
    assert scores.std() > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    assert "step 2" in diverges(reward_model, TINY, "bradley_terry_loss", 3)


@pytest.mark.parametrize(
    "flags",
    [
        "--beta 1",
        "--margin -1",
        "--pairs 0",
        "--init nowhere",
        "--init reward_model",
        "--data nowhere.jsonl",
        "--data nowhere.jsonl --comparisons other",
        "--init nowhere --comparisons missing",
        "--comparisons a/b",
        "--out sft",
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags):
    """A flag that is ignored; what is wrong said after training, or over many lines."""
    refused(reward_model, f"{TINY} {flags}")
