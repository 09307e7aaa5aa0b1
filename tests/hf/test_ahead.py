"""Work for prompts that wait: never in the way, never lost for good."""

from __future__ import annotations

import threading

from chunkcache.hf.ahead import Ahead


def test_work_that_is_done_at_once_blocks_nobody() -> None:
    """A callback of a future that is done runs in the thread that adds it."""
    ahead = Ahead()
    done: list[int] = []

    def start() -> None:
        for number in range(2000):
            while not ahead.start(lambda number=number: done.append(number)):
                pass

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    last = threading.Event()
    while not ahead.start(last.set):
        pass
    assert last.wait(60) and len(done) == 2000
    ahead.close()


def test_what_fails_harms_nobody() -> None:
    ahead, done = Ahead(), threading.Event()
    ahead.start(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    ahead.start(done.set)
    assert done.wait(60)
    ahead.close()


def test_it_is_bounded_and_ends() -> None:
    ahead, go_on = Ahead(), threading.Event()

    def wait() -> None:
        go_on.wait(60)

    taken = [ahead.start(wait) for _ in range(100)]
    assert taken.count(True) == 64
    closer = threading.Thread(target=ahead.close)
    closer.start()
    go_on.set()
    closer.join(60)
    assert not closer.is_alive() and not ahead.start(lambda: None)
