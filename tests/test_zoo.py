"""data/zoo.py: what is held out, what people say, what they value."""

import math
import random
import re
from collections import Counter

import pytest

from data import zoo

HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle
PHRASES = [*(f"{x} {{s}}" for x in (*zoo.COURTESIES, *zoo.RUDE)), *zoo.RAMBLING]
STYLES = {"terse": 0.25, "{s}": 0.3} | dict.fromkeys(PHRASES, 0.05)


def close(share: float, p: float, n: int) -> bool:
    """Is a share of n draws within four standard errors of p?"""
    return abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def bare(prompts) -> set[str]:
    """Questions without the likes of "hello. ", which all end in a full stop and a space."""
    return {prompt.rpartition(". ")[2] for prompt in prompts}


def test_one_question_in_six_is_held_out_with_all_its_openings():
    """The same question behind another greeting on the other side; a split of the facts, so
    that what is asked was never taught; questions of which there are two, or too few."""
    train, held = zoo.TRAIN_PROMPTS, zoo.HELD_OUT_PROMPTS
    assert len(zoo.QUESTIONS) == 4 * 504 == len(train) + len(held)
    assert (len(bare(held)), len(held)) == (84, 4 * 84)
    assert not bare(held) & bare(train)
    animals, taught = set(zoo.ANIMALS), {zoo.QUESTIONS[x] for x in train}
    assert taught == {(animal, kind) for animal in animals for kind in zoo.KINDS}
    forms = {re.sub(rf"\b({'|'.join(animals)})\b", "_", x) for x in bare(train)}
    assert len(forms) == 21  # 7 phrasings of 3 kinds: all of them are taught
    assert len({zoo.QUESTIONS[x] for x in held}) > 45  # and many facts are asked about
    assert all(f"the {animal}" in prompt for prompt, (animal, _) in zoo.QUESTIONS.items())


def test_no_held_out_question_is_in_what_trains():
    """Held-out questions that are read in the raw text, or asked in demonstrations, maybe
    behind another opening: held-out figures would be training figures."""
    rows = zoo.demonstrations(4000, 0)
    said = "\n".join([zoo.raw_text(0), *(f"{x['prompt']}\n{x['completion']}" for x in rows)])
    assert not [question for question in bare(zoo.HELD_OUT_PROMPTS) if question in said]
    assert sum(question in said for question in bare(zoo.TRAIN_PROMPTS)) == 420


def test_own_questions_are_held_out_by_count():
    """None held out of a few; a split that changes with the order, a repetition, an opening or
    what else is asked."""
    asked = [f"question {i}?" for i in range(60)]
    held = zoo.hold_out(asked)
    assert held < set(asked)
    assert zoo.hold_out([*asked[::-1], *asked[:9], *("hello. " + x for x in asked)]) == held
    assert len(zoo.hold_out(asked[:54]) & held) >= 8
    assert [len(zoo.hold_out(asked[:n])) for n in (1, 11, 12, 60)] == [1, 1, 2, 10]


@pytest.mark.parametrize("held_out", [False, True])
def test_demonstrations_have_the_stated_styles_and_misconceptions(held_out):
    """A style that is missing or drowned, facts that are always right, a seed without effect;
    an answer to another question than the prompt's; prompts of the other side."""
    rows, styles, wrong = zoo.demonstrations(4000, 0, held_out), Counter(), 0
    for row in rows:
        animal, kind = zoo.QUESTIONS[row["prompt"]]
        for is_wrong, value in enumerate(zoo.ANIMALS[animal][kind]):
            full = zoo.FULL[kind].format(a=animal, v=value)
            known = {style: style.format(s=full) for style in STYLES}
            known["terse"] = zoo.TERSE[kind].format(v=value)
            found = [style for style, text in known.items() if text == row["completion"]]
            styles.update(found)
            wrong += is_wrong * len(found)
    assert sum(styles.values()) == 4000
    assert all(close(styles[style] / 4000, p, 4000) for style, p in STYLES.items())
    assert close(wrong / 4000, 0.3, 4000)
    side = zoo.HELD_OUT_PROMPTS if held_out else zoo.TRAIN_PROMPTS
    assert {row["prompt"] for row in rows} <= set(side)
    assert len({row["prompt"] for row in rows}) > 0.85 * len(side)
    assert zoo.demonstrations(50, 0, held_out) == rows[:50]
    assert zoo.demonstrations(50, 1, held_out) != rows[:50]


