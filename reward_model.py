"""Reward modelling: from pairwise comparisons to a scalar r(x, y).

Annotators compare two answers y_c (chosen) and y_r (rejected) to a prompt x. Bradley-Terry
assumes P(y_c ≻ y_r) = σ(r(x, y_c) − r(x, y_r)); r is fitted by maximum likelihood (chapter
"Reward Modeling", eq:rewardmodeling1):

    L(r) = − mean over pairs of log σ(r(x, y_c) − r(x, y_r))                nats per pair

    symbol         here                    made by
    x, y_c, y_r    rows of comparisons     common.comparisons: labelled answers of sft
    r(x, y), r_θ   r_chosen, r_rejected    common.score: scalar head at the last response token
    m              cfg.margin              the same for all; in eq:rewardmodelingmargin one each
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
    python reward_model.py --comparisons comparisons,comparisons_ppo --pairs 40000 --out rm_2
                                    a second round: labelled answers of ppo beside the old ones

Look at: held-out accuracy beside its ceiling. The zoo's annotators value `gold`, a number that
no script trains on, and are noisy: they choose y_c with P = σ(Δgold), so that gold itself would
agree with only some of their choices. Printed for held-out pairs: `accuracy`, the share with
r_c > r_r; `expected`, what it would be over all draws of the labels, mean σ(Δgold · sign Δr);
`ceiling`, the same for gold itself, mean σ(|Δgold|); and `agrees_with_gold`, the share of pairs
of unequal gold that r orders as gold does. metrics.csv: `loss` (ln 2 is chance), `accuracy` of
the training batch, `grad_norm` before clipping, `lr`.

Differs from the book: it trains for one epoch, to avoid overfitting, and keeps all pairs of a
prompt in one batch (eq:rewardmodelinginstructgpt). A model this small still improves in the
third epoch, and here the pairs of a prompt are drawn independently.
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
from data import zoo


@dataclass
class Config:
    pairs: int = arg(20_000, "comparisons to train on, at most", low=1)
    epochs: int = arg(3, "passes over the comparisons", low=1)
    batch: int = arg(32, "pairs per step", low=1)
    lr: float = arg(5e-4, "learning rate, falling to 0", low=0)
    margin: float = arg(0.0, "m, how far r_chosen should exceed r_rejected")
    data: str = arg(None, "your own JSONL: {prompt, chosen, rejected}")
    comparisons: str = arg("comparisons", "labelled pairs under --runs, or several: a,b")
    max_new_tokens: int = arg(24, "longest answer in the closing table, in tokens", low=1)
    init: str = arg("sft", "the policy whose trunk r starts from, under --runs")
    out: str = arg("reward_model", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "random seed: the same command, the same result", low=0)
    device: str = arg("auto", "a torch device; auto: cuda, else mps, else cpu")


# ------------------------------------------------------------------------------- the maths


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """−log σ(r_c − r_r − m), nats: scores (B,), (B,) -> (B,). A pair at r_c − r_r = m has loss
    ln 2. Source: "Reward Modeling", eq:rewardmodeling1; with m, eq:rewardmodelingmargin."""
    # L = −log σ(r(x, y_c) − r(x, y_r) − m)
    return -F.logsigmoid(chosen - rejected - margin)


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs with r_c > r_r, (B,), (B,) -> (); a tie counts ½."""
    return ((chosen - rejected).sgn() + 1).mean() / 2


# -------------------------------------------------------------------------------- the step


