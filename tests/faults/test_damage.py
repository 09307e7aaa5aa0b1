"""Damage of every kind to what lies in stores, as real models see it.

A damaged value is found by the request that reads it, which computes instead, and it is written again.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chunkcache.errors import CorruptValueError
from chunkcache.kv import codec
from chunkcache.kv.notes import is_note
from chunkcache.stores import Key, Store
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.open import open_store
from tests.faults.conftest import StartRedis
from tests.faults.world import (
    CHUNK,
    FAULTS,
    KINDS,
    assert_no_corrupt,
    check,
    check_again,
    count,
    kept,
    wrap,
)
from tests.hf.test_zoo import ids

LENGTH = 5 * CHUNK + 4  # tokens of the prompt
WORDS = b"crc format name namespace parent seal start data_offsets dtype shape".split()


class World(NamedTuple):
    """A model over one store with all values of one prompt in it."""

    name: str
    cached: Any
    store: Store
    row: list[int]
    values: dict[Key, bytes]

    def damage(self, key: Key, value: bytes, where: object) -> None:
        """Puts something else in the place of a value; answers are right, and the value comes back."""
        before = count(self.cached, "corrupt")
        self.store.put([(key, value)])
        end = codec.inspect(self.values[key], key).start + CHUNK
        for row in (self.row[: end + 1], self.row):  # the first needs this value before all others
            self.cached.flush()
            check(self.cached, self.name, row, where)
            assert self.cached.settle(60), where
        assert count(self.cached, "corrupt") > before or harmless(key, value), where
        assert_no_corrupt(self.store, where)
        check_again(self.cached, self.name, self.row[: end + 1], self.store.kind, where)
        self.cached.flush()
        check(self.cached, self.name, self.row, where)
        self.cached.settle(60)

    def keys(self) -> list[Key]:
        """Of chunks and states."""
        return [key for key in self.values if not is_note(key)]


def harmless(key: Key, value: bytes) -> bool:
    """Whether a changed value says the same as before."""
    try:
        codec.inspect(value, key)
    except CorruptValueError:
        return False
    return True


@pytest.fixture(params=["disk", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path, start_redis: StartRedis) -> str:
    """The name of an empty store."""
    return f"disk:{tmp_path}/store" if request.param == "disk" else start_redis().url


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, place: str) -> Iterator[World]:
    name = request.param
    row = ids(random.Random(name), LENGTH)
    with wrap(name, place) as cached, closing(open_store(place)) as store:
        assert cached.proof.tier == KINDS[name]
        for end in range(CHUNK, LENGTH, CHUNK):  # so that there is a state behind every chunk
            check(cached, name, row[: end + 1])
        check(cached, name, row)
        assert cached.settle(60)
        yield World(name, cached, store, row, kept(store))


def places(value: bytes) -> Iterator[tuple[str, int]]:
    """Bytes of every region of a value: its length, each fact, both ends of each tensor."""
    size = int.from_bytes(value[:8], "little")
    yield from ((f"length {at}", at) for at in (0, 2, 7))
    for word in WORDS:
        at = value.index(word, 8, 8 + size)
        yield f"name of {word.decode()}", at
        yield f"value of {word.decode()}", at + len(word) + 5
    for name, part in json.loads(value[8 : 8 + size]).items():
        if name != "__metadata__" and part["data_offsets"][0] < part["data_offsets"][1]:
            begin, end = part["data_offsets"]
            yield f"first of {name}", 8 + size + begin
            yield f"last of {name}", 8 + size + end - 1


def test_a_bit_of_any_region_may_flip(world: World) -> None:
    random_ = random.Random(f"flip {world.name}")
    for key in random_.sample(world.keys(), min(len(world.keys()), 2 * FAULTS)):
        for what, at in places(world.values[key]):
            value = bytearray(world.values[key])
            bit = random_.randrange(8)
            value[at] ^= 1 << bit
            world.damage(key, bytes(value), f"{world.name} {key} {what}, bit {bit}")


def test_a_value_may_be_cut_or_grow(world: World) -> None:
    for key in world.keys()[:2]:
        value = world.values[key]
        size = int.from_bytes(value[:8], "little")
        for end in (0, 4, 8, 8 + size // 2, 8 + size, 8 + size + 1, len(value) // 2, -1):
            world.damage(key, value[:end], f"{world.name} {key} cut at {end}")
        for more in (b"\0", value):
            world.damage(key, value + more, f"{world.name} {key} longer")
        world.damage(key, bytes(len(value)), f"{world.name} {key} zeros")


def test_values_may_lie_under_keys_of_others(world: World) -> None:
    keys = world.keys()
    for number, key in enumerate(keys):
        other = keys[(number + 1) % len(keys)]
        world.damage(key, world.values[other], f"{world.name} {other} under {key}")


def test_values_may_be_of_another_format(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in other_format(world, monkeypatch).items():
        world.damage(key, value, f"{world.name} {key} of format 2")


def other_format(world: World, patch: pytest.MonkeyPatch) -> dict[Key, bytes]:
    """The same values as a version would write them that numbers its format otherwise."""
    with patch.context() as patched:
        patched.setattr(codec, "FORMAT", codec.FORMAT + 1)
        world.store.delete(list(world.values))
        world.cached.flush()
        for end in (*range(CHUNK, LENGTH, CHUNK), LENGTH):
            check(world.cached, world.name, world.row[: end + 1])
        world.cached.settle(60)
        found = {key: value for key, value in kept(world.store).items() if not is_note(key)}
        assert found.keys() == set(world.keys())
        assert_no_corrupt(world.store)
    world.store.put(list(world.values.items()))
    return found


@pytest.mark.parametrize("part", [None, 3000], ids=["whole", "in parts"])
def test_what_redis_keeps_around_values_may_be_damaged(
    part: int | None, start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads of values, and their parts."""
    if part is not None:
        monkeypatch.setattr("chunkcache.stores.redis.PART", part)
    server, random_ = start_redis(), random.Random(f"heads {part}")
    client, row = server.client(), ids(random_, LENGTH)
    with wrap("llama", server.url) as cached, closing(open_store(server.url)) as store:
        check(cached, "llama", row)
        cached.settle(60)
        before = kept(store)
        names = [name for name in client.scan_iter("chunkcache:*") if b".model" not in name]
        for name in sorted(names):
            for number, spoil in enumerate(spoilers(random_)):
                where = (name, number)
                client.set(name, spoil(client.get(name)))
                cached.flush()
                check(cached, "llama", row, where)
                cached.settle(60)
                assert_no_corrupt(store, where)
                assert kept(store) == before, where


