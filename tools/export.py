"""A run as transformers, TRL, vLLM and others load one: a policy as LlamaForCausalLM, a reward
model as LlamaForSequenceClassification, and the tokenizer with its chat template.

    pip install transformers
    python -m tools.export ppo FOLDER

The tokenizer finds the names of the four specials in a text, which common.encode never does: do
not let a stranger's prompt spell <|assistant|>.
"""

import importlib.util
import json
from pathlib import Path

import torch

import common
from common import EOS, PAD, Transformer
from tools.sample import find, parser

SPECIALS = ("<|eos|>", "<|user|>", "<|assistant|>", "<|pad|>")  # what ids 0 to 3 are called
CHAT_TEMPLATE = (  # common.chat, in Jinja; an answer that is there ends with EOS
    "{% for turn in messages %}{% if turn.role == 'user' %}<|user|>{{ turn.content }}"
    "{% elif turn.role == 'assistant' %}<|assistant|>{{ turn.content }}<|eos|>"
    "{% else %}{{ raise_exception('only user and assistant have turns') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = {  # our weight: Llama's name for it; a fused one is several of Llama's, stacked
    "embed": ["model.embed_tokens"],
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
    "norm": ["model.norm"],
    "scalar": ["score"],
}


def llama_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights under Llama's names."""
    c, found = model.config, {}
    kv = c.channels // c.heads * c.kv_heads
    for ours, weight in model.named_parameters():  # blocks.i.part.weight, or part.weight
        *block, part, _ = ours.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        rows = [c.channels, kv, kv] if part == "qkv" else len(weight) // len(LLAMA[part])
        for name, w in zip(LLAMA[part], weight.detach().split(rows)):
            found[f"{layer}{name}.weight"] = w.clone()
    return found


def llama(model: Transformer):
    """The same model as a Llama of transformers."""
    import transformers

    c, weights = model.config, llama_weights(model)
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.channels,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=model.head == "lm",
        bos_token_id=None,  # Llama's, 1, is our USER
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    if model.head == "lm":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        made = transformers.LlamaForCausalLM(config)
        # generate() then samples as ours does: from the whole softmax, at temperature 1
        made.generation_config.update(do_sample=True, top_k=0, max_new_tokens=c.context // 2)
    else:  # Llama's head has no bias: its number minus `mean` is r
        config.num_labels, config.mean, config.std = 1, model.offset.item(), 1.0
        made = transformers.LlamaForSequenceClassification(config)
    made.load_state_dict(weights)
    return made


def llama_tokenizer():
    """common.encode as a BPE without merges: a regex splits the text; a part that is a piece
    becomes its id (ignore_merges), any other the ids of its bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # JSON has no bytes. GPT-2's way: each has a letter, its own if Latin-1 can print it
    own, free = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = [chr(byte if byte in own else next(free)) for byte in range(256)]
    names = [*SPECIALS, *("".join(letters[byte] for byte in x) for x in common.PIECES[4:])]
    vocabulary = {name: i for i, name in enumerate(names)}
    found = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    split = Regex(r" ?[\p{L}\p{N}_]+|[\s\S]")  # encode's: \w of Python is [\p{L}\p{N}_]
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(split, "isolated"), to_letters]
    found.pre_tokenizer, found.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    found.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        eos_token=SPECIALS[EOS],
        pad_token=SPECIALS[PAD],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__, ("run", "a policy or a reward model"), ("folder", "a new folder"))
    cfg = options.parse_args(words)
    run, folder = find(cfg.runs, cfg.run), Path(cfg.folder)
    if importlib.util.find_spec("transformers") is None:
        common.fail("this needs transformers: pip install transformers")
    if (folder / "model.pt").exists():
        common.fail(f"{folder} is a run, whose config.json would be lost; name another folder")
    head = torch.load(run / "model.pt", map_location="cpu", weights_only=True)["head"]
    model = common.load_model(run, head, "cpu")
    llama(model).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    about = folder / "tokenizer_config.json"  # transformers 4 knows this class as well
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    about.write_text(json.dumps(json.loads(about.read_text()) | kind, indent=1))
    print(f"{folder}: {cfg.run}, to be loaded as a Llama model")


if __name__ == "__main__":
    main()
