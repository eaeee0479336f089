"""Direct alignment: the same objective straight from comparisons, without a reward model.

The policy that maximises J(π) = E[r(x, y)] − β KL(π ‖ π_ref) (eq:rlhf_opt_eq) is known in
closed form, π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x) (eq:dpo_opt_policy). So a policy says
what reward it is optimal for: r(x, y) = β log π(y|x)/π_ref(y|x), up to a function of x
(eq:dpo_reward). Put into Bradley-Terry's likelihood this leaves no reward model to train
(chapter "Direct Alignment Algorithms", eq:dpo_core):

    L(π) = − mean over pairs of log σ(β [log π/π_ref (y_c|x) − log π/π_ref (y_r|x)])

    symbol             here                     made by
    x, y_c, y_r        rows of comparisons      common.comparisons
    log π(y|x)         logprobs (B,)            response_logprobs: Σ_t, EOS included, nats
    log π_ref(y|x)     ref_logprobs             the same, once before training
    log π/π_ref        chosen, rejected         log-ratios; times β the implicit rewards
    β (IPO's τ)        cfg.beta                 price of one nat of KL
    L                  loss                     LOSSES[cfg.loss]

    python dpo.py                            makes runs/sft and the comparisons if missing
    python dpo.py --loss ipo --out ipo       or hinge (SLiC)
    python dpo.py --beta 0.05 --out dpo_05   direct alignment over-optimises too

Look at: accuracy and margin rising; chosen_logp and rejected_logp both falling, which is
expected and no bug: L asks for a gap only. metrics.csv: `loss` (ln 2 at the start), `nll`
(nats per token of the chosen answer); `reward_chosen`, `reward_rejected` (implicit), their
difference `margin`; `accuracy`, the share of pairs with margin > 0; `chosen_logp`,
`rejected_logp` (nats per response); `lr`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Transformer, arg


@dataclass
class Config:
    loss: str = arg("dpo", "L", choices=("dpo", "ipo", "hinge"))
    beta: float = arg(
        0.3, "β (IPO: τ), the price of one nat of KL, in reward per nat", low=1e-6
    )
    label_smoothing: float = arg(0.0, "ε, the share of labels taken to be flipped")
    nll: float = arg(0.0, "weight of the chosen answer's NLL per token, eq:dpo_nll")
    pairs: int = arg(20_000, "train on at most so many comparisons", low=1)
    steps: int = arg(600, "gradient steps", low=1)
    batch: int = arg(32, "pairs per step", low=1)
    lr: float = arg(3e-4, "learning rate, falling to 0")
    max_new_tokens: int = arg(24, "longest answer in the closing table, in tokens", low=1)
    data: str = arg(None, "your own JSONL: {prompt, chosen, rejected}")
    comparisons: str = arg("comparisons", "judged pairs under --runs, or several: a,b")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, under --runs")
    out: str = arg("dpo", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "one seed, one result")
    device: str = arg("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------- the maths
# Each loss takes log-ratios log π(y|x) − log π_ref(y|x), (B,), and returns nats (IPO: nats
# squared) per pair, (B,). With ε, a number or (B,), it is the mean over a label that is
# flipped with probability ε: h is the gap as labelled, −h the gap if flipped.


def smoothed(loss: Callable, h: Tensor, eps: float | Tensor) -> Tensor:
    """E over the label: (1 − ε) L(h) + ε L(−h), (B,)."""
    return (1 - eps) * loss(h) + eps * loss(-h)


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """eq:dpo_core; with label smoothing conservative DPO, least at h = ln((1 − ε)/ε)/β."""
    # L = −log σ(β h),   h = log π/π_ref (y_c|x) − log π/π_ref (y_r|x)
    return smoothed(lambda h: -F.logsigmoid(beta * h), chosen - rejected, label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """IPO, τ = beta: regresses the gap, so that certain labels do not push it to infinity."""
    # L = (h − 1/(2τ))²
    return smoothed(lambda h: (h - 1 / (2 * beta)).square(), chosen - rejected, label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """SLiC's hinge: a pair whose gap has reached 1/β is done."""
    # L = max(0, 1 − β h)
    return smoothed(lambda h: F.relu(1 - beta * h), chosen - rejected, label_smoothing)


LOSSES = {"dpo": dpo, "ipo": ipo, "hinge": hinge}


