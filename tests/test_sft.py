"""sft.py: the loss, what is trained on and measured on, the base model, whole runs."""

import csv
import json
from dataclasses import dataclass

import pytest
import tiny as world
import torch

import common
import sft
from common import ModelConfig, Transformer, arg
from data import zoo

TINY = "--steps 3 --batch 8 --demonstrations 60 --max-new-tokens 3 --init other"
CPU = torch.device("cpu")


def test_loss_is_the_mean_over_tokens_not_over_rows():
    """A mean of row means, which gives a short row's tokens more weight; it would be 3.5."""
    logprobs = torch.tensor([[0.0, -1, -2, -3], [-9, -5, -9, -9]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert sft.sft_loss(logprobs, mask).item() == pytest.approx((1 + 2 + 3 + 5) / 4)


def test_what_train_descends_in_the_enumerable_world(double, steps, tmp_path):
    """A mask made from `tokens != PAD`, which in this world is a word like any other; EOS left
    out; a shift; padding or prompt counted: the loss and the gradient of train's own step, on
    every completion of every prompt, are those of the enumerated token mean."""
    model, answers = world.transformer(1), [list(y) for y in world.completions()]
    rows = common.collate([(x, y) for x in world.PROMPTS for y in answers])
    cfg = sft.Config(runs=str(tmp_path), batch=len(rows[0]))
    sft.train(cfg, "new", model, rows, rows, 0.1, 1)
    exact = -world.logp(model).sum() / (3 * sum(map(len, answers)))
    assert steps[0].loss == pytest.approx(exact.item(), abs=1e-10)
    assert world.apart(steps[0].gradient, world.gradient(exact, model)) < 1e-10


@pytest.mark.parametrize("own", [False, True])
def test_every_column_and_the_weights_by_hand(
    own, call, runs, double, closing, drawn, slow, mine
):
    """Held-out rows trained on, not the asked demonstrations, rows that come twice in an epoch
    or never; a batch that divides by its rows; EOS left out, or added where an answer was cut;
    a column that is something else; a held-out loss of other rows, or before the step; a rate
    that does not fall to 0 or is not used; an optimizer that forgets; --init, --batch, --steps,
    --lr, --seed, --data, --demonstrations that do not arrive; a table of training prompts,
    without π_ref, or without what it started from."""
    file, train, held = mine
    flags = f"--data {file} --batch 9"
    if not own:
        train, held = zoo.demonstrations(20, 5), zoo.demonstrations(5, 5, held_out=True)
        flags = "--demonstrations 20 --batch 7"
    table = call(sft, f"{flags} --init other --steps 5 --lr 0.01 --seed 5 --out new")
    model = common.load_model(runs / "other", "lm", CPU)
    take = slow.descent(model, 0.01, 5)
    assert [len(batch) for batch in drawn[:3]] == ([9, 9, 8] if own else [7, 7, 6])
    assert sorted(sum(drawn[:3], [])) == sorted(map(slow.ids, train))
    assert drawn[0] != drawn[3]  # in another order
    for step, (row, batch) in enumerate(zip(table, drawn, strict=True)):
        numbers = {"step": step} | take(slow.token_mean(model, batch))
        measured = slow.token_mean(model, map(slow.ids, held)).item()
        slow.same(row, numbers | {"held_out_loss": measured if step in (0, 4) else None})
    slow.same_weights(runs / "new", model)
    assert not (runs / "base").exists()

    cfg, names, reward, reward_name, prompts, device = closing[0]
    asked = dict.fromkeys(row["prompt"] for row in held) if own else zoo.HELD_OUT_PROMPTS
    assert prompts == list(asked)
    assert (names, reward_name) == (["sft", "other", "new"], "reward_model")


@pytest.fixture
def small(monkeypatch):
    """A base model that by default is small and takes two steps."""

    @dataclass
    class Small(sft.Config):
        base_steps: int = arg(2, "")
        layers: int = arg(1, "")
        channels: int = arg(32, "")

    monkeypatch.setattr(sft, "Config", Small)


@pytest.mark.parametrize("source", ["raw", "data", "zoo"])
def test_the_base_model_by_hand(
    source, call, runs, double, closing, drawn, slow, mine, monkeypatch
):
    """A base flag that does not arrive: --raw, --base-steps, --base-lr, --layers, --channels,
    --context, --seed; another text, as one with held-out rows in it; part of it skipped; its
    end trained on, or not what held_out_loss is of; the first token of a window counted;
    instruction tuning that starts from other weights, or goes on with the base's rate."""
    file, train, held = mine
    flags, text, made = "--demonstrations 20", zoo.raw_text(5, 150) + "ж", zoo.raw_text
    monkeypatch.setattr(zoo, "raw_text", lambda seed: made(seed, 150))
    if source == "zoo":
        text = made(3, 150)
    elif source == "raw":
        flags += f" --raw {file.with_name('raw.txt')}"
        file.with_name("raw.txt").write_text(text, "utf-8-sig")
    else:
        flags = f"--data {file}"
        text = "\n".join(f"{row['prompt']}\n{row['completion']}" for row in train)
    if source != "data":
        held = zoo.demonstrations(5, 3, held_out=True)
    sizes = "--layers 1 --channels 64 --context 96 --seed 3 --batch 9"
    table = call(sft, f"{flags} {sizes} --base-steps 5 --base-lr 0.02 --steps 2 --lr 0.01")
    torch.manual_seed(3)
    model = Transformer(ModelConfig(len(common.PIECES), 64, 1, 2, 2, 176, 96))
    ids = common.encode(text)  # in windows of 32; the rest is left out
    rows = [([ids[i]], ids[i + 1 : i + 32]) for i in range(0, len(ids) - 31, 32)]
    cut = len(rows) * 19 // 20
    epoch = drawn[: -(-cut // 9)]
    assert sorted(sum(epoch, [])) == sorted(rows[:cut])
    with open(runs / "base/metrics.csv") as file:
        of_base = list(csv.DictReader(file))
    assert (len(of_base), len(table)) == (5, 2)
    end, held = rows[cut:], [slow.ids(row) for row in held]
    parts = ("base", of_base, end, 0.02), ("sft", table, held, 0.01)
    for name, steps, other, lr in parts:
        take = slow.descent(model, lr, len(steps))
        for step, row in enumerate(steps):
            numbers = {"step": step} | take(slow.token_mean(model, drawn.pop(0)))
            measured = slow.token_mean(model, other).item()
            last = step + 1 == len(steps)
            numbers["held_out_loss"] = measured if step == 0 or last else None
            slow.same(row, numbers)
        slow.same_weights(runs / name, model)
    assert drawn == []


@pytest.mark.parametrize("flag", ["", "--raw raw.txt", "--base-steps 3", "--base-lr 0.1",
                                  "--layers 2", "--channels 64", "--context 64"])  # fmt: skip
def test_a_flag_of_the_base_model_makes_it_anew(
    flag, call, runs, small, mine, closing, monkeypatch
):
    """A flag of the base model that is ignored because one is there; a base model that is made
    again although it is there; instruction tuning that uses up or shifts its random numbers:
    one seed, one result, whatever had to be made, and another seed another."""
    file, *_ = mine
    monkeypatch.chdir(file.parent)
    (file.parent / "raw.txt").write_text(zoo.raw_text(5, 70))
    words = f"--data {file} --steps 2 --batch 9"
    model, table = runs / "base/model.pt", runs / "sft/metrics.csv"
    call(sft, words)
    first, loss = model.read_bytes(), table.read_bytes()
    call(sft, f"{words} {flag}")
    assert (model.read_bytes() == first) == (not flag)
    if flag:
        return
    assert table.read_bytes() == loss
    call(sft, f"{words} --seed 1")
    assert model.read_bytes() == first
    assert table.read_bytes() != loss


def test_a_first_run_on_own_data_from_nothing(call, runs, small, mine, capsys):
    """A table that needs a policy or a reward model which is not there; a number where there
    is neither a reward nor gold."""
    for name in ("sft", "reward_model"):
        (runs / name / "model.pt").unlink()
    call(sft, f"--data {mine[0]} --steps 2 --batch 4 --max-new-tokens 2 --out first")
    row = capsys.readouterr().out.split("\nfirst  ")[1].split()
    assert row[:5] == ["–", "–", "0.00", "±", "0.00"]  # no reward, no gold; KL to itself


@pytest.mark.parametrize("prompts", [["a"] * 500, "abcdefghi", ["a"]])
def test_any_number_of_rows_and_prompts(prompts, call, runs, small, drawn, slow, closing):
    """Rows refused because their prompts are few, or alike; nothing left on one side; a base
    model that cannot be made, as the text is shorter than a window, or one window long."""
    rows = [{"prompt": x, "completion": "b" * (1 + i % 7)} for i, x in enumerate(prompts)]
    (runs / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = call(sft, f"--data {runs}/mine.jsonl --steps 1 --batch 500")
    train, held = common.split(rows, own=True)
    assert sorted(drawn[-1]) == sorted(map(slow.ids, train))
    assert closing[0][4] == list(dict.fromkeys(row["prompt"] for row in held))
    assert float(table[0]["held_out_loss"]) > 0


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    said = diverges(sft, TINY, "sft_loss", 4)  # the second value is that of the held-out rows
    assert "step 2" in said


@pytest.mark.parametrize("flags", ["--stepz 3", "--layers 3", "--init reward_model"])
def test_a_wrong_command_line_is_refused(call, stops, flags):
    """A flag that is ignored, as is one of the base model where --init is another."""
    stops(call, sft, f"{TINY} {flags}")
