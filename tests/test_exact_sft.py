"""sft.py in the enumerable world: the loss is that of the response's own tokens."""

import tiny
import torch

import common
import sft


def test_sft_loss_is_that_of_the_response_alone():
    """Prompt or padding counted in the loss; EOS left out of it."""
    model, rows = tiny.transformer(1), tiny.everything()
    with torch.no_grad():
        loss = sft.sft_loss(common.token_logprobs(model, rows.tokens), rows.response_mask)
        exact = -tiny.logp(model).sum() / (3 * sum(map(len, tiny.completions())))
    assert abs(loss - exact) < 1e-10