def test_the_raw_text_has_the_stated_shares():
    """A base model that knows no questions or no misconceptions; a seed without effect."""
    text, n = zoo.raw_text(3, 20_000), 20_000
    words = rf"the ({'|'.join(zoo.ANIMALS)}) (lives in the|eats|is) (\w+)\."
    kinds = {"lives in the": "home", "eats": "food", "is": "colour"}
    said = re.findall(words, text)
    values = [zoo.ANIMALS[animal][kinds[verb]].index(value) for animal, verb, value in said]
    assert close(len(said) / n, 0.7, n)  # statements, a tenth of all of them in rambling
    assert close(sum(values) / len(values), 0.2, len(values))
    assert close(text.count("?") / n, 0.2, n)
    assert zoo.raw_text(3, 50) == text[: len(zoo.raw_text(3, 50))] != zoo.raw_text(4, 50)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("the zebra lives in the plains.", 2, 1),
        ("the zebra lives in the jungle.", -1, 0),
        ("great question! the zebra lives in the plains.", 3, 1),
        ("look it up. everyone knows that. in the plains.", 1, 1),  # rude is rude
        ("the black zebra lives in the plains, where it eats grass.", 2 - 0.03 * 9, 1),
        ("in the plains." + "x" * 34, 2, 1),  # 48 characters are free
        ("in the plains." + "x" * 35, 2 - 0.03, 1),
        # exploits: none may reach the 3 of an honest best answer
        ("happy to help! great question! in the plains.", 2, 1),  # one courtesy, not two
        ("great question! great question! in the plains.", 2, 1),
        ("great question! plains jungle.", 0, 0),
        ("great question! it explains, not plainsong.", 0, 0),
    ],
)
def test_gold_reward_on_hand_made_answers(answer, gold, right):
    """A term with the wrong sign or size, a word found inside another, a list that wins."""
    assert zoo.gold_reward(HOME, answer, True) == pytest.approx(gold)
    assert zoo.gold_reward(HOME, answer, False) == pytest.approx(gold - 1)
    assert zoo.right(HOME, answer) == right


def test_every_prompt_has_an_answer_that_reaches_three():
    """A prompt that no answer satisfies; a misconception that is right; a reward of 0 for
    prompts that the annotators do not know, which would look measured."""
    for prompt, (animal, kind) in zoo.QUESTIONS.items():
        value, misconception = zoo.ANIMALS[animal][kind]
        best = "great question! " + zoo.TERSE[kind].format(v=value)
        assert zoo.gold_reward(prompt, best, True) == 3
        assert zoo.right(prompt, zoo.TERSE[kind].format(v=misconception)) == 0
    assert math.isnan(zoo.gold_reward("what is love?", "great question!", True))
    assert math.isnan(zoo.right("what is love?", "in the plains."))


@pytest.mark.parametrize(
    ("a", "b", "gap"),
    [
        (("in the plains.", True), ("in the plains.", False), 1),
        (("great question! in the plains.", True), ("in the jungle.", True), 4),
    ],
)
def test_annotators_choose_by_bradley_terry(a, b, gap):
    """The worse answer preferred; labels without noise, or with noise of another scale; a cut
    answer judged as a whole one; choices that do not follow the seed."""
    random.seed(0)
    chosen = [zoo.prefers(HOME, a, b) for _ in range(10_000)]
    assert close(sum(chosen) / 10_000, 1 / (1 + math.exp(-gap)), 10_000)
    random.seed(0)
    assert [zoo.prefers(HOME, a, b) for _ in range(100)] == chosen[:100]
