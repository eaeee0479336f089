"""A verifiable reward: no model, but a check of the fact itself (chapter "Reasoning").

    python ppo.py --reward exercises/verifiable.py:right --out verifiable

Compare with the learned reward: nothing here likes courtesy or dislikes rudeness.
"""

from data import zoo


def right(prompts: list[str], completions: list[str]) -> list[float]:
    """3 for the right fact and no other, else 0: what a fact is worth to gold_reward."""
    return [3 * zoo.right(x, y) for x, y in zip(prompts, completions)]
