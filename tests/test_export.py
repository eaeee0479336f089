"""tools/export.py: what others load is the same model, tokenizer and template. Each test names
the bugs it catches. Most need transformers, which no script needs: pip install transformers."""

import importlib.machinery
import importlib.util
import json
import random
import unicodedata

import pytest
import torch

import common
from common import EOS, PAD, PIECES, USER, ModelConfig, Transformer
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
        common.save_model(tmp_path / "runs/another", small(head, 3))
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
def test_every_weight_has_its_name_in_llama(kv_heads):
    """A weight left out, transposed or rounded; q, k, v or gate and up cut at the wrong row, as
    with k and v as tall as q though their heads are grouped."""
    model = small("scalar", kv_heads)
    ours, found = dict(model.named_parameters()), export.llama_weights(model)
    expected = {"model.embed_tokens": "embed", "model.norm": "norm", "score": "scalar"}
    expected = {name: ours[f"{x}.weight"] for name, x in expected.items()}
    for i in range(3):
        b, at = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = ours[f"{b}.qkv.weight"].split([48, 8 * kv_heads, 8 * kv_heads])
        gate, up = ours[f"{b}.gate_up.weight"].split(40)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        parts |= {"mlp.gate_proj": gate, "mlp.up_proj": up}
        parts |= {"input_layernorm": ours[f"{b}.attention_norm.weight"]}
        parts |= {"post_attention_layernorm": ours[f"{b}.mlp_norm.weight"]}
        parts |= {"self_attn.o_proj": ours[f"{b}.out.weight"]}
        parts |= {"mlp.down_proj": ours[f"{b}.down.weight"]}
        expected |= {f"{at}.{name}": weight for name, weight in parts.items()}
    assert found.keys() == {f"{name}.weight" for name in expected}
    assert all(torch.equal(found[f"{x}.weight"], weight) for x, weight in expected.items())


@pytest.mark.parametrize("kv_heads", [2, 6])
@torch.no_grad()
def test_logits_and_greedy_answers_are_ours(exported, tokenizer, kv_heads):
    """A size, ε, θ or rotation that Llama has otherwise; a weight that stayed random; an output
    matrix that is not the embedding; padding on the side where the answer grows; an answer that
    does not end at EOS; another run's model."""
    import transformers

    policy, folder = exported("lm", kv_heads)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(theirs, transformers.LlamaForCausalLM)
    assert theirs.dtype == torch.float32
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
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert isinstance(theirs, transformers.LlamaForSequenceClassification)
    pairs = zip(list(QUESTIONS)[::97], random_texts(17))
    rows = [(common.chat(prompt), [*common.encode(text)[:60], EOS]) for prompt, text in pairs]
    tokens, mask = common.collate(rows)
    expected = common.score(reward_model, tokens, mask)
    padded = tokenizer.pad({"input_ids": [x + y for x, y in rows]}, return_tensors="pt")
    assert not torch.equal(padded["input_ids"], tokens)  # it pads on the left, we on the right
    for batch in (padded, {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}):
        found = theirs(**batch).logits - theirs.config.mean
        torch.testing.assert_close(found, expected[:, None], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_files_say_what_only_some_loaders_read(exported, head):
    """vLLM goes by the architecture, transformers 4 by its own names, OpenRLHF by mean and std;
    a BOS would be our USER; sampling that is greedy, cut short, or from the 50 likeliest."""
    _, folder = exported(head)
    names = ("config", "tokenizer_config") + ("generation_config",) * (head == "lm")
    config, about, *law = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    kind = "CausalLM" if head == "lm" else "SequenceClassification"
    assert config["architectures"] == [f"LlamaFor{kind}"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert [config[f"{x}_token_id"] for x in ("bos", "eos", "pad")] == [None, EOS, PAD]
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["max_position_embeddings"] == about["model_max_length"] == 96
    if head == "scalar":
        assert (config["mean"], config["std"]) == (pytest.approx(0.7), 1.0)
    else:
        expected = dict(do_sample=True, top_k=0, max_new_tokens=48, eos_token_id=EOS)
        assert expected.items() <= law[0].items()
        assert {law[0].get(key, 1) for key in ("temperature", "top_p")} == {1}


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
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert sorted(tokenizer.all_special_ids) == sorted([EOS, PAD])  # and no BOS
    # the name of a special in a text can be read as the text that it is
    user = tokenizer.convert_ids_to_tokens(USER)
    assert tokenizer(user, split_special_tokens=True)["input_ids"] == common.encode(user)


def test_the_template_is_chat(tokenizer):
    """A special missing or doubled, a space or newline of the template's own, a text that is
    stripped; an answer without its EOS; a system turn that is taken for the user's."""

    def template(*turns, **how):
        turns = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(turns, return_dict=True, **how)["input_ids"]

    for text in random_texts(300) + list(QUESTIONS)[::7]:
        ids = template(("user", text), add_generation_prompt=True)
        assert ids == common.chat(text)
        ids = template(("user", " hi\n"), ("assistant", text), ("user", "so"))
        expected = [*common.chat(" hi\n"), *common.encode(text), EOS, *common.chat("so")]
        assert ids == expected[:-1]
    with pytest.raises(Exception, match="only user and assistant"):
        template(("system", "hi"), ("user", "hi"))


def test_what_cannot_be_exported_is_one_line(runs, tmp_path, monkeypatch, capsys, files):
    """A traceback, a run whose config.json is lost to Llama's, a training run."""
    before = files()
    there = importlib.machinery.ModuleSpec("transformers", None)
    for run, folder, spec, words in [
        ("typo", tmp_path / "new", there, "--out typo"),
        ("sft", runs / "sft", there, "another folder"),
        ("sft", tmp_path / "new", None, "pip install transformers"),
    ]:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(SystemExit) as stopped:
            export.main([run, str(folder), "--runs", str(runs)])
        said = capsys.readouterr().err
        assert (stopped.value.code, said.count("\n"), files()) == (2, 1, before)
        assert words in said
