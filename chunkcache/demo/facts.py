"""Seeded fictional shops: a system prompt of facts, and questions that only this prompt answers.

An answer repeats its fact word for word, and each sentence names its subject first. The few words
just before a value (subject and verb) therefore single it out in the prompt, and a small model can
learn to copy it. Every value is one token. An earlier model got wrong mostly what was not: opening
times with minutes, telephone numbers in two groups, addresses with house numbers. Subjects and
values are drawn afresh for every shop: nothing about one shop helps with another, so a model that
reads the keys and values of the wrong prompt answers wrongly.

Seeds below `HELD_OUT_SEED` are for training, seeds from it on for evaluation and tests.

>>> shop = make_shop(HELD_OUT_SEED, fact_tokens=64)
>>> shop == make_shop(HELD_OUT_SEED, fact_tokens=64)
True
>>> all(qa.answer in shop.system_prompt for qa in shop.questions)
True
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from chunkcache.demo import words

HELD_OUT_SEED = 10**9

SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Good morning!", "Good evening!", "Hello there."),
        "Hello! How can I help you?",
    ),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Great, thank you."), "You are welcome."),
    (("Bye!", "Goodbye!", "That is all.", "See you soon."), "Goodbye, and see you soon!"),
)


class QA(NamedTuple):
    """A user's question and the one answer that counts as right."""

    question: str
    answer: str


class Shop(NamedTuple):
    """A fictional shop.

    `questions` has one question per fact of the prompt, in random order. `unknown` has questions on
    matters of which the prompt says nothing.
    """

    name: str
    system_prompt: str
    questions: list[QA]
    unknown: list[QA]


class Kind(NamedTuple):
    """A kind of fact: sentences with the places `{s}` (subject) and `{v}` (value)."""

    fact: str
    unknown: str
    questions: tuple[str, ...]
    value: Callable[[random.Random], str]


def _number(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randint(low, high))


