"""The same training here and in TRL: from the same weights, on the same batches.

    pip install torch numpy tqdm trl transformers datasets         tried: TRL 1.16.0
    python tests/studies/beside_trl.py             three seeds, about 45 minutes of one core
    python tests/studies/beside_trl.py --quick     a tenth of all steps and pairs: does it work?

Four stages: SFT, reward model, DPO, and `ppo.py --estimator rloo` beside TRL's RLOOTrainer. In
each, two processes of one thread train in turn, some steps here, then as many there, so that
both meet the same load of the machine. `seconds` are processor time, of training alone, π_ref's
log-probs included; `MiB` is a process's peak, all that it imports included; `apart` is
‖w_theirs − w_ours‖ / ‖w_ours − w_start‖. ± is the standard deviation over seeds.

Equal: start, rows (no cut answers: TRL's template ends each with EOS), batches, steps, learning
rate, Adam (0.9, 0.95), clipping of the gradient's norm, β, ε, K, M, N, longest answer, float32.
TRL tokenizes the text by itself. Its weights come back into our Transformer, and one function
judges both. TRL has its fastest settings: no gradient checkpointing, no logging, no workers, a
malloc that keeps its memory, eager attention (sdpa takes as long for rows this short).

Not equal, in RLOO alone: the sampled answers. ρ and its clip are one per answer in TRL, one per
token here. TRL's rate falls at every update, ours at every rollout. TRL cuts a rollout into
minibatches once, we at every epoch. TRL's reward model reads the answer's text, tokenized anew,
and an EOS even where it was cut.
"""

import contextlib
import json
import math
import os
import resource
import statistics
import time
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import runs as study
import torch
from runs import CPU, HELD_OUT, TRAIN, common

import dpo
import ppo
import reward_model
import sft
from data import zoo
from tools import export

ATTENTION = "eager"
STAGES = {  # our script, what both sides start from, TRL's trainer, steps in a turn, numbers
    "sft": (sft, "base", "SFT", 10, "loss gold right"),
    "reward_model": (reward_model, "sft", "Reward", 20, "accuracy agrees_with_gold"),
    "dpo": (dpo, "sft", "DPO", 20, "gold kl right"),
    "rloo": (ppo, "sft", "RLOO", 1, "gold kl right"),
}
FLAGS = {"rloo": ["--estimator", "rloo", "--reward", "reward_model_ours"]}
RECIPE = {"sft": "sft.py", "comparisons": "collect sft 20000"}


class Clock:
    """Times training in turns: after each, the other side has its own."""

    def __init__(self, pipe: Connection, steps: int, turn: int):
        self.pipe, self.steps, self.turn, self.done = pipe, steps, turn, 0

    def start(self) -> None:
        self.pipe.recv()
        self.began = time.process_time()

    def tick(self) -> None:
        """A step is done."""
        self.done += 1
        if self.done % self.turn == 0 or self.done == self.steps:
            self.pipe.send(time.process_time() - self.began)
            if self.done < self.steps:
                self.start()


def given(stage: str, folder: Path, seed: int, quick: bool) -> tuple:
    """What both sides are given: settings, the model at the start, rows, and the numbers of
    each step's rows, as common.minibatches draws them. For RLOO the rows are the prompts."""
    script, start, *_ = STAGES[stage]
    words = ["--runs", str(folder), "--out", f"{stage}_ours", "--seed", str(seed)]
    words += study.FEW[f"{script.__name__}.py"].split() * quick + FLAGS.get(stage, [])
    cfg = common.parse(script.Config, "", words)
    common.seed_all(seed)
    model = common.load_model(folder / start, "lm", CPU)
    if stage == "rloo":
        rows = [{"prompt": x} for prompts in ppo.draw(cfg, TRAIN) for x in prompts]
        return cfg, model, rows, [range(cfg.prompts)] * cfg.steps
    if stage == "sft":
        rows = zoo.demonstrations(cfg.demonstrations, seed)
    else:
        rows = common.split(pairs(folder), own=False)[0][: cfg.pairs]
    if stage == "reward_model":
        model, steps = common.scalar_copy(model), cfg.epochs * math.ceil(len(rows) / cfg.batch)
    else:
        steps = cfg.steps
    common.seed_all(seed)
    number = torch.arange(len(rows))[:, None]
    stream = common.minibatches(cfg.batch, number, torch.ones_like(number))
    return cfg, model, rows, [batch.flatten().tolist() for batch, _ in islice(stream, steps)]