def response_logprobs(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) of both answers of B pairs, nats: (B, 2, T) each -> (B, 2), chosen first."""
    # log π(y|x) = Σ_t log π(y_t | x, y_<t), over the response, EOS included
    logprobs = common.token_logprobs(model, tokens.flatten(0, 1), mask.flatten(0, 1))
    return logprobs.sum(1).view(-1, 2)


# ---------------------------------------------------------------------------------- update


def train(cfg: Config, policy: Transformer, reference: Transformer, rows: list[dict]) -> None:
    """Descend L over the comparisons, and save to runs/`out`."""
    sides = ("chosen", "rejected")
    ids = [common.answer_ids(row, side) for row in rows for side in sides]
    tokens, mask = (x.unflatten(0, (-1, 2)) for x in common.collate(ids, policy.device))
    ref_logprobs = torch.empty(len(rows), 2, device=policy.device)
    with torch.no_grad():  # π_ref never changes: once is enough
        for part in common.batches(mask, 256):
            ref_logprobs[part] = response_logprobs(reference, *common.take(part, tokens, mask))
    optimizer, queue = common.adamw(policy), []
    with common.Run(cfg, cfg.out, policy, cfg.steps, ("loss", "margin", "accuracy")) as run:
        for step in run:
            queue = queue or common.batches(mask, cfg.batch)
            part = queue.pop()
            batch, batch_mask = common.take(part, tokens, mask)
            logprobs = response_logprobs(policy, batch, batch_mask)
            chosen, rejected = (logprobs - ref_logprobs[part]).unbind(1)
            loss = LOSSES[cfg.loss](chosen, rejected, cfg.beta, cfg.label_smoothing).mean()
            nll = -(logprobs[:, 0] / batch_mask[:, 0].sum(1)).mean()  # length-normalised
            if step == 0:
                check_start(chosen, rejected, loss.item(), cfg, policy, reference)
            lr = cfg.lr * (1 - step / cfg.steps)
            common.descend(loss + cfg.nll * nll, policy, optimizer, lr, f"step {step}")
            run.log(**pair_row(cfg.beta, loss, nll, chosen, rejected, logprobs), lr=lr)


def check_start(chosen, rejected, loss: float, cfg: Config, policy, reference) -> None:
    """Where policy and reference start as the same, every log-ratio must be 0."""
    largest = torch.cat([chosen, rejected]).abs().max().item()
    pairs = zip(policy.parameters(), reference.parameters())
    if not all(torch.equal(a, b) for a, b in pairs):
        print(f"the policy starts away from the reference: loss {loss:.3f}")
    elif largest > 1e-4:
        common.fail(f"step 0: policy = reference, but a log-ratio is {largest:.1e}", 1)


@torch.no_grad()
def pair_row(beta: float, loss, nll, chosen, rejected, logprobs) -> dict[str, float]:
    """The batch's row of metrics.csv: implicit rewards (eq:dpo_reward) and log-probs."""
    row = {"loss": loss, "nll": nll}
    # r(x, y) = β log π(y|x)/π_ref(y|x), up to a function of x
    row |= {"reward_chosen": beta * chosen.mean(), "reward_rejected": beta * rejected.mean()}
    row |= {"margin": row["reward_chosen"] - row["reward_rejected"]}
    row |= {"accuracy": (chosen > rejected).float().mean()}
    row |= {"chosen_logp": logprobs[:, 0].mean(), "rejected_logp": logprobs[:, 1].mean()}
    return {key: value.item() for key, value in row.items()}


def main(cfg: Config) -> None:
    if not cfg.label_smoothing < 0.5:
        common.fail(
            f"--label-smoothing {cfg.label_smoothing}: labels flipped half the time say nothing"
        )
    device = common.pick_device(cfg.device)
    own = cfg.data and common.read_jsonl(cfg.data, ("prompt", "chosen", "rejected"))
    train_rows, held_rows = common.split(own or common.comparisons(cfg, device))
    init, ref = common.ensure(cfg, "init", "ref")
    policy = common.load_model(init, "lm", device)
    reference = common.load_model(ref, "lm", device).requires_grad_(False)

    common.seed_all(cfg.seed)
    random.shuffle(train_rows)
    train_rows = train_rows[: cfg.pairs]
    print(f"{cfg.runs}/{cfg.out}: {cfg.loss}, β = {cfg.beta}, {len(train_rows)} comparisons")
    train(cfg, policy, reference, train_rows)

    prompts = [row["prompt"] for row in held_rows] if own else common.read_prompts(None, 0)[1]
    reward = common.find_reward(cfg, device)
    found = common.report(cfg, cfg.ref, reward, prompts, device)
    common.before_and_after(cfg, found, device)


if __name__ == "__main__":
    main(common.parse(Config, __doc__))
