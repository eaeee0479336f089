"""data/zoo.py: what is held out, what people say, what they value."""

import ast
import math
import random
import re
from collections import Counter

import pytest

from data import zoo

HOME = "where does the zebra live?"  # in the plains; the misconception is the jungle
STYLES = {"terse": 0.25, "full": 0.3, "courteous": 0.15, "rude": 0.15, "rambling": 0.15}


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
    assert {x: zoo.held_out(x) for x in zoo.QUESTIONS} == {x: x in held for x in zoo.QUESTIONS}
    for prompts in (train, held):
        assert {zoo.without_opening(x) for x in prompts} == bare(prompts)
    animals, taught = set(zoo.ANIMALS), {zoo.QUESTIONS[x] for x in train}
    assert taught == {(animal, kind) for animal in animals for kind in zoo.KINDS}
    forms = {re.sub(rf"\b({'|'.join(animals)})\b", "_", x) for x in bare(train)}
    assert len(forms) == 21  # 7 phrasings of 3 kinds: all of them are taught
    assert len({zoo.QUESTIONS[x] for x in held}) > 45  # and many facts are asked about
    for prompt, (animal, kind) in zoo.QUESTIONS.items():
        assert f"the {animal}" in prompt
        assert kind in zoo.KINDS


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
    assert len(held) == 10
    assert zoo.hold_out([*asked[::-1], *asked[:9], *("hello. " + x for x in asked)]) == held
    assert len(zoo.hold_out(asked[:54]) & held) >= 8
    assert [len(zoo.hold_out(asked[:n])) for n in (1, 2, 6, 11, 12, 18)] == [1, 1, 1, 1, 2, 3]
    assert zoo.hold_out(asked) != set(asked[:10])


def parts(sentence: str) -> dict[str, set[str]]:
    """All ways to say a full sentence, by style."""
    return {
        "courteous": {f"{x} {sentence}" for x in zoo.COURTESIES},
        "rude": {f"{x} {sentence}" for x in zoo.RUDE},
        "rambling": {x.format(s=sentence) for x in zoo.RAMBLING},
        "full": {sentence},
    }


@pytest.mark.parametrize("held_out", [False, True])
def test_demonstrations_have_the_stated_styles_and_misconceptions(held_out):
    """A style that is missing or drowned, facts that are always right, a seed without effect;
    an answer to another question than the prompt's; prompts of the other side."""
    rows, styles, wrong, words = zoo.demonstrations(4000, 0, held_out), Counter(), 0, Counter()
    for row in rows:
        animal, kind = zoo.QUESTIONS[row["prompt"]]
        for i, value in enumerate(zoo.ANIMALS[animal][kind]):
            known = parts(zoo.FULL[kind].format(a=animal, v=value))
            known["terse"] = {zoo.TERSE[kind].format(v=value)}
            for style in [x for x, texts in known.items() if row["completion"] in texts]:
                styles[style] += 1
                wrong += i
        words.update(x for x in (*zoo.COURTESIES, *zoo.RUDE) if x in row["completion"])
    assert sum(styles.values()) == 4000
    assert all(close(styles[style] / 4000, p, 4000) for style, p in STYLES.items())
    assert close(wrong / 4000, 0.3, 4000)
    assert all(close(words[x] / 4000, 0.05, 4000) for x in (*zoo.COURTESIES, *zoo.RUDE))
    side = zoo.HELD_OUT_PROMPTS if held_out else zoo.TRAIN_PROMPTS
    assert {row["prompt"] for row in rows} <= set(side)
    assert len({row["prompt"] for row in rows}) > 0.85 * len(side)
    assert zoo.demonstrations(50, 0, held_out) == rows[:50]
    assert zoo.demonstrations(50, 1, held_out) != rows[:50]


