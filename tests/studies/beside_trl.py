"""The same work here and in TRL, from the same weights on the same rows.

    pip install torch transformers trl datasets numpy tqdm          tried: trl 1.16.0
    python tests/studies/beside_trl.py --seeds 0 1 2 --threads 2
    python tests/studies/beside_trl.py --seeds 0 --steps 10 --runs trial --results trial.jsonl

Every cell (stage, side, seed) trains in a process of its own and leaves a line in the results
file, of which the tables are made; what stands there is not done again. Sides:

    ours     the script of this project, as its command line runs it
    trl      TRL's trainer as installed: gradient checkpointing, torch's fused attention, our
             rows in an order of its own
    tuned    no checkpointing, eager attention (faster for rows this short), a malloc that
             keeps its memory; our batches, row by row, in our order

Equal: the start (runs/base, runs/sft and the reward model's fresh head, by common.export), the
rows (no cut answers: TRL's template ends each with EOS), batch, steps, learning rate falling
linearly to 0 from the first step on, AdamW (0.9, 0.95) without decay, clipping of the
gradient's norm, β, ε, K, M, N, longest answer, float32 (TRL's default is bf16 autocast, on a
CPU too). TRL tokenizes the text by itself: `differ` counts the answers where its ids are not
ours. Its weights come back into our Transformer, and `measure` judges both sides; `apart` is
‖w_theirs − w_ours‖ / ‖w_ours − w_start‖. seconds: training alone, π_ref's log-probs on both
sides; no imports, tokenization or tables. MiB: the process's peak until then, `before` what
stood there before training.

Not equal:
    sft            TRL divides a batch's loss by that batch's number of tokens, we by the mean
                   number. `tuned` by ours: in batches of like length its own would give a
                   token of a short row several times the weight
    reward_model   nothing
    dpo            nothing
    rloo           the sampled answers. ρ and its clip are one per answer in TRL, one per token
                   here. TRL's rate falls at every update, ours at every rollout. TRL cuts a
                   rollout into minibatches once, we at every epoch. TRL's reward model reads
                   the answer's text, tokenized anew, and an EOS even where it was cut
"""

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import common  # noqa: E402
import reward_model  # noqa: E402

STAGES = {  # our script, what both sides start from, TRL's trainer
    "sft": ("sft.py", "base", "SFT"),
    "reward_model": ("reward_model.py", "reward_model_start", "Reward"),
    "dpo": ("dpo.py", "sft", "DPO"),
    "rloo": ("ppo.py", "sft", "RLOO"),
}
SIDES = ("ours", "trl", "tuned")
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # for glibc's malloc
PAIRS = "comparisons_finished"


def load(runs: Path, name: str) -> common.Transformer:
    head = "scalar" if name.startswith("reward_model") else "lm"
    return common.load_model(runs / name, head, torch.device("cpu"))


