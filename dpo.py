"""Direct alignment: the same objective straight from comparisons, without a reward model.

The policy that maximises J(π) = E[r(x, y)] − β KL(π ‖ π_ref) (eq:rlhf_opt_eq) is known in
closed form, π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x) (eq:dpo_opt_policy). Solving it for
r shows that every policy π is optimal for the reward β log π(y|x)/π_ref(y|x) + β log Z(x)
(eq:dpo_reward_full). In Bradley-Terry's likelihood of a pair Z(x) cancels, and no reward
model is left to train (chapter "Direct-Alignment Algorithms", eq:dpo_core):

    L(π) = − mean over pairs of log σ(β [log π/π_ref (y_c|x) − log π/π_ref (y_r|x)])

    symbol             here                     made by
    x, y_c, y_r        tokens[:, 0], [:, 1]     common.comparisons: labelled answers of sft
    log π(y|x)         logprobs (B, 2)          response_logprobs: Σ_t, EOS included, nats
    log π_ref(y|x)     ref_logprobs             the same function, frozen weights
    log π/π_ref        chosen, rejected         log-ratios; times β the implicit rewards
    h                  h                        the gap of the two log-ratios
    β (IPO's τ), ε     cfg.beta                 price of one nat of KL; cfg.label_smoothing
    L                  loss                     LOSSES[cfg.loss], and cfg.nll × NLL

A step, numbered as in the code:
    1  draw a minibatch of pairs
    2  log π and log π_ref of both answers of each, in one pass of each model
    3  subtract: the log-ratios
    4  descend L

    python dpo.py                            makes runs/sft and the comparisons if missing
    python dpo.py --loss ipo --out ipo       or hinge (SLiC's, on log-ratios as in RSO)
    python dpo.py --beta 0.05 --out dpo_05   direct alignment over-optimises too
    python dpo.py --init dpo --comparisons comparisons_dpo --out dpo_2     another round

Look at: accuracy and margin rising; chosen_logp and rejected_logp both falling, the book's
preference displacement, and no bug: L asks for a gap only. In the closing table gold, what
the zoo's annotators value, rises with KL; with a small β it turns. metrics.csv: `loss`, what
is descended (at the start ln 2 for dpo, 1/(4τ²) for ipo, 1 for hinge); `nll` (nats per token
of the chosen answer); `reward_chosen`, `reward_rejected` (implicit, eq:dpo_reward), their
difference `margin`; `accuracy`, the share of pairs with margin > 0, a tie ½; `chosen_logp`,
`rejected_logp` (nats per response); `grad_norm` (before clipping), `lr`.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Transformer, arg
from data import zoo


@dataclass
class Config:
    loss: str = arg("dpo", "L, the loss", choices=("dpo", "ipo", "hinge"))
    beta: float = arg(0.3, "β (IPO: τ), weight of the KL penalty, reward per nat", low=1e-6)
    label_smoothing: float = arg(0.0, "ε, share of labels taken to be flipped", low=0)
    nll: float = arg(0.0, "weight of the chosen answer's NLL per token, eq:dpo_nll", low=0)
    pairs: int = arg(20_000, "comparisons to train on, at most", low=1)
    steps: int = arg(600, "gradient steps", low=1)
    batch: int = arg(32, "pairs per step", low=1)
    lr: float = arg(3e-4, "learning rate, falling to 0", low=0)
    max_new_tokens: int = arg(24, "longest answer in the closing table, in tokens", low=1)
    data: str = arg(None, "your own JSONL: {prompt, chosen, rejected}")
    comparisons: str = arg("comparisons", "labelled pairs under --runs, or several: a,b")
    init: str = arg("sft", "the policy to start from, under --runs")
    ref: str = arg("sft", "π_ref, under --runs")
    out: str = arg("dpo", "where the result goes, under --runs")
    runs: str = arg("runs", "the folder of all runs")
    seed: int = arg(0, "random seed: the same command, the same result", low=0)
    device: str = arg("auto", "a torch device; auto: cuda, else mps, else cpu")


# ------------------------------------------------------------------------------- the maths
# Each loss takes log-ratios log π/π_ref (y|x), (B,), in nats and returns one value per pair,
# (B,): (1 − ε) loss(h) + ε loss(−h). ε (label_smoothing), a number or (B,), is the assumed
# probability that the label is wrong.


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """eq:dpo_core, nats: Bradley-Terry's loss on the implicit rewards. With ε it is the book's
    conservative DPO, minimal at h = ln((1 − ε)/ε)/β."""
    # h = log π/π_ref (y_c|x) − log π/π_ref (y_r|x)
    h, eps = chosen - rejected, label_smoothing
    # L = −(1 − ε) log σ(β h) − ε log σ(−β h)
    return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """IPO, τ = beta, nats²: fits h to 1/(2τ), so that noiseless labels do not drive it to ∞."""
    h, eps, target = chosen - rejected, label_smoothing, 1 / (2 * beta)
    # L = (1 − ε) (h − 1/(2τ))² + ε (−h − 1/(2τ))²
    return (1 - eps) * (h - target) ** 2 + eps * (-h - target) ** 2


def hinge(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing=0.0) -> Tensor:
    """SLiC's hinge on log-ratios, as in RSO: with ε = 0 a pair with h ≥ 1/β has no loss."""
    h, eps = chosen - rejected, label_smoothing
    # L = (1 − ε) max(0, 1 − β h) + ε max(0, 1 + β h)
    return (1 - eps) * F.relu(1 - beta * h) + eps * F.relu(1 + beta * h)