def _word(choices: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


PRODUCT_KINDS = (
    Kind(
        "{s} costs {v} dollars.",
        "{s} costs a sum I do not know.",
        (
            "How much is {s}?",
            "What does {s} cost?",
            "What is the price of {s}?",
            "How much does {s} cost?",
        ),
        _number(10, 599),
    ),
    Kind(
        "{s} is painted {v}.",
        "{s} is painted a colour I do not know.",
        ("What colour is {s}?", "Which colour does {s} have?"),
        _word(words.COLOURS),
    ),
    Kind(
        "{s} weighs {v} pounds.",
        "{s} weighs a number I do not know.",
        ("How heavy is {s}?", "What does {s} weigh?", "What is the weight of {s}?"),
        _number(10, 99),
    ),
    Kind(
        "{s} comes from {v}.",
        "{s} comes from a place I do not know.",
        ("Where is {s} made?", "Where does {s} come from?"),
        _word(words.CITIES),
    ),
    Kind(
        "{s} is guaranteed for {v} months.",
        "{s} is guaranteed for a time I do not know.",
        (
            "How long is {s} guaranteed?",
            "What guarantee does {s} have?",
            "Is there a guarantee on {s}?",
        ),
        _number(10, 99),
    ),
)
BRANCH_KINDS = (
    Kind(
        "{s} opens at {v}.",
        "{s} opens at a time I do not know.",
        ("When does {s} open?", "From what time is {s} open?"),
        _number(5, 12),
    ),
    Kind(
        "{s} closes at {v}.",
        "{s} closes at a time I do not know.",
        ("When does {s} close?", "Until what time is {s} open?"),
        _number(14, 23),
    ),
    Kind(
        "{s} lies in {v} Street.",
        "{s} lies in a street I do not know.",
        ("What is the address of {s}?", "How do I get to {s}?"),
        _word(words.STREETS),
    ),
    Kind(
        "{s} has phone number {v}.",
        "{s} has a number I do not know.",
        ("How can I call {s}?", "What is the phone number of {s}?"),
        _number(100, 599),
    ),
)
STAFF_KINDS = (
    Kind(
        "{s} works in {v}.",
        "{s} works in a team I do not know.",
        ("Where does {s} work?", "In which team is {s}?"),
        _word(words.TEAMS),
    ),
    Kind(
        "{s} speaks {v}.",
        "{s} speaks a language I do not know.",
        ("Which language does {s} speak?", "What does {s} speak?"),
        _word(words.LANGUAGES),
    ),
    Kind(
        "{s} sits in room {v}.",
        "{s} sits in a room I do not know.",
        ("Where does {s} sit?", "Which room is the office of {s}?"),
        _number(100, 599),
    ),
)
POLICY_KINDS = (
    Kind(
        "The fee for {s} is {v} dollars.",
        "The fee for {s} is a sum I do not know.",
        ("What is the fee for {s}?", "What do you charge for {s}?"),
        _number(10, 99),
    ),
    Kind(
        "The deadline for {s} is {v} days.",
        "The deadline for {s} is a time I do not know.",
        ("What is the deadline for {s}?", "How many days do I have for {s}?"),
        _number(10, 99),
    ),
)

# How subjects of each group are made (every name at most once per shop), and how often the group
# gives the next subject.
_GROUPS = (
    (PRODUCT_KINDS, 10),
    (BRANCH_KINDS, 5),
    (STAFF_KINDS, 4),
    (POLICY_KINDS, 1),
)


def make_shop(seed: int, *, facts: int | None = None, fact_tokens: int | None = None) -> Shop:
    """Make the shop of `seed`, with so many facts or `fact_tokens` demo tokens of them (or 512).

    The same arguments give the same shop on every machine. The largest shops hold some 4,500
    tokens: then the names run out.

    Raises:
        ValueError: both sizes are given, or one below 1.
    """
    if facts is not None and fact_tokens is not None:
        raise ValueError("give facts or fact_tokens, not both")
    size = facts if facts is not None else fact_tokens if fact_tokens is not None else 512
    if size < 1:
        raise ValueError(f"a shop needs at least one fact, not {size}")
    rng = random.Random(seed)
    name = f"{rng.choice(words.EPITHETS)} {rng.choice(words.ANIMALS)}"
    told: list[tuple[str, QA]] = []
    unknown: list[QA] = []
    used = 0
    for kind, subject, known in _candidates(rng):
        question = rng.choice(kind.questions).format(s=subject)
        if not known:
            unknown.append(QA(question, _sentence(kind.unknown, subject)))
            continue
        fact = _sentence(kind.fact, subject, kind.value(rng))
        cost = 1 if facts is not None else count_tokens(fact) + 1
        if told and used + cost > size:
            break
        told.append((fact, QA(question, fact)))
        used += cost
    rng.shuffle(told)
    lines = [
        f"You are the assistant of {name}. These are the facts you know.",
        *(fact for fact, _ in told),
    ]
    questions = [qa for _, qa in rng.sample(told, len(told))]
    return Shop(name, "\n".join(lines), questions, unknown)


def count_tokens(text: str) -> int:
    """Count the demo tokens of generated text without a tokenizer.

    A word, a number or a mark is one token each of the demo vocabulary.
    """
    return len(re.findall(r" ?[^\W\d]+| ?\d{1,3}|[^\w ]", text))


def _candidates(rng: random.Random) -> Iterator[tuple[Kind, str, bool]]:
    """Yield kinds and subjects, and whether the prompt states them.

    A subject lacks some kinds, and a few subjects lack all.
    """
    pools = [_products(rng), _branches(rng), _staff(rng), _policies(rng)]
    weights = [weight for _, weight in _GROUPS]
    while any(pools):
        (group,) = rng.choices(range(len(pools)), weights)
        if not pools[group]:
            continue
        subject = pools[group].pop()
        kinds = _GROUPS[group][0]
        stated = 0 if rng.random() < 0.1 else rng.randint(1, len(kinds))
        for position, kind in enumerate(rng.sample(kinds, len(kinds))):
            yield kind, subject, position < stated


def _products(rng: random.Random) -> list[str]:
    count = min(len(words.ADJECTIVES), len(words.NOUNS))
    pairs = zip(rng.sample(words.ADJECTIVES, count), rng.sample(words.NOUNS, count), strict=True)
    return [f"the {adjective} {noun}" for adjective, noun in pairs]


def _branches(rng: random.Random) -> list[str]:
    return [f"our branch in {city}" for city in rng.sample(words.CITIES, len(words.CITIES))]


def _staff(rng: random.Random) -> list[str]:
    return [f"our colleague {person}" for person in rng.sample(words.PEOPLE, len(words.PEOPLE))]


def _policies(rng: random.Random) -> list[str]:
    return rng.sample(words.SERVICES, len(words.SERVICES))


def _sentence(pattern: str, subject: str, value: str = "") -> str:
    text = pattern.format(s=subject, v=value)
    return text[0].upper() + text[1:]