class Clock:
    """Seconds of this process from the first start() on, and its memory in MiB."""

    began = None

    def start(self) -> None:
        if self.began is None:
            self.before, self.began = self.memory("VmRSS"), time.perf_counter()

    def stop(self, folder: Path, **more) -> None:
        cell = {"seconds": time.perf_counter() - self.began, "MiB": self.memory("VmHWM")}
        (folder / "cell.json").write_text(json.dumps(cell | {"before": self.before} | more))

    def memory(self, what: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def ours(stage: str, runs: Path, flags: list[str]) -> None:
    """Run the script until its training is over. Notes for TRL: reward_model's start, and the
    batches in order, or for RL the prompts of each rollout."""
    clock, noted, generate = Clock(), [], common.generate

    def noting(function):
        def with_note(model, tokens, mask):
            if torch.is_grad_enabled() and STAGES[stage][0] != "ppo.py":
                if not noted and stage == "reward_model":  # its head is new
                    common.save_model(runs / "reward_model_start", model, {})
                noted.append(torch.where(mask, tokens, -1 - tokens).short())
            return function(model, tokens, mask)

        return with_note

    def noting_prompts(model, prompts, *more):
        noted.append([common.decode(prompt) for prompt in prompts])
        return generate(model, prompts, *more)

    class Run(common.Run):
        def __init__(self, *args, **more):
            clock.start()
            super().__init__(*args, **more)

        def __exit__(self, kind, *more):
            super().__exit__(kind, *more)
            if kind is None:
                clock.stop(self.folder)
                torch.save([vars(self.cfg), len(self.rows), noted], runs / f"{stage}_notes.pt")
                os._exit(0)  # the closing table is no training

    common.Run, common.generate = Run, noting_prompts
    common.token_logprobs, common.score = noting(common.token_logprobs), noting(common.score)
    script = STAGES[stage][0]
    sys.argv = [script, "--runs", str(runs), "--out", f"{stage}_ours", *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows_of(stage: str, noted: list) -> tuple[list[dict], list[list[int]], list[range]]:
    """Our batches as TRL's rows of text, the ids of their answers, and the rows of a batch."""
    rows, ids, batches = [], [], []
    names = ["completion"] if stage == "sft" else ["chosen", "rejected"]
    for batch in noted:
        first = len(rows)
        for answers in zip(*[iter(batch.tolist())] * len(names)):
            rows.append({})
            for name, answer in zip(names, answers):
                response = [i for i in answer if i >= 0]
                prompt = [-1 - i for i in answer[: answer.index(response[0])]]
                rows[-1] |= {"prompt": turn("user", common.decode(prompt))}
                rows[-1] |= {name: turn("assistant", common.decode(response))}
                ids.append(prompt + response)
        batches.append(range(first, len(rows)))
    return rows, ids, batches


def theirs(stage: str, side: str, runs: Path, seed: int) -> None:
    """Train on what our side noted, with the trainer of TRL that does this."""
    import datasets
    import trl

    _, start, name = STAGES[stage]
    cfg, steps, noted = torch.load(runs / f"{stage}_notes.pt")
    out, folder, model = runs / f"{stage}_{side}", runs / f"llama_{stage}", load(runs, start)
    common.export(model, folder)
    settings = dict(
        output_dir=str(out), seed=seed, max_steps=steps, learning_rate=cfg["lr"],
        lr_scheduler_type="linear", warmup_steps=0, adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=common.MAX_NORM, per_device_train_batch_size=cfg.get("batch"),
        bf16=False, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    if side == "tuned":
        settings |= {"gradient_checkpointing": False}
        settings |= {"model_init_kwargs": {"attn_implementation": "eager"}}
    if stage in ("dpo", "rloo"):
        settings |= {"beta": cfg["beta"]}
    trainer_class, rewards = getattr(trl, f"{name}Trainer"), []
    if stage == "rloo":
        common.export(load(runs, cfg["reward"]), runs / "llama_reward")
        rewards = [str(runs / "llama_reward")]
        K, parts, M, N = (cfg[key] for key in ("epochs", "minibatches", "prompts", "samples"))
        settings |= dict(
            max_steps=steps * K * parts, num_iterations=K, steps_per_generation=parts,
            per_device_train_batch_size=M * N // parts, num_generations=N, epsilon=cfg["clip"],
            max_completion_length=cfg["max_new_tokens"], shuffle_dataset=side != "tuned",
        )  # fmt: skip
        rows, ids = [{"prompt": turn("user", x)} for batch in noted for x in batch[::N]], []
    else:
        rows, ids, batches = rows_of(stage, noted)
        mean = mean_tokens(cfg) if stage == "sft" else None

        class OurBatches(trainer_class):
            def get_train_dataloader(self):
                data = self._remove_unused_columns(self.train_dataset, "training")
                how = {"batch_sampler": batches, "collate_fn": self.data_collator}
                return torch.utils.data.DataLoader(data, **how)

            def compute_loss(self, model, inputs, *more, num_items_in_batch=None):
                count = mean or num_items_in_batch
                return super().compute_loss(model, inputs, *more, num_items_in_batch=count)

        trainer_class = OurBatches if side == "tuned" else trainer_class
    config = getattr(trl, f"{name}Config")(**settings)
    data = datasets.Dataset.from_list(rows)
    trainer = trainer_class(str(folder), *rewards, args=config, train_dataset=data)
    made, clock = trainer.train_dataset.to_dict(), Clock()
    answers = [made[key] for key in ("input_ids", "chosen_ids", "rejected_ids") if key in made]
    prompts = made.get("prompt_ids", [[]] * len(rows))
    made = [prompt + part for prompt, *parts in zip(prompts, *answers) for part in parts]
    clock.start()
    trainer.train()
    clock.stop(out, differ=sum(a != b for a, b in zip(made, ids, strict=True)))
    read_back(trainer.model.state_dict(), model)
    common.save_model(out, model, {})


def mean_tokens(cfg: dict) -> float:
    """By what our SFT loss is divided."""
    rows = common.split(common.demonstrations(cfg["demonstrations"], cfg["seed"]))[0]
    tokens = sum(len(common.answer_ids(row)[1]) for row in rows)
    return tokens / math.ceil(len(rows) / cfg["batch"])


def read_back(weights: dict, model: common.Transformer) -> None:
    """The weights of a Llama of transformers into our Transformer."""
    for name, weight in model.named_parameters():
        *block, part, _ = name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        found = [weights[f"{layer}{theirs}.weight"] for theirs in common.LLAMA[part]]
        weight.data.copy_(torch.cat(found))


@torch.no_grad()
def measure(stage: str, side: str, runs: Path, seed: int) -> dict:
    """Our numbers, for a model of either side, on what is held out."""
    names = (f"{stage}_{side}", f"{stage}_ours", STAGES[stage][1])
    model, *_ = models = [load(runs, name) for name in names]
    it, first, start = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in models)
    found = {"apart": ((it - first).norm() / (first - start).norm()).item()}
    if stage == "reward_model":
        lines = (runs / PAIRS / "comparisons.jsonl").open()
        rows = common.split([json.loads(line) for line in lines])[1]
        return found | reward_model.accuracies(model, rows)
    if stage == "sft":
        rows = common.split(common.demonstrations(2400, seed))[1]
        tokens, mask = common.collate([common.answer_ids(row) for row in rows])
        nll = -common.token_logprobs(model, tokens, mask)
        found["loss"] = (nll.sum() / mask.sum()).item()
    prompts = common.split(list(common.QUESTIONS))[1]
    run = common.evaluate(model, load(runs, "sft"), None, prompts, 24)
    found |= {"KL": run["log_ratio"].mean().item()} if stage != "sft" else {}
    return found | {k: run[k].float().mean().item() for k in ("gold", "right", "finished")}


def prepare(runs: Path, seed: int) -> None:
    """What both sides start from: the recipe's own models; its pairs without cut answers."""
    if not (runs / "reward_model" / "model.pt").exists():
        flags = ["--runs", str(runs), "--seed", str(seed)]
        subprocess.run([sys.executable, ROOT / "reward_model.py", *flags], check=True)
    if not (runs / PAIRS).exists():
        lines = (runs / "comparisons" / "comparisons.jsonl").read_text().splitlines(True)
        (runs / PAIRS).mkdir()
        whole = [line for line in lines if line.count('_finished": true') == 2]
        (runs / PAIRS / "comparisons.jsonl").write_text("".join(whole))


def tables(cells: list[dict]) -> None:
    """Mean ± standard deviation over seeds, of the numbers and of the gaps seed by seed."""
    import pandas

    numbers = ["loss", "accuracy", "gold", "right", "KL", "apart", "seconds", "MiB"]
    frame = pandas.DataFrame(cells).set_index(["stage", "side", "seed"])
    frame = frame.reindex(columns=numbers)
    base = frame.xs("ours", level="side")
    gaps = (frame - base).drop(columns="apart").drop("ours", level="side")
    gaps["seconds"] = frame["seconds"] / base["seconds"]
    for name, table in {"": frame, "theirs − ours; seconds: theirs / ours": gaps}.items():
        groups = table.groupby(level=["stage", "side"], sort=False)
        mean, spread = groups.mean(), groups.std().fillna(0)
        text = mean.map("{:.3g} ± ".format) + spread.map("{:.2g}".format)
        print(f"\n{name}\n{text.where(mean.notna(), '').to_string()}")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=0, help="for a trial; 0: the scripts' own")
    parser.add_argument("--runs", type=Path, default="runs_trl", help="with a folder per seed")
    parser.add_argument("--results", type=Path, default="beside_trl.jsonl")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cell:
        stage, side, seed = args.cell
        if side != "ours":
            return theirs(stage, side, args.runs, int(seed))
        flags = ["--seed", seed] + ["--estimator", "rloo"] * (stage == "rloo")
        flags += ["--comparisons", PAIRS] if stage in ("reward_model", "dpo") else []
        few = ["--steps", args.steps]
        if stage == "reward_model":
            few = ["--epochs", 1, "--pairs", 32 * args.steps]
        return ours(stage, args.runs, flags + [str(x) for x in few if args.steps])
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    cells = [json.loads(x) for x in args.results.open()] if args.results.exists() else []
    for seed in args.seeds:
        runs = (args.runs / str(seed)).resolve()
        prepare(runs, seed)
        for stage, side in ((stage, side) for stage in args.stages for side in args.sides):
            key = {"stage": stage, "side": side, "seed": seed, "steps": args.steps}
            if any(cell | key == cell for cell in cells):
                continue
            flags = ["--cell", stage, side, str(seed), "--steps", str(args.steps)]
            flags += ["--runs", str(runs), "--threads", str(args.threads)]
            environment = os.environ | (KEEPING if side == "tuned" else {})
            subprocess.run([sys.executable, __file__, *flags], check=True, env=environment)
            cell = key | json.loads((runs / f"{stage}_{side}" / "cell.json").read_text())
            cells.append(cell | measure(stage, side, runs, seed))
            with args.results.open("a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    tables([cell for cell in cells if cell["steps"] == args.steps])


if __name__ == "__main__":
    main()
