"""The demo: a support bot, its users, and what the cache spares them, measured on a real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from chunkcache.config import Config
from chunkcache.demo.facts import HELD_OUT_SEED, QA, Shop, make_shop
from chunkcache.hf import CachedModel, wrap
from chunkcache.lab.records import Stats, TreeRow

NAME = "support-bot"
_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Visit:
    """One user's question, answered twice; times are to the first token, in seconds."""

    question: str
    expected: str
    plain_answer: str
    answer: str
    cold_seconds: float
    warm_seconds: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int

    @property
    def same(self) -> bool:
        """Whether the cache left the answer as it was."""
        return self.answer == self.plain_answer

    @property
    def right(self) -> bool:
        """Whether the answer is the fact that was asked for."""
        return self.answer == self.expected


@dataclass(frozen=True)
class Story:
    """All that happened.

    Attributes:
        wrap_seconds: the probe and the digest of the weights; preload_seconds: the system prompt.
        preload_tokens: tokens of the system prompt that were stored.
        private_bytes: KV if every user has a copy of everything; shared_bytes: with one system
            prompt for all of them.
    """

    shop: str
    system_prompt: str
    wrap_seconds: float
    preload_seconds: float
    preload_tokens: int
    visits: tuple[Visit, ...]
    private_bytes: int
    shared_bytes: int
    stats: Stats
    tree: tuple[TreeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, sums first, for JSON."""
        sums = {
            "users": len(self.visits),
            "cold_seconds": sum(visit.cold_seconds for visit in self.visits) / len(self.visits),
            "warm_seconds": sum(visit.warm_seconds for visit in self.visits) / len(self.visits),
            "same_answers": sum(visit.same for visit in self.visits),
            "right_answers": sum(visit.right for visit in self.visits),
        }
        rest = asdict(self) | {"stats": self.stats.to_dict()}
        return sums | rest


def run_story(
    model: Any,
    tokenizer: Any,
    users: int = 24,
    fact_tokens: int = 2048,
    progress: Callable[[str], None] = lambda what: None,
) -> Story:
    """Plays the demo: every user asks the plain model, then the cached one.

    Raises:
        ValueError: no user, or more than the shop has facts.
    """
    shop = make_shop(HELD_OUT_SEED + 7, fact_tokens=fact_tokens)
    if not 1 <= users <= len(shop.questions):
        raise ValueError(f"between 1 and {len(shop.questions)} users can ask this shop's bot")
    asked = shop.questions[:users]
    chats = [_ids(tokenizer, shop, qa) for qa in asked]
    _timed(model, tokenizer, chats[0][:64])  # the first forward of a process is slower
    progress(f"{users} users ask the plain model")
    cold = [_timed(model, tokenizer, ids) for ids in chats]
    progress("wrapping the model: the probe compares it with itself")
    started = perf_counter()
    with wrap(model, tokenizer, Config(device_bytes="256MiB")) as cached:
        wrap_seconds = perf_counter() - started
        progress("the same users ask the cached model")
        return _cached_part(cached, shop, asked, chats, cold, wrap_seconds)


def _cached_part(
    cached: CachedModel,
    shop: Shop,
    asked: list[QA],
    chats: list[list[int]],
    cold: list[_Timed],
    wrap_seconds: float,
) -> Story:
    started = perf_counter()
    stored = cached.preload([_system(shop)], name=NAME, pin=True)
    preload_seconds = perf_counter() - started
    both = zip(asked, chats, cold, strict=True)
    visits = tuple(_visit(cached, qa, ids, before) for qa, ids, before in both)
    stats = cached.stats()
    held = sum(visit.prompt_tokens + visit.answer_tokens for visit in visits)
    return Story(
        shop=shop.name,
        system_prompt=shop.system_prompt,
        wrap_seconds=wrap_seconds,
        preload_seconds=preload_seconds,
        preload_tokens=stored,
        visits=visits,
        private_bytes=held * stats.token_bytes,
        shared_bytes=(held - (len(visits) - 1) * stored) * stats.token_bytes,
        stats=stats,
        tree=tuple(cached.tree_rows()),
    )


def _system(shop: Shop) -> dict[str, str]:
    return {"role": "system", "content": shop.system_prompt}


def _ids(tokenizer: Any, shop: Shop, qa: QA) -> list[int]:
    chat = [_system(shop), {"role": "user", "content": qa.question}]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def _visit(cached: CachedModel, qa: QA, ids: list[int], before: _Timed) -> Visit:
    now = _timed(cached, cached.tokenizer, ids)
    (reuse,) = cached.last_reuse
    return Visit(
        question=qa.question,
        expected=qa.answer,
        plain_answer=before.answer,
        answer=now.answer,
        cold_seconds=before.seconds,
        warm_seconds=now.seconds,
        prompt_tokens=reuse.prompt_tokens,
        cached_tokens=reuse.cached_tokens,
        answer_tokens=now.tokens,
    )


@dataclass(frozen=True)
class _Timed:
    answer: str
    tokens: int
    seconds: float


def _timed(model: Any, tokenizer: Any, ids: list[int]) -> _Timed:
    """One greedy answer; `seconds` until its first token was chosen."""
    moments: list[float] = []

    def note(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        moments.append(perf_counter())
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)

    started = perf_counter()
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_ANSWER_TOKENS,
            stopping_criteria=[note],
        )
    answer = output[0, len(ids) :].tolist()
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return _Timed(text, len(answer), moments[0] - started)
