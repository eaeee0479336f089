"""Time the project beside `transformers`, and a PPO step part by part and size by size.

python tests/studies/benchmark.py [--threads 1]       needs runs/sft and runs/reward_model
python tests/studies/benchmark.py --beside FOLDER     the recipe, here and in another checkout

1. Rollouts and training steps of ours and, if it is there, of the Llama of transformers: the
   same weights (equal logits and gradients are checked), the same batches, in turn. But ours
   drops finished rows from the batch and computes prefixes that rows share once (both on a
   CPU), and has logits and the last block's MLP only where they are needed; theirs pads on the
   left. Sampled texts differ by seed.

2. The parts of a PPO step of the default run. 3. Its growth with rows, tokens and model.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import astuple
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common, dpo, reward_model, sft  # noqa: E401, E402, I001
from benchmark_ppo import breakdown, growth, timed  # noqa: E402
from common import EOS, PAD, Transformer  # noqa: E402

try:
    import transformers as hf
except ImportError:
    hf = None


def peak(run) -> float:
    """MiB that run() takes beyond what stood there before; NaN where that is not known."""
    if torch.cuda.is_initialized():  # at the first call, which captures its graphs
        torch.cuda.reset_peak_memory_stats()
        before, _ = torch.cuda.memory_allocated(), run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, _ = Path("/proc/self/status"), run()  # the first call also reads libraries in
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what the allocator kept
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before, _, after = status.read_text(), run(), status.read_text()
    except (OSError, AttributeError):
        return math.nan
    kept, top = before.split("VmRSS:")[1].split()[0], after.split("VmHWM:")[1].split()[0]
    return (int(top) - int(kept)) / 1024


def matmuls(run) -> tuple[int, float]:
    """FLOPs of run()'s products with weights and of their gradients; FLOP/s of these alone."""
    work, linear = [], F.linear

    def noted(x, w, bias=None):
        y = linear(x, w)
        work.append([t.detach().flatten(0, -2) for t in (x, w, y)])
        return y

    def alone():
        for x, w, g in work:  # g: where the gradient of y would stand
            _ = linear(x, w), g @ w, g.T @ x

    with patch.object(F, "linear", noted):
        run()
    flops = sum(6 * len(x) * w.numel() for x, w, _ in work)
    return flops, flops / min(timed(alone)[0] for _ in range(7))


FIELDS = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
intermediate_size max_position_embeddings rope_theta rms_norm_eps""".split()  # as ModelConfig's


def as_llama(tensors):
    """One tensor per parameter of ours, in the order of theirs, the fused ones split."""
    embed, *rest = tensors
    yield embed
    while len(rest) > 2:
        attention_norm, qkv, out, mlp_norm, gate_up, down, *rest = rest
        yield from (*qkv.chunk(3), out, *gate_up.chunk(2), down, attention_norm, mlp_norm)
    yield from rest


class Llama(torch.nn.Module):
    """The Llama of transformers with the weights of `ours`, for the functions of `common`."""

    def __init__(self, ours: Transformer, kind: str, tokens, mask):
        super().__init__()
        shape = dict(zip(FIELDS, astuple(ours.config))) | {"pad_token_id": PAD, "num_labels": 1}
        shape |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
        net = hf.LlamaForSequenceClassification if kind == "reward" else hf.LlamaForCausalLM
        self.net, there = net(hf.LlamaConfig(**shape)).to(ours.device), tokens != PAD
        for p, x in zip(self.parameters(), as_llama(ours.parameters()), strict=True):
            p.data.copy_(x)
        off = [ours(tokens)[there] - self(tokens, there)] if ours.kind == "lm" else []
        ours.zero_grad()
        for side in (ours, self):
            loss(side, kind, tokens, mask).backward()
        grads = as_llama([p.grad for p in ours.parameters()])
        off += [p.grad - grad for p, grad in zip(self.parameters(), grads)]
        assert max(x.abs().max() for x in off) < 1e-4, "ours and theirs are not the same model"

    def forward(self, tokens, keep):
        out = self.net(tokens, attention_mask=tokens != PAD, use_cache=False).logits
        return out[keep] if out.dim() == 3 else out[:, 0]


def roll(model, prompts, limit: int, stops: bool, **cache) -> int:
    """Response tokens sampled by ours or theirs. Forced: to both EOS is one token of many."""
    if isinstance(model, Transformer):
        with patch.object(common, "EOS", EOS if stops else -1):
            return int(common.generate(model, prompts, limit).response_mask.sum())
    P, free = max(map(len, prompts)), {"do_sample": True, "top_k": 0, "max_new_tokens": limit}
    free |= cache | ({"eos_token_id": EOS} if stops else {})
    ids = torch.tensor([[PAD] * (P - len(p)) + p for p in prompts], device=model.net.device)
    out = model.net.generate(ids, attention_mask=(ids != PAD).long(), **free)[:, P:]
    return int((out != PAD).sum()) if stops else out.numel()  # after EOS they write PAD


def loss(model, kind: str, tokens, mask):
    """Of ours or theirs; DPO's beside a reference whose log-probs are 0."""
    if kind == "reward":
        scores = common.score(model, tokens, mask).view(-1, 2)
        return reward_model.bradley_terry_loss(*scores.T).mean()
    logprobs = common.token_logprobs(model, tokens, mask)
    pairs = logprobs.sum(1).view(-1, 2)
    return sft.sft_loss(logprobs, mask) if kind == "SFT" else dpo.dpo(*pairs.T, 0.3).mean()


