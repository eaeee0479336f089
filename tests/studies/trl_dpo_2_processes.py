"""TRL's DPO on two CPU processes, from a policy of ours on comparisons of ours.

    python common.py export sft llama_sft
    torchrun --nproc_per_node 2 tests/studies/trl_dpo_2_processes.py llama_sft \
        runs/comparisons/comparisons.jsonl llama_dpo [steps]
"""

import json
import sys
from pathlib import Path

import datasets
import trl

model, comparisons, out, steps = [*sys.argv[1:], 100][:4]
rows = [json.loads(line) for line in Path(comparisons).open()]
says = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
rows = [{k: [{"role": says[k], "content": row[k]}] for k in says} for row in rows
        if row["chosen_finished"] and row["rejected_finished"]]  # fmt: skip
args = trl.DPOConfig(out, use_cpu=True, bf16=False, max_steps=int(steps), beta=0.3,
                     per_device_train_batch_size=16, learning_rate=3e-4)  # fmt: skip
trainer = trl.DPOTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows))
print(f"process {args.process_index} of {args.world_size}, {args.parallel_mode}")
trainer.train()
trainer.save_model(out)
