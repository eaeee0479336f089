"""Reward modelling: from pairwise comparisons to a scalar r(x, y).

Annotators compare two answers y_c (chosen) and y_r (rejected) to a prompt x. Bradley-Terry
supposes P(y_c ≻ y_r) = σ(r(x, y_c) − r(x, y_r)); r is fitted by maximum likelihood (chapter
"Reward Modeling", eq:rewardmodeling1):

    L(r) = − mean over pairs of log σ(r(x, y_c) − r(x, y_r))                nats per pair

    symbol         here                    made by
    x, y_c, y_r    rows of comparisons     common.comparisons: judged answers of --init
    r(x, y), r_θ   r_chosen, r_rejected    common.score: scalar head at the last response token
    m              cfg.margin              one for all pairs; eq:rewardmodelingmargin: one each
    L              loss                    bradley_terry_loss

A step, numbered as in the code:
    1  draw a minibatch of pairs
    2  score both answers of each, in one pass
    3  descend L
and once, after the last step:
    4  centre r. Comparisons fix r only up to a constant, so the mean score of demonstrations
       is subtracted and saved with the weights: r = 0 is an average demonstration.

    python reward_model.py                              makes runs/sft and comparisons first
    python reward_model.py --pairs 2000 --out rm_weak   a weak one, for over-optimisation
    python reward_model.py --init ppo --comparisons comparisons,pairs_2 --pairs 40000 --out rm_2
                                      a second round: pairs of ppo's answers beside the old ones

Look at: held-out accuracy beside its ceiling. Annotators are noisy, so that even the gold
reward would agree with only `ceiling` of their choices. Both are expectations over the noisy
label: ceiling = mean σ(|Δgold|), accuracy = mean σ(Δgold · sign Δr). metrics.csv: `loss`
(nats per pair; ln 2 is chance), `accuracy` (of the training batch, noisy labels and all: the
share with r_c > r_r, which the held-out printout calls `labels`), `grad_norm` (before
clipping), `lr`. The book trains reward models for one epoch, to avoid overfitting; a model
this small still improves in the third.
"""

