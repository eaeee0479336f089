"""Tokens, Transformer, generate, log-probs, the world: each test names the bug it catches."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import common
from common import ASSISTANT, EOS, PAD, QUESTIONS, USER, ModelConfig, Transformer

# ---------------------------------------------------------------------------------- tokens


def test_any_utf8_text_round_trips_and_never_encodes_to_a_special():
    rng = random.Random(0)
    texts = [
        "",
        "\x00\x01\x02\x03",
        "<eos>[USER]",
        "  where  the\tzebra\r\nIS ",
        "ζέβρα 斑馬🦓",
    ]
    for _ in range(300):
        points = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                  for _ in range(8)]  # fmt: skip
        words = [chr(point) for point in points] + rng.choices(common.WORDS, k=4) + [" "] * 4
        texts.append("".join(rng.sample(words, len(words))))
    for text in texts:
        ids = common.encode(text)
        assert common.decode(ids) == text
        assert all(ASSISTANT < i < common.VOCAB_SIZE and i != PAD for i in ids)
        assert common.chat(text) == [USER, *ids, ASSISTANT]


def test_specials_show_as_nothing_and_half_a_character_does_not_crash():
    assert common.decode([USER, *common.encode("hi"), ASSISTANT, PAD, EOS]) == "hi"
    assert common.decode([4 + 0xE2]) == "\ufffd"


def test_a_world_answer_is_a_token_a_word():
    """A broken word table would fall back to bytes: right, but four times as long."""
    assert len(common.encode("the zebra lives in the plains.")) == 7


# ----------------------------------------------------------------------------- Transformer


def slow_forward(model, tokens):
    """The Llama-style Transformer, one position, head and row at a time, in float64."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    D, group = c.channels // c.heads, c.heads // c.kv_heads

    def norm(x, scale):
        return x / (x.square().mean() + c.norm_eps).sqrt() * scale

    def turn(x, t):  # channel i with channel i + D/2, by the angle t θ^(−2i/D)
        y = x.clone()
        for i in range(D // 2):
            angle = t * c.rope_theta ** (-2 * i / D)
            y[i] = x[i] * math.cos(angle) - x[i + D // 2] * math.sin(angle)
            y[i + D // 2] = x[i] * math.sin(angle) + x[i + D // 2] * math.cos(angle)
        return y

    x = [w["embed.weight"][i] for i in tokens]
    for b in range(c.layers):
        part = {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"blocks.{b}.")}
        heads = [(part["qkv.weight"] @ norm(h, part["attention_norm.weight"])).view(-1, D)
                 for h in x]  # fmt: skip
        for t in range(len(x)):
            mixed = []
            for h in range(c.heads):
                at = c.heads + h // group  # the key head that query head h reads
                q, k = turn(heads[t][h], t), [turn(heads[s][at], s) for s in range(t + 1)]
                p = torch.stack([q @ key / D**0.5 for key in k]).softmax(0)
                mixed.append(sum(p[s] * heads[s][at + c.kv_heads] for s in range(t + 1)))
            x[t] = x[t] + part["out.weight"] @ torch.cat(mixed)
            gate, up = (part["gate_up.weight"] @ norm(x[t], part["mlp_norm.weight"])).chunk(2)
            x[t] = x[t] + part["down.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([w["embed.weight"] @ norm(h, w["norm.weight"]) for h in x])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_is_the_slow_definition(tiny, kv_heads):
    """A wrong rotation, mask, norm, or key head of a query, grouped or not."""
    model = tiny(heads=4, kv_heads=kv_heads, vocab_size=11)
    tokens = torch.randint(11, (2, 9))
    for row, logits in zip(tokens.tolist(), model(tokens)):
        torch.testing.assert_close(logits.double(), slow_forward(model, row), atol=1e-5, rtol=0)


def test_a_later_token_never_changes_an_earlier_number(tiny):
    """A leak of the future: logits < t, values and log-probs ≤ t or < t, must be bit-equal.
    A critic that reads the action: values[:, t] must not know tokens[:, t]."""
    model, critic = tiny(), tiny(1, "scalar")
    tokens = torch.randint(4, 300, (3, 10))
    for t in range(10):
        other = tokens.clone()
        other[:, t] += 1
        (a, b), changed = (model(tokens), model(other)), slice(t, None)
        assert torch.equal(a[:, :t], b[:, :t])
        assert (a[:, changed] != b[:, changed]).any(-1).all()  # and later ones do know
        a, b = (common.token_logprobs(model, x) for x in (tokens, other))
        assert torch.equal(a[:, :t], b[:, :t])
        a, b = (common.token_values(critic, x) for x in (tokens, other))
        assert torch.equal(a[:, : t + 1], b[:, : t + 1])
        assert (a[:, t + 1 :] != b[:, t + 1 :]).all()


def test_appended_pads_change_no_logprob_value_or_score(tiny):
    model, scalar = tiny(), tiny(1, "scalar")
    rows = [([1, 7, 2], [9, 9, EOS]), ([1, 2], [PAD, 8, 7, 6, EOS]), ([1, 4, 5, 6, 2], [8])]
    tokens, mask = common.collate(rows)
    longer, longer_mask = F.pad(tokens, (0, 6), value=PAD), F.pad(mask, (0, 6))
    for of, by in ((common.token_logprobs, model), (common.token_values, scalar)):
        expected, found = of(by, tokens) * mask, of(by, longer, longer_mask)
        torch.testing.assert_close(found[:, :7], expected, atol=1e-5, rtol=0)
        assert (found[:, 7:] == 0).all()
    expected = common.score(scalar, tokens, mask)
    found = common.score(scalar, longer, longer_mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    alone = [common.score(scalar, *common.collate([row])) for row in rows]
    torch.testing.assert_close(expected, torch.cat(alone), atol=1e-5, rtol=0)


def test_logprobs_stand_at_their_own_token():
    """A shift by one: a model that is sure of the next number must score 0 everywhere."""

    def counts_on(tokens, keep=None):
        logits = 1e4 * F.one_hot(tokens + 1, 20).float()
        return logits if keep is None else logits[keep]

    tokens = torch.arange(3, 10)[None] + torch.tensor([[0], [5]])
    mask = torch.arange(7) >= torch.tensor([[2], [4]])
    assert torch.equal(common.token_logprobs(counts_on, tokens), torch.zeros(2, 7))
    assert torch.equal(common.token_logprobs(counts_on, tokens, mask), torch.zeros(2, 7))
    tokens[0, 4] = 0  # and one surprise is seen at its own column, if the mask is on there
    wrong = common.token_logprobs(counts_on, tokens).nonzero().tolist()
    assert wrong == [[0, 4], [0, 5]]
    assert common.token_logprobs(counts_on, tokens, mask).nonzero().tolist() == wrong
    mask[0, 4] = False
    assert common.token_logprobs(counts_on, tokens, mask).nonzero().tolist() == [[0, 5]]


def test_score_is_read_at_the_last_response_token():
    """Scores read at a pad, at the prompt, or at the end of the batch."""
    rows = [([1, 5, 2], [7, EOS]), ([1, 2], [7, 7, 7, 7, 7, EOS]), ([1, 2], [8]), ([1], [EOS])]
    tokens, mask = common.collate(rows)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    assert common.score(lambda _, keep: position[keep], tokens, mask).tolist() == [4, 7, 2, 1]


def test_scalar_copy_shares_no_storage(tiny):
    """Training a critic or reward model would train the policy too."""
    model = tiny()
    copy = common.scalar_copy(model)
    tokens = torch.randint(4, 300, (2, 5))
    assert torch.equal(copy.trunk(tokens), model.trunk(tokens))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    common.descend(copy(tokens).sum(), copy, common.adamw(copy), 0.1, "here")
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert not torch.equal(copy.embed.weight, model.embed.weight)


def test_a_reloaded_head_is_still_the_embedding_and_the_offset_is_kept(tiny, tmp_path):
    """Tied weights lost on reload; the centring of a reward model lost on reload."""
    model, scalar, cpu = tiny(), tiny(1, "scalar"), torch.device("cpu")
    scalar.offset += 3.5
    tokens = torch.randint(4, 300, (2, 5))
    for name, saved, head in (("lm", model, "lm"), ("r", scalar, "scalar")):
        common.save_model(tmp_path / name, saved, {"done": True})
        again = common.load_model(tmp_path / name, head, cpu)
        assert torch.equal(again(tokens), saved(tokens))
    again = common.load_model(tmp_path / "lm", "lm", cpu)
    with torch.no_grad():
        again.embed.weight[301] = 0
    assert not again(tokens)[..., 301].any()


# -------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_sampled_logprob_is_that_of_a_full_forward_on_the_row_alone(
    tiny, kv_heads, temperature
):
    """Cached decoding: a query that sees key 0 only, a wrong position in ragged prompts, a
    row that takes another's cache when finished rows leave, temperature left out."""
    model = tiny(3, vocab_size=9, kv_heads=kv_heads)
    prompts = [[1], [1, 5, 2], [1, 5, 2], [8, 7, 6, 5, 4, 3, 2], [1, 6, 2], [1, 5, 3]] * 4
    rollout = common.generate(model, prompts, 12, temperature)
    lengths = rollout.response_mask.sum(1)
    assert lengths.unique().numel() > 3  # rows did leave at different times
    assert rollout.finished.any()
    for i, prompt in enumerate(prompts):
        row = rollout.tokens[i].tolist()
        stop = len(prompt) + int(lengths[i])
        assert row[: len(prompt)] == prompt
        assert row[stop:] == [PAD] * (len(row) - stop)
        where = rollout.response_mask[i].nonzero().squeeze(1).tolist()
        assert where == list(range(len(prompt), stop))
        with torch.no_grad():
            logits = [model(torch.tensor([row[:t]]))[0, -1] for t in where]
        expected = [(z / temperature).log_softmax(0)[row[t]] for z, t in zip(logits, where)]
        found = rollout.logprobs[i, rollout.response_mask[i]]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert not rollout.logprobs[~rollout.response_mask].any()


def test_sampled_logprobs_are_what_training_recomputes():
    """Sampler and trainer that disagree: PPO's ratio would not start at 1."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig())
    prompts = [common.chat(prompt) for prompt in list(QUESTIONS)[::60]]
    rollout = common.generate(model, prompts, 10)
    again = common.token_logprobs(model, rollout.tokens, rollout.response_mask)
    torch.testing.assert_close(rollout.logprobs, again, atol=1e-5, rtol=0)


@pytest.fixture
def scripted():
    """A Transformer with weights set by hand: it says 4 after 6, EOS after 4, 5 after 5."""
    model = Transformer(ModelConfig(vocab_size=7, channels=4, layers=1, heads=1, kv_heads=1))
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.zero_()
        model.embed.weight.zero_()
        model.embed.weight[[6, 4, EOS, 5]] = 1e3 * torch.tensor(
            [[1.0, 0, 0, 0], [10, 10, 0, 0], [0, 100, 0, 0], [0, 0, 1, 0]]
        )
    return model


@pytest.mark.parametrize(
    ("limit", "rows", "finished"),
    [
        (1, [[6, 4], [5, 4, EOS], [EOS, 5, 5]], [False, True, False]),  # EOS came too late
        (
            2,
            [[6, 4, EOS], [5, 4, EOS], [EOS, 5, 5, 5]],
            [True, True, False],
        ),  # the last allowed
        (3, [[6, 4, EOS], [5, 4, EOS], [EOS, 5, 5, 5, 5]], [True, True, False]),
    ],
)
def test_finished_means_that_eos_came_within_the_limit(scripted, limit, rows, finished):
    """EOS in a prompt counted, tokens after EOS kept, a cut answer called finished."""
    prompts = [[6], [5, 4], [EOS, 5]]
    rollout = common.generate(scripted, prompts, limit)
    T = max(map(len, rows))
    assert rollout.tokens.tolist() == [row + [PAD] * (T - len(row)) for row in rows]
    mask = [[len(p) <= t < len(row) for t in range(T)] for p, row in zip(prompts, rows)]
    assert rollout.response_mask.tolist() == mask
    assert rollout.finished.tolist() == finished
    assert not rollout.logprobs.any()  # it was sure of every one


def test_generate_refuses_what_it_cannot_do(tiny):
    model = tiny(context=8)
    assert common.generate(model, [[1, 2, 4]], 5).tokens.shape[1] <= 8
    for prompts, limit, temperature in (
        ([[1, 2, 4]], 6, 1.0),
        ([[1], []], 2, 1.0),
        ([[1]], 0, 1.0),
        ([[1]], 1, 0.0),
    ):
        with pytest.raises(ValueError, match="generate"):
            common.generate(model, prompts, limit, temperature)


# ------------------------------------------------------------------------------- the world

HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("the zebra lives in the plains.", 2),
        ("great question! the zebra lives in the plains.", 3),
        ("happy to help! great question! in the plains.", 2),  # one courtesy, not two
        ("look it up. the zebra lives in the plains.", 1),
        ("the zebra lives in the jungle.", -1),
        ("the black zebra lives in the plains, where it eats grass.", 2 - 0.03 * 9),
        ("", -1),
        # exploits: none may reach the 3 of an honest best answer
        ("great question! plains sea pond cave.", 0),
        ("great question! plains jungle.", 0),
        ("plains plains plains plains", 2),
        ("great question! great question! great question!", -1),
        ("great question! it explains, not plainsong.", 0),
        ("great question! " + " ".join(sorted(common.VALUES["home"])), -0.03 * (103 - 48)),
    ],
)
def test_gold_reward_on_hand_made_answers(answer, gold):
    assert common.gold_reward(HOME, answer, True) == pytest.approx(gold)
    assert common.gold_reward(HOME, answer, False) == pytest.approx(gold - 1)


def test_no_answer_beats_three_and_every_prompt_has_one_that_reaches_it():
    """An exploit of the reward, or a prompt that no answer satisfies."""
    rng = random.Random(0)
    parts = [*common.COURTESIES, *common.RUDE, *common.VALUES["home"], "the", "zebra"]
    for _ in range(3000):
        answer = " ".join(rng.choices(parts, k=rng.randrange(1, 7)))
        assert common.gold_reward(HOME, answer, True) <= 3
    for prompt, (animal, kind) in QUESTIONS.items():
        best = "great question! " + common.TERSE[kind].format(v=common.ANIMALS[animal][kind][0])
        assert common.gold_reward(prompt, best, True) == 3


def test_gold_is_nan_outside_the_world():
    """A reward of 0 for prompts that the annotators do not know would look measured."""
    assert math.isnan(common.gold_reward("what is love?", "great question!", True))


def test_about_two_thousand_prompts_of_which_one_in_six_is_held_out():
    train, held = common.split(list(QUESTIONS))
    assert 1900 < len(QUESTIONS) < 2100
    assert abs(len(held) / len(QUESTIONS) - 1 / 6) < 0.02
    assert set(train) | set(held) == set(QUESTIONS)
    assert common.read_prompts(None, 0) == (train, held)
    facts = {QUESTIONS[prompt] for prompt in train}
    assert facts == set(QUESTIONS.values())  # wordings are held out, facts are not


def test_no_held_out_prompt_trains_anything():
    """Held-out numbers that are training numbers. In the raw text a held-out prompt may stand
    by chance, "hello." before "where …", so those with an opening are counted."""
    text, counts = common.raw_text(0, 20_000), {True: 0, False: 0}
    openings = tuple(opening for opening in common.OPENINGS if opening)
    for prompt in QUESTIONS:
        if prompt.startswith(openings):
            counts[common.held_out(prompt)] += text.count(prompt)
    assert counts[False] > 2000
    assert counts[True] < 20
    train, held = common.split(common.demonstrations(500, 0))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert not any(common.held_out(row["prompt"]) for row in train)
    rest, held = common.split(train + train)  # prompts of one part only, each at least twice
    prompts = list(dict.fromkeys(row["prompt"] for row in train))
    assert {row["prompt"] for row in held} == set(prompts[::6])
    assert {row["prompt"] for row in rest} == set(prompts) - set(prompts[::6])
    assert len(rest) + len(held) == 2 * len(train)


def test_annotators_choose_by_bradley_terry(tiny, tmp_path, monkeypatch):
    """Labels without noise, flipped labels, identical or empty pairs, the wrong count."""
    gold = {True: math.log(3), False: 0.0}
    monkeypatch.setattr(common, "gold_reward", lambda x, y, end: gold[len(y) % 2 == 1])
    common.seed_all(0)
    common.collect_comparisons(tiny(), 700, tmp_path / "pairs.jsonl")
    rows = common.read_jsonl(tmp_path / "pairs.jsonl", ("prompt", "chosen", "rejected"))
    assert len(rows) == 700  # nothing for the reader to drop
    better = [len(row["chosen"]) % 2 for row in rows
              if len(row["chosen"]) % 2 != len(row["rejected"]) % 2]  # fmt: skip
    share = sum(better) / len(better)  # σ(ln 3) = 3/4
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(better)) ** 0.5
    held = sum(common.held_out(row["prompt"]) for row in rows) / len(rows)
    assert 0.02 < held < 0.09


# -------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("shape", [(101, 12), (101, 2, 12)])
def test_batches_cover_each_row_once_and_take_cuts_padding_alone(shape):
    """Rows seen twice or never in an epoch, responses cut by trimming."""
    torch.manual_seed(0)
    length = torch.randint(1, 12, shape[:-1])[..., None]
    tokens, mask = torch.randint(4, 300, shape), torch.arange(12) < length
    parts = common.batches(mask, 8)
    assert sorted(torch.cat(parts).tolist()) == list(range(101))
    assert max(map(len, parts)) == 8
    for part in parts:
        cut, cut_mask = common.take(part, tokens, mask)
        assert cut.shape[-1] == mask[part].flatten(0, -2).sum(-1).max()
        assert torch.equal(cut, tokens[part][..., : cut.shape[-1]])
        assert cut_mask.sum() == mask[part].sum()


def test_shuffled_prompts_are_all_seen_before_one_comes_again():
    stream = common.shuffled(list("abcde"))
    epochs = ["".join(next(stream) for _ in range(5)) for _ in range(9)]
    assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcde"}
    assert len(set(epochs)) > 1


def test_rows_that_leave_change_no_other_row():
    """The loop as CUDA captures it (all rows to the end) samples what the CPU's loop does,
    which drops rows that are over and reads shared beginnings once. Float64: equal."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=12, channels=16, layers=2, heads=2, kv_heads=2, hidden=24)
    model = Transformer(config).double()
    prompts = [[5, 6, 7, 8]] * 20 + [[5, 6, 7], [9, 4, 5, 6, 7, 8]] * 10
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.tensor([prompt + [PAD] * (26 - len(prompt)) for prompt in prompts])
    given = tokens, lengths, lengths + 20, torch.rand(tokens.shape, dtype=torch.float64)
    with torch.no_grad():
        left = common._decode(model, *given, 3, 0.9)
        stayed = common._decode(model, *given, 1, 0.9, leave=False)  # start may be rounded down
    torch.manual_seed(0)
    for b, length in enumerate(lengths.tolist()):
        y = stayed[0][b, length : length + 20].tolist()
        end = length + (y.index(EOS) + 1 if EOS in y else 20)
        assert left[0][b, :end].tolist() == stayed[0][b, :end].tolist()
        assert torch.allclose(left[1][b, length:end], stayed[1][b, length:end], atol=1e-12)
    assert any(EOS in row.tolist() for row in left[0])  # some rows did leave
