"""How long computing a token takes, from requests of which each computed some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Pace:
    """A line through (tokens computed, seconds) of requests by least squares; its slope is the pace.

    What every request pays whatever its length does not count as the price of a token. If the requests do
    not tell one from the other (all are of one length, say), all time is that of tokens.
    """

    requests: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Counts a request. O(1)."""
        self.requests += 1
        self.tokens += tokens
        self.seconds += seconds
        self._squares += tokens * tokens
        self._products += tokens * seconds

    @classmethod
    def of(cls, requests: Iterable[tuple[int, float]]) -> Pace:
        """That of many."""
        pace = cls()
        for tokens, seconds in requests:
            pace.add(tokens, seconds)
        return pace

    @property
    def token_seconds(self) -> float | None:
        """Seconds a token; None before the first was computed.

        >>> round(Pace.of([(100, 0.3), (1000, 1.2)]).token_seconds, 9)
        0.001
        """
        if not self.tokens:
            return None
        spread = self.requests * self._squares - self.tokens**2
        if spread > 1e-9 * self.requests * self._squares:
            slope = (self.requests * self._products - self.tokens * self.seconds) / spread
            if slope > 0:
                return slope
        return self.seconds / self.tokens