import math
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
    lr: float = arg(5e-4, "learning rate, falling to 0", high=1)
    margin: float = arg(0.0, "m, how far r_chosen should exceed r_rejected")
    data: str = arg(None, "your own JSONL: {prompt, chosen, rejected}")
    comparisons: str = arg("comparisons", "judged pairs under --runs, or several: a,b")
    max_new_tokens: int = arg(24, "longest answer in the closing table, in tokens", low=1)
    init: str = arg("sft", "where r's trunk and new comparisons come from, under --runs")
    out: str = arg("reward_model", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """−log σ(r_c − r_r − m), nats: scores (B,), (B,) -> (B,).

    The margin is a soft shift: a pair at r_c − r_r = m still has loss ln 2. Source: "Reward
    Modeling", eq:rewardmodeling1; with a margin eq:rewardmodelingmargin.
    """
    # L = −log σ(r(x, y_c) − r(x, y_r) − m)
    return -F.logsigmoid(chosen - rejected - margin)


# ---------------------------------------------------------------------------------- scores


def pair_scores(model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """r of chosen and rejected, (B,) each, in one pass over the 2B rows."""
    scores = common.score(model, tokens.flatten(0, 1), mask.flatten(0, 1))
    return scores.view(-1, 2).unbind(1)


# ---------------------------------------------------------------------------------- update


def train(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Descend L over the comparisons, and save to runs/`out`."""
    tokens, mask = common.encode_pairs(rows, model.device)
    optimizer, stream = common.adamw(model), common.minibatches(cfg.batch, tokens, mask)
    steps = cfg.epochs * math.ceil(len(rows) / cfg.batch)
    with common.Run(cfg, cfg.out, model, steps, show=("loss", "accuracy")) as run:
        for step in run:
            batch, batch_mask = next(stream)  # 1
            r_chosen, r_rejected = pair_scores(model, batch, batch_mask)  # 2
            loss = bradley_terry_loss(r_chosen, r_rejected, cfg.margin).mean()  # 3
            lr = cfg.lr * (1 - step / steps)
            norm = common.descend(loss, model, optimizer, lr)
            accuracy = (r_chosen > r_rejected).float().mean()
            run.log(loss=loss, accuracy=accuracy, grad_norm=norm, lr=lr)
        center(cfg, model, rows)  # 4


@torch.no_grad()
def center(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Set the offset so that demonstrations score 0 in the mean: the world's, or for your
    own data the chosen answers."""
    if cfg.data:
        ids = [common.answer_ids(row, "chosen") for row in rows[:1000]]
    else:
        ids = [common.answer_ids(row) for row in common.demonstrations(1000, cfg.seed)]
    tokens, mask = common.collate(ids, model.device)
    parts = zip(tokens.split(256), mask.split(256))
    model.offset += torch.cat([common.score(model, t, m) for t, m in parts]).mean()


@torch.no_grad()
def accuracies(model: Transformer, rows: list[dict]) -> dict[str, float]:
    """How r orders pairs: `labels`, the share with r_c > r_r; in the world also `accuracy`
    and `ceiling`, expected over the noisy label, and `order`, the share that gold orders the
    same way, where it differs."""
    tokens, mask = common.encode_pairs(rows, model.device)
    scores = [pair_scores(model, t, m) for t, m in zip(tokens.split(256), mask.split(256))]
    gap = torch.cat([chosen - rejected for chosen, rejected in scores]).cpu().double()
    found = {"labels": (gap > 0).double().mean().item()}
    chosen, rejected = (
        [common.gold_reward(x["prompt"], x[k], x.get(f"{k}_finished", True)) for x in rows]
        for k in ("chosen", "rejected")
    )
    gold_gap = torch.tensor(chosen).double() - torch.tensor(rejected).double()
    if not gold_gap.isnan().any():
        found["accuracy"] = torch.sigmoid(gold_gap * gap.sign()).mean().item()
        found["ceiling"] = torch.sigmoid(gold_gap.abs()).mean().item()
        found["order"] = (gap.sign() == gold_gap.sign())[gold_gap != 0].double().mean().item()
    return found


def show(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Print the accuracies on held-out pairs, file by file, beside those of
    runs/reward_model; and three of the pairs with the score of each answer."""
    for source in dict.fromkeys(row.get("source", cfg.data) for row in rows):
        pairs = [row for row in rows if row.get("source", cfg.data) == source]
        common.say(f"\n{len(pairs)} held-out pairs of {source}")
        for name in dict.fromkeys((Config.out, cfg.out)):
            folder = Path(cfg.runs) / name
            if (folder / "model.pt").exists():
                judge = common.load_model(folder, "scalar", model.device)
                found = accuracies(judge, pairs).items()
                common.say(f"{name:>20s}: " + "  ".join(f"{k} {v:.3f}" for k, v in found))
    scores = pair_scores(model, *common.encode_pairs(rows[:3], model.device))
    for row, r_c, r_r in zip(rows, *(side.tolist() for side in scores)):
        chosen, rejected = f"{r_c:+20.2f}: {row['chosen']}", f"{r_r:+20.2f}: {row['rejected']}"
        common.say(f"{row['prompt']}\n{chosen}\n{rejected}")


def main(cfg: Config) -> None:
    device = common.pick_device(cfg.device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    context = policy.config.context
    train_rows, held_rows = common.split(common.comparisons(cfg, context, device))
    common.seed_all(cfg.seed)
    random.shuffle(train_rows)  # so that --pairs takes from all files alike
    train_rows = train_rows[: cfg.pairs]
    model = common.scalar_copy(policy)
    common.say(f"{cfg.runs}/{cfg.out}: Bradley-Terry on {len(train_rows)} comparisons")
    train(cfg, model, train_rows)

    show(cfg, model, held_rows)
    reward = common.load_reward(cfg, cfg.out, device)
    prompts = common.read_prompts(cfg.data, cfg.max_new_tokens, context)[1]
    common.closing_table(cfg, [cfg.init], reward, cfg.out, prompts, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
