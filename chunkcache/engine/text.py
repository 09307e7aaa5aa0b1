"""From token ids to text that may be shown at once.

Two things can make text unfit to show yet: the last token may end inside a character, and the last
characters may be the beginning of a stop string. Both are held back until the next token decides.

transformers' TextIteratorStreamer was rejected: it holds back whole words, knows no stop strings,
and serves one row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of a growing list of tokens, in pieces whose concatenation is the text of them all.

    A piece is decoded together with the tokens of the piece before it, because some tokenizers
    drop the space of a first token; only what lies behind the old text is new.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is still held back, as far as it can be decoded."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopScanner:
    """Lets text through up to the first stop string, and never a part of one.

    >>> scanner = StopScanner(["END"])
    >>> [scanner.push(piece) for piece in ("one E", "N", "ough EN", "D two")]
    ['one ', '', 'ENough ', '']
    >>> scanner.stopped
    True
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        self.stopped = bool(found)
        # The one that ends first, however the text was cut into pieces.
        cut = min(found)[1] if found else len(self._held) - self._doubtful()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        return "" if self.stopped else self._held

    def _doubtful(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Row:
    """One answer while it grows: its text, its number of tokens, and why it ended."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], ends: Collection[int]):
        self._words = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._ends = ends
        self.tokens = 0
        self.text = ""
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Take the next token of a row that has not ended; returns the text to show now."""
        assert self.finish_reason is None, "a token after the end"
        self.tokens += 1
        if token in self._ends:
            return self.finish("stop")
        shown = self._scanner.push(self._words.push(token))
        if self._scanner.stopped:
            self.finish_reason = "stop"
        self.text += shown
        return shown

    def finish(self, reason: str) -> str:
        """End the row; returns the text that was held back and now can be shown."""
        shown = self._scanner.push(self._words.finish())
        self.finish_reason = "stop" if self._scanner.stopped else reason
        shown += self._scanner.finish()
        self.text += shown
        return shown
