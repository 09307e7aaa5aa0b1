"""What is asked of the worker, and what it reports while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from chunkcache.lab.records import Reuse


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, and where they end.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy; None leaves it, and top_p and top_k, to the model's own
            generation config.
        seed: makes the answers reproducible; the random state outside is left as it was.
        ignore_eos: go on to max_new_tokens whatever the model says.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def arguments(self, model_top_k: int | None) -> dict[str, Any]:
        """The arguments of generate().

        An explicit temperature samples from the whole distribution, unless top_k is given or the
        model's own config (`model_top_k`) asks for less; transformers alone would cut at 50.
        """
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.ignore_eos:
            chosen["min_new_tokens"] = self.max_new_tokens
        if self.temperature == 0:
            return chosen | {"do_sample": False}
        if self.temperature is not None or self.top_p is not None or self.top_k is not None:
            top_k = model_top_k if self.top_k is None else self.top_k
            chosen |= {"do_sample": True, "top_k": top_k or 0}
        if self.temperature is not None:
            chosen["temperature"] = self.temperature
        if self.top_p is not None:
            chosen["top_p"] = self.top_p
        return chosen


@dataclass(frozen=True)
class Delta:
    """New text of one row; `finish_reason` is set when it is the last."""

    row: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Answer:
    """One finished row; `tokens` counts the token that ended it, the text does not show it."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Result:
    """All rows of a job, `n` for each prompt, and a reuse record for each prompt."""

    answers: tuple[Answer, ...]
    reuse: tuple[Reuse, ...]
    first_token_seconds: float


@dataclass(frozen=True)
class Finished:
    """The last event of a job that ran to its end."""

    result: Result


@dataclass(frozen=True)
class Failed:
    """The last event of a job that did not."""

    error: Exception


Event = Delta | Finished | Failed


@dataclass(eq=False)
class Job:
    """Prompts to be answered together.

    Attributes:
        prompts: token ids, a list each.
        n: answers for each prompt.
        listener: called from the worker's thread with every event; it must not block.
    """

    prompts: list[list[int]]
    sampling: Sampling
    listener: Callable[[Event], None]
    n: int = 1
    submitted: float = field(default_factory=perf_counter)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop at the next token; a second call does nothing."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answers any more."""
        return self._cancelled.is_set()