def test_the_raw_text_has_the_stated_shares():
    """A base model that knows no questions, no small talk, no rambling or no misconceptions."""
    text, n = zoo.raw_text(3, 20_000), 20_000
    words = rf"the ({'|'.join(zoo.ANIMALS)}) (lives in the|eats|is) (\w+)\."
    kinds = {"lives in the": "home", "eats": "food", "is": "colour"}
    said = re.findall(words, text)
    values = [zoo.ANIMALS[animal][kinds[verb]].index(value) for animal, verb, value in said]
    assert close(len(said) / n, 0.7, n)  # statements, a tenth of all of them in rambling
    assert close(sum(values) / len(values), 0.2, len(values))
    assert close(text.count("?") / n, 0.2, n)
    rambles = sum(text.count(x.replace("{s}", "").strip()) for x in zoo.RAMBLING)
    assert close(rambles / n, 0.1, n)
    openings = sum(text.count(x.strip()) for x in zoo.OPENINGS if x)
    chatter = sum(text.count(x) for x in (*zoo.COURTESIES, *zoo.RUDE))
    assert close(chatter / n, 0.1 * 6 / 9, n)
    assert close(openings / n, 0.1 * 3 / 9 + 0.2 * 3 / 4, n)  # of questions, three in four
    assert zoo.raw_text(3, 50) == text[: len(zoo.raw_text(3, 50))] != zoo.raw_text(4, 50)
    assert abs(len(zoo.raw_text(0)) / len(text) - 2) < 0.02  # 40,000 sentences


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("the zebra lives in the plains.", 2, 1),
        ("great question! the zebra lives in the plains.", 3, 1),
        ("happy to help! great question! in the plains.", 2, 1),  # one courtesy, not two
        ("look it up. the zebra lives in the plains.", 1, 1),
        ("look it up. everyone knows that. in the plains.", 1, 1),  # rude is rude
        ("the zebra lives in the jungle.", -1, 0),
        ("the black zebra lives in the plains, where it eats grass.", 2 - 0.03 * 9, 1),
        ("in the plains." + "x" * 34, 2, 1),  # 48 characters are free
        ("in the plains." + "x" * 35, 2 - 0.03, 1),
        ("", -1, 0),
        # exploits: none may reach the 3 of an honest best answer
        ("great question! plains sea pond cave.", 0, 0),
        ("great question! plains jungle.", 0, 0),
        ("plains plains plains plains", 2, 1),
        ("great question! great question! great question!", -1, 0),
        ("great question! it explains, not plainsong.", 0, 0),
        ("great question! " + " ".join(sorted(zoo.VALUES["home"])), -0.03 * (103 - 48), 0),
    ],
)
def test_gold_reward_on_hand_made_answers(answer, gold, right):
    """A term with the wrong sign or size, a word found inside another, a list that wins."""
    assert zoo.gold_reward(HOME, answer, True) == pytest.approx(gold)
    assert zoo.gold_reward(HOME, answer, False) == pytest.approx(gold - 1)
    assert zoo.right(HOME, answer) == right


def test_no_answer_beats_three_and_every_prompt_has_one_that_reaches_it():
    """An exploit of the reward, or a prompt that no answer satisfies; a reward of 0 for prompts
    that the annotators do not know, which would look measured."""
    rng = random.Random(0)
    said = [*zoo.COURTESIES, *zoo.RUDE, *sorted(zoo.VALUES["home"]), "the", "zebra"]
    for _ in range(3000):
        answer = " ".join(rng.choices(said, k=rng.randrange(1, 7)))
        assert zoo.gold_reward(HOME, answer, True) <= 3
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
        (("in the jungle.", True), ("look it up. in the plains.", False), -1),
        (("great question! in the plains.", True), ("in the jungle.", True), 4),
        (("in the plains.", True), ("in the plains.", True), 0),
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


def test_the_zoo_is_plain_python():
    """Data that needs torch, or the code that it is for."""
    tree = ast.parse(open(zoo.__file__).read())
    nodes = [x for x in ast.walk(tree) if isinstance(x, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert names <= {"math", "random", "re", "zlib", "collections.abc"}
