"""The scripts on an accelerator, beside the CPU: all draws come from the CPU's generator, so
that both have the same. Skipped where torch sees no accelerator."""

import os

import pytest
import torch

import dpo
import ppo
import rejection_sampling
import reward_model
import sft

there = torch.accelerator.is_available()
DEVICE = os.environ.get("DEVICE", str(torch.accelerator.current_accelerator()) * there)
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs an accelerator")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sft, "--steps 3 --batch 8 --demonstrations 60 --base-steps 3"),
        (reward_model, "--epochs 1 --batch 16"),
        (rejection_sampling, "--prompts 6 --samples 3 --steps 2 --batch 4 --rounds 2"),
        (ppo, "--steps 3 --prompts 3 --samples 2 --minibatches 2"),
        (ppo, "--steps 3 --prompts 3 --samples 2 --minibatches 2 --estimator gae"),
        (dpo, "--steps 3 --batch 8"),
    ],
)
def test_every_script_has_the_numbers_of_the_cpu(call, script, flags):
    """A tensor left on the CPU; a draw from the device's generator; a KL that is not 0 at the
    start (ppo.py itself stops then); TF32."""
    flags += " --max-new-tokens 4 --out new"
    expected, found = call(script, flags), call(script, f"{flags} --device {DEVICE}")
    for mine, its in zip(found, expected, strict=True):
        for key, value in its.items():
            same = pytest.approx(float(value or 0), rel=1e-4, abs=1e-4)
            assert float(mine[key] or 0) == same, key


def test_the_same_command_has_the_same_bytes(repeats):
    """Sums in an order that changes from run to run."""
    flags = f"--steps 3 --prompts 3 --samples 2 --max-new-tokens 4 --device {DEVICE}"
    repeats(ppo, flags)
