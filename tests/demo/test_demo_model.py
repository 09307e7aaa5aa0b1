"""The packaged demo model: a lossless tokenizer, a prefix-stable template, and true recall."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chunkcache.demo import model_path
from chunkcache.demo.evaluate import accuracy, generate
from chunkcache.demo.facts import HELD_OUT_SEED, make_shop

TOKENIZER = AutoTokenizer.from_pretrained(model_path())
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ROLES = ("system", "user", "assistant")
# Training checks itself on the first held-out shops; nothing was ever chosen by these.
FRESH_SEED = HELD_OUT_SEED + 7000


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return TOKENIZER


def render(chat: list[dict[str, str]], **options: bool) -> list[int]:
    return TOKENIZER.apply_chat_template(chat, return_dict=False, **options)


@given(TEXT)
def test_tokenizer_round_trip(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.decode(ids) == text


@given(st.lists(TEXT, min_size=2, max_size=7), st.data())
def test_template_is_prefix_stable(contents: list[str], data: st.DataObject) -> None:
    chat = [
        {"role": ROLES[0] if n == 0 else ROLES[1 + (n + 1) % 2], "content": text}
        for n, text in enumerate(contents)
    ]
    cut = data.draw(st.integers(1, len(chat) - 1))
    short, full = render(chat[:cut]), render(chat)
    assert full[: len(short)] == short
    if chat[cut]["role"] == "assistant":
        prompted = render(chat[:cut], add_generation_prompt=True)
        assert full[: len(prompted)] == prompted


def test_special_tokens_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert render([{"role": "user", "content": "Hello!"}])[-1] == tokenizer.eos_token_id


def test_package_is_small() -> None:
    assert sum(file.stat().st_size for file in model_path().iterdir()) < 8 * 10**6


def test_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert not model.generation_config.do_sample
    assert model.config.max_position_embeddings >= 4096


def test_reads_512_tokens_of_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert accuracy(model, tokenizer, 512, 12, 10, seed0=FRESH_SEED) >= 0.95


def test_reads_2048_tokens_of_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert accuracy(model, tokenizer, 2048, 3, 10, seed0=FRESH_SEED + 100) >= 0.85


def test_knows_nothing_without_the_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert accuracy(model, tokenizer, 512, shops=4, questions_per_shop=10, with_prompt=False) <= 0.1


def test_wrong_prompt_gives_wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Questions on one shop, the facts of another: what wrong reuse of keys and values does."""
    asked, other = (
        make_shop(HELD_OUT_SEED, fact_tokens=512),
        make_shop(HELD_OUT_SEED + 1, fact_tokens=512),
    )
    chats = [
        [
            {"role": "system", "content": other.system_prompt},
            {"role": "user", "content": qa.question},
        ]
        for qa in asked.questions[:10]
    ]
    answers = generate(model, tokenizer, chats)
    assert (
        sum(answer == qa.answer for answer, qa in zip(answers, asked.questions, strict=False)) <= 1
    )
