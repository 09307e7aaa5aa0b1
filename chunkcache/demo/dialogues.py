"""Training sequences: a shop's prompt and a conversation on it, labelled on the answers only."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerFast

from chunkcache.demo.facts import HELD_OUT_SEED, QA, SMALL_TALK, Shop, make_shop
from chunkcache.demo.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

IGNORED = -100


def batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    rows: int,
    length: int,
    fact_tokens: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, both (rows, length), of conversations on new training shops.

    The shops' prompts hold `fact_tokens` (least, most) tokens of facts.
    """
    pairs = []
    for _ in range(rows):
        shop = make_shop(rng.randrange(HELD_OUT_SEED), fact_tokens=rng.randint(*fact_tokens))
        pairs.append(conversation(tokenizer, shop, turns(shop, rng), length))
    ids, labels = zip(*pairs, strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def turns(shop: Shop, rng: random.Random, aside: float = 0.15) -> Iterator[QA]:
    """Yield questions for ever: each fact once per round, in random order.

    In between comes a share `aside` of small talk and of matters that the prompt lacks.
    """
    while True:
        for qa in rng.sample(shop.questions, len(shop.questions)):
            if rng.random() < aside:
                yield (
                    rng.choice(shop.unknown)
                    if shop.unknown and rng.random() < 0.7
                    else _small_talk(rng)
                )
            yield qa


def conversation(
    tokenizer: PreTrainedTokenizerFast, shop: Shop, asked: Iterator[QA], length: int
) -> tuple[list[int], list[int]]:
    """Return up to `length` ids as the chat template gives them, and their labels.

    Labels are the ids in answers with their end marks, and `IGNORED` elsewhere.
    """
    bos, end, system, user, assistant = tokenizer.convert_tokens_to_ids(
        [BOS, END, SYSTEM, USER, ASSISTANT]
    )
    ids = [bos, system, *encode(tokenizer, shop.system_prompt), end]
    labels = [IGNORED] * len(ids)
    for qa in asked:
        question = [user, *encode(tokenizer, qa.question), end, assistant]
        answer = [*encode(tokenizer, qa.answer), end]
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        if len(ids) >= length:
            break
    return ids[:length], labels[:length]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of plain text: no special token is added."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _small_talk(rng: random.Random) -> QA:
    asked, answer = rng.choice(SMALL_TALK)
    return QA(rng.choice(asked), answer)
