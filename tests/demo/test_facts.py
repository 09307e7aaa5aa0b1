"""The generator of demo shops: one seed, one shop, and answers that only the prompt gives."""

from __future__ import annotations

import doctest
import random

import pytest

from chunkcache.demo import facts, words
from chunkcache.demo.facts import HELD_OUT_SEED, make_shop


def test_same_seed_same_shop() -> None:
    assert make_shop(7, fact_tokens=300) == make_shop(7, fact_tokens=300)
    assert make_shop(7, facts=30) == make_shop(7, facts=30)


def test_other_seed_other_shop() -> None:
    prompts = {
        make_shop(seed, facts=20).system_prompt
        for seed in [*range(50), *range(HELD_OUT_SEED, HELD_OUT_SEED + 50)]
    }
    assert len(prompts) == 100


def test_two_shops_share_almost_no_facts() -> None:
    shared = told = 0
    for seed in range(100):
        trained = {qa.answer for qa in make_shop(seed, fact_tokens=512).questions}
        held_out = {qa.answer for qa in make_shop(HELD_OUT_SEED + seed, fact_tokens=512).questions}
        shared, told = shared + len(trained & held_out), told + len(held_out)
    assert shared < 0.005 * told


@pytest.mark.parametrize("size", [64, 512, 2048, 3072])
def test_size_and_answers(size: int) -> None:
    shop = make_shop(HELD_OUT_SEED, fact_tokens=size)
    lines = shop.system_prompt.split("\n")[1:]
    assert size - 16 <= sum(facts.count_tokens(line) + 1 for line in lines) <= size
    assert sorted(lines) == sorted(qa.answer for qa in shop.questions)
    assert not {qa.answer for qa in shop.unknown} & set(lines)


def test_number_of_facts() -> None:
    assert len(make_shop(3, facts=25).questions) == 25
    assert len(make_shop(3).questions) > 40


def test_a_question_has_one_answer() -> None:
    """No two facts of a shop are asked for in the same way."""
    for seed in range(20):
        shop = make_shop(HELD_OUT_SEED + seed, fact_tokens=3072)
        starts = [qa.question for qa in shop.questions + shop.unknown]
        assert len(starts) == len(set(starts))


def test_a_value_is_one_token() -> None:
    """What the model copies is one word, or one number that the tokenizer has whole."""
    kinds = (facts.PRODUCT_KINDS, facts.BRANCH_KINDS, facts.STAFF_KINDS, facts.POLICY_KINDS)
    for kind in (kind for group in kinds for kind in group):
        values = [kind.value(random.Random(seed)) for seed in range(200)]
        assert all(facts.count_tokens(value) == 1 for value in values)
        assert all(int(value) < 600 for value in values if value.isdigit())


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="not both"):
        make_shop(1, facts=3, fact_tokens=30)
    with pytest.raises(ValueError, match="at least one"):
        make_shop(1, facts=0)


def test_no_word_twice_among_nouns_and_names() -> None:
    lists = [words.ADJECTIVES, words.NOUNS, words.PEOPLE, words.CITIES, words.SERVICES]
    assert len({word for some in lists for word in some}) == sum(map(len, lists))


def test_doctest() -> None:
    assert doctest.testmod(facts).failed == 0
