"""What attention of one layer does with scores, and which keys it hides besides those to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Hiding = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Rule:
    """How a query attends.

    Attributes:
        scaling: of the scores.
        window: a query at position p sees the last `window` keys, its own included.
        span: chunked attention: a query at p sees keys from the last multiple of `span` up to p on.
        softcap: scores become softcap * tanh(score / softcap), before anything is hidden.
        sinks: `[query_heads]` a score per head of a key without a value, which only takes weight.

    Raises:
        ValueError: window, span or softcap are not positive.
    """

    scaling: float
    window: int | None = None
    span: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("window", "span", "softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} of attention is {value}, not a positive number")

    @property
    def hiding(self) -> Hiding:
        """Window and span: which keys it hides."""
        return self.window, self.span

    def first(self, position: int) -> int:
        """The first key that a query at a position sees.

        >>> Rule(1.0, window=4).first(9), Rule(1.0, span=4).first(9), Rule(1.0).first(9)
        (6, 8, 0)
        """
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.span is None else max(first, position // self.span * self.span)
