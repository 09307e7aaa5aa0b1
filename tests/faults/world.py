"""What tests of faults share: how many, models over real stores, cold answers, a look at all values.

Everything that tests need to know of the insides of a wrapper is here.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from typing import Any

import chunkcache
from chunkcache.errors import CorruptValueError
from chunkcache.kv.codec import inspect
from chunkcache.kv.notes import decode_note, is_note
from chunkcache.lab.records import Reuse
from chunkcache.stores import Key, Store
from chunkcache.stores.guard import Guard
from chunkcache.stores.open import open_store
from tests.hf.test_zoo import ask, ids, same_bits
from tests.zoo import zoo_model

FAULTS = int(os.environ.get("CHUNKCACHE_FAULTS", "1"))  # times the kills of an ordinary run
KILLS = 20  # of each group
PATIENCE = 60.0  # seconds after which something hangs
CHUNK = 16
KINDS = {"llama": "A", "granitemoehybrid": "B"}  # a model of each tier that reads in place


def groups(count: int) -> list[int]:
    """Numbers of groups of kills, which are also their seeds."""
    return list(range(count * FAULTS))


def until(true: Callable[[], object], what: str, pause: float = 0.01) -> None:
    """Waits until something holds, and looks every now and then."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(pause)


# -- models


def always(store: str) -> str:
    """The name of a store that is read although tiny models compute faster."""
    return f"{store}{'&' if '?' in store else '?'}load=always"


def wrap(name: str, *stores: str, **settings: Any) -> Any:
    """A wrapper of a tiny model."""
    names = [always(store) for store in stores]
    config = chunkcache.Config(chunk_size=CHUNK, stores=names, **settings)
    return chunkcache.wrap(zoo_model(name), config=config)


class Cold:
    """What a model answers with nothing stored."""

    def __init__(self, name: str):
        self._cached = wrap(name)
        self._known: dict[tuple[int, ...], Any] = {}

    def answer(self, row: Sequence[int]) -> Any:
        """Runs each prompt once."""
        key = tuple(row)
        if key not in self._known:
            self._cached.flush()
            self._known[key] = ask(self._cached, [list(row)])
        return self._known[key]


cold = cache(Cold)


def rows(seed: object, count: int) -> list[list[int]]:
    """Prompts of which some share beginnings."""
    random_ = random.Random(f"rows {seed}")
    heads = [ids(random_, 4 * CHUNK) for _ in range(2)]
    return [random_.choice(heads) + ids(random_, random_.randrange(2, 40)) for _ in range(count)]


def check(cached: Any, name: str, row: list[int], where: object = "") -> Reuse:
    """Asks, and compares with the cold answer; says what was reused."""
    begin = time.monotonic()
    given = ask(cached, [row])
    reuse: Reuse = cached.last_reuse[0]
    assert same_bits(given, cold(name).answer(row)), f"another answer: {where}"
    assert time.monotonic() - begin < PATIENCE, f"too slow: {where}"
    return reuse


def check_again(cached: Any, name: str, row: list[int], kind: str, where: object = "") -> None:
    """Asks until a tier serves again, as it must without a restart."""

    def served() -> bool:
        cached.flush()
        found = check(cached, name, row, where).tiers.get(kind, 0) > 0
        cached.settle(PATIENCE)
        return found

    until(served, f"no hits from {kind}: {where}")


# -- what was counted


def count(cached: Any, what: str) -> int:
    """Values or calls of all tiers, as the statistics tell."""
    return int(cached.stats().stores[what])


def guards(cached: Any) -> list[Guard]:
    """Those around the stores of a wrapper, the fastest first."""
    found: list[Guard] = cached._state._servings.guards
    return found


@contextmanager
def short_pauses(patch: Any) -> Iterator[None]:
    """Guards that are made meanwhile leave a broken store alone for moments only."""
    with patch.context() as patched:
        patched.setattr("chunkcache.stores.guard._FIRST", 0.01)
        patched.setattr("chunkcache.stores.guard._LONGEST", 0.05)
        yield


# -- what is in a store


def kept(store: Store) -> dict[Key, bytes]:
    """All values; what is not whole any more is none."""
    keys = [one.key for one in store.scan()]
    pairs = zip(keys, store.get(keys), strict=True)
    return {key: bytes(value) for key, value in pairs if value is not None}


def assert_no_corrupt(store: Store, where: object = "") -> int:
    """Every value is whole and what its key says; returns how many there are."""
    found = kept(store)
    for key, value in found.items():
        try:
            decode_note(value) if is_note(key) else inspect(value, key)
        except CorruptValueError as error:
            raise AssertionError(f"{where}: {error}") from error
    return len(found)


def assert_all_whole(names: Sequence[str], where: object = "") -> int:
    """As `assert_no_corrupt`, of stores by name."""
    found = 0
    for name in names:
        with closing(open_store(name)) as store:
            found += assert_no_corrupt(store, where)
    return found
