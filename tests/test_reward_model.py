"""reward_model.py: Bradley-Terry by hand, centring, accuracy beside its ceiling, whole runs."""

import json
import math
import re

import pytest
import torch

import common
import reward_model

TINY = "--epochs 1 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "loss"),
    [
        (0.7, 0.7, 0.0, math.log(2)),  # chance
        (math.log(3), 0.0, 0.0, math.log(4 / 3)),  # σ(ln 3) = 3/4
        (0.0, math.log(3), 0.0, math.log(4)),  # the wrong way round
        (math.log(3), 0.0, math.log(3), math.log(2)),  # just as far ahead as was asked
        (
            math.log(3),
            0.0,
            2 * math.log(3),
            math.log(4),
        ),  # less than was asked
        (-500.0, 500.0, 0.0, 1000.0),  # log(sigmoid(x)) would be −inf
    ],
)
def test_bradley_terry_by_hand(chosen, rejected, margin, loss):
    scores = torch.tensor([[chosen, rejected], [0.0, 0.0]])
    found = reward_model.bradley_terry_loss(*scores.unbind(1), margin)
    assert found.shape == (2,)
    assert found[0].item() == pytest.approx(loss)


def test_bradley_terry_gradient_is_how_wrong_it_was():
    """∂L/∂r_c = −σ(r_r − r_c): towards chosen, and little where it is sure already."""
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([0.0, 5.0], [0.0, 0.0]))
    reward_model.bradley_terry_loss(chosen, rejected).sum().backward()
    expected = [-0.5, -1 / (1 + math.exp(5))]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-x for x in expected])


def test_each_answer_of_a_pair_is_scored_as_if_alone(tiny, pairs):
    """Chosen and rejected swapped by a reshape; a score read from padding; EOS left out."""
    model, rows = tiny(0, "scalar"), pairs(9)
    found = reward_model.pair_scores(model, *reward_model.encode_pairs(rows, CPU))
    for side, scores in zip(("chosen", "rejected"), found):
        for row, r in zip(rows, scores.tolist()):
            ids = common.chat(row["prompt"]) + common.encode(row[side]) + [common.EOS]
            with torch.no_grad():
                assert r == pytest.approx(model(torch.tensor([ids]))[0, -1].item(), abs=1e-5)


def test_padding_and_the_order_of_pairs_change_no_gradient(tiny, pairs):
    """Losses that depend on who else is in the batch."""

    def gradient(rows, pad):
        model = tiny(0, "scalar")
        tokens, mask = reward_model.encode_pairs(rows, CPU)
        tokens = torch.nn.functional.pad(tokens, (0, pad), value=common.PAD)
        mask = torch.nn.functional.pad(mask, (0, pad))
        scores = reward_model.pair_scores(model, tokens, mask)
        reward_model.bradley_terry_loss(*scores).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = pairs(6)
    assert (gradient(rows, 0) - gradient(rows[::-1], 7)).abs().max() < 1e-5


class Gold:
    """Stands for a reward model: ± the gold reward of each row's answer, at every position."""

    device = CPU

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, tokens, keep):
        chats = [row[: row.index(common.EOS)] for row in tokens.tolist()]
        at = [ids.index(common.ASSISTANT) for ids in chats]
        texts = [(common.decode(ids[:i]), common.decode(ids[i:])) for ids, i in zip(chats, at)]
        gold = torch.tensor([self.sign * common.gold_reward(*text, True) for text in texts])
        return gold[:, None].expand(tokens.shape)[keep]


@pytest.mark.parametrize("sign", [1, -1])
def test_accuracy_stands_beside_a_ceiling_free_of_label_noise(sign):
    """With the gold reward as scores accuracy is the ceiling, mean σ(|Δgold|), whatever the
    labels; with its negative, 1 − ceiling. Ties in gold have no order."""
    right, wrong = "in the plains.", "in the jungle."  # gold 2 and −1
    sides = [(right, wrong)] * 3 + [(wrong, right), (right, "the plains.")]
    prompt = "where does the zebra live?"
    rows = [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in sides]
    said = reward_model.accuracy(Gold(sign), rows)
    ceiling = (4 / (1 + math.exp(-3)) + 0.5) / 5
    expected = [3 / 5, ceiling, ceiling, 1] if sign > 0 else [1 / 5, 1 - ceiling, ceiling, 0]
    found = [float(x) for x in re.findall(r"\d\.\d{3}", said)]
    assert found == pytest.approx(expected, abs=6e-4)


def test_a_run_learns_is_centred_and_repeats_itself(repeats, runs, moved):
    """A score whose level is arbitrary; a policy trained along; a seed that is not set."""
    rows = repeats(reward_model, f"{TINY} --epochs 10 --lr 0.01")
    first, last = (
        sum(float(row["loss"]) for row in part) / 7 for part in (rows[:7], rows[-7:])
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


def test_own_data_is_centred_on_its_chosen_answers(call, runs, tmp_path):
    """The world's demonstrations would say nothing about another alphabet."""
    rows = [{"prompt": f"где {i}?", "chosen": "там" + "!" * (i % 4), "rejected": "нет"}
            for i in range(40)]  # fmt: skip
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(reward_model, f"{TINY} --data {data} --out new")
    model = common.load_model(runs / "new", "scalar", CPU)
    ids = [common.answer_ids(row, "chosen") for row in common.split(rows)[0]]
    with torch.no_grad():
        assert abs(common.score(model, *common.collate(ids)).mean().item()) < 1e-5


def test_pairs_and_epochs_mean_what_they_say(call):
    """--pairs 20 --epochs 3: ⌈20 / 8⌉ batches an epoch."""
    assert len(call(reward_model, f"{TINY} --pairs 20 --epochs 3 --out new")) == 9


def test_old_and_new_comparisons_train_together(call, runs, pairs):
    second = "".join(json.dumps(row) + "\n" for row in pairs(50))
    common.write(runs / "second/comparisons.jsonl", second)
    alone = call(reward_model, f"{TINY} --out new")
    both = call(reward_model, f"{TINY} --out new --comparisons comparisons,second")
    assert len(both) > 1.5 * len(alone)


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    assert "step 2: the loss is nan" in diverges(reward_model, TINY, "bradley_terry_loss", 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--beta 1", "unrecognized arguments: --beta 1"),
        ("--margin -1", "--margin -1.0: a number ≥ 0 is needed"),
        ("--pairs 0", "--pairs 0: a number ≥ 1 is needed"),
        ("--init nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--init reward_model", "holds a reward model, and a policy is needed"),
        ("--comparisons comparisons,nowhere", "nowhere/comparisons.jsonl is not there"),
        ("--data nowhere.jsonl", "nowhere.jsonl:0: cannot be read"),
        ("--policy nowhere --comparisons none", "nowhere/model.pt is not there; make it with"),
        ("--policy other", "there are no new --comparisons to collect"),
        ("--out sft", "--out sft: other runs start from it"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags, says):
    assert says in refused(reward_model, flags)
