"""Pins, names, time to live, and why things are missing."""

from __future__ import annotations

import pytest

from chunkcache.tree import Miss

from .test_edges import PROMPT, SIZE, World

OTHER = (*PROMPT[:8], *range(8))


@pytest.fixture
def world():
    world = World()
    yield world
    world.tree.check()


def test_pins_survive_splits_and_protect_the_path(world) -> None:
    world.insert(PROMPT, pin=True, name="bot")
    world.insert(OTHER)
    assert world.tree.pinned_chunks == 4 and world.tree.evict(100) == 2
    assert world.tree.names["bot"].start == 8
    assert world.tree.unpin("bot") and not world.tree.unpin("bot")
    assert "bot" in world.tree.names, "the name stays as a label"
    assert world.tree.evict(100) == 4 and not world.tree.names


def test_a_pin_on_a_head_leaves_the_tail_evictable(world) -> None:
    world.insert(PROMPT)
    assert world.tree.pin(PROMPT[:9]) == 8
    assert world.tree.evict(100) == 2
    assert not world.tree.unpin(PROMPT[:4]) and world.tree.unpin(PROMPT[:8])
    assert world.tree.evict(100) == 2


def test_pins_with_different_names_add_up(world) -> None:
    world.insert(PROMPT)
    for name in ("a", "b", None, "a"):
        world.tree.pin(PROMPT, name)
    assert world.tree.unpin("a") and world.tree.evictable_chunks == 0
    assert world.tree.unpin(PROMPT) and world.tree.evictable_chunks == 4


def test_a_pin_with_a_ttl_ends_by_itself(world) -> None:
    world.insert(PROMPT)
    world.tree.pin(PROMPT, ttl=10)
    world.now = 9.9
    assert world.tree.evict(1) == 0
    world.now = 10.0
    assert world.tree.evict(1) == 1 and world.tree.match(PROMPT).tokens == 12


def test_a_pin_keeps_from_expiring(world) -> None:
    world.insert(PROMPT, ttl=5)
    world.tree.pin(PROMPT[:8])
    world.now = 6.0
    assert world.tree.match(PROMPT).tokens == 8
    assert world.tree.expire() == 2 and world.tree.match(PROMPT).reason is Miss.EXPIRED


def test_pinned_insert_with_a_ttl_leaves_when_it_ends(world) -> None:
    world.insert(PROMPT, ttl=5, pin=True)
    world.now = 5.0
    assert world.tree.expire() == 4 and world.tree.pinned_chunks == 0


def test_a_name_moves(world) -> None:
    world.insert(PROMPT, name="x", pin=True)
    world.insert(OTHER, name="x")
    assert world.tree.names["x"].prefix.tolist() == list(OTHER)
    assert world.tree.pinned_chunks == 0, "the pin of that name went with it"


def test_lookups_never_return_expired_nodes(world) -> None:
    world.insert(PROMPT[:8])
    world.insert(PROMPT, ttl=5)
    world.now = 5.0
    found = world.tree.match(PROMPT)
    assert (found.tokens, found.reason) == (8, Miss.EXPIRED)
    assert world.tree.match((*PROMPT[:10], 1, 1)).tokens == 8, "not part of its chunk either"
    assert world.tree.chunks == 4
    assert world.tree.lease(PROMPT).tokens == 8 and world.tree.chunks == 2


def test_expired_neighbours_are_passed_over(world) -> None:
    for last, ttl in ((10, None), (20, 1), (21, 1), (30, 1), (90, None)):
        world.insert((1, 2, 3, last), ttl=ttl)
    world.now = 2.0
    assert world.tree.match((1, 2, 3, 20)).tokens == 3
    assert world.tree.match((1, 2, 3, 20)).reason is Miss.EXPIRED


def test_a_leased_expired_node_leaves_with_its_last_lease(world) -> None:
    world.insert(PROMPT, ttl=5)
    first, second = world.tree.lease(PROMPT), world.tree.lease(PROMPT)
    world.now = 6.0
    assert world.tree.expire() == 0 and world.tree.match(PROMPT).tokens == 0
    world.insert(OTHER)  # splits it: the head is alive again, its tail is not
    assert world.tree.match(PROMPT).tokens == 8
    world.tree.check()
    first.release()
    assert world.tree.chunks == 6
    second.release()
    assert world.tree.chunks == 4 and world.left == [PROMPT[8:12], PROMPT[12:16]]


def test_inserting_again_extends_life_but_never_shortens_it(world) -> None:
    world.insert(PROMPT, ttl=5)
    world.insert(PROMPT, ttl=3)
    world.insert(PROMPT[:8], ttl=9)
    assert [n.expires for n in world.tree] == [9.0, 5.0]
    world.insert(PROMPT)
    world.now = 100.0
    assert world.tree.match(PROMPT).tokens == 16


def test_ghosts_explain_until_the_chunk_is_back(world) -> None:
    world.insert(PROMPT)
    world.insert(OTHER)
    world.tree.lease(PROMPT).release()
    assert world.tree.evict(1) == 1 and world.tree.match(OTHER).reason is Miss.EVICTED
    assert world.tree.match((*OTHER[:12], 9, 9, 9, 9)).reason is Miss.NEVER_SEEN
    world.insert(OTHER)
    assert world.tree.match(OTHER).reason is Miss.NONE
    assert len(world.tree._structure.ghosts) == 0


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_ghosts_are_bounded(bound) -> None:
    world = World(ghosts=bound)
    for first in range(8):
        world.insert((first,) * SIZE)
    world.tree.evict(8)
    world.tree.check()
    reasons = [world.tree.match((first,) * SIZE).reason for first in range(8)]
    assert reasons == [Miss.NEVER_SEEN] * (8 - bound) + [Miss.EVICTED] * bound


def test_too_short_counts_from_the_last_chunk_border(world) -> None:
    world.insert(PROMPT)
    assert world.tree.match((*PROMPT[:8], 1, 2)).reason is Miss.TOO_SHORT
    assert world.tree.match((*PROMPT[:10], 1)).reason is Miss.TOO_SHORT
    assert world.tree.match((*PROMPT[:10], 1, 2)).reason is Miss.NEVER_SEEN


def test_clear_ends_pins_and_spares_leases(world) -> None:
    world.insert(PROMPT, pin=True, name="x")
    world.insert(OTHER, pin=True)
    lease = world.tree.lease(PROMPT[:8])
    assert world.tree.clear() == 4 and world.tree.chunks == 2
    assert world.tree.pinned_chunks == 0 and not world.tree.names
    lease.release()
    assert world.tree.clear() == 2