def spoilers(random_: random.Random) -> list[Callable[[bytes], bytes]]:
    """Ways to damage some bytes."""

    def flip(value: bytes) -> bytes:
        at = random_.randrange(min(24, len(value)))
        return value[:at] + bytes([value[at] ^ 1 << random_.randrange(8)]) + value[at + 1 :]

    return [flip, flip, lambda value: value[: len(value) // 2], lambda value: b""]


@pytest.mark.parametrize("name", KINDS)
def test_bits_of_the_index_may_flip_under_a_model(name: str, tmp_path: Path) -> None:
    """While it runs, and before it starts; values are the truth, and the budget is kept in the end."""
    random_ = random.Random(f"index {name}")
    row, place = ids(random_, LENGTH), f"disk:{tmp_path}/store?budget=400KB"
    for trial in range(6 * FAULTS):
        where = f"{name} trial={trial}"
        with wrap(name, place) as cached:
            for step in range(4):
                flip_index(tmp_path / "store", random_)
                cached.flush()
                other = row[: random_.randrange(len(row))] + ids(random_, 40)
                check(cached, name, random_.choice([row, other]), (where, step))
                assert cached.settle(60), where
        with closing(open_store(place)) as store:
            assert_no_corrupt(store, where)
            assert isinstance(store, DiskStore)
            store.collect()
            assert_index(store, where)


def flip_index(folder: Path, random_: random.Random) -> None:
    """A few bits anywhere in the database, or in what is not in it yet."""
    for path in folder.glob("index.sqlite*"):
        content = bytearray(path.read_bytes())
        for _ in range(random_.randrange(4) if content else 0):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        with open(path, "r+b") as file:  # the same file, as processes have it open
            file.write(content)


def assert_index(store: DiskStore, where: str) -> None:
    """It agrees with the files."""
    files = {one.key: one.bytes for one in store.scan()}
    assert sum(files.values()) <= store.budget, where
    with closing(sqlite3.connect(store.folder / "index.sqlite")) as index:
        known = dict(index.execute("select name, bytes from files").fetchall())
    assert known == {str(key): size for key, size in files.items()}, where