def train(model, kind: str, optimizer, batches) -> int:
    """An optimizer step of ours or theirs on every batch."""
    for batch in batches:
        common.descend(loss(model, kind, *batch), model, optimizer, 1e-5)
    return sum(tokens.numel() for tokens, _ in batches)


def compare(name: str, rounds: int, runs: list, square: float = 0) -> None:
    """Print a row of the first table; runs: ours, then theirs if they are there."""
    (memory, *others), speed = map(peak, runs), []
    for _ in range(rounds):
        ours, *rest = (tokens / seconds for seconds, tokens in map(timed, runs))
        speed.append((ours, max(rest, default=math.nan)))
    (ours, best), ratio = map(median, zip(*speed)), [a / b for a, b in speed]
    line = f"{name:34s}{ours:8.0f}{memory:6.0f} MiB{best:9.0f}"
    line += f"{min(others, default=math.nan):6.0f} MiB"
    line += f"{median(ratio):7.2f} ({min(ratio):.2f}–{max(ratio):.2f})"
    if square:
        flops, rate = matmuls(runs[0])
        line += "".join(f"{flops * ours / runs[0]() / full:8.0%}" for full in (rate, square))
    print(line, flush=True)


def compare_checkouts(other: Path, rounds: int, threads: int) -> None:
    """Print the seconds of whole commands here and in another checkout, run in turn: ppo.py
    from an empty folder, then with its inputs there; and of each stage's training alone."""
    seconds = {}
    for _ in range(rounds):
        for side, folder in enumerate((ROOT, other)):
            with tempfile.TemporaryDirectory() as runs:
                command = [sys.executable, "ppo.py", "--runs", runs, "--device", "cpu"]
                how = {"cwd": folder, "stdout": subprocess.DEVNULL, "check": True}
                how["env"] = os.environ | {"OMP_NUM_THREADS": str(threads)}
                for what in ("whole recipe", "ppo.py, inputs there"):
                    took, _ = timed(partial(subprocess.run, command, **how))
                    seconds.setdefault(what, ([], []))[side].append(took)
                for about in Path(runs).glob("*/config.json"):
                    took = json.loads(about.read_text())["seconds"]
                    what = f"{about.parent.name}, training"
                    seconds.setdefault(what, ([], []))[side].append(took)
    print(f"{'seconds':24s}    here   there   ratio (range)")
    for what, (ours, theirs) in seconds.items():
        ratio = [b / a for a, b in zip(ours, theirs)]
        line = f"{what:24s}{median(ours):8.1f}{median(theirs):8.1f}{median(ratio):8.2f}"
        print(f"{line} ({min(ratio):.2f}–{max(ratio):.2f})")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="of ours and theirs, in turn")
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--runs", type=Path, default="runs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    cfg = parser.parse_args()
    torch.set_num_threads(cfg.threads)
    if cfg.beside:
        compare_checkouts(cfg.beside.resolve(), cfg.rounds, cfg.threads)
        return
    device = common.pick_device(cfg.device)
    common.seed_all(0)
    policy = common.load_model(cfg.runs / "sft", "lm", device)
    _, square = matmuls(lambda: F.linear(*torch.randn(2, 2048, 2048, device=device)))
    beside = f"transformers {hf.__version__}" if hf else "no transformers"
    print(f"{device}, {cfg.threads} threads, torch {torch.__version__}, {beside};", end=" ")
    print(f"products of 2048 × 2048: {square / 1e9:.0f} GFLOP/s")
    if device.type == "cuda":
        x = torch.empty(2**28, device=device)
        seconds = min(timed(x.clone)[0] for _ in range(7))
        print(f"memory bandwidth {2 * x.nbytes / seconds / 1e9:.0f} GB/s, of a 1 GiB copy")
    print(f"{'tokens/s':38s}ours      peak   theirs      peak  ratio (range)     matmul share")
    prompts = [common.chat(prompt) for prompt in list(common.QUESTIONS)[::4][:256]]
    rollout = common.generate(policy, prompts, 24)
    batches = list(zip(rollout.tokens.split(64), rollout.response_mask.split(64)))
    for limit, stops in ((64, False), (24, True), (64, True)):
        sides = [policy, Llama(policy, "SFT", *batches[0])] if hf else [policy]
        runs = [partial(roll, model, prompts, limit, stops) for model in sides]
        runs += [partial(run, cache_implementation="static") for run in runs[1:]]
        how = "real stopping" if stops else "forced"
        compare(f"rollout 256 × {limit}, {how}", cfg.rounds, runs)
    for kind in ("SFT", "reward", "DPO"):
        model = common.scalar_copy(policy) if kind == "reward" else policy
        sides = [model, Llama(model, kind, *batches[0])] if hf else [model]
        runs = [partial(train, side, kind, common.adamw(side), batches) for side in sides]
        compare(f"{kind} step, 64 rows", cfg.rounds, runs, square)
    print("tokens: sampled in responses, or all positions of a training step; matmul share:")
    print("at the step's own shapes, of 2048 × 2048; theirs: better of two caches, least peak")
    print(__doc__.split("\n\n")[2])  # what differs between the two sides
    breakdown(cfg, device)
    growth(cfg.rounds, device)


if __name__ == "__main__":
    main()
