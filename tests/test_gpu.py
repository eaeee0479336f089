"""What only an NVIDIA GPU can show: the captured token loop, and whole runs on the device.
Skipped where there is none. Under a minute."""

import csv
import gc
import os
import subprocess
import sys

import pytest
import torch

import common
import dpo
import ppo
import rejection_sampling
import reward_model
import sft
from common import ModelConfig, Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SIZES = dict(vocab_size=12, channels=32, layers=2, heads=2, kv_heads=1, hidden=48, context=96)
PROMPTS = [[5, 6, 7, 8]] * 20 + [[5, 6, 7], [9, 4, 5, 6, 7, 8]] * 10


def model_on(device: str, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**SIZES)).double().to(device)


def given(prompts, limit: int, seed: int, device: str) -> tuple:
    """The arguments of a token loop, with the same noise on every device."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    T = int(lengths.max()) + limit
    tokens = torch.tensor([p + [common.PAD] * (T - len(p)) for p in prompts])
    noise = torch.rand(
        tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    tensors = tokens, lengths, lengths + limit, noise
    return *(x.to(device) for x in tensors), int(lengths.min()), 0.9


def responses(loop, model, args) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, log-probs) where the mask of a loop's result is True."""
    with torch.no_grad():
        tokens, mask, logprobs = loop(model, *args)
    return tokens.where(mask, -1).cpu(), logprobs.where(mask, 0.0).cpu()


def test_graph_is_eager_is_cpu():
    """A captured loop that reads old inputs, rounds positions, or samples past the end."""
    cpu, gpu = model_on("cpu"), model_on("cuda")
    expected = responses(common._token_loop, cpu, given(PROMPTS, 20, 0, "cpu"))
    for loop in (common._token_loop, common._captured_loop, common._captured_loop):
        tokens, logprobs = responses(loop, gpu, given(PROMPTS, 20, 0, "cuda"))
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprobs, expected[1], atol=1e-9, rtol=0)


def test_shapes_are_replayed_in_any_order_bitwise():
    """Graphs share a memory pool: what one leaves there must not reach another's result."""
    model, work = model_on("cuda"), [(PROMPTS, 20), (PROMPTS[:7], 9), (PROMPTS[20:], 40)]
    first = [
        responses(common._captured_loop, model, given(p, n, i, "cuda"))
        for i, (p, n) in enumerate(work)
    ]
    for i in (2, 0, 1, 1, 2, 0):
        again = responses(common._captured_loop, model, given(*work[i], i, "cuda"))
        assert all(torch.equal(a, b) for a, b in zip(first[i], again))


def test_a_step_in_place_is_seen_by_an_old_graph_and_new_weights_by_a_new_one():
    """A graph that holds a copy of the weights would sample from an old policy for ever."""
    model, args = model_on("cuda"), given(PROMPTS, 20, 0, "cuda")
    responses(common._captured_loop, model, args)
    for change in (lambda: model.embed.weight.data.mul_(1.5), lambda: model.float().double()):
        change()
        found = responses(common._captured_loop, model, args)
        expected = responses(common._token_loop, model, args)
        assert torch.equal(found[0], expected[0])


def test_another_models_graphs_die_without_harm():
    """A dying graph frees the workspace of its capture stream: the others must not share it."""
    model, args = model_on("cuda"), given(PROMPTS, 20, 0, "cuda")
    expected = responses(common._captured_loop, model, args)
    for seed in range(3):
        other = model_on("cuda", seed)
        responses(common._captured_loop, other, args)
        del other
        gc.collect()
        torch.cuda.empty_cache()
        found = responses(common._captured_loop, model, args)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_replay_waits_for_nothing():
    """A hidden synchronisation makes the loop as slow as its launches."""
    model, args = model_on("cuda"), given(PROMPTS, 20, 0, "cuda")
    responses(common._captured_loop, model, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            common._captured_loop(model, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def on_gpu(runs, monkeypatch):
    """on_gpu(script, flags): a short run on the GPU; its metrics.csv as bytes."""
    evaluate = common.evaluate
    monkeypatch.setattr(
        common, "evaluate", lambda p, q, r, prompts, n: evaluate(p, q, r, prompts[:4], n)
    )

    def run(script, flags: str) -> bytes:
        argv = [script.__file__, "--runs", str(runs), "--device", "cuda", *flags.split()]
        monkeypatch.setattr(sys, "argv", [*argv, "--out", "new", "--max-new-tokens", "4"])
        common.start(script.main, script.Config, script.__doc__)
        return (runs / "new/metrics.csv").read_bytes()

    return run


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sft, "--steps 3 --batch 8 --demonstrations 60 --init other"),
        (reward_model, "--epochs 1 --batch 8"),
        (rejection_sampling, "--prompts 6 --samples 3 --steps 3 --batch 4"),
        (ppo, "--steps 3 --prompts 3 --samples 2 --minibatches 2"),
        (ppo, "--steps 3 --prompts 3 --samples 2 --minibatches 2 --estimator gae"),
        (dpo, "--steps 4 --batch 8"),
    ],
)
def test_every_script_runs_and_repeats_itself(on_gpu, script, flags):
    """A tensor left on the CPU; a seed that does not reach the device; KL not 0 at the start
    (ppo.py itself stops then)."""
    first = on_gpu(script, flags)
    assert on_gpu(script, flags) == first
    if script is ppo:
        assert float(next(csv.DictReader(first.decode().splitlines()))["kl"]) == 0


def test_tf32_forced_by_the_environment_changes_nothing(runs):
    """Vendor containers set it: ρ would be 1e-3 from 1 at the first update, and ppo.py stop."""
    env = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    flags = "--device cuda --steps 2 --prompts 3 --samples 2 --max-new-tokens 3 --out new"
    command = [sys.executable, ppo.__file__, "--runs", str(runs), *flags.split()]
    assert subprocess.run(command, env=env).returncode == 0
