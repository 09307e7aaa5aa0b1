"""A store that hangs, fails or comes back: nobody waits longer than said, and it is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores import Key, MemoryStore
from chunkcache.stores.guard import Guard

ONE = Key("ab", "cd")


class Moody(MemoryStore):
    """Does what `mood` says before it answers."""

    def __init__(self) -> None:
        super().__init__(1000)
        self.mood = lambda: None
        self.asked = 0

    def get(self, keys):
        self.asked += 1
        self.mood()
        return super().get(keys)


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.store = Moody()
        self.guard = Guard(self.store, timeout=0.1, clock=lambda: self.now)
        self.go_on = threading.Event()
        self.guard.put([(ONE, b"1")])

    def fails(self, mood) -> None:
        self.store.mood = mood
        with pytest.raises(StoreDownError):
            self.guard.get([ONE])


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.go_on.set()
    world.guard.close()


def down() -> None:
    raise StoreDownError("no route")


def test_calls_go_through(world: World) -> None:
    assert world.guard.get([ONE]) == [b"1"] and world.guard.exists([ONE]) == [True]
    assert world.guard.delete([ONE]) == 1 and world.guard.kind == "memory"
    assert not world.guard.open and world.guard.counts == {"calls": 4}


def test_a_store_that_hangs_costs_its_time_out_once(world: World) -> None:
    begin = time.monotonic()
    world.fails(world.go_on.wait)
    assert 0.1 <= time.monotonic() - begin < 5
    for _ in range(100):
        world.fails(world.go_on.wait)  # at once: nothing is asked
    assert world.store.asked == 1 and world.guard.open
    assert world.guard.counts["timeouts"] == 1 and world.guard.counts["skipped"] == 100


def test_it_is_tried_again_later_and_later(world: World) -> None:
    world.fails(down)
    for pause in (1, 2, 4, 8, 16, 30, 30):
        world.now += pause - 0.01
        asked = world.store.asked
        world.fails(down)
        assert world.store.asked == asked
        world.now += 0.02
        world.fails(down)
        assert world.store.asked == asked + 1
    world.now += 31
    world.store.mood = lambda: None
    assert world.guard.get([ONE]) == [b"1"] and not world.guard.open
    world.fails(down)
    world.now += 1.01  # the pause is short again
    world.store.mood = lambda: None
    assert world.guard.get([ONE]) == [b"1"]
    assert world.guard.counts["opened"] == 2


def test_only_one_call_tries_a_store_that_failed(world: World) -> None:
    world.fails(down)
    world.now += 2
    world.store.mood = lambda: world.go_on.wait(5)
    slow = Guard(world.store, 5.0, lambda: world.now)
    slow._failed, slow._closed_from = True, 0.0
    answers: list[object] = []
    trial = threading.Thread(target=lambda: answers.append(slow.get([ONE])))
    asked = world.store.asked
    trial.start()
    while world.store.asked == asked:
        time.sleep(0.001)
    with pytest.raises(StoreDownError, match="left alone"):
        slow.get([ONE])
    world.go_on.set()
    trial.join()
    assert answers == [[b"1"]] and slow.get([ONE]) == [b"1"]
    slow.close()


def test_a_full_store_is_not_a_broken_one(world: World) -> None:
    def full() -> None:
        raise StoreFullError("no room")

    world.store.mood = full
    for _ in range(3):
        with pytest.raises(StoreFullError):
            world.guard.get([ONE])
    assert not world.guard.open and world.store.asked == 3


def test_threads_that_hang_are_bounded(world: World) -> None:
    """Each trial may hang in a thread of its own; with none left, calls fail at once."""
    before = threading.active_count()
    for _ in range(10):
        world.fails(world.go_on.wait)
        world.now += 60
    assert world.store.asked <= 4 and threading.active_count() - before <= 4
    world.go_on.set()
    time.sleep(0.2)
    world.now += 60
    world.store.mood = lambda: None
    assert world.guard.get([ONE]) == [b"1"]
