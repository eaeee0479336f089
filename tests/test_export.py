"""Export: what others load is the same model, tokenizer and template. Each test names the bug
it catches. Those that load need transformers, which no script needs: pip install transformers.
"""

import inspect
import json
import random
import struct
import subprocess
import sys
import unicodedata

import jinja2  # torch brings it
import pytest
import torch

import common
from common import ASSISTANT, EOS, PAD, QUESTIONS, USER, VOCAB_SIZE, ModelConfig, Transformer

# every size differs from every other, and from what Llama has by default
SIZES = {"layers": 3, "heads": 6, "hidden": 40, "context": 96, "rope_theta": 500.0}


def small(head: str, kv_heads: int) -> Transformer:
    """An untrained model whose numbers depend on every weight. It says EOS now and then."""
    torch.manual_seed(kv_heads)
    config = ModelConfig(channels=48, kv_heads=kv_heads, norm_eps=1e-3, **SIZES)
    model = Transformer(config, head).requires_grad_(False)
    for weight in model.parameters():
        weight *= 0.5 + torch.rand(weight.shape)  # the norms are no longer all ones
    model.embed.weight[EOS] *= 3
    if head == "scalar":
        model.offset.fill_(0.7)
    return model


@pytest.fixture(params=[2, 6], ids=["grouped", "ungrouped"])
def policy(request):
    return small("lm", request.param)


@pytest.fixture(params=[2, 6], ids=["grouped", "ungrouped"])
def reward_model(request):
    return small("scalar", request.param)


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # everything is in the folder
    return pytest.importorskip("transformers")


