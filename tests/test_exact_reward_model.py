"""reward_model.py in the enumerable world: from exact preferences the reward is recovered."""

import tiny
import torch
from tiny import PROMPTS

import reward_model

TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(tiny.completions(TWO))
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


def test_reward_is_recovered_up_to_a_constant_per_prompt():
    """Chosen and rejected swapped; a score read at a pad or at another token."""
    rows = tiny.listed([(x, y) for x in PROMPTS for y in tiny.completions(TWO) for _ in "cr"])
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    model = tiny.transformer(7, "scalar", channels=16, hidden=32, layers=1)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=250,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def scores():  # each completion stands twice, as its own pair
        chosen, rejected = reward_model.pair_scores(model, tokens, mask)
        assert (chosen - rejected).abs().max() < 1e-12
        return chosen.view(3, N)

    def closure():
        optimizer.zero_grad()
        r = scores()
        loss = reward_model.bradley_terry_loss(r[:, FIRST], r[:, SECOND])
        value = (PREFERRED * loss).sum() / PREFERRED.sum()
        value.backward()
        return value

    optimizer.step(closure)
    error = scores().detach() - R
    assert (error - error.mean(1, keepdim=True)).abs().max() < 1e-2