def pair_scores(model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """r of chosen and of rejected answers, (B,) each: (B, 2, T) as 2B rows in one pass."""
    scores = common.score(model, tokens.flatten(0, 1), mask.flatten(0, 1))
    return scores.view(-1, 2).unbind(1)


def train(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Descend L over the comparisons, and save to runs/`out`."""
    stream = common.minibatches(cfg.batch, *common.encode_pairs(rows, model.device))
    steps, optimizer = cfg.epochs * math.ceil(len(rows) / cfg.batch), common.adam(model)
    with common.Run(cfg, cfg.out, model, steps, show=("loss", "accuracy")) as run:
        try:
            for step in range(steps):
                # 1. pairs (x, y_c, y_r)
                tokens, mask = next(stream)
                # 2. r(x, y_c), r(x, y_r)
                r_chosen, r_rejected = pair_scores(model, tokens, mask)
                # 3. L
                loss = bradley_terry_loss(r_chosen, r_rejected, cfg.margin).mean()
                lr = cfg.lr * (1 - step / steps)
                norm = common.descend(loss, model, optimizer, lr)

                right = accuracy(r_chosen, r_rejected)
                run.log(loss=loss, accuracy=right, grad_norm=norm, lr=lr)
        finally:  # 4, also of a run that is stopped
            center(cfg, model, rows)


@torch.no_grad()
def center(cfg: Config, model: Transformer, rows: list[dict]) -> None:
    """Set the offset so that demonstrations score 0 on average: the zoo's, or for your own
    data the chosen answers."""
    good, key = zoo.demonstrations(1024, cfg.seed), "completion"
    if cfg.data:
        good, key = rows[:1024], "chosen"
    ids = [common.answer_ids(row, key) for row in good]
    tokens, mask = common.collate(ids, model.device)
    model.offset += common.score(model, tokens, mask).mean()


# ------------------------------------------------------------------------- held-out accuracy


@torch.no_grad()
def accuracies(model: Transformer, rows: list[dict]) -> dict[str, float]:
    """How r orders pairs: the four numbers that the header explains; outside the zoo
    `accuracy` alone."""
    r_chosen, r_rejected = pair_scores(model, *common.encode_pairs(rows, model.device))
    gap, found = (r_chosen - r_rejected).cpu(), {"accuracy": accuracy(r_chosen, r_rejected)}

    def gold(row: dict, key: str) -> float:
        finished = row.get(f"{key}_finished") is not False
        return zoo.gold_reward(row["prompt"], row[key], finished)

    gold_gap = torch.tensor([gold(row, "chosen") - gold(row, "rejected") for row in rows])
    if not gold_gap.isnan().any():
        found["expected"] = torch.sigmoid(gold_gap * gap.sign()).mean()
        found["ceiling"] = torch.sigmoid(gold_gap.abs()).mean()
        found["agrees_with_gold"] = (
            (gap.sign() == gold_gap.sign())[gold_gap != 0].float().mean()
        )
    return {key: value.item() for key, value in found.items()}


def show(cfg: Config, model: Transformer, held: dict[str, list[dict]]) -> None:
    """For each source print the accuracies on held-out pairs, beside those of the default
    reward model; and three of the pairs with the score of each answer."""
    judges, default = {cfg.out: model}, Path(cfg.runs) / Config.out
    if cfg.out != Config.out and (default / "model.pt").exists():
        judges[Config.out] = common.load_model(default, "scalar", model.device)
    for source, rows in held.items():
        print(f"\n{len(rows)} held-out pairs of {source}")
        for name, judge in judges.items():
            numbers = "  ".join(f"{k} {v:.3f}" for k, v in accuracies(judge, rows).items())
            print(f"{name:>20}: {numbers}")
        with torch.no_grad():
            scores = pair_scores(model, *common.encode_pairs(rows[:3], model.device))
        for row, r_c, r_r in zip(rows, *(side.tolist() for side in scores)):
            print(f"{row['prompt']}\n{r_c:+20.2f}: {row['chosen']}")
            print(f"{r_r:+20.2f}: {row['rejected']}")


def main(cfg: Config) -> None:
    device = common.pick_device(cfg.device)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    context = policy.config.context
    rows, held = [], {}
    for source, pairs in common.comparisons(cfg, context, device).items():
        train_rows, held_rows = common.split(pairs, bool(cfg.data))
        rows += train_rows
        if held_rows:
            held[source] = held_rows[:1024]

    asked = [row["prompt"] for side in held.values() for row in side]
    prompts = common.fit_prompts(cfg, asked if cfg.data else zoo.HELD_OUT_PROMPTS, context)
    common.seed_all(cfg.seed)
    random.shuffle(rows)  # so that --pairs takes from all sources alike
    rows, model = rows[: cfg.pairs], common.scalar_copy(policy)
    about = f"{len(rows)} comparisons, {sum(map(len, held.values()))} held out"
    print(f"{cfg.out}: Bradley-Terry on {about}")
    train(cfg, model, rows)

    show(cfg, model, held)
    reward = common.model_reward(model)
    common.closing_table(cfg, [cfg.init], reward, cfg.out, prompts, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
