"""rejection_sampling.py in the enumerable world: the exact law of the best of n, its KL."""

import math

import pytest
import tiny
import torch

import common
import rejection_sampling

POLICY = tiny.transformer(1)
RANDOM = torch.Generator().manual_seed(0)
REWARDS = {
    "no_ties": torch.randn(3, 40, generator=RANDOM, dtype=torch.float64),
    "ties": torch.randint(4, (3, 40), generator=RANDOM).double(),
    "all_tie": torch.zeros(3, 40, dtype=torch.float64),
}


def selected(n: int, p: torch.Tensor, r: torch.Tensor, longest: int) -> torch.Tensor:
    """The law of what the script keeps, summed over all n-tuples: (K,), (K,) -> (K,)."""
    which = tiny.tuples(n, longest)
    cfg = rejection_sampling.Config(samples=n, select="per_prompt")
    kept = which.flatten()[rejection_sampling.select(cfg, r[which])]
    rows = torch.arange(len(which))
    assert torch.equal(kept, which[rows, rejection_sampling.top_per_prompt(r[which])])
    return torch.zeros_like(p).index_add(0, kept, p[which].prod(1))


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(("n", "longest"), [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_the_best_of_n_has_its_exact_law(n, longest, rewards):
    """The worst picked, the wrong row picked, a tie that favours some completion; the bound
    log n − (n − 1)/n of the KL is kept, and is not what it equals when rewards tie."""
    bound = math.log(n) - (n - 1) / n
    for logp, r in zip(tiny.logp(POLICY, longest=longest).detach(), REWARDS[rewards]):
        p, r = logp.exp(), r[: len(logp)]
        found = selected(n, p, r, longest)
        assert (found - tiny.best_of(n, p, r)).abs().max() < 1e-10
        kl = (found * (found.clamp(min=1e-300) / p).log()).sum()
        assert kl <= bound + 1e-10
        if rewards == "all_tie":
            assert kl.abs() < 1e-10


def test_imitation_descends_to_the_law_that_was_selected():
    """Prompt or padding counted in the loss: at the exact law of what is selected, the loss
    is the cross-entropy per token, −E log π(y|x) / E |y|."""
    rows = tiny.everything()
    with torch.no_grad():
        logp = tiny.logp(POLICY)
        laws = [tiny.best_of(4, q.exp(), r) for q, r in zip(logp, REWARDS["ties"])]
        law = torch.stack(laws).flatten()[:, None]
        logprobs = common.token_logprobs(POLICY, rows.tokens)  # of the prompt as well
        found = rejection_sampling.imitation_loss(logprobs, rows.response_mask * law)
        lengths = torch.tensor([len(y) for y in tiny.completions()] * 3)
        exact = -(law.flatten() * logp.flatten()).sum() / (law.flatten() * lengths).sum()
    assert abs(found - exact) < 1e-10
