"""A store that hangs, fails or comes back: nobody waits longer than said, and it is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores import Key, MemoryStore
from chunkcache.stores.guard import Guard
from tests.stores.servers import wait_for

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


def test_calls_wait_for_a_thread_that_is_busy() -> None:
    """More calls at once than threads: none of them failed."""
    store = Moody()
    store.mood = lambda: time.sleep(0.05)
    guard = Guard(store, timeout=30)
    with ThreadPoolExecutor(16) as callers:
        found = list(callers.map(lambda number: guard.get([ONE]), range(32)))
    assert found == [[None]] * 32 and guard.counts == {"calls": 32}
    guard.close()


def test_calls_that_fail_together_are_one_failure(world: World) -> None:
    slow = Guard(world.store, 0.2, lambda: world.now)
    world.store.mood = world.go_on.wait
    with ThreadPoolExecutor(4) as callers:
        for call in [callers.submit(slow.get, [ONE]) for _ in range(4)]:
            with pytest.raises(StoreDownError):
                call.result()
    assert slow.counts["opened"] == 1
    world.go_on.set()
    world.store.mood = lambda: None
    wait_for(lambda: not slow._hung, "the end of what hung")
    world.now += 1.01
    assert slow.get([ONE]) == [b"1"], "the pause is that of a first failure"
    slow.close()


def test_a_read_that_nobody_waits_for_harms_nobody(world: World) -> None:
    for _ in range(20):
        world.guard.begin([ONE], list)
    assert world.guard.get([ONE]) == [b"1"]
    world.fails(down)
    world.now += 2
    world.store.mood = world.go_on.wait
    world.guard.begin([ONE], list)  # the trial, which hangs
    time.sleep(0.2)
    with pytest.raises(StoreDownError):  # it is noticed now that the trial has failed
        world.guard.get([ONE])
    world.now += 60
    world.store.mood = lambda: None
    assert world.guard.get([ONE]) == [b"1"], "another one may try"


def test_what_is_given_less_time_did_not_fail(world: World) -> None:
    """The caller's patience has ended, not the store's time."""
    slow = Guard(world.store, 30.0)
    world.store.mood = lambda: time.sleep(0.1)
    wait = slow.begin([ONE], list, within=0.01)
    with pytest.raises(StoreDownError, match="longer"):
        wait()
    assert slow.get([ONE]) == [b"1"] and slow.counts["failures"] == 0
    slow.close()


@pytest.mark.parametrize("error", [MemoryError, OSError("x"), KeyError("x"), TimeoutError])
def test_whatever_a_store_raises_is_said_as_an_error_of_stores(world: World, error) -> None:
    def bad() -> None:
        raise error

    world.store.mood = bad
    with pytest.raises(StoreDownError):
        world.guard.get([ONE])
    assert world.guard.open
    world.now += 2
    with pytest.raises(StoreDownError):
        world.guard.begin([ONE], lambda values: 1 / 0)()


def test_closing_is_bounded_and_final() -> None:
    store, go_on = Moody(), threading.Event()
    store.close = lambda: go_on.wait(30)
    guard = Guard(store, timeout=0.1)
    guard.get([ONE])
    begin = time.monotonic()
    guard.close()
    guard.close()
    assert time.monotonic() - begin < 10
    with pytest.raises(StoreDownError):
        guard.get([ONE])
    go_on.set()