@pytest.fixture
def tokenizer(transformers, tmp_path):
    common.export(small("lm", 2), tmp_path / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def random_texts(n: int) -> list[str]:
    """Words of the world, spaces, and characters of any script, joined with and without care.
    Only characters that are old enough for every library's tables (Unicode 3.2)."""
    rng, texts = random.Random(0), []
    known = [
        chr(point)
        for point in range(0x110000)
        if unicodedata.ucd_3_2_0.category(chr(point)) not in ("Cn", "Co", "Cs")
    ]
    ascii_characters = [chr(point) for point in range(128)]
    for _ in range(n):
        parts = rng.choices(common.WORDS, k=6) + rng.choices(known, k=4)
        parts += rng.choices(ascii_characters, k=4) + [" "] * rng.randrange(6)
        parts += rng.choices(["_", "1", "'s", " .", "\r\n", "é", "\u0301", "<|", "|>"], k=2)
        texts.append("".join(rng.sample(parts, len(parts))))
    return ["", " ", "the  zebra", *texts]


def read_safetensors(path) -> tuple[dict, dict]:
    """The format as its specification has it: header, and the tensors as lists of numbers."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert size % 8 == 0  # or the numbers are not aligned
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        assert (start, entry["dtype"]) == (end, "F32")  # no hole, no overlap
        numbers = struct.unpack(f"<{(stop - start) // 4}f", data[start:stop])
        tensors[name], end = torch.tensor(numbers).view(entry["shape"]), stop
    assert end == len(data)
    return header, tensors


# -------------------------------------------------------------------- without transformers


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_every_weight_is_in_the_file_under_its_own_name(tmp_path, head, kv_heads):
    """A weight left out, transposed, rounded, under another's name; q, k, v or gate and up cut
    at the wrong row, as with k and v as tall as q though their heads are grouped; an lm_head
    that is written though it is tied; offsets that do not fit the bytes."""
    model = small(head, kv_heads)
    common.export(model, tmp_path)
    header, found = read_safetensors(tmp_path / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}  # transformers 4 insists
    ours = {k: v for k, v in model.state_dict().items() if k != "offset"}

    def same(mine, *theirs, heights=None):
        parts = [found.pop(f"{name}.weight") for name in theirs]
        assert heights is None or [len(part) for part in parts] == heights
        assert torch.equal(torch.cat(parts), ours.pop(f"{mine}.weight"))

    same("embed", "model.embed_tokens")
    same("norm", "model.norm")
    for i in range(3):
        b, at = f"blocks.{i}", f"model.layers.{i}"
        same(f"{b}.attention_norm", f"{at}.input_layernorm")
        same(
            f"{b}.qkv",
            *(f"{at}.self_attn.{x}_proj" for x in "qkv"),
            heights=[48, 8 * kv_heads, 8 * kv_heads],
        )
        same(f"{b}.out", f"{at}.self_attn.o_proj")
        same(f"{b}.mlp_norm", f"{at}.post_attention_layernorm")
        same(f"{b}.gate_up", f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", heights=[40, 40])
        same(f"{b}.down", f"{at}.mlp.down_proj")
    if head == "scalar":
        same("scalar", "score")
    assert not ours
    assert not found


def test_every_id_has_one_name(tmp_path):
    """Two bytes with one letter, or a special called like a piece: an id would be lost."""
    common.export(small("lm", 2), tmp_path)
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(ids.values()) == list(range(VOCAB_SIZE))
    assert [ids[token] for token in ("a", "Ġzebra", "Ċ")] == [
        4 + ord("a"),
        *common.encode(" zebra\n"),
    ]


def test_the_files_say_what_only_some_loaders_read(tmp_path):
    """A key that the tests below would not miss: vLLM goes by the architecture, transformers 4
    by its own place for θ, OpenRLHF by mean and std; a BOS, which would be our USER; the
    context or the ε of some other Llama; a decoder that drops the space before a full stop;
    a regex that is not `encode`'s; an answer without its EOS."""
    for head, kind in (("lm", "CausalLM"), ("scalar", "SequenceClassification")):
        common.export(small(head, 2), tmp_path / head)
        config = json.loads((tmp_path / head / "config.json").read_text())
        assert config["architectures"] == [f"LlamaFor{kind}"]
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
        assert config["bos_token_id"] is None
        assert config["rms_norm_eps"] == 1e-3
        about = json.loads((tmp_path / head / "tokenizer_config.json").read_text())
        assert config["max_position_embeddings"] == about["model_max_length"] == 96
        assert about["clean_up_tokenization_spaces"] is False
    assert (config["mean"], config["std"]) == (pytest.approx(0.7), 1.0)
    tokenizer = json.loads((tmp_path / "lm/tokenizer.json").read_text())
    regex = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert regex.replace(r"[\p{L}\p{N}_]", r"\w") in inspect.getsource(common.encode)
    template = jinja2.Environment().from_string(about["chat_template"])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    start = "<|user|>q<|assistant|>"
    assert template.render(messages=turns[:1], add_generation_prompt=True) == start
    assert template.render(messages=turns) == f"{start}a<|eos|>"


def test_a_second_export_replaces_the_first(tmp_path):
    """A file of the model that was there before, left beside the new one's."""
    for kv_heads in (6, 2):
        common.export(small("lm", kv_heads), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    found = read_safetensors(tmp_path / "model.safetensors")[1]
    assert found["model.layers.0.self_attn.k_proj.weight"].shape == (16, 48)


def test_no_run_is_written_over(tmp_path, capsys):
    """`export sft runs/sft`: the run would lose its config.json to Llama's."""
    model = small("lm", 2)
    common.save_model(tmp_path, model, {"flags": {}, "done": True})
    common.write(tmp_path / "config.json", "{}")
    with pytest.raises(SystemExit) as stopped:
        common.export(model, tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == "{}"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    """A traceback where FOLDER is a file, is below one, or has too long a name."""
    common.write(tmp_path / "file", "kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(SystemExit) as stopped:
            common.export(small("lm", 2), folder)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_command_line(tmp_path):
    """A traceback where no run is; a flag, or a kind of model, that `export` forgot."""

    def export(run, folder):
        command = [sys.executable, common.__file__, "export", run, folder]
        command += ["--runs", tmp_path / "runs"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    refused = export("nowhere", "X")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "nowhere" in refused.stderr
    assert not (tmp_path / "X").exists()
    for head in ("lm", "scalar"):
        model = small(head, 2)
        common.save_model(tmp_path / "runs" / head, model, {"flags": {}, "done": True})
        done = export(head, f"out/{head}")
        assert (done.returncode, done.stderr) == (0, "")
        common.export(model, tmp_path / "expected" / head)
        for file in (tmp_path / "expected" / head).iterdir():
            assert (tmp_path / "out" / head / file.name).read_bytes() == file.read_bytes()


# ----------------------------------------------------------------------- with transformers


@torch.no_grad()
def test_logits_are_ours(transformers, policy, tmp_path):
    """A size, ε, θ or rotation that Llama has otherwise; a weight that was not loaded and
    stayed random; an output matrix that is not the embedding."""
    common.export(policy, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(theirs, transformers.LlamaForCausalLM)
    assert theirs.dtype == torch.float32
    tokens = torch.randint(4, VOCAB_SIZE, (4, policy.config.context))
    torch.testing.assert_close(theirs(tokens).logits, policy(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_rewards_are_ours_up_to_the_offset(transformers, reward_model, tmp_path):
    """Two labels instead of one number; a score read at padding, where answers end at
    different places; a mean with the wrong sign."""
    common.export(reward_model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(theirs, transformers.LlamaForSequenceClassification)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pairs = list(zip(list(QUESTIONS)[::97], random_texts(17)))
    rows = [(common.chat(prompt), [*common.encode(text)[:60], EOS]) for prompt, text in pairs]
    tokens, mask = common.collate(rows)
    expected = common.score(reward_model, tokens, mask)
    padded = tokenizer.pad({"input_ids": [x + y for x, y in rows]}, return_tensors="pt")
    assert not torch.equal(padded["input_ids"], tokens)  # it pads on the left, we on the right
    for batch in (padded, {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}):
        found = theirs(**batch).logits
        assert found.shape == (len(rows), 1)
        found = found.squeeze(1) - theirs.config.mean
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_ids_and_decoded_text_are_ours(tokenizer):
    """A regex that cuts otherwise than Python's, a space moved or added, a BOS, a byte under
    the wrong letter: over random texts and all prompts of the world."""
    texts = random_texts(3000) + list(QUESTIONS)
    expected = [common.encode(text) for text in texts]
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer(texts)["input_ids"] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


def test_any_ids_decode_as_ours(tokenizer):
    """Specials that are shown, and half a character that is dropped or repaired otherwise."""
    rng = random.Random(1)
    for _ in range(1000):
        ids = rng.choices(range(VOCAB_SIZE), k=8) + rng.choices(range(4 + 128, 4 + 256), k=8)
        assert tokenizer.decode(ids, skip_special_tokens=True) == common.decode(ids)


def test_specials_are_the_loaders_specials(tokenizer):
    """An EOS or PAD that trainers cannot find, or find under another id."""
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert tokenizer.bos_token_id is None
    assert sorted(tokenizer.all_special_ids) == sorted([EOS, PAD])
    names = tokenizer.convert_ids_to_tokens([EOS, USER, ASSISTANT, PAD])
    # the name of a special in a text can be read as the text that it is
    assert tokenizer(names[USER], split_special_tokens=True)["input_ids"] == common.encode(
        names[USER]
    )


def test_the_template_is_chat(tokenizer):
    """A special missing or doubled, a space or newline of the template's own, a text that is
    stripped; an answer without its EOS; a system turn that is taken for the user's."""

    def template(*turns, **how):
        turns = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(turns, return_dict=True, **how)["input_ids"]

    for prompt in random_texts(300) + list(QUESTIONS):
        ids = template(("user", prompt), add_generation_prompt=True)
        assert ids == common.chat(prompt)
    for answer in random_texts(300):
        ids = template(("user", " hi\n"), ("assistant", answer))
        assert ids == [*common.chat(" hi\n"), *common.encode(answer), EOS]
    ids = template(("user", "hi"), ("assistant", "hi"), ("user", "so"))
    assert ids == [*common.chat("hi"), *common.encode("hi"), EOS, USER, *common.encode("so")]
    with pytest.raises(Exception, match="only user and assistant"):
        template(("system", "hi"), ("user", "hi"))


@torch.no_grad()
def test_greedy_answers_are_ours(transformers, policy, tmp_path):
    """An answer that does not end at EOS, padding on the side where the answer grows, and
    whatever else adds up only over many steps."""
    common.export(policy, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = list(QUESTIONS)[::26]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(turns, padding=True, **how)
    rows = theirs.generate(**batch, do_sample=False, max_new_tokens=24)
    ended = 0
    for prompt, row in zip(prompts, rows[:, batch["input_ids"].shape[1] :].tolist()):
        ours = common.chat(prompt)
        start = len(ours)
        while len(ours) < start + 24 and EOS not in ours[start:]:
            ours.append(int(policy(torch.tensor([ours]))[0, -1].argmax()))
        answer = ours[start:]
        assert row == answer + [PAD] * (24 - len(answer))
        ended += EOS in answer
    assert 0 < ended < len(prompts)


@torch.no_grad()
def test_sampling_without_further_ado_is_sampling_from_the_policy(transformers, tmp_path):
    """The loader's own defaults: greedy, the 50 likeliest tokens only, 20 tokens at most."""
    policy = small("lm", 2)
    policy.embed.weight[EOS] = 0  # so that some answers are long
    common.export(policy, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([common.chat("where does the owl live?")] * 8)
    how = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    found = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 8
    assert found.sequences.shape[1] > 30
    for scores, logits in zip(found.scores, found.logits):
        assert torch.equal(scores, logits)
