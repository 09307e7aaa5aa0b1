"""The JSON of answers: chat and text completions, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import Any

from chunkcache.engine import Answer, Result


class ChatShape:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    @staticmethod
    def choice(index: int, answer: Answer) -> dict[str, Any]:
        """A finished row."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        reason = {"logprobs": None, "finish_reason": answer.finish_reason}
        return {"index": index, "message": message} | reason

    @staticmethod
    def opening(index: int) -> dict[str, Any] | None:
        """What a stream says of a row before its first text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    @staticmethod
    def piece(index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A piece of a row."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextShape:
    """`/v1/completions`."""

    prefix = "cmpl"
    whole = "text_completion"
    chunk = "text_completion"

    @staticmethod
    def choice(index: int, answer: Answer) -> dict[str, Any]:
        """A finished row."""
        return TextShape.piece(index, answer.text, answer.finish_reason)

    @staticmethod
    def opening(index: int) -> dict[str, Any] | None:
        """Nothing: a text row begins with its text."""
        return None

    @staticmethod
    def piece(index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A piece of a row."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


Shape = type[ChatShape] | type[TextShape]


class Envelope:
    """What all messages of one response have in common."""

    def __init__(self, shape: Shape, model: str):
        self.shape = shape
        self._id = f"{shape.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, result: Result) -> dict[str, Any]:
        """The body of a plain response."""
        choices = [self.shape.choice(index, answer) for index, answer in enumerate(result.answers)]
        return self._wrap(self.shape.whole, choices, usage=usage(result), chunkcache=reuse(result))

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A message of a stream."""
        return self._wrap(self.shape.chunk, list(choices), **more)

    def _wrap(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return head | {"choices": choices} | more


def usage(result: Result) -> dict[str, Any]:
    """Token counts; a prompt counts once, whatever `n` is."""
    prompt = sum(row.prompt_tokens for row in result.reuse)
    completion = sum(answer.tokens for answer in result.answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(result)},
    }


def cached_tokens(result: Result) -> int:
    """Prompt tokens whose KV was reused."""
    return sum(row.cached_tokens for row in result.reuse)


def reuse(result: Result) -> dict[str, Any]:
    """The reuse record: sums, and where and why reuse of the first prompt ended.

    With several prompts, `prompts` has the record of each.
    """
    tiers: Counter[str] = Counter()
    for row in result.reuse:
        tiers.update(row.tiers)
    first = result.reuse[0]
    record: dict[str, Any] = {
        "cached_tokens": cached_tokens(result),
        "divergence": first.divergence,
        "reason": first.reason,
        "tiers": dict(tiers),
    }
    if len(result.reuse) > 1:
        record["prompts"] = [row.to_dict() for row in result.reuse]
    return record
