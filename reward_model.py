"""Reward modelling: from pairwise comparisons to a scalar r(x, y).

Annotators compare two answers y_c (chosen) and y_r (rejected) to a prompt x. Bradley-Terry
supposes P(y_c ≻ y_r) = σ(r(x, y_c) − r(x, y_r)); r is fitted by maximum likelihood (chapter
"Reward Modeling", eq:rewardmodeling1):

    L(r) = − mean over pairs of log σ(r(x, y_c) − r(x, y_r))                nats per pair

    symbol         here                    made by
    x, y_c, y_r    rows of comparisons     common.comparisons, judged answers of the SFT model
    r(x, y), r_θ   chosen, rejected        common.score: scalar head at the last response token
    m(y_c, y_r)    margin                  bradley_terry_loss, eq:rewardmodelingmargin
    L              loss                    bradley_terry_loss

Comparisons fix r only up to a constant, so the mean score of demonstrations is subtracted
and saved with the weights: r = 0 is "as good as a human answer".

    python reward_model.py                              makes runs/sft and comparisons first
    python reward_model.py --pairs 2000 --out rm_weak   a weak one, for over-optimisation
    python reward_model.py --policy ppo --comparisons comparisons,comparisons_2 --out rm_2
                                                        a second round, on old and new pairs

Look at: held-out accuracy beside its ceiling. Annotators are noisy, so that even the gold
reward would agree with only `ceiling` of their choices. Both are free of label noise:
ceiling = mean σ(|Δgold|), accuracy = mean σ(Δgold · sign Δr). metrics.csv: `loss` (nats per
pair; ln 2 is chance), `accuracy` (share of the batch's pairs with r_c > r_r), `lr`.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Transformer, arg


@dataclass
class Config:
    pairs: int = arg(20_000, "train on at most so many comparisons", low=1)
    epochs: int = arg(3, "passes over the comparisons", low=1)
    batch: int = arg(32, "pairs per step", low=1)
    lr: float = arg(5e-4, "learning rate, falling to 0")
    margin: float = arg(0.0, "m, by how much the chosen score must be ahead")
    data: str = arg(None, "your own JSONL: {prompt, chosen, rejected}")
    comparisons: str = arg("comparisons", "judged pairs under --runs, or several: a,b")
    policy: str = arg(None, "collect missing comparisons from this run; or from init")
    max_new_tokens: int = arg(24, "longest answer in the closing table, in tokens", low=1)
    init: str = arg("sft", "the model whose trunk r starts from, under --runs")
    out: str = arg("reward_model", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """−log σ(r_c − r_r − m), nats: scores (B,), (B,) -> (B,).

    Source: "Reward Modeling", eq:rewardmodeling1; with a margin eq:rewardmodelingmargin.
    """
    # L = −log σ(r(x, y_c) − r(x, y_r) − m)
    return -F.logsigmoid(chosen - rejected - margin)


# ------------------------------------------------------------------------------------ data


def encode_pairs(rows: list[dict], device) -> tuple[Tensor, Tensor]:
    """Tokens and response masks of comparisons, (B, 2, T) each: [:, 0] chosen, [:, 1] not."""
    ids = [common.answer_ids(row, side) for row in rows for side in ("chosen", "rejected")]
    tokens, mask = common.collate(ids, device)
    return tokens.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


def pair_scores(model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """r of chosen and rejected, (B,) each, in one pass over the 2B rows."""
    scores = common.score(model, tokens.flatten(0, 1), mask.flatten(0, 1))
    return scores.view(-1, 2).unbind(1)


# ---------------------------------------------------------------------------------- update


def train(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Descend L over the comparisons, and save to runs/`out`."""
    tokens, mask = encode_pairs(rows, model.device)
    optimizer = common.adamw(model)
    epochs = [common.batches(mask, cfg.batch) for _ in range(cfg.epochs)]
    order = [batch for epoch in epochs for batch in epoch]
    with common.Run(cfg, cfg.out, model, len(order), show=("loss", "accuracy")) as run:
        for step in run:
            chosen, rejected = pair_scores(model, *common.take(order[step], tokens, mask))
            loss = bradley_terry_loss(chosen, rejected, cfg.margin).mean()
            lr = cfg.lr * (1 - step / len(order))
            value = common.descend(loss, model, optimizer, lr, f"step {step}")
            run.log(loss=value, accuracy=(chosen > rejected).float().mean().item(), lr=lr)
        center(cfg, model, rows)


