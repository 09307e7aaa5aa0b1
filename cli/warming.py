"""Prompts computed into colder tiers piece by piece, so that who is killed loses one piece.

A piece is the prompt's beginning up to some token: what of it is stored is loaded, not computed. What a
store refused shows in the counts of `stats()`, and the log has the words for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from jinja2 import TemplateError

from chunkcache.errors import ChunkcacheError, PromptTooLongError, StoreDownError

from .preloads import Preload

if TYPE_CHECKING:
    from chunkcache import CachedModel

_PATIENCE = 60.0  # seconds that the stores get for one piece
_PAUSE = 1.5  # seconds before a second try; a store that failed is left alone for one
_CHOICE = {"load", "hits", "depth"}  # options of a store: when it is read, and what it is given
Progress = Callable[[int], None]


@dataclass
class Warmed:
    """A prompt, and what became of it.

    Attributes:
        ids: its tokens.
        stored: tokens that the stores have now, in whole chunks.
        computed: of these, how many were nowhere before.
        values: chunks and snapshots written, over all stores.
        error: why it is not stored, or not to its end.
    """

    name: str
    ids: list[int] = field(default_factory=list, repr=False)
    stored: int = 0
    computed: int = 0
    values: int = 0
    error: str | None = None

    @property
    def found(self) -> int:
        """Tokens that need not be computed: a store had them, or a prompt before began alike."""
        return self.stored - self.computed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"stored": self.stored, "found": self.found, "computed": self.computed}
        head = {"name": self.name, "tokens": len(self.ids)}
        return head | counts | {"values_written": self.values, "error": self.error}


class _Counts(NamedTuple):
    new: int  # chunks that the device was given
    loaded: int  # of these from stores
    saved: int
    failed: int


class Warmer:
    """Stores prompts one after another.

    Args:
        piece: tokens that are computed between two writes; rounded down to a border.
    """

    def __init__(self, cached: CachedModel, piece: int):
        self.cached = cached
        cut = cached.settings.cut
        self.piece = max(1, piece // cut) * cut

    def read(self, prompt: Preload) -> Warmed:
        """A prompt as ids, not stored yet; its error says why it cannot be."""
        found = Warmed(prompt.name)
        try:
            found.ids = self._ids(prompt.prompt)
            self._check(len(found.ids))
        except (TemplateError, ValueError) as error:
            found.error = str(error)
        return found

    def _ids(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """As preload() makes them, which takes them too."""
        tokenizer: Any = self.cached.tokenizer
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        return list(tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False))

    def _check(self, tokens: int) -> None:
        """Refuses early what would be refused at the end, with all but that computed for nothing."""
        from chunkcache.hf.trial import position_limit

        limits = [position_limit(self.cached.model), self.cached.proof.limit]
        most = min((limit for limit in limits if limit is not None), default=tokens)
        if tokens > most:
            raise PromptTooLongError(f"{tokens} tokens were given; at most {most} can be stored")

    def warm(self, prompt: Warmed, progress: Progress) -> None:
        """Stores a prompt, and notes on it how that went; `progress` hears of the tokens that are done."""
        before = self._counts()
        ends = [*range(self.piece, len(prompt.ids), self.piece), len(prompt.ids)]
        with _heard() as heard:
            try:
                for end in ends:
                    name = prompt.name if end == len(prompt.ids) else None
                    prompt.stored = self._store(prompt.ids[:end], name)
                    progress(end)
            except StoreDownError as error:
                prompt.error = "; ".join(dict.fromkeys(heard[-3:])) or str(error)
            except ChunkcacheError as error:
                prompt.error = str(error)
                self.cached.settle(
                    _PATIENCE
                )  # what is written is held, and the next one needs room
        now = self._counts()
        new = now.new - before.new - (now.loaded - before.loaded)
        prompt.computed = min(prompt.stored, max(0, new) * self.cached.stats().chunk_size)
        prompt.values = now.saved - before.saved

    def _store(self, ids: list[int], name: str | None) -> int:
        """Computes and writes what is missing; returns the tokens that are stored.

        Raises:
            StoreDownError: a store does not take it, also when asked a second time.
        """
        for pause in (0.0, _PAUSE):
            time.sleep(pause)
            failed = self._counts().failed
            stored = self.cached.preload(ids, name=name, pin=False)
            if self.cached.settle(_PATIENCE) and self._counts().failed == failed:
                return stored
        raise StoreDownError(f"the stores did not take it within {_PATIENCE:g} s")

    def _counts(self) -> _Counts:
        stats = self.cached.stats()
        stores = stats.stores
        failed = sum(stores.get(what, 0) for what in ("failed", "dropped"))
        failed += sum(
            calls[what]
            for calls in stores.values()
            if isinstance(calls, Mapping)
            for what in ("failures", "skipped")
        )
        loaded, saved = stores.get("loaded", 0), stores.get("saved", 0)
        return _Counts(stats.stored_chunks, loaded, saved, failed)


def eager(name: str) -> str:
    """A store that is read always and given everything, whatever its name says of when.

    >>> eager("disk:/tmp/kv?hits=2&ttl=7d")
    'disk:/tmp/kv?ttl=7d&load=always'
    """
    head, _, query = name.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    others = [pair for pair in pairs if pair[0] not in _CHOICE]
    return f"{head}?{urlencode([*others, ('load', 'always')], safe='/:,')}"


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the stores, and what moves values, say to the log meanwhile."""
    log, said = logging.getLogger("chunkcache"), _Said()
    level = log.level
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        yield said.lines
    finally:
        log.setLevel(level)
        log.removeHandler(said)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("chunkcache.kv", "chunkcache.stores")):
            self.lines.append(record.getMessage())