LOSSES = {"dpo": dpo, "ipo": ipo, "hinge": hinge}


def response_logprobs(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) of both answers of B pairs, nats: (B, 2, T) each -> (B, 2), chosen first. A
    sum over tokens, as the loss, nll and chosen_logp take it."""
    # log π(y|x) = Σ_t log π(y_t | x, y_<t), over the response, EOS included
    logprobs = common.token_logprobs(model, tokens.flatten(0, 1), mask.flatten(0, 1))
    return logprobs.sum(1).view(-1, 2)


# -------------------------------------------------------------------------------- the step


def train(cfg: Config, policy: Transformer, reference: Transformer, rows: list[dict]) -> None:
    """Descend L over the comparisons, and save to runs/`out`."""
    stream = common.minibatches(cfg.batch, *common.encode_pairs(rows, policy.device))
    optimizer, show = common.adam(policy), ("loss", "margin", "accuracy")
    with common.Run(cfg, cfg.out, policy, cfg.steps, show) as run:
        for step in range(cfg.steps):
            # 1. pairs (x, y_c, y_r)
            tokens, mask = next(stream)
            # 2. log π(y|x), log π_ref(y|x)
            logprobs = response_logprobs(policy, tokens, mask)
            with torch.no_grad():
                ref_logprobs = response_logprobs(reference, tokens, mask)
            # 3. log π/π_ref of both answers
            chosen, rejected = (logprobs - ref_logprobs).unbind(1)
            # 4. L; the NLL is length-normalised: eq:dpo_nll (chapter "Regularization")
            loss = LOSSES[cfg.loss](chosen, rejected, cfg.beta, cfg.label_smoothing).mean()
            nll = -(logprobs[:, 0] / mask[:, 0].sum(1)).mean()
            loss = loss + cfg.nll * nll
            lr = cfg.lr * (1 - step / cfg.steps)
            norm = common.descend(loss, policy, optimizer, lr)

            if step == 0:
                check_start(cfg, logprobs, ref_logprobs)
            compared = measure(cfg.beta, chosen, rejected, logprobs)
            run.log(loss=loss, nll=nll, **compared, grad_norm=norm, lr=lr)


@torch.no_grad()
def measure(beta: float, chosen: Tensor, rejected: Tensor, logprobs: Tensor) -> dict:
    """The part of metrics.csv that is about what the loss compares, batch means."""
    # r(x, y) = β log π(y|x)/π_ref(y|x)                                      eq:dpo_reward
    r_chosen, r_rejected = beta * chosen, beta * rejected
    return {
        "reward_chosen": r_chosen.mean(),
        "reward_rejected": r_rejected.mean(),
        "margin": (r_chosen - r_rejected).mean(),
        "accuracy": ((r_chosen - r_rejected).sgn() + 1).mean() / 2,
        "chosen_logp": logprobs[:, 0].mean(),
        "rejected_logp": logprobs[:, 1].mean(),
    }


def check_start(cfg: Config, logprobs: Tensor, ref_logprobs: Tensor) -> None:
    """If policy and reference start as the same run, every log-ratio must be 0."""
    largest = (logprobs - ref_logprobs).abs().max().item()
    if cfg.init == cfg.ref and largest > 1e-4:
        common.fail(f"step 0: policy = reference, but a log-ratio is {largest:.1e}", 1)


def main(cfg: Config) -> None:
    device = common.pick_device(cfg.device)
    reference = common.load_run(cfg, cfg.ref, "lm", device).requires_grad_(False)
    policy = common.load_run(cfg, cfg.init, "lm", device)
    context = min(policy.config.context, reference.config.context)
    rows = sum(common.comparisons(cfg, context, device).values(), [])
    rows, held = common.split(rows, bool(cfg.data))

    asked = [row["prompt"] for row in held] if cfg.data else zoo.HELD_OUT_PROMPTS
    prompts = common.fit_prompts(cfg, asked, context)
    common.seed_all(cfg.seed)
    random.shuffle(rows)  # so that --pairs takes from all sources alike
    rows = rows[: cfg.pairs]
    about = f"{cfg.loss}, β = {cfg.beta}, {len(rows)} comparisons"
    print(f"{cfg.out}: {about}")
    train(cfg, policy, reference, rows)
    names, reward = [cfg.ref, cfg.init, cfg.out], common.table_reward(cfg, device)
    common.closing_table(cfg, names, *reward, prompts, device)


if __name__ == "__main__":
    common.start(main, Config, __doc__)
