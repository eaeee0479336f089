"""sft.py: the loss, what is trained on and measured on, every flag and column, whole runs."""

import json
import math
import re
from collections import Counter

import pytest
import tiny as world
import torch

import common
import sft
from common import ASSISTANT, EOS, PAD, USER, ModelConfig, Transformer

TINY = "--steps 3 --batch 8 --demonstrations 60 --max-new-tokens 3 --init other"
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------- the maths


def test_loss_is_the_mean_over_tokens_not_over_rows():
    """A mean of row means gives a short row's tokens more weight; here it would be 3.5. A
    `count` that is not what the sum is divided by."""
    logprobs = torch.tensor([[0.0, -1, -2, -3], [-9, -5, -9, -9]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert sft.sft_loss(logprobs, mask).item() == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert sft.sft_loss(logprobs, mask, 5).item() == pytest.approx((1 + 2 + 3 + 5) / 5)


def test_sft_loss_is_that_of_the_response_alone():
    """Prompt or padding counted in the loss; EOS left out of it; a sampled PAD left out."""
    model, rows = world.transformer(1), world.everything()
    with torch.no_grad():
        loss = sft.sft_loss(common.token_logprobs(model, rows.tokens), rows.response_mask)
        exact = -world.logp(model).sum() / (3 * sum(map(len, world.completions())))
    assert abs(loss - exact) < 1e-10


def test_what_train_descends_in_the_enumerable_world(double, steps, tmp_path):
    """A mask made from `tokens != PAD`, which in this world is a word like any other; a shift;
    padding or prompt counted: the gradient of train's own step, on every completion of every
    prompt, is that of the enumerated token mean."""
    model = world.transformer(1)
    answers = [list(y) for y in world.completions()]
    rows = common.collate([(x, y) for x in world.PROMPTS for y in answers])
    cfg = sft.Config(runs=str(tmp_path), batch=len(rows[0]))
    sft.train(cfg, "new", model, rows, rows, 0.1, 1)
    exact = -world.logp(model).sum() / (3 * sum(map(len, answers)))
    assert steps[0].loss == pytest.approx(exact.item(), abs=1e-10)
    assert world.apart(steps[0].gradient, world.gradient(exact, model)) < 1e-10


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


# ----------------------------------------------------------------- a whole script, by hand


@pytest.fixture
def mine(tmp_path):
    """--data: 44 rows in another alphabet with answers of 2 to 16 tokens. Returns the file,
    the rows to train on, those to hold out."""
    rows = [{"prompt": f"где {i}?", "completion": "a" * (1 + i * i % 16)} for i in range(44)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.jsonl", *world.parted(rows)


def token_mean(model, rows):
    """L the slow way: one unpadded row at a time, no mask, no minibatch."""
    total, count = 0.0, 0
    for row in rows:
        prompt = [USER, *common.encode(row["prompt"]), ASSISTANT]
        answer = [*common.encode(row["completion"]), EOS]
        logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        total -= sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(answer))
        count += len(answer)
    return total / count


@pytest.mark.parametrize("own", [False, True])
def test_every_token_weighs_the_same(own, call, runs, double, steps, closing, mine):
    """A batch that divides by its own tokens, by its rows, or by a constant that forgets that
    the last batch is smaller; a held-out row, or not the asked demonstrations, trained on.
    The mean gradient over an epoch's batches is that of the whole set's token mean."""
    file, train, held = mine
    flags = f"--data {file}"
    if not own:
        train, held = world.parted(common.demonstrations(70, 5))
        flags = "--demonstrations 70 --seed 5"
    n = math.ceil(len(train) / 8)
    assert len(train) % 8  # so that the last batch is smaller
    call(sft, f"{flags} --init other --steps {n} --batch 8 --out new")
    model = common.load_model(runs / "other", "lm", CPU)
    whole = token_mean(model, train)
    exact = world.gradient(whole, model)
    assert len(steps) == n
    assert sum(step.loss for step in steps) / n == pytest.approx(whole.item(), abs=1e-10)
    assert world.apart(sum(step.gradient for step in steps) / n, exact) < 1e-10
    mean = sum(step.mask.sum() for step in steps) / n
    own_count = sum(step.gradient * mean / step.mask.sum() for step in steps) / n
    assert world.apart(own_count, exact) > 0.01  # so the difference would show


@pytest.mark.parametrize("own", [False, True])
def test_every_column_and_the_weights_by_hand(own, call, runs, double, closing, mine):
    """A column of metrics.csv that is something else, held-out loss measured on other rows or
    before the step, a learning rate that does not fall to 0 or is not used, weight decay,
    --init that is not where it starts: three steps of the whole set, as AdamW alone does."""
    file, train, held = mine
    flags = f"--data {file}"
    if not own:
        train, held = world.parted(common.demonstrations(60, 0))
        flags = "--demonstrations 60"
    rows = call(sft, f"{flags} --init other --steps 3 --batch 99 --lr 0.01 --out new")
    model = common.load_model(runs / "other", "lm", CPU)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step, row in enumerate(rows):
        loss, lr = token_mean(model, train), 0.01 * (3 - step) / 3
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        optimizer.step()
        by_hand = {"step": step, "loss": loss.item(), "grad_norm": norm.item()}
        by_hand |= {"held_out_loss": token_mean(model, held).item(), "lr": lr}
        if step == 1:
            assert row.pop("held_out_loss") == ""
            del by_hand["held_out_loss"]
        assert {k: float(v) for k, v in row.items()} == pytest.approx(by_hand, rel=2e-5)
    new = common.load_model(runs / "new", "lm", CPU)
    for name, weight in new.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_the_closing_table_asks_held_out_prompts(own, call, steps, closing, mine, runs):
    """A table of training prompts; a table without π_ref, or the model that it started from."""
    file, train, held = mine
    flags = f"--data {file} --max-new-tokens 140" if own else ""  # not all of `train` fit
    call(sft, f"{TINY} {flags} --out new")
    (cfg, names, reward, reward_name, prompts, device) = closing[0]
    expected = [x for x in common.QUESTIONS if common.held_out(x)]
    assert prompts == ([row["prompt"] for row in held] if own else expected)
    assert names == ["sft", "other", "new"]
    (runs / "sft/model.pt").unlink()
    call(sft, f"{TINY} {flags} --out first")
    assert closing[1][1] == ["first", "other", "first"]  # π_ref is sft, once it is there


def test_no_prompt_of_ones_own_is_both_trained_on_and_asked(
    call, steps, closing, monkeypatch, tmp_path
):
    """Rows whose prompts are all on one side, as in selected.jsonl, one of them unusable: it
    shifted which prompts were held out, and the table asked what had been trained on."""
    trained, honest = [], common.answer_ids
    prompts = [x for x in common.QUESTIONS if not common.held_out(x)][:60]
    rows = [{"prompt": x, "completion": "red." * (i != 3)} for i, x in enumerate(prompts)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(common, "answer_ids", lambda row: trained.append(row) or honest(row))
    call(sft, f"--data {tmp_path}/mine.jsonl --steps 1 --init other --out new")
    held = closing[0][4]
    asked = [row["prompt"] for row in trained]
    first_held = next(i for i, prompt in enumerate(asked) if prompt in held)
    assert 4 <= len(asked) - first_held <= 20  # one in six of 59, at the end
    assert not set(asked[:first_held]) & set(held)
    assert set(asked[first_held:]) <= set(held)


# -------------------------------------------------------------------------- the base model


def windows(text):
    ids = common.encode(text)
    width = min(32, len(ids))
    return [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]


def window_mean(model, rows):
    """L of the base model the slow way: of all tokens but the first of each window."""
    logp = model(torch.tensor(rows)).log_softmax(-1)
    after = torch.tensor([row[1:] for row in rows])
    return -logp[:, :-1].gather(-1, after[..., None]).mean()


def test_raw_windows_are_the_text_in_order():
    """A part of the text skipped or read twice; windows that carry padding; a first token,
    which nothing stands before, that counts in the mean."""
    text = "the zebra is striped. " * 50 + "ж"
    tokens, mask = sft.raw_windows(text, 32)
    assert tokens.shape[1] == 32
    assert tokens.tolist() == windows(text)
    assert mask[:, 1:].all()
    assert not mask[:, 0].any()
    assert sft.raw_windows("ж", 32)[0].tolist() == [common.encode("ж")]


@pytest.mark.parametrize("raw", [True, False])
def test_the_base_model_by_hand(raw, call, runs, double, steps, closing, tmp_path, monkeypatch):
    """A base flag that does not arrive: --raw, --base-steps, --base-lr, --layers, --channels,
    --context, --seed; a text whose end is trained on, or not what held_out_loss is of; a
    base model with sizes of its own; instruction tuning that does not start from it."""
    text, seeds, honest = sft.raw_text(5, 70) + "ж", [], sft.raw_text
    (tmp_path / "raw.txt").write_text(text)
    if not raw:
        text = honest(3, 70)
        monkeypatch.setattr(sft, "raw_text", lambda s: seeds.append(s) or honest(s, 70))
    sizes = "--layers 1 --channels 64 --context 96 --seed 3 --demonstrations 50"
    flags = f"--raw {tmp_path}/raw.txt" if raw else ""
    call(sft, f"{sizes} {flags} --base-steps 4 --base-lr 0.02 --steps 2 --lr 0.01 --batch 99")
    torch.manual_seed(3)
    shape = ModelConfig(common.VOCAB_SIZE, 64, 1, 2, 2, 176, 96)
    model, base = Transformer(shape), common.load_model(runs / "base", "lm", CPU)
    assert base.config == shape
    for name, weight in base.named_parameters():  # nothing moved, above
        assert torch.equal(weight, model.get_parameter(name))
    cut = int(len(text) * 0.95)
    whole = window_mean(model, windows(text[:cut]))
    assert steps[0].loss == pytest.approx(whole.item(), abs=1e-10)
    assert world.apart(steps[0].gradient, world.gradient(whole, model)) < 1e-10
    assert [step.lr for step in steps] == pytest.approx([0.02, 0.015, 0.01, 0.005, 0.01, 0.005])
    table = (runs / "base/metrics.csv").read_text().splitlines()
    assert len(table) == 1 + 4
    row = dict(zip(table[0].split(","), table[1].split(",")))
    held = window_mean(model, windows(text[cut:]))
    assert float(row["held_out_loss"]) == pytest.approx(held.item(), rel=2e-5)
    assert seeds == ([] if raw else [3])
    train, _ = world.parted(common.demonstrations(50, 3))
    assert steps[4].loss == pytest.approx(
        token_mean(model, train).item()
    )  # it starts from base


def test_the_base_model_is_made_once_and_made_anew_from_raw(call, runs, steps, closing, mine):
    """A base model made again for every run, or not again when --raw gives another text."""
    file, train, held = mine
    raw = file.with_name("raw.txt")
    raw.write_text(sft.raw_text(5, 70))
    flags, model = f"--data {file} --steps 1 --batch 4 --seed 1", runs / "base/model.pt"
    smaller = f"--raw {raw} --base-steps 1 --channels 32 --layers 1"
    call(sft, f"{flags} {smaller} --seed 0")
    first = model.read_bytes()
    call(sft, flags)
    assert model.read_bytes() == first
    call(sft, f"{flags} {smaller}")
    assert model.read_bytes() != first


def test_raw_text_has_the_shares_that_it_states():
    """Another share of misconceptions (20 %), rambling (10 %), questions (20 %), small talk
    (10 %, of which a third are openings); a seed that is not used; a held-out prompt read,
    unless an opening stands by chance before a bare question."""
    text = sft.raw_text(0, 20_000)
    assert text == sft.raw_text(0, 20_000)
    assert text[:500] != sft.raw_text(1, 100)[:500]
    pieces = [piece.strip() for piece in re.findall(r"[^.!?]+[.!?]", text)]
    verbs = "lives in the|eats|is"
    said = re.findall(rf"the ({'|'.join(common.ANIMALS)}) ({verbs}) (\w+)\.", text)
    kinds = dict(zip(verbs.split("|"), common.KINDS))
    wrong = [common.ANIMALS[a][kinds[verb]].index(value) for a, verb, value in said]
    assert sum(wrong) / len(wrong) == pytest.approx(0.2, abs=0.01)
    shares = Counter((a, verb) for a, verb, _ in said)
    assert len(shares) == 72
    assert max(shares.values()) < 1.5 * min(shares.values())
    rambled = sum(map(text.count, ("well, so, let", "and so they say", "my friend told")))
    assert rambled / 20_000 == pytest.approx(0.1, abs=0.01)
    small = [common.COURTESIES, common.RUDE]
    for some in small:
        assert sum(map(text.count, some)) / 20_000 == pytest.approx(0.1 / 3, abs=0.005)
    asked = []
    for before, piece in zip(["", *pieces], pieces):
        if piece.endswith("?"):
            opening = f"{before} " if f"{before} " in common.OPENINGS else ""
            asked.append(opening + piece)
    assert len(asked) / 20_000 == pytest.approx(0.2, abs=0.01)
    assert set(asked) <= set(common.QUESTIONS)
    assert sum(map(common.held_out, asked)) < 0.01 * len(asked)


# ------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_repeats_itself(repeats, runs, capsys):
    """No learning; a seed that is not set; files that the reader is promised; a held-out loss
    measured at every step, or not at every fiftieth and at the last."""
    rows = repeats(sft, f"{TINY} --steps 52 --lr 0.02")
    held = {i: float(x["held_out_loss"]) for i, x in enumerate(rows) if x["held_out_loss"]}
    assert list(held) == [0, 50, 51]
    assert held[51] < held[0] - 0.5
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5
    assert json.loads((runs / "new/config.json").read_text())["flags"]["steps"] == 52
    samples = (runs / "new/samples.txt").read_text()
    assert samples.count("other: ") == samples.count("new: ") == 4
    common.load_model(runs / "new", "lm", CPU)


def test_one_seed_one_result_whatever_had_to_be_made(call, runs, closing, mine):
    """Random numbers used up by making the base model shift those of instruction tuning; or
    a seed that does not arrive."""
    file, train, held = mine
    raw = file.with_name("raw.txt")
    raw.write_text(sft.raw_text(5, 70))
    flags, metrics = f"--data {file} --steps 3 --batch 8", runs / "sft/metrics.csv"
    call(sft, f"{flags} --raw {raw} --channels 32 --layers 1 --base-steps 2")
    first = metrics.read_bytes()
    call(sft, flags)
    assert metrics.read_bytes() == first
    call(sft, f"{flags} --seed 1")
    assert metrics.read_bytes() != first


def test_from_raw_text_to_answers_in_another_alphabet(call, runs, tmp_path, capsys):
    """Own text and data end to end: no gold reward there, and no reward model yet: their
    cells are empty, and the KL of the reference to itself is 0."""
    raw, data = tmp_path / "raw.txt", tmp_path / "mine.jsonl"
    raw.write_text("где живёт зебра? на равнине. " * 60)
    rows = [{"prompt": f"где {i}?", "completion": "там."} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (runs / "reward_model/model.pt").unlink()
    call(
        sft, f"--raw {raw} --data {data} --base-steps 2 --steps 2 --batch 4 --max-new-tokens 2"
    )
    for name in ("base", "sft"):
        common.load_model(runs / name, "lm", CPU)
    row = capsys.readouterr().out.split("\nsft  ")[1].split("\n")[0].split()
    assert row[:2] == ["–", "–"]  # no reward, no gold
    assert row[2:5] == ["0.00", "±", "0.00"]  # its KL to itself


def test_a_context_that_the_model_has_and_not_the_flag(call, steps, closing, runs, tiny):
    """Rows longer than the context of the model that is there: they were kept, by --context's
    default, and ended the run with a traceback."""
    common.save_model(runs / "base", tiny(3, context=64), {})
    rows = [{"prompt": f"{i}?", "completion": "a" * (9 if i % 9 else 90)} for i in range(40)]
    file = runs / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(call(sft, f"--data {file} --steps 1 --batch 99 --max-new-tokens 3")) == 1
    train, _ = world.parted(rows)
    assert steps[0].mask.sum() == sum(10 for row in train if len(row["completion"]) == 9)


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    said = diverges(sft, TINY, "sft_loss", 4)  # the second value is that of the held-out rows
    assert "step 2" in said


@pytest.mark.parametrize(
    "flags",
    [
        "--stepz 3",
        "--step 3",  # no abbreviations: one name for one thing
        "--steps 0",
        "--lr -1",
        "--lr nan",
        "--batch two",
        "--demonstrations 5",
        "--device tpu",
        "--init nowhere",
        "--init reward_model",
        "--out reward_model",
        "--data nowhere.jsonl",
        "--init base --raw nowhere.txt",
        "--init other --raw nowhere.txt",
        "--init other --layers 3",  # it is there, with its own
        "--init base --channels 40",
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags):
    """A flag that is ignored; what is wrong said after training, or over many lines."""
    refused(sft, f"{TINY} {flags}")


@pytest.mark.parametrize(("content", "line"), [(b"too short.", 0), (b"good\n\xff" * 2000, 2)])
def test_a_raw_text_that_cannot_be_read_is_refused(refused, tmp_path, content, line):
    """A text in another encoding, or of a few words, that fails in the middle of training."""
    (tmp_path / "raw.txt").write_bytes(content)
    assert f"{tmp_path}/raw.txt:{line}:" in refused(sft, f"--raw {tmp_path}/raw.txt")
