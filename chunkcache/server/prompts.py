"""From messages and texts to token ids, and the room they leave for answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from jinja2 import TemplateError

from chunkcache.server.problems import ApiError

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel

_T = TypeVar("_T")


class Prompts:
    """Tokenises in a thread of its own, one prompt at a time, so that long ones hold up nobody.

    It has its own copy of the tokenizer: the worker decodes with the original meanwhile, and fast
    tokenizers may not be used from two threads in every combination of calls.
    """

    def __init__(self, cached: CachedModel):
        self._tokenizer = copy.deepcopy(cached.tokenizer)
        self._one = anyio.CapacityLimiter(1)
        text_config = cached.config.get_text_config()
        self.limit: int | None = getattr(text_config, "max_position_embeddings", None)

    async def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a dialogue, up to where the assistant begins to speak.

        Raises:
            ApiError: the model has no chat template, or its template refuses the dialogue.
        """
        if not self._tokenizer.chat_template:
            raise ApiError("this model has no chat template; use /v1/completions", param="messages")
        try:
            return await self._run(lambda: self._render(messages))
        except TemplateError as error:
            raise ApiError(f"the chat template refuses this dialogue: {error}") from None

    async def ids(self, prompt: str, special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return await self._run(
            lambda: list(self._tokenizer(prompt, add_special_tokens=special_tokens).input_ids)
        )

    async def text(self, ids: list[int]) -> str:
        """The text of ids, special tokens included.

        Raises:
            ApiError: numbers that are no token ids.
        """
        if not all(0 <= token < len(self._tokenizer) for token in ids):
            raise ApiError("'tokens' holds ids outside the vocabulary", param="tokens")
        return await self._run(lambda: str(self._tokenizer.decode(ids)))

    def room(self, prompts: list[list[int]], wanted: int | None, param: str) -> int | None:
        """Tokens left behind the longest prompt; None if the model sets no limit.

        Raises:
            ApiError: no room for `wanted` tokens, or for a single one.
        """
        if self.limit is None:
            return None
        longest = max(map(len, prompts))
        room = self.limit - longest
        if room < (wanted or 1):
            raise ApiError(
                f"this model has {self.limit} positions; the prompt takes {longest} and the answer "
                f"asks for {wanted or 'at least 1'}",
                param=param,
                code="context_length_exceeded",
            )
        return room

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._one)


def ids_of(value: Any) -> list[int]:
    """A list of token ids from a JSON body.

    Raises:
        ApiError: anything else.
    """
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ApiError("'tokens' must be a list of token ids", param="tokens", code="invalid_value")
    return value
