"""A world small enough to list: 4 tokens, EOS among them, and at most 3 new ones.

A prompt then has 40 completions, so that π(y|x), E[r], KL, J, ∇J, π* and the best-of-n law
are sums over 40 terms, exact in float64. The policy is the project's own Transformer; of the
project nothing else goes into an exact value: no padding, no mask, no shift, no cache.

PAD is one of the 4 tokens too, so a mask made from `tokens != PAD` would be wrong here.
"""

import itertools
import json

import torch
from torch import Tensor

from common import EOS, PAD, ModelConfig, Rollout, Transformer
from data import zoo

V, LONGEST = 4, 3
# ragged, so that padding and positions matter. π* must be a policy this Transformer can be: no
# prompt is the beginning of another, and none one token repeated, which attention cannot count
PROMPTS = [[1, 2], [2, 3, 1], [3, 1, 1, 2]]
NAMES = ["0", "1", "2"]  # prompts as text; `chat` turns them into PROMPTS


def chat(name: str) -> list[int]:
    """In place of common.chat, whose ids would be outside this vocabulary."""
    return PROMPTS[int(name)]


def prefixes(longest: int = LONGEST) -> list[tuple[int, ...]]:
    """Every beginning of a completion that is not over: 1 + 3 + 9."""
    going = [token for token in range(V) if token != EOS]
    return [p for n in range(longest) for p in itertools.product(going, repeat=n)]


def completions(longest: int = LONGEST) -> list[tuple[int, ...]]:
    """Every completion: ended by EOS, or of full length. 1 + 3 + 9 + 27 = 40."""
    tokens = [p + (token,) for p in prefixes(longest) for token in range(V)]
    return [y for y in tokens if y[-1] == EOS or len(y) == longest]


def transformer(seed: int, head: str = "lm", spread: float = 1.0, **sizes) -> Transformer:
    """A Transformer in float64. With a larger spread the probabilities differ by more."""
    shape = dict(channels=8, layers=2, heads=2, kv_heads=2, hidden=16, context=16) | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(vocab_size=V, **shape), head).double()
    with torch.no_grad():
        model.embed.weight.mul_(spread)
    return model


def nearby(model: Transformer, size: float = 0.02) -> Transformer:
    """A copy whose weights have moved a little."""
    copy = Transformer(model.config, model.head).double()
    copy.load_state_dict(model.state_dict())
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += size * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    return copy


def token_logp(
    model: Transformer, prompt: list[int], longest: int = LONGEST, temperature: float = 1.0
) -> Tensor:
    """log π(y_t | x, y_<t) of every completion, (40, 3), 0 where it is over: the slow way,
    one unpadded forward per length of prefix, of which only the last position is read."""
    begun, logp = prefixes(longest), []
    for _, same in itertools.groupby(begun, key=len):
        logits = model(torch.tensor([prompt + list(p) for p in same]))[:, -1]
        logp.append((logits / temperature).log_softmax(-1))
    row = {prefix: i for i, prefix in enumerate(begun)}
    flat = torch.cat([torch.cat(logp).flatten(), torch.zeros(1, dtype=torch.float64)])
    return flat[
        torch.tensor(
            [
                [row[y[:t]] * V + y[t] if t < len(y) else -1 for t in range(longest)]
                for y in completions(longest)
            ]
        )
    ]


def logp(model: Transformer, prompts=PROMPTS, longest: int = LONGEST) -> Tensor:
    """log π(y|x) of every completion of every prompt, (M, 40)."""
    return torch.stack([token_logp(model, x, longest).sum(1) for x in prompts])


def kl(logp: Tensor, other: Tensor) -> Tensor:
    """KL(π ‖ other), mean over prompts: (M, 40), (M, 40) -> ()."""
    return (logp.exp() * (logp - other)).sum(-1).mean()


def objective(logp: Tensor, ref_logp: Tensor, r: Tensor, beta: float) -> Tensor:
    """J(π) = E[r] − β KL(π ‖ π_ref), mean over prompts: (M, 40) each -> ()."""
    return (logp.exp() * r).sum(-1).mean() - beta * kl(logp, ref_logp)


