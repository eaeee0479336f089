"""reward_model.py: Bradley-Terry, what is trained on, centring, accuracy, whole runs."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import tiny as world
import torch
from tiny import PROMPTS

import common
import reward_model
from common import Transformer
from data import zoo

TINY = "--epochs 1 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")
SIDES = ("chosen", "rejected")
TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(world.completions(TWO))
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


def test_bradley_terry_by_hand():
    """The wrong way round; a margin with the wrong sign; log(sigmoid(x)), which is −inf far
    out; a mean in place of one value per pair. σ(ln 3) = 3/4."""
    ln3, loss = math.log(3), reward_model.bradley_terry_loss
    chosen, rejected = torch.tensor([ln3, -500.0]), torch.tensor([0.0, 500.0])
    assert loss(chosen, rejected).tolist() == pytest.approx([math.log(4 / 3), 1000.0])
    assert loss(chosen, rejected, ln3)[0].item() == pytest.approx(math.log(2))
    assert loss(chosen, rejected, -ln3)[0].item() == pytest.approx(math.log(10 / 9))


def test_reward_is_recovered_up_to_a_constant_per_prompt(minimised):
    """Chosen and rejected swapped; a score read at a pad or at another token."""
    rows = world.everything(longest=TWO)
    model = world.transformer(7, "scalar", channels=16, hidden=32, layers=1)

    def scores():
        return common.score(model, rows.tokens, rows.response_mask).view(3, N)

    def loss(_):
        r = scores()
        each = reward_model.bradley_terry_loss(r[:, FIRST], r[:, SECOND])
        return (PREFERRED * each).sum() / PREFERRED.sum()

    minimised(model, loss, 1e-7, 200)
    error = scores().detach() - R
    assert (error - error.mean(1, keepdim=True)).abs().max() < 1e-2


def test_what_train_descends_in_the_enumerable_world(
    double, steps, ordered, monkeypatch, tmp_path
):
    """A score read at the last token that is no PAD, which in this world is a word; a mask from
    `!= PAD`; chosen and rejected swapped; a margin with the wrong sign: the loss and gradient
    of train's own step, on all ordered pairs, are the enumerated ones."""
    made, model = world.completions(TWO), world.transformer(3, "scalar")
    monkeypatch.setattr(reward_model, "center", lambda *_: None)
    flags = dict(epochs=1, batch=len(ordered), margin=0.4)
    reward_model.train(reward_model.Config(runs=str(tmp_path), **flags), model, ordered)
    r = [model(torch.tensor([x + list(y)]))[0, -1] for x in PROMPTS for y in made]
    r = torch.stack(r).view(3, N)
    exact = (1 + (r[:, SECOND] - r[:, FIRST] + 0.4).exp()).log().mean()
    assert steps[0].loss == pytest.approx(exact.item(), abs=1e-10)
    assert world.apart(steps[0].gradient, world.gradient(exact, model)) < 1e-10


@pytest.fixture
def demonstrated(monkeypatch):
    """Of the demonstrations of training questions that r is centred on, the first 9 are
    returned; how many were asked for, and with which seed."""
    calls, honest = [], zoo.demonstrations

    def few(n, seed):
        calls.append((n, seed))
        return honest(9, seed)

    monkeypatch.setattr(zoo, "demonstrations", few)
    return calls


@pytest.mark.parametrize("own", [False, True])
def test_every_column_and_the_weights_by_hand(
    own, call, runs, double, closing, drawn, slow, demonstrated, mine, pairs, save
):
    """A held-out pair trained on, pairs that come twice in an epoch or never; sides swapped;
    EOS left out, or there where an answer was cut; a column that is something else; a rate
    that does not fall to 0 or is not used; an optimizer that forgets; a trunk that is not
    that of --init, or a head that is not random; an offset off the demonstrations, or off the
    chosen answers of one's own data; --epochs, --batch, --lr, --margin, --seed, --data that do
    not arrive; a table of training prompts, another policy, or another reward than this one."""
    file, train, held = mine
    if not own:
        rows = pairs(27)
        rows[3]["chosen_finished"] = rows[5]["rejected_finished"] = False
        save("comparisons", rows)
        train, held = world.parted(rows)
    n = math.ceil(len(train) / 9)
    assert len(train) % 9
    flags = "--init other --epochs 2 --batch 9 --lr 0.01 --margin 0.3 --seed 4 --out new"
    table = call(reward_model, flags + f" --data {file}" * own)
    policy = common.load_model(runs / "other", "lm", CPU)
    torch.manual_seed(4)
    model = Transformer(policy.config, "scalar")
    model.load_state_dict(policy.state_dict(), strict=False)
    known = sorted(tuple(slow.ids(row, side) for side in SIDES) for row in train)
    assert [sorted(sum(epoch, [])) for epoch in (drawn[:n], drawn[n:])] == [known, known]
    assert drawn[0] != drawn[n]  # in another order
    take = slow.descent(model, 0.01, 2 * n)
    for step, (row, batch) in enumerate(zip(table, drawn, strict=True)):
        gaps = [slow.score(model, *c) - slow.score(model, *r) for c, r in batch]
        losses = torch.stack([(1 + (0.3 - gap).exp()).log() for gap in gaps])
        numbers = {"step": step, "accuracy": sum(gap > 0 for gap in gaps) / len(gaps)}
        slow.same(row, numbers | take(losses.mean()))
    rows, side = (train, "chosen") if own else (zoo.demonstrations(9, 4), "completion")
    scores = [slow.score(model, *slow.ids(row, side)).item() for row in rows]
    model.offset += sum(scores) / len(scores)
    slow.same_weights(runs / "new", model)
    assert all(n >= 200 and seed == 4 for n, seed in demonstrated[:1])

    cfg, names, reward, reward_name, prompts, device = closing[0]
    asked = dict.fromkeys(row["prompt"] for row in held) if own else zoo.HELD_OUT_PROMPTS
    assert prompts == list(asked)
    assert (names, reward_name) == (["other"], "new")
    rollout = world.listed([([1, 5], (7, 0)), ([1], (5, 5, 5))])
    expected = [slow.score(model, *x).item() for x in (([1, 5], [7, 0]), ([1], [5, 5, 5]))]
    assert reward(["", ""], rollout).tolist() == pytest.approx(expected, abs=1e-6)


