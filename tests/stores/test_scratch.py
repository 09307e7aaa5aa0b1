"""Memory that is used again, and by one at a time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.stores.scratch import _KEPT, Scratch

SIZES = st.one_of(st.integers(0, 300), st.integers(0, 3 * 2**20))
STEPS = st.lists(st.tuples(st.sampled_from(["take", "give", "again", "lose"]), SIZES), max_size=40)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_nobody_gets_what_another_has(steps: list[tuple[str, int]]) -> None:
    scratch, held = Scratch(), list[tuple[memoryview, int]]()
    for number, (what, size) in enumerate(steps):
        if what == "take":
            view = scratch.take(size)
            assert len(view) == size
            view[:] = bytes([number]) * size
            held.append((view, number))
        elif held:
            view, written = held.pop(size % len(held))
            assert bytes(view) == bytes([written]) * len(view)
            if what != "lose":
                scratch.give([view, view] if what == "again" else [view])
                assert scratch._bytes == sum(piece.nbytes for piece in scratch._free) <= _KEPT
    for view, written in held:
        assert bytes(view) == bytes([written]) * len(view)


def test_memory_is_used_again_and_only_its_own() -> None:
    scratch = Scratch()
    first = scratch.take(100_000)
    scratch.give([first, b"bytes", bytearray(9), memoryview(bytearray(70_000))])
    again = scratch.take(99_990)
    assert again.obj is first.obj
    assert scratch.take(99_990).obj is not first.obj
    scratch.give([again])
    assert scratch.take(10).obj is not first.obj, "far too large for that"
