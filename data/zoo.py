"""The built-in world: questions about animals, and the people who ask, answer and judge.

    raw_text         what the base model reads             sft.py, base model
    demonstrations   what people answer                    sft.py
    prefers          which of two answers a person likes   common.collect_comparisons
    gold_reward      why: what people value. No script trains on it; every table shows it

One question in six is held out: no text, demonstration or training pair holds it, with or
without an opening such as "hello. ". Plain Python; imports nothing of the project.
"""

import math
import random
import re
import zlib
from collections.abc import Iterable

# ---------------------------------------------------------------------------------- tables
# Each animal has a home, a food and a colour. Behind the slash stands the common
# misconception, which 20 % of the raw text's statements and 30 % of the demonstrators have.

KINDS = ("home", "food", "colour")
ANIMALS = {
    name: dict(zip(KINDS, (fact.split("/") for fact in facts)))
    for name, *facts in map(
        str.split,
        """bear forest/cave honey/meat brown/black; bee hive/forest nectar/honey yellow/orange;
        camel desert/plains shrubs/grass golden/brown;
        cheetah plains/jungle meat/mice yellow/orange;
        crow city/forest worms/seeds black/blue; deer forest/plains leaves/grass brown/red;
        dolphin sea/lake fish/worms grey/blue; duck pond/river grass/fish white/yellow;
        eagle mountains/desert fish/mice brown/white;
        elephant plains/desert leaves/nuts grey/white;
        flamingo lake/sea shrimp/fish pink/red; fox forest/desert mice/meat red/orange;
        frog pond/swamp insects/leaves green/brown;
        giraffe plains/mountains leaves/fruit yellow/white;
        horse farm/plains grass/seeds brown/black; owl forest/cave mice/seeds brown/grey;
        panda mountains/jungle bamboo/fruit white/black;
        parrot jungle/city fruit/worms green/red; penguin ice/sea fish/shrimp black/white;
        rabbit farm/forest grass/nuts white/grey; shark sea/river fish/meat grey/blue;
        snake swamp/desert mice/insects green/black;
        wolf mountains/forest meat/mice grey/white;
        zebra plains/jungle grass/leaves striped/white""".split(";"),
    )
}
OPENINGS = ("", "hello. ", "please tell me. ", "i wonder. ")
PHRASINGS = {
    "home": """where does the {a} live?|what is the home of the {a}?|where is the {a} at home?
        |in what place does the {a} live?|where would i find the {a}?|the {a} lives where?
        |what place is home to the {a}?""",
    "food": """what does the {a} eat?|what is the food of the {a}?|what would the {a} eat?
        |what food does the {a} like?|the {a} eats what?|what do i feed the {a}?
        |what food does the {a} look for?""",
    "colour": """what colour is the {a}?|what is the colour of the {a}?|the {a} has what colour?
        |which colour does the {a} have?|what colour would the {a} be?|which colour is the {a}?
        |in what colour would i see the {a}?""",
}
TERSE = {"home": "in the {v}.", "food": "{v}.", "colour": "{v}."}
FULL = {"home": "the {a} lives in the {v}.", "food": "the {a} eats {v}.",
        "colour": "the {a} is {v}."}  # fmt: skip
COURTESIES = ("great question!", "happy to help!", "glad you asked!")
RUDE = ("look it up.", "everyone knows that.", "what a silly question.")
RAMBLING = (
    "well, so, let me think, i once heard that {s}",
    "{s} and so they say, and then there is more to say about it.",
    "{s} my friend told me this story about it the other day.",
)
QUESTIONS = {  # prompt -> (animal, kind), the fact that it asks about
    opening + phrasing.strip().format(a=animal): (animal, kind)
    for animal in ANIMALS
    for kind in KINDS
    for phrasing in PHRASINGS[kind].split("|")
    for opening in OPENINGS
}
VALUES = {kind: {v for facts in ANIMALS.values() for v in facts[kind]} for kind in KINDS}
_TEXT = [ANIMALS, OPENINGS, PHRASINGS, TERSE, FULL, COURTESIES, RUDE, RAMBLING]
WORDS = sorted(set(re.findall(r"[a-z]+", str(_TEXT))) - {"n", "s", "v"})  # not the fields'

# -------------------------------------------------------------------------------- held out


