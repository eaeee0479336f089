"""sft.py: what carries gradient, the loss by hand, whole runs, wrong command lines."""

import json

import pytest
import torch

import common
import sft
from common import ASSISTANT, EOS, PAD, USER

TINY = "--steps 3 --batch 8 --demonstrations 60 --max-new-tokens 3 --init other"


def test_loss_is_the_mean_over_the_batchs_tokens_not_over_rows():
    """A mean of row means gives a short row's tokens more weight; here it would be 3.5."""
    logprobs = torch.tensor([[0.0, -1, -2, -3], [-9, -5, -9, -9]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert sft.sft_loss(logprobs, mask).item() == pytest.approx((1 + 2 + 3 + 5) / 4)


class Logits:
    """Stands for a model: its logits are leaves, so that each position's gradient shows."""

    def __init__(self, B, T):
        self.logits = torch.randn(B, T, common.VOCAB_SIZE, requires_grad=True)

    def __call__(self, tokens, keep):
        return self.logits[:, : tokens.shape[1]][keep]


def test_prompts_and_pads_carry_no_gradient_and_eos_does():
    """pad = eos, a mask from `!= pad`, or off by one: the model never learns to stop."""
    rows = [
        {"prompt": "a b", "completion": "c"},
        {"prompt": "a", "completion": "c d e f"},
        {"prompt": "a", "completion": "cut", "completion_finished": False},
    ]
    tokens, mask = sft.chat_rows(rows)
    for row, ids, on in zip(rows, tokens.tolist(), mask.tolist()):
        prompt, answer = common.encode(row["prompt"]), common.encode(row["completion"])
        answer += [EOS] * row.get("completion_finished", True)
        ids_on = [USER, *prompt, ASSISTANT, *answer]
        assert ids == ids_on + [PAD] * (len(ids) - len(ids_on))
        assert [i for i, carries in zip(ids, on) if carries] == answer
    model = Logits(*tokens.shape)
    sft.sft_loss(common.token_logprobs(model, tokens, mask), mask).backward()
    moved = model.logits.grad.abs().sum(-1) > 0  # the logits at t − 1 are about token t
    assert torch.equal(moved[:, :-1], mask[:, 1:])
    assert not moved[:, -1].any()


def test_raw_windows_are_the_text_in_order():
    """A part of the text skipped or read twice; windows that carry padding."""
    text = "the zebra is striped. " * 50 + "ж"
    tokens, mask = sft.raw_windows(text, 32)
    ids = common.encode(text)
    assert tokens.shape[1] == 32
    assert tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert mask.all()
    assert sft.raw_windows("ж", 32)[0].tolist() == [common.encode("ж")]


def test_a_run_learns_and_repeats_itself(repeats, runs):
    """No learning; a seed that is not set; files or columns that the reader is promised."""
    rows = repeats(sft, f"{TINY} --steps 30 --lr 0.02")
    assert len(rows) == 30
    held = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert held[-1] < held[0] - 0.5
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5
    assert common.is_done(runs / "new")
    assert json.loads((runs / "new/config.json").read_text())["flags"]["steps"] == 30
    samples = (runs / "new/samples.txt").read_text()
    assert samples.count("other: ") == samples.count("new: ") == 4


def test_from_raw_text_to_answers_in_another_alphabet(call, runs, tmp_path, capsys):
    """The base model is made from --raw; --data needs no gold reward: its cell is empty."""
    raw, data = tmp_path / "raw.txt", tmp_path / "mine.jsonl"
    raw.write_text("где живёт зебра? на равнине. " * 60)
    rows = [{"prompt": f"где {i}?", "completion": "там."} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (runs / "reward_model/model.pt").unlink()
    call(
        sft, f"--raw {raw} --data {data} --base-steps 2 --steps 2 --batch 4 --max-new-tokens 2"
    )
    assert common.is_done(runs / "base")
    assert common.is_done(runs / "sft")
    row = capsys.readouterr().out.split("\nsft  ")[1].split("\n")[0].split()
    assert row[:2] == ["–", "–"]  # no reward, no gold
    assert row[2:5] == ["0.00", "±", "0.00"]  # its KL to itself


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    said = diverges(sft, TINY, "sft_loss", 4)  # the second value is that of the held-out rows
    assert "sft, step 2: the loss is nan" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--stepz 3", "unrecognized arguments: --stepz 3"),
        ("--step 3", "unrecognized arguments"),  # no abbreviations: one name for one thing
        ("--steps 0", "--steps 0: a number ≥ 1 is needed"),
        ("--lr -1", "--lr -1.0: a number ≥ 0 is needed"),
        ("--lr nan", "a number ≥ 0 is needed"),
        ("--batch two", "invalid int value: 'two'"),
        ("--device tpu", "--device tpu is not available"),
        ("--init nowhere", "make it with: python sft.py"),
        ("--init reward_model", "holds a reward model, and a policy is needed"),
        ("--data nowhere.jsonl", "nowhere.jsonl:0: cannot be read"),
        ("--init base --raw nowhere.txt", "nowhere.txt:0: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags, says):
    assert says in refused(sft, flags)