def pairs(folder: Path) -> list[dict]:
    """The comparisons of two finished answers."""
    rows = map(json.loads, (folder / "comparisons" / study.PAIRS).open())
    return [row for row in rows if row["chosen_finished"] and row["rejected_finished"]]


def ours(stage: str, cfg, model, rows: list[dict], clock: Clock) -> None:
    """Train with the script's own `train`, which saves the result."""

    class Run(common.Run):
        def __enter__(self):
            clock.start()
            return super().__enter__()

        def log(self, **row):
            row = super().log(**row)
            clock.tick()
            return row

    common.Run, path = Run, Path(cfg.runs)
    if stage in ("dpo", "rloo"):
        reference = common.load_model(path / cfg.ref, "lm", CPU).requires_grad_(False)
    if stage == "rloo":
        reward = common.model_reward(common.load_model(path / cfg.reward, "scalar", CPU))
    common.seed_all(cfg.seed)
    if stage == "sft":
        tokens, mask = common.collate([common.answer_ids(row) for row in rows])
        held = tokens[:1], mask[:1]  # TRL measures nothing on the way
        sft.train(cfg, cfg.out, model, (tokens, mask), held, cfg.lr, cfg.steps)
    elif stage == "reward_model":
        reward_model.train(cfg, model, rows)
    elif stage == "dpo":
        dpo.train(cfg, model, reference, rows)
    else:
        ppo.train(cfg, model, reference, None, reward, TRAIN)


def theirs(stage: str, cfg, model, rows: list[dict], batches: list, clock: Clock) -> None:
    """Train with TRL, and put its weights into our model."""
    import datasets
    import transformers
    import trl

    name, folder = STAGES[stage][2], Path(cfg.runs) / f"llama_{stage}"
    common.save_model(folder.with_name(f"{stage}_start"), model)
    export.main([f"{stage}_start", str(folder), "--runs", cfg.runs])
    settings = dict(
        output_dir=str(folder), seed=cfg.seed, max_steps=len(batches), learning_rate=cfg.lr,
        lr_scheduler_type="linear", warmup_steps=0, adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=common.MAX_NORM, bf16=False, use_cpu=True, gradient_checkpointing=False,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"attn_implementation": ATTENTION},
    )  # fmt: skip
    if stage in ("dpo", "rloo"):
        settings["beta"] = cfg.beta
    trainer_class, judge = getattr(trl, f"{name}Trainer"), []
    if stage == "rloo":
        judge = [str(folder.with_name("llama_reward"))]
        export.main([cfg.reward, judge[0], "--runs", cfg.runs])
        updates, size = cfg.epochs * cfg.minibatches, cfg.prompts * cfg.samples
        clock.steps, clock.turn = clock.steps * updates, clock.turn * updates
        settings |= dict(
            max_steps=clock.steps, num_iterations=cfg.epochs, epsilon=cfg.clip,
            steps_per_generation=cfg.minibatches, num_generations=cfg.samples,
            per_device_train_batch_size=size // cfg.minibatches, shuffle_dataset=False,
            max_completion_length=cfg.max_new_tokens,
        )  # fmt: skip
    else:

        class OurBatches(trainer_class):
            def get_train_dataloader(self):
                data = self._remove_unused_columns(self.train_dataset, "training")
                how = {"batch_sampler": batches, "collate_fn": self.data_collator}
                return torch.utils.data.DataLoader(data, **how)

        trainer_class = OurBatches

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.tick()

    who = {"prompt": "user"}  # all else is said by the assistant
    turns = [{key: [{"role": who.get(key, "assistant"), "content": row[key]}]
              for key in ("prompt", "completion", "chosen", "rejected") if key in row}
             for row in rows]  # fmt: skip
    trainer = trainer_class(
        str(folder), *judge, args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=datasets.Dataset.from_list(turns), callbacks=[Ticks()],
    )  # fmt: skip
    trainer.train()
    found = trainer.model.state_dict()
    for name, weight in model.named_parameters():  # as in tools/export.py, the other way
        *block, part, _ = name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        parts = [found[f"{layer}{llama}.weight"] for llama in export.LLAMA[part]]
        weight.data = torch.cat(parts)


