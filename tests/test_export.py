"""tools/export.py: what others load is the same model, tokenizer and template. Each test names
the bugs it catches. Most need transformers, which no script needs: pip install transformers."""

import importlib.util
import random
import unicodedata

import pytest
import torch

import common
from common import EOS, PAD, PIECES, ModelConfig, Transformer
from data.zoo import QUESTIONS, WORDS
from tools import export

# every size differs from every other, and from what Llama has by default
SIZES = {"channels": 48, "layers": 3, "heads": 6, "hidden": 40, "context": 96}


def small(head: str, kv_heads: int) -> Transformer:
    """An untrained model whose numbers depend on every weight. It says EOS now and then."""
    torch.manual_seed(kv_heads)
    config = ModelConfig(**SIZES, kv_heads=kv_heads, rope_theta=500.0, norm_eps=1e-3)
    model = Transformer(config, head).requires_grad_(False)
    for weight in model.parameters():
        weight *= 0.5 + torch.rand(weight.shape)  # the norms are no longer all ones
    model.embed.weight[EOS] *= 3
    if head == "scalar":
        model.offset.fill_(0.7)
    return model


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """exported(head, kv_heads) -> the model of a run, and the folder that it was exported to,
    by the command."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # everything is in the folder

    def make(head, kv_heads=2):
        model, folder = small(head, kv_heads), tmp_path / f"exported_{head}"
        common.save_model(tmp_path / "runs/it", model)
        export.main(["it", str(folder), "--runs", str(tmp_path / "runs")])
        return model, folder

    return make


@pytest.fixture
def tokenizer(exported):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported("lm")[1])


def random_texts(n: int) -> list[str]:
    """Words of the zoo, spaces, and characters of any script, joined with and without care.
    Only characters that are old enough for every library's tables (Unicode 3.2)."""
    rng, texts, category = random.Random(0), [], unicodedata.ucd_3_2_0.category
    known = [x for x in map(chr, range(0x110000)) if category(x) not in ("Cn", "Co", "Cs")]
    for _ in range(n):
        parts = rng.choices(WORDS, k=6) + rng.choices(known, k=4)
        parts += rng.choices(list(map(chr, range(128))), k=4) + [" "] * rng.randrange(6)
        parts += rng.choices(["_", "1", "'s", " .", "\r\n", "é", "\u0301", "<|", "|>"], k=2)
        texts.append("".join(rng.sample(parts, len(parts))))
    return ["", " ", "the  zebra", *texts]


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_fused_weights_are_cut_where_llama_has_several(kv_heads):
    """q, k, v or gate and up cut at the wrong row, as with k and v as tall as q though their
    heads are grouped; a weight left out. (That each has its right name, the logits show.)"""
    model = small("scalar", kv_heads)
    found = export.llama_weights(model)
    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}."
        q, k, v = (found[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        gate, up = (found[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        assert [len(x) for x in (q, k, v, gate, up)] == [48, *[8 * kv_heads] * 2, 40, 40]
        assert torch.equal(torch.cat([q, k, v]), block.qkv.weight)
        assert torch.equal(torch.cat([gate, up]), block.gate_up.weight)
    assert sum(x.numel() for x in found.values()) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize("kv_heads", [2, 6])
@torch.no_grad()
def test_logits_and_greedy_answers_are_ours(exported, tokenizer, kv_heads):
    """A size, ε, θ or rotation that Llama has otherwise; a weight that stayed random; an output
    matrix that is not the embedding; padding on the side where the answer grows; an answer that
    does not end at EOS; sampling that is greedy, or from the 50 likeliest."""
    import transformers

    policy, folder = exported("lm", kv_heads)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.bos_token_id is None  # Llama's is our USER
    assert theirs.config.max_position_embeddings == SIZES["context"]  # vLLM's limit
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (theirs.generation_config.do_sample, theirs.generation_config.top_k) == (True, 0)
    tokens = torch.randint(4, len(PIECES), (4, SIZES["context"]))
    torch.testing.assert_close(theirs(tokens).logits, policy(tokens), atol=1e-4, rtol=0)

    prompts, ended = list(QUESTIONS)[::120], 0
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(turns, padding=True, **how)
    rows = theirs.generate(**batch, do_sample=False, max_new_tokens=24)
    for prompt, row in zip(prompts, rows[:, batch["input_ids"].shape[1] :].tolist()):
        ours = common.chat(prompt)
        start = len(ours)
        while len(ours) < start + 24 and EOS not in ours[start:]:
            ours.append(int(policy(torch.tensor([ours]))[0, -1].argmax()))
        assert row == ours[start:] + [PAD] * (24 + start - len(ours))
        ended += EOS in ours[start:]
    assert 0 < ended < len(prompts)


@torch.no_grad()
def test_rewards_are_ours_up_to_the_offset(exported, tokenizer):
    """Two labels instead of one number; a score read at padding, where answers end at
    different places; a mean with the wrong sign."""
    import transformers

    reward_model, folder = exported("scalar")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = zip(list(QUESTIONS)[::97], random_texts(17))
    rows = [(common.chat(prompt), [*common.encode(text)[:60], EOS]) for prompt, text in pairs]
    tokens, mask = common.collate(rows)
    expected = common.score(reward_model, tokens, mask)
    left = tokenizer.pad({"input_ids": [x + y for x, y in rows]}, return_tensors="pt")
    right = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    for batch in (left, right):
        found = (theirs(**batch).logits - theirs.config.mean) / theirs.config.std
        torch.testing.assert_close(found, expected[:, None], atol=1e-4, rtol=0)


def test_ids_and_decoded_text_are_ours(tokenizer):
    """A regex that cuts otherwise than Python's, a space moved or added, a byte under the wrong
    letter, half a character that is repaired otherwise; a BOS, or an EOS or PAD that trainers
    find under another id."""
    texts, rng = random_texts(3000) + list(QUESTIONS), random.Random(1)
    expected = [common.encode(text) for text in texts]
    assert len(tokenizer) == len(PIECES)
    assert tokenizer(texts)["input_ids"] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    for _ in range(1000):
        ids = rng.choices(range(len(PIECES)), k=8) + rng.choices(range(4 + 128, 4 + 256), k=8)
        assert tokenizer.decode(ids, skip_special_tokens=True) == common.decode(ids)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (None, EOS, PAD)


def test_the_template_is_chat(tokenizer):
    """A special missing or doubled, a space or newline of the template's own, a text that is
    stripped; an answer without its EOS; a system turn that is taken for the user's."""

    def template(*turns, **how):
        turns = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(turns, return_dict=True, **how)["input_ids"]

    for text in random_texts(300):
        ids = template(("user", text), add_generation_prompt=True)
        assert ids == common.chat(text)
        ids = template(("user", " hi\n"), ("assistant", text), ("user", "so"))
        expected = [*common.chat(" hi\n"), *common.encode(text), EOS, *common.chat("so")]
        assert ids == expected[:-1]
    with pytest.raises(Exception, match="only user and assistant"):
        template(("system", "hi"), ("user", "hi"))


def test_what_cannot_be_exported_is_one_line(runs, monkeypatch, capsys, files):
    """A traceback where transformers is missing; a run whose config.json is lost to Llama's."""
    before = files()
    for there, folder, words in [(True, "sft", "another"), (None, "new", "pip install")]:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
        with pytest.raises(SystemExit):
            export.main(["sft", str(runs / folder), "--runs", str(runs)])
        assert words in capsys.readouterr().err
        assert files() == before
