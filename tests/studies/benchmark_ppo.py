"""Parts 2 and 3 of benchmark.py: a PPO step part by part, and size by size."""

import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common, ppo  # noqa: E401, E402, I001
from common import Transformer  # noqa: E402


def timed(run) -> tuple[float, object]:
    """Seconds until run() is over, on CUDA its last kernel too, and what it returned."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else int
    wait()
    began, result, _ = time.perf_counter(), run(), wait()
    return time.perf_counter() - began, result


def stepper(cfg: ppo.Config, policy, reference, rewards):
    """A function: a step of ppo.main on given prompts, at rate 0, so that its work stays."""
    critic = common.scalar_copy(policy)
    optimizers = [common.adamw(policy), common.adamw(critic)]

    def reward(_, rollout):
        return common.score(rewards, rollout.tokens, rollout.response_mask)

    def step(prompts):
        batch = ppo.collect(cfg, prompts, policy, reference, critic, reward)
        advantages = ppo.estimate_advantages(cfg.estimator, cfg, batch)
        ppo.update(cfg, batch, advantages, policy, critic, optimizers, 0.0)

    return step


PARTS = {"generate": "generate", "token_logprobs": "log-probs of policy and reference"}
PARTS |= {"score": "reward model scores", "token_values": "critic values", "descend": ""}
PARTS |= dict.fromkeys(("completions", "gold_reward"), "text and gold reward, on the host")


def breakdown(cfg, device) -> None:
    """Print the second table, by clocks around the functions of `common` that ppo.py calls."""
    default, rows, plain = ppo.Config(), [], []
    inputs = {"init": "lm", "ref": "lm", "reward": "scalar"}
    folders = [cfg.runs / getattr(default, flag) for flag in inputs]
    models = [common.load_model(f, head, device) for f, head in zip(folders, inputs.values())]
    step = stepper(default, *models)
    stream = common.shuffled(common.read_prompts(None, default.max_new_tokens, 512)[0])

    def clock(name, run, *args):
        (seconds, result), part = timed(partial(run, *args)), PARTS[name]
        if torch.is_grad_enabled():  # in ppo.update
            critic = any(getattr(x, "kind", "") == "scalar" for x in args)
            part = "critic updates" if critic else "policy updates"
        rows[-1][part] = rows[-1].get(part, 0.0) + seconds
        return result

    clocks = {name: partial(clock, name, getattr(common, name)) for name in PARTS}
    for _ in range(3 * cfg.rounds):
        run = partial(step, [next(stream) for _ in range(default.prompts)])
        plain.append(timed(run)[0])
        rows.append({})
        with patch.multiple(common, **clocks):
            total, _ = timed(run)
        rows[-1] |= {"rest": total - sum(rows[-1].values()), "whole step": total}
    middle = {part: median(row[part] for row in rows) for part in rows[-1]}
    what = f"PPO step, {default.prompts} × {default.samples} rows"
    print(f"\n{what:38s}    ms  of it     medians of {len(rows)}")
    for part, seconds in (middle | {"without these clocks": median(plain)}).items():
        print(f"{part:34s}{1000 * seconds:8.1f}{seconds / middle['whole step']:8.1%}")


def growth(rounds: int, device) -> None:
    """Print the third table: fresh models, and no response that ends before its limit."""
    sizes = [(B, 24, 128, 2) for B in (64, 128, 256, 512)]
    sizes += [(128, T, 128, 2) for T in (12, 24, 48, 96)]
    sizes += [(128, 24, *model) for model in ((64, 2), (128, 2), (256, 2), (256, 4))]
    steps, flops, seconds = {}, {}, {size: [] for size in sizes}
    # for the counter, which does not see what a CUDA graph holds
    eager = patch.object(common, "_captured_loop", common._token_loop)
    with patch.object(common, "EOS", -1):
        for B, T, C, L in seconds:
            c = common.ModelConfig(channels=C, layers=L, hidden=C * 11 // 4)
            models = [Transformer(c, head).to(device) for head in ("lm", "lm", "scalar")]
            step = stepper(ppo.Config(prompts=B // 4, max_new_tokens=T), *models)
            run = steps[B, T, C, L] = partial(step, list(common.QUESTIONS)[::16][: B // 4])
            with FlopCounterMode(display=False) as counter, eager:
                run()
            flops[B, T, C, L] = counter.get_total_flops()
        for size, run in [*steps.items()] * max(1, rounds // 2):
            seconds[size].append(timed(run)[0])
    print("\n  rows   new channels layers     s/step  growth  of FLOPs   (PPO step, forced)")
    for i, size in enumerate(sizes):
        first, now = sizes[i // 4 * 4], median(seconds[size])
        line = "{:6d}{:6d}{:9d}{:7d}".format(*size) + f"{now:11.3f}"
        print(line + f"{now / median(seconds[first]):8.2f}{flops[size] / flops[first]:10.2f}")
