"""Time the project beside `transformers`: same weights, same batches, measured in turn.

python tests/benchmark.py                 needs runs/sft; compares where transformers is there
python tests/benchmark.py --threads 1
"""

import ctypes
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common, dpo, reward_model, sft  # noqa: E401, E402, I001
from common import EOS, PAD, ModelConfig, Transformer, arg  # noqa: E402

try:
    import transformers as hf
except ImportError:
    hf = None


@dataclass
class Config:
    threads: int = arg(torch.get_num_threads(), "of torch, on a CPU", low=1)
    rounds: int = arg(7, "alternations of ours and theirs", low=1)
    runs: str = arg("runs", "the folder that has the SFT model")
    device: str = arg("auto", "auto, cpu or cuda")


def timed(run) -> tuple[float, object]:
    """Seconds until run() is over, on CUDA its last kernel too, and what it returned."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else int
    wait()
    began, result, _ = time.perf_counter(), run(), wait()
    return time.perf_counter() - began, result


def peak(run, cuda: bool) -> float:
    """MiB that run() takes beyond what stood there before; NaN where that is not known."""
    if cuda:  # at the first call, which captures its graphs
        torch.cuda.reset_peak_memory_stats()
        before, _ = torch.cuda.memory_allocated(), run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    run()  # the first call also reads libraries in
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what the allocator kept
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    except (OSError, AttributeError):
        return math.nan
    before, _, after = (Path("/proc/self/status").read_text(), run(),
                        Path("/proc/self/status").read_text())  # fmt: skip
    kept, top = before.split("VmRSS:")[1].split()[0], after.split("VmHWM:")[1].split()[0]
    return (int(top) - int(kept)) / 1024


def matmuls(c: ModelConfig, positions: float, logits: float) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the products of one forward pass."""
    C, head = c.channels, [(round(logits), c.channels, c.vocab_size)] * (logits > 0)
    block = [(C, C + 2 * C * c.kv_heads // c.heads), (C, C), (C, 2 * c.hidden), (c.hidden, C)]
    return [(round(positions), *shape) for shape in block * c.layers] + head


def matmul_rate(shapes, device, backward: bool = False) -> float:
    """FLOP/s of these products in turn, best of 7; backward: with those of the gradients."""
    sizes = [((n, i), (o, i), (n, o)) for n, i, o in shapes]
    work = [[torch.randn(size, device=device) for size in three] for three in sizes]
    total = (3 if backward else 1) * sum(2 * n * i * o for n, i, o in shapes)
    work *= max(1, int(2e9 / total))  # long enough to time

    def run():
        for x, w, g in work:
            _ = F.linear(x, w), *((g @ w, g.T @ x) if backward else ())

    return len(work) / len(shapes) * total / min(timed(run)[0] for _ in range(7))


NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "scalar": "score"}
NAMES |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NAMES |= {"qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "down": "mlp.down_proj"}
NAMES |= {"out": "self_attn.o_proj", "gate_up": "mlp.gate_proj mlp.up_proj"}
SHAPE = """vocab_size vocab_size hidden_size channels intermediate_size hidden
rope_theta rope_theta num_hidden_layers layers num_attention_heads heads num_key_value_heads
kv_heads max_position_embeddings context rms_norm_eps norm_eps""".split()


def as_llama(model: Transformer, pick):
    """pick(parameter) under the names of transformers, the fused weights split."""
    for name, parameter in model.named_parameters():
        *block, kind, _ = name.split(".")
        names, at = NAMES[kind].split(), f"model.layers.{block[1]}." if block else ""
        for part, x in zip(names, pick(parameter).chunk(len(names))):
            yield f"{at}{part}.weight", x


def llama(model: Transformer):
    """The Llama of transformers with the model's weights."""
    shape = {t: getattr(model.config, o) for t, o in zip(SHAPE[::2], SHAPE[1::2])}
    shape |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD, "num_labels": 1}
    kind = hf.LlamaForCausalLM if model.kind == "lm" else hf.LlamaForSequenceClassification
    twin = kind(hf.LlamaConfig(**shape, tie_word_embeddings=True, attn_implementation="sdpa"))
    twin.load_state_dict(dict(as_llama(model, torch.Tensor.detach)), strict=False)
    return twin.to(model.device)


def roll(model, prompts, limit: int, stops: bool, **cache) -> int:
    """Response tokens sampled by ours or theirs. Forced: to both EOS is one token of many."""
    if isinstance(model, Transformer):
        with patch.object(common, "EOS", EOS if stops else -1):
            return int(common.generate(model, prompts, limit).response_mask.sum())
    P, free = max(map(len, prompts)), {"do_sample": True, "top_k": 0, "max_new_tokens": limit}
    free |= {"eos_token_id": EOS} if stops else {}
    ids = torch.tensor([[PAD] * (P - len(p)) + p for p in prompts], device=model.device)
    out = model.generate(ids, attention_mask=(ids != PAD).long(), **free, **cache)[:, P:]
    over = (out == EOS) & stops
    return int((over.cumsum(1) - over.long() == 0).sum())


def outputs(model, tokens, mask, there):
    """By ours or theirs: log-probs of the responses (rows, T), or scores (rows,)."""
    if isinstance(model, Transformer):
        run = common.token_logprobs if model.kind == "lm" else common.score
        return run(model, tokens, mask)
    logits = model(tokens, attention_mask=there, use_cache=False).logits
    if logits.dim() == 2:
        return logits[:, 0]
    labels = tokens.masked_fill(~mask, -100)[:, 1:].flatten()
    logp = -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
    return F.pad(logp.view(len(tokens), -1), (1, 0))


LOSSES = {  # of outputs; the same for both sides
    "SFT": lambda out, mask, ref: sft.sft_loss(out, mask),
    "reward": lambda out, *_: reward_model.bradley_terry_loss(*out.view(-1, 2).T).mean(),
    "DPO": lambda out, mask, ref: dpo.dpo(*(out.sum(1).view(-1, 2) - ref).T, 0.3).mean(),
}


def train(model, kind: str, optimizer, batches) -> int:
    """An optimizer step on every batch, by ours or theirs."""
    for *batch, ref in batches:
        loss = LOSSES[kind](outputs(model, *batch), batch[1], ref)
        common.descend(loss, model, optimizer, 1e-5, "benchmark")
    return sum(tokens.numel() for tokens, *_ in batches)


def check(model: Transformer, twin, kind: str, batches) -> None:
    """Ours and theirs have equal logits and gradients: they are the same model."""
    tokens, mask, there, ref = batches[0]
    for side in (model, twin):
        side.zero_grad()
        LOSSES[kind](outputs(side, tokens, mask, there), mask, ref).backward()
    grads = {name: p.grad for name, p in twin.named_parameters()}
    off = [g - grads[name] for name, g in as_llama(model, lambda p: p.grad)]
    if model.kind == "lm":
        off += [(model(tokens) - twin(tokens, attention_mask=there).logits)[there.bool()]]
    assert max(x.abs().max() for x in off) < 1e-4, "ours and theirs are not the same model"


def training_batches(model: Transformer, kind: str, device) -> list:
    """Four batches of 64 rows as the scripts make them, with log-probs of a reference."""
    torch.manual_seed(0)
    prompts = [common.chat(prompt) for prompt in list(common.QUESTIONS)[:256]]
    rollout = common.generate(model, prompts, 24)
    made = []
    for tokens, mask in zip(rollout.tokens.split(64), rollout.response_mask.split(64)):
        made.append((tokens, mask, tokens != PAD, torch.zeros(32, 2, device=device)))
    return made


def compare(name: str, ours, theirs: list, rounds: int, rate: float, shapes=()) -> None:
    """Print tokens/s of ours and of the best of theirs, measured in turn; the range of the
    ratio; and of a training step what share of the matmul rate at its shapes it reaches."""
    cuda = torch.cuda.is_available()
    memory = peak(ours, cuda), *(peak(run, cuda) for run in theirs)
    speed = []
    for _ in range(rounds):
        row = [(tokens / seconds) for seconds, tokens in map(timed, (ours, *theirs))]
        speed.append((row[0], max(row[1:], default=math.nan)))
    mine, best = (sorted(column) for column in zip(*speed))
    ratio = sorted(a / b for a, b in speed)
    middle = rounds // 2
    line = f"{name:34s}{mine[middle]:9.0f}{memory[0]:6.0f} MiB{best[middle]:9.0f}"
    line += f"{min(memory[1:], default=math.nan):6.0f} MiB"
    line += f"{ratio[middle]:7.2f} ({ratio[0]:.2f}–{ratio[-1]:.2f})"
    if shapes:  # three products a weight: forward, and two gradients
        needed = 3 * sum(2 * n * i * o for n, i, o in shapes) * mine[middle] / shapes[0][0]
        line += f"{needed / rate:6.0%}"
    print(line, flush=True)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    device = common.pick_device(cfg.device)
    policy = common.load_model(Path(cfg.runs) / "sft", "lm", device)
    c = policy.config
    square = matmul_rate([(2048, 2048, 2048)], device) / 1e9
    print(f"{device}, {cfg.threads} threads, torch {torch.__version__}; {square:.0f} GFLOP/s")
    print(f"{'':34s}{'ours/s':>9s}{'peak':>10s}{'theirs/s':>9s}{'peak':>10s}{'ratio':>7s}")
    prompts = [common.chat(prompt) for prompt in list(common.QUESTIONS)[::4][:256]]
    for limit, stops in ((64, False), (24, True), (64, True)):
        theirs = []
        if hf:
            twin, static = llama(policy), {"cache_implementation": "static"}
            theirs = [partial(roll, twin, prompts, limit, stops, **h) for h in ({}, static)]
        name = f"rollout 256 × {limit}, {'real stopping' if stops else 'forced'}"
        ours = partial(roll, policy, prompts, limit, stops)
        compare(name, ours, theirs, cfg.rounds, 1.0)
    for kind in LOSSES:
        model = common.scalar_copy(policy) if kind == "reward" else policy
        batches = training_batches(policy, kind, device)
        positions, kept = batches[0][0].numel(), int(batches[0][1].sum())
        shapes = matmuls(c, positions, 0 if kind == "reward" else kept)
        rate, sides = matmul_rate(shapes, device, backward=True), [model]
        if hf:
            sides.append(llama(model))
            check(*sides, kind, batches)
        runs = [partial(train, side, kind, common.adamw(side), batches) for side in sides]
        compare(f"{kind} step, 64 rows", runs[0], runs[1:], cfg.rounds, rate, shapes)
    print(
        "tokens/s: sampled response tokens, or all positions of a training step; last column:"
    )
    print("share of the matmul rate at the step's own shapes. theirs: best of their variants.")


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