def optimum(ref_logp: Tensor, r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log π* = log π_ref + r/β − log Z, and J* = β log Z: (M, 40) -> (M, 40), ()."""
    log_z = (ref_logp + r / beta).logsumexp(-1, keepdim=True)
    return ref_logp + r / beta - log_z, beta * log_z.mean()


def best_of(n: int, p: Tensor, r: Tensor) -> Tensor:
    """The law of the best of n samples, ties broken at random: (40,), (40,) -> (40,)."""
    below = ((r[None] < r[:, None]) * p).sum(1)  # F⁻(y) = P(r(Y) < r(y))
    upto = ((r[None] <= r[:, None]) * p).sum(1)  # F(y)
    return p * (upto**n - below**n) / (upto - below)


def gradient(value: Tensor, model: Transformer) -> Tensor:
    """∇ of a number with respect to all the weights, as one vector."""
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference between two gradients, as a share of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def listed(pairs: list[tuple[list[int], tuple[int, ...]]]) -> Rollout:
    """(prompt, completion) rows as `generate` would have returned them."""
    width = max(len(x) + len(y) for x, y in pairs)
    tokens = [[*x, *y] + [PAD] * (width - len(x) - len(y)) for x, y in pairs]
    mask = [[len(x) <= t < len(x) + len(y) for t in range(width)] for x, y in pairs]
    return Rollout(
        torch.tensor(tokens),
        torch.tensor(mask),
        torch.tensor([y[-1] == EOS for _, y in pairs]),
        torch.zeros(len(pairs), width, dtype=torch.float64),
    )


def everything(prompts=PROMPTS, longest: int = LONGEST) -> Rollout:
    """All completions of all prompts, 40 rows a prompt."""
    return listed([(x, y) for x in prompts for y in completions(longest)])


def tuples(n: int, longest: int = LONGEST) -> Tensor:
    """Every ordered n-tuple of completions, by number, (40ⁿ, n)."""
    return torch.cartesian_prod(*[torch.arange(len(completions(longest)))] * n).view(-1, n)


def number(tokens: Tensor, mask: Tensor, longest: int = LONGEST) -> Tensor:
    """Which completion each row holds where its mask is True, (B,); −1 for none of them."""
    known = torch.full(((V + 1) ** longest,), -1)  # a completion is read as a number
    for i, y in enumerate(completions(longest)):
        known[sum((token + 1) * (V + 1) ** t for t, token in enumerate(y))] = i
    place = (V + 1) ** (mask.cumsum(1) - 1).clamp(min=0)
    code = ((tokens + 1) * place * mask).sum(1)
    return torch.where(code < len(known), known[code.clamp(max=len(known) - 1)], -1)


class Table:
    """r(x, y) as a plain table (M, 40), called as ppo.train calls a reward model."""

    def __init__(self, r: Tensor, longest: int = LONGEST):
        self.r, self.longest = r, longest

    def __call__(self, names: list[str], rollout: Rollout) -> Tensor:
        y = number(rollout.tokens, rollout.response_mask, self.longest)
        return self.r[torch.tensor([int(name) for name in names]), y]


def fits(rollout: Rollout, p: Tensor) -> float:
    """The p-value of χ² for completions of M prompts, as many of each and in their order,
    under p (M, 40). Cells that expect < 5 are pooled; 0 if a completion is impossible."""
    y = number(rollout.tokens, rollout.response_mask).view(len(p), -1)
    statistic, freedom = 0.0, 0
    for found, law in zip(y, p):
        if (found < 0).any():
            return 0.0
        counts, expected = found.bincount(minlength=len(law)).double(), len(found) * law
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        statistic += ((counts - expected).square() / expected)[expected > 0].sum()
        freedom += int((expected > 0).sum()) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2.0), statistic / 2).item()


def parted(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of the zoo to train on, rows held out."""
    held = [row for row in rows if zoo.held_out(row["prompt"])]
    return [row for row in rows if not zoo.held_out(row["prompt"])], held


def judged(runs, name: str = "comparisons") -> list[dict]:
    """The comparisons in runs/NAME."""
    lines = (runs / name / "comparisons.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
