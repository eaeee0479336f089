"""PPO as TRL 1.12 has it, the last version with one, beside `ppo.py --estimator gae`.

    pip install --no-deps --target trl112 trl==1.12.0        beside what beside_trl.py needs
    python tests/studies/beside_trl_ppo.py trl112 --seeds 0 1 2 --threads 2

As in beside_trl.py; a stage more in its results file. Equal on both sides, beyond what is
named there: 128 answers a rollout, 4 minibatches, 2 epochs shuffled anew, β of k1 per token,
γ = 1, λ, a critic of its own whose trunk is SFT's and whose head is 0, the value loss (TRL's
clip of it off, its weight 1), the rate falling at every rollout. TRL needs one device batch of
all 128: with --gradient-accumulation-steps 4 its 4 minibatches become one update.

Not equal: TRL whitens advantages over the tokens of a rollout; it averages the policy loss
over a minibatch's tokens, we sum over an answer's (a scale, to which Adam is blind). It
adds the score to the first PAD, not to EOS, and V is trained there too: the last token's own
advantage has λ times the score. It samples all 24 tokens, and cuts at EOS afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import beside_trl as study
import torch

import common

study.STAGES["ppo"] = ("ppo.py", "sft", "PPO")


def theirs(runs: Path, seed: int) -> None:
    import datasets
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    cfg, steps, noted = torch.load(runs / "ppo_notes.pt")
    policy = study.load(runs, "sft")
    critic = common.scalar_copy(policy)
    torch.nn.init.zeros_(critic.scalar.weight)
    models, out = {}, runs / "ppo_tuned"
    for name, model in (
        ("policy", policy), ("reference", policy), ("value", critic),
        ("reward", study.load(runs, cfg["reward"])),
    ):  # fmt: skip
        common.export(model, runs / f"llama_{name}")
        kind = "CausalLM" if model is policy else "SequenceClassification"
        read = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
        models[name] = read(runs / f"llama_{name}", attn_implementation="eager")
    settings = PPOConfig(
        output_dir=str(out), seed=seed, learning_rate=cfg["lr"], lr_scheduler_type="linear",
        warmup_steps=0, adam_beta2=0.95, weight_decay=0.0, bf16=False, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        per_device_train_batch_size=len(noted[0]), num_mini_batches=cfg["minibatches"],
        num_ppo_epochs=cfg["epochs"], total_episodes=steps * len(noted[0]),
        local_rollout_forward_batch_size=len(noted[0]), response_length=cfg["max_new_tokens"],
        stop_token="eos", temperature=1.0, kl_coef=cfg["beta"], cliprange=cfg["clip"],
        gamma=1.0, lam=cfg["lam"], vf_coef=1.0, cliprange_value=1e9, num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        settings, transformers.AutoTokenizer.from_pretrained(runs / "llama_policy"),
        models["policy"], models["reference"], models["reward"], value_model=models["value"],
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": common.chat(prompt)} for batch in noted for prompt in batch]
        ),
    )  # fmt: skip
    clock = study.Clock()
    clock.start()
    trainer.train()
    clock.stop(out)
    study.read_back(models["policy"].state_dict(), policy)
    common.save_model(out, policy, {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trl112", type=Path, help="the folder with TRL 1.12 in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default="runs_trl")
    parser.add_argument("--results", type=Path, default="beside_trl.jsonl")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cell:
        side, seed = args.cell
        if side == "tuned":
            return theirs(args.runs, int(seed))
        flags = ["--estimator", "gae", "--steps", str(args.steps), "--seed", seed]
        return study.ours("ppo", args.runs, flags)
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = str(args.trl112.resolve())
    few = args.steps if args.steps != 60 else 0  # as beside_trl.py's --steps has it
    for seed in args.seeds:
        runs = (args.runs / str(seed)).resolve()
        study.prepare(runs, seed)
        for side in ("ours", "tuned"):
            cell = {"stage": "ppo", "side": side, "seed": seed, "steps": few}
            done = args.results.read_text() if args.results.exists() else ""
            if json.dumps(cell)[:-1] in done:
                continue
            flags = [args.trl112, "--cell", side, seed, "--runs", runs, "--steps", args.steps]
            flags = [str(flag) for flag in [__file__, *flags, "--threads", args.threads]]
            environment = os.environ | (study.KEEPING if side == "tuned" else {})
            subprocess.run([sys.executable, *flags], check=True, env=environment)
            cell |= json.loads((runs / f"ppo_{side}" / "cell.json").read_text())
            cell |= study.measure("ppo", side, runs, seed)
            with args.results.open("a") as file:
                file.write(json.dumps(cell) + "\n")
    cells = [json.loads(line) for line in args.results.open()]
    study.tables([x for x in cells if x["stage"] == "ppo" and x["steps"] == few])


if __name__ == "__main__":
    main()
