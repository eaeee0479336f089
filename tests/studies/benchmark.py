"""Time the project beside `transformers`, and the recipe beside another checkout.

    python tests/studies/benchmark.py --runs runs         needs runs/sft and runs/reward_model
    python tests/studies/benchmark.py --beside FOLDER     whole commands, here and there in turn

Beside transformers: rollouts and training steps of ours and of its Llama, with the same weights
(equal logits and gradients are checked) and the same batches, in turn. Ours drops finished rows
from a rollout's batch, computes prefixes that rows share once, and has logits and the last
block's MLP only where they are needed; theirs pads on the left. Sampled texts differ by seed.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common, dpo, reward_model, sft  # noqa: E401, E402, I001
from common import EOS, PAD, Transformer  # noqa: E402
from data import zoo  # noqa: E402


def timed(run) -> tuple[float, object]:
    """Seconds until run() is over, on an accelerator its last kernel too, and its result."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else int
    wait()
    began, result, _ = time.perf_counter(), run(), wait()
    return time.perf_counter() - began, result


def peak(run) -> float:
    """MiB of this process that run() takes beyond what stood there before; NaN where the
    system does not say."""
    status, _ = Path("/proc/self/status"), run()  # the first call also reads libraries in
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what the allocator kept
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before, _, after = status.read_text(), run(), status.read_text()
    except (OSError, AttributeError):
        return math.nan
    kept, top = before.split("VmRSS:")[1].split()[0], after.split("VmHWM:")[1].split()[0]
    return (int(top) - int(kept)) / 1024


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

    def __init__(self, hf, ours: Transformer, kind: str, tokens, mask):
        super().__init__()
        shape = dict(zip(FIELDS, astuple(ours.config))) | {"pad_token_id": PAD, "num_labels": 1}
        shape |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
        net = hf.LlamaForSequenceClassification if kind == "reward" else hf.LlamaForCausalLM
        self.net, there = net(hf.LlamaConfig(**shape)).to(ours.device), tokens != PAD
        for p, x in zip(self.parameters(), as_llama(ours.parameters()), strict=True):
            p.data.copy_(x)
        off = [ours(tokens)[there] - self(tokens, there)] if ours.head == "lm" else []
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


def compare(name: str, rounds: int, runs: list) -> None:
    """Print a row: tokens per second and peak memory of ours, then of the best of theirs."""
    (memory, *others), speed = map(peak, runs), []
    for _ in range(rounds):
        ours, *rest = (tokens / seconds for seconds, tokens in map(timed, runs))
        speed.append((ours, max(rest, default=math.nan)))
    (ours, best), ratio = map(median, zip(*speed)), [a / b for a, b in speed]
    line = f"{name:34s}{ours:8.0f}{memory:6.0f} MiB{best:9.0f}"
    line += f"{min(others, default=math.nan):6.0f} MiB"
    print(f"{line}{median(ratio):7.2f} ({min(ratio):.2f}–{max(ratio):.2f})", flush=True)


def beside_transformers(args) -> None:
    import transformers as hf

    device = common.pick_device(args.device)
    common.seed_all(0)
    policy = common.load_model(args.runs / "sft", "lm", device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {hf.__version__}")
    print(f"{'tokens/s':38s}ours      peak   theirs      peak  ratio (range)")
    prompts = [common.chat(prompt) for prompt in list(zoo.QUESTIONS)[::4][:256]]
    rollout = common.generate(policy, prompts, 24)
    batches = list(zip(rollout.tokens.split(64), rollout.response_mask.split(64)))
    for limit, stops in ((64, False), (24, True), (64, True)):
        sides = [policy, Llama(hf, policy, "SFT", *batches[0])]
        runs = [partial(roll, model, prompts, limit, stops) for model in sides]
        runs.append(partial(runs[1], cache_implementation="static"))
        how = "real stopping" if stops else "forced"
        compare(f"rollout 256 × {limit}, {how}", args.rounds, runs)
    for kind in ("SFT", "reward", "DPO"):
        model = common.scalar_copy(policy) if kind == "reward" else policy
        sides = [model, Llama(hf, model, kind, *batches[0])]
        runs = [partial(train, side, kind, common.adam(side), batches) for side in sides]
        compare(f"{kind} step, 64 rows", args.rounds, runs)
    print(
        "tokens: sampled in responses, or all positions of a training step; theirs: the faster"
    )
    print("of two caches, and the smaller peak")


def beside_checkout(args) -> None:
    """Print the seconds of whole commands here and in another checkout, run in turn: ppo.py
    from an empty folder, then with its inputs there; and of each stage's training alone."""
    seconds = {}
    for _ in range(args.rounds):
        for side, folder in enumerate((ROOT, args.beside.resolve())):
            with tempfile.TemporaryDirectory() as runs:
                command = [sys.executable, "ppo.py", "--runs", runs, "--device", "cpu"]
                how = {"cwd": folder, "stdout": subprocess.DEVNULL, "check": True}
                how["env"] = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
                for what in ("whole recipe", "ppo.py, inputs there"):
                    took, _ = timed(partial(subprocess.run, command, **how))
                    seconds.setdefault(what, ([], []))[side].append(took)
                for about in Path(runs).glob("*/config.json"):
                    if took := json.loads(about.read_text()).get("seconds"):
                        what = f"{about.parent.name}, training"
                        seconds.setdefault(what, ([], []))[side].append(took)
    print(f"{'seconds':24s}    here   there   here / there (range)")
    for what, (ours, theirs) in seconds.items():
        ratio = [a / b for a, b in zip(ours, theirs)]
        line = f"{what:24s}{median(ours):8.1f}{median(theirs):8.1f}{median(ratio):8.2f}"
        print(f"{line} ({min(ratio):.2f}–{max(ratio):.2f})")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="of the two sides, in turn")
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--runs", type=Path, default="runs")
    parser.add_argument("--device", default="cpu", help="auto, or a name that torch knows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (beside_checkout if args.beside else beside_transformers)(args)


if __name__ == "__main__":
    main()