def train(side: str, stage: str, folder: Path, seed: int, quick: bool, pipe) -> None:
    """One side of a stage, in a process of its own."""
    torch.set_num_threads(1)
    with (
        (folder / f"{stage}_{side}.txt").open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        cfg, model, rows, batches = given(stage, folder, seed, quick)
        clock = Clock(pipe, len(batches), STAGES[stage][3])
        if side == "ours":
            ours(stage, cfg, model, rows, clock)
        else:
            theirs(stage, cfg, model, rows, batches, clock)
            common.save_model(folder / f"{stage}_{side}", model)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def beside(stage: str, folder: Path, seed: int, quick: bool) -> dict[str, dict]:
    """Train both sides of a stage in turn; {side: what is measured}."""
    context, pipes, seconds = get_context("spawn"), {}, {"ours": [], "trl": []}
    for side in seconds:
        pipes[side], other = context.Pipe()
        args = (side, stage, folder, seed, quick, other)
        context.Process(target=train, args=args, daemon=True).start()
        other.close()
    steps = len(given(stage, folder, seed, quick)[3])
    for _ in range(math.ceil(steps / STAGES[stage][3])):
        for side, pipe in pipes.items():
            pipe.send("your turn")
            seconds[side].append(pipe.recv())
    found = {}
    for side, pipe in pipes.items():
        peak = pipe.recv()
        cell = {"seconds": sum(seconds[side]), "MiB": peak, "turns": seconds[side]}
        found[side] = measure(stage, side, folder, seed) | cell
    return found


@torch.no_grad()
def measure(stage: str, side: str, folder: Path, seed: int) -> dict[str, float]:
    """Our numbers, for a model of either side, on what is held out."""
    head = "scalar" if stage == "reward_model" else "lm"
    models = [study.load(folder, f"{stage}_{name}", head) for name in (side, "ours", "start")]
    w, w_ours, w_start = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in models)
    found = {"apart": ((w - w_ours).norm() / (w_ours - w_start).norm()).item()}
    if stage == "reward_model":
        held = common.split(pairs(folder), own=False)[1]
        return found | reward_model.accuracies(models[0], held)
    if stage == "sft":
        held = [common.answer_ids(row) for row in zoo.demonstrations(400, seed, held_out=True)]
        tokens, mask = common.collate(held)
        logprobs = common.token_logprobs(models[0], tokens, mask)
        found["loss"] = sft.sft_loss(logprobs, mask).item()
    reference = study.load(folder, "sft", "lm")
    run = common.evaluate(models[0], reference, None, list(HELD_OUT), 24)
    return found | {key: run[key].mean().item() for key in common.NUMBERS}


def table(cells: dict[str, list[dict]]) -> None:
    """The numbers of each stage, and the gaps: differences, of seconds and memory ratios."""

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def show(values: list[float]) -> str:
        return f"{statistics.mean(values):.4g} ± {spread(values):.2g}"

    line = "{:14}{:18}{:>20}{:>20}   {}".format
    print("\n" + line("", "", "ours", "TRL", "TRL − ours or TRL / ours, seed by seed"))
    for stage, seeds in cells.items():
        numbers = STAGES[stage][4].split()
        for key in [*numbers, "apart", "seconds", "MiB"]:
            here, there = ([cell[side][key] for cell in seeds] for side in ("ours", "trl"))
            pairs, costs = list(zip(there, here)), key in ("seconds", "MiB")
            said = "  ".join(f"{a / b:.2f} ×" if costs else f"{a - b:+.4f}" for a, b in pairs)
            gap = abs(statistics.mean(a - b for a, b in pairs))
            if key in numbers and gap > max(spread(here), spread(there)):
                said += "   further apart than the seeds"
            print(line(stage, key, show(here), show(there), said))


def main() -> None:
    args = study.arguments(__doc__, "runs_trl", [0, 1, 2])
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc's
    torch.set_num_threads(1)
    recipe = study.quick(RECIPE) if args.quick else RECIPE
    study.make_all(recipe, args.folders, args.jobs)
    cells = {stage: [] for stage in args.only or STAGES}
    for seed, folder in args.folders.items():
        for stage in cells:
            file = folder / f"{stage}.json"
            if not file.exists():
                common.write(file, json.dumps(beside(stage, folder, seed, args.quick)))
            cells[stage].append(json.loads(file.read_text()))
    table(cells)


if __name__ == "__main__":
    main()