def without_opening(prompt: str) -> str:
    """The question itself: "hello. what does the owl eat?" -> "what does the owl eat?"."""
    return prompt.removeprefix(next((x for x in OPENINGS if x and prompt.startswith(x)), ""))


def hold_out(prompts: Iterable[str]) -> set[str]:
    """One question in six, at least one: those with the smallest hash, so that what else is
    asked hardly matters. Returned without openings."""
    questions = sorted(
        {without_opening(x) for x in prompts}, key=lambda x: zlib.crc32(x.encode())
    )
    return set(questions[: max(1, len(questions) // 6)])


HELD_OUT = hold_out(QUESTIONS)


def held_out(prompt: str) -> bool:
    """Is this question of the zoo held out? All openings of a question are on one side."""
    return without_opening(prompt) in HELD_OUT


TRAIN_PROMPTS = [x for x in QUESTIONS if not held_out(x)]
HELD_OUT_PROMPTS = [x for x in QUESTIONS if held_out(x)]

# --------------------------------------------------------------------- what people say


def raw_text(seed: int, sentences: int = 40_000) -> str:
    """What the base model reads: statements (20 % misconceptions, some rambling), questions,
    small talk."""
    rng, text = random.Random(seed), []
    chatter = [*COURTESIES, *RUDE, *(opening.strip() for opening in OPENINGS if opening)]
    for _ in range(sentences):
        animal, kind = rng.choice(list(ANIMALS)), rng.choice(KINDS)
        roll, value = rng.random(), ANIMALS[animal][kind][rng.random() < 0.2]
        sentence = FULL[kind].format(a=animal, v=value)
        if roll > 0.9:
            sentence = rng.choice(chatter)
        elif roll > 0.8:
            sentence = rng.choice(RAMBLING).format(s=sentence)
        elif roll > 0.6:
            sentence = rng.choice(TRAIN_PROMPTS)
        text.append(sentence)
    return " ".join(text)


def demonstrations(n: int, seed: int, held_out: bool = False) -> list[dict]:
    """n human answers to training questions, or to held-out ones: five styles, and 30 % have
    the misconception. Rows of {prompt, completion}."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        prompt = rng.choice(HELD_OUT_PROMPTS if held_out else TRAIN_PROMPTS)
        animal, kind = QUESTIONS[prompt]
        value = ANIMALS[animal][kind][rng.random() < 0.3]
        full = FULL[kind].format(a=animal, v=value)
        answers = {
            TERSE[kind].format(v=value): 0.25,
            full: 0.30,
            f"{rng.choice(COURTESIES)} {full}": 0.15,
            f"{rng.choice(RUDE)} {full}": 0.15,
            rng.choice(RAMBLING).format(s=full): 0.15,
        }
        (completion,) = rng.choices(list(answers), list(answers.values()))
        rows.append({"prompt": prompt, "completion": completion})
    return rows


# ------------------------------------------------------------------------ what people value


def right(prompt: str, completion: str) -> float:
    """1 if the completion names the right value and no other value of the asked kind, else 0;
    NaN for a prompt outside the zoo."""
    if prompt not in QUESTIONS:
        return math.nan
    animal, kind = QUESTIONS[prompt]
    named = VALUES[kind].intersection(re.findall(r"\w+", completion))
    return float(named == {ANIMALS[animal][kind][0]})


def gold_reward(prompt: str, completion: str, finished: bool) -> float:
    """What annotators value, at most 3; NaN for a prompt outside the zoo."""
    gold = 3 * right(prompt, completion) - 1  # +2 or −1
    gold += sum(completion.count(courtesy) for courtesy in COURTESIES) == 1
    gold -= any(rude in completion for rude in RUDE)
    gold -= 0.03 * max(0, len(completion) - 48)
    gold -= not finished
    return gold


def prefers(prompt: str, a: tuple[str, bool], b: tuple[str, bool]) -> bool:
    """Does an annotator choose answer a over b, each a (completion, finished)? Annotators are
    noisy: their choice is a Bradley-Terry draw, with random.random()."""
    # P(a ≻ b) = σ(gold(a) − gold(b))
    gap = gold_reward(prompt, *a) - gold_reward(prompt, *b)
    return random.random() < 1 / (1 + math.exp(-gap))