@torch.no_grad()
def center(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Set the offset so that demonstrations score 0 in the mean: the world's, or for your
    own data the chosen answers."""
    if cfg.data:
        demonstrations = [{**row, "completion": row["chosen"]} for row in rows[:1000]]
    else:
        demonstrations = common.demonstrations(1000, cfg.seed)
    ids = [common.answer_ids(row, "completion") for row in demonstrations]
    model.offset += common.score(model, *common.collate(ids, model.device)).mean()


@torch.no_grad()
def accuracy(model: Transformer, rows: list[dict]) -> str:
    """How r orders held-out pairs; in the world, beside what annotator noise allows at most."""
    tokens, mask = encode_pairs(rows, model.device)
    parts = [pair_scores(model, t, m) for t, m in zip(tokens.split(256), mask.split(256))]
    gap = torch.cat([chosen - rejected for chosen, rejected in parts]).cpu().double()
    line = f"chosen preferred in {(gap > 0).double().mean():.3f}"
    chosen, rejected = (
        [common.gold_reward(x["prompt"], x[k], x.get(f"{k}_finished", True)) for x in rows]
        for k in ("chosen", "rejected")
    )
    gold_gap = torch.tensor(chosen).double() - torch.tensor(rejected).double()
    if gold_gap.isnan().any():
        return line
    apart = gold_gap != 0
    return line + (
        f"; free of label noise: accuracy {torch.sigmoid(gold_gap * gap.sign()).mean():.3f}, "
        f"ceiling {torch.sigmoid(gold_gap.abs()).mean():.3f}; "
        f"gold order {(gap.sign() == gold_gap.sign())[apart].double().mean():.3f}"
    )


def show(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Print the accuracy on held-out pairs, file by file, beside that of runs/reward_model;
    and three of the pairs with the score of each answer."""
    for source in [cfg.data] if cfg.data else cfg.comparisons.split(","):
        pairs = [row for row in rows if cfg.data or row["source"] == source]
        print(f"\n{len(pairs)} held-out pairs of {source}")
        for name in dict.fromkeys((Config.out, cfg.out)):
            folder = Path(cfg.runs) / name
            if (folder / "model.pt").exists():
                judge = common.load_model(folder, "scalar", model.device)
                print(f"{name:>20s}: {accuracy(judge, pairs)}")
    chosen, rejected = pair_scores(model, *encode_pairs(rows[:3], model.device))
    for row, r_c, r_r in zip(rows, chosen.tolist(), rejected.tolist()):
        print(
            f"{row['prompt']}\n{r_c:+20.2f}: {row['chosen']}\n{r_r:+20.2f}: {row['rejected']}"
        )


def main(cfg: Config) -> None:
    device = common.pick_device(cfg.device)
    own = cfg.data and common.read_jsonl(cfg.data, ("prompt", "chosen", "rejected"))
    train_rows, held_rows = common.split(own or common.comparisons(cfg, device))
    (init,) = common.ensure(cfg, "init")
    common.seed_all(cfg.seed)
    random.shuffle(train_rows)  # so that --pairs takes from all files alike
    train_rows = train_rows[: cfg.pairs]
    model = common.scalar_copy(common.load_model(init, "lm", device))
    print(f"{cfg.runs}/{cfg.out}: Bradley-Terry on {len(train_rows)} comparisons")
    train(cfg, model, train_rows)

    show(cfg, model, held_rows)
    reward = common.Reward(cfg.out, cfg.runs, device)
    prompts = [row["prompt"] for row in held_rows] if own else common.read_prompts(None, 0)[1]
    common.report(cfg, cfg.init, reward, prompts, device)


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