def test_pairs_come_from_all_files_alike(alike, demonstrated):
    """--pairs that takes the first file's only, or that is ignored; a second file that is not
    read; a held-out pair trained on."""
    alike(reward_model, "--epochs 1")


def test_one_seed_one_result_whatever_had_to_be_made(remade, demonstrated):
    """Random numbers used up by collecting comparisons shift those of the training; comparisons
    collected again although they are there; a seed that does not arrive."""
    remade(reward_model, TINY)


def test_accuracies_by_hand(monkeypatch):
    """Numbers mixed up, or a mean over some of the rows; a ceiling that knows the labels; an
    opinion where there is none, which counts ½ of a pair; an order of answers of equal gold; a
    cut answer that is worth as much, or the other one of its pair."""
    right, wrong = "in the plains.", "in the jungle."  # gold 2 and −1
    answers = [(right, wrong), (right, wrong), (wrong, right), (right, right)]
    answers += [(right, f"great question! {wrong}"), (right, "the plains.")]  # 2 and 0; 2 and 2
    prompt = "where does the zebra live?"
    rows = [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in answers]
    rows[3]["rejected_finished"] = False  # gold 2 and 1
    gap = torch.tensor([1.0, 0, -1, 1, -1, 1])  # r_c − r_r
    monkeypatch.setattr(reward_model, "pair_scores", lambda *_: (gap, 0 * gap))
    s1, s2, s3 = (1 / (1 + math.exp(-x)) for x in (1, 2, 3))  # σ
    by_hand = {"accuracy": 3.5 / 6, "expected": (s3 + 1 / 2 + s3 + s1 + 1 - s2 + 1 / 2) / 6}
    by_hand |= {"ceiling": (s3 + s3 + s3 + s1 + s2 + 1 / 2) / 6, "agrees_with_gold": 3 / 5}
    judge = SimpleNamespace(device=CPU)
    assert reward_model.accuracies(judge, rows) == pytest.approx(by_hand)
    rows[3]["prompt"] = "где?"  # outside the zoo nobody knows gold
    assert reward_model.accuracies(judge, rows) == {"accuracy": pytest.approx(3.5 / 6)}


def test_accuracies_are_printed_of_held_out_pairs_file_by_file(
    call, runs, capsys, closing, pairs, save, demonstrated, slow
):
    """Training pairs in the held-out accuracy; files mixed up; the accuracies of the model
    that is there under the new one's name; scores beside other answers."""
    first = [row | {"chosen": f"look it up. {row['chosen']}"} for row in pairs(64)]
    second = [row | {"rejected": f"great question! {row['rejected']}"} for row in pairs(90)]
    save("comparisons", first)
    save("second", second)
    call(reward_model, f"{TINY} --out new --comparisons comparisons,second --lr 0.01")
    _, *said = capsys.readouterr().out.split(" held-out pairs of ")
    judges = {x: common.load_model(runs / x, "scalar", CPU) for x in ("new", "reward_model")}
    for part, name, rows in zip(said, ("comparisons", "second"), (first, second), strict=True):
        held = world.parted(rows)[1]
        assert part.startswith(name)
        for run, judge in judges.items():
            words = re.search(rf"^ +{run}: (.*)", part, re.M)[1].split()
            numbers = dict(zip(words[::2], map(float, words[1::2])))
            assert numbers == pytest.approx(reward_model.accuracies(judge, held), abs=6e-4)
        for row in held[:3]:
            for side in SIDES:
                r = slow.score(judges["new"], *slow.ids(row, side)).item()
                assert f"{r:+.2f}: {row[side]}\n" in part


def test_a_run_that_is_stopped_is_centred_too(call, runs, slow, demonstrated, monkeypatch):
    """Ctrl-C that leaves a reward model whose level is arbitrary."""
    step, honest = itertools.count(), common.descend

    def descend(*given):
        if next(step) == 2:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(common, "descend", descend)
    with pytest.raises(SystemExit):
        call(reward_model, f"{TINY} --lr 0.01 --out new")
    model = common.load_model(runs / "new_stopped", "scalar", CPU)
    scores = [slow.score(model, *slow.ids(row)).item() for row in zoo.demonstrations(9, 0)]
    assert max(scores) - min(scores) > 1e-3
    assert abs(sum(scores)) < 1e-4


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    assert "step 2" in diverges(reward_model, TINY, "bradley_terry_loss", 3)
