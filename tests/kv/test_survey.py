"""Surveys of damaged stores against brute force, and sweeps beside writers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkcache.errors import CorruptValueError
from chunkcache.kv import codec
from chunkcache.kv.codec import Identity, decode_chunk, decode_state
from chunkcache.kv.notes import MODEL, decode_note, is_note, model_key, prompt_key
from chunkcache.kv.survey import CORRUPT, FOREIGN, LOST, UNREACHABLE, WHOLE, survey, sweep
from chunkcache.stores import Key, MemoryStore, Store
from chunkcache.stores.base import Stored
from tests.stores.filling import (
    LARGE,
    LAYOUT,
    ONE,
    OTHER,
    about,
    flipped,
    path_of,
    prefix,
    value_of,
)

KINDS = ["memory", "disk", "redis"]
SERVERS = ["redis", "cluster", "sentinel"]


class Prompt(NamedTuple):
    """A prompt whose prefix is written."""

    namespace: bytes
    tokens: list[int]
    name: str | None
    state: bool


PROMPTS = st.builds(
    Prompt,
    st.sampled_from([ONE, OTHER]),
    st.lists(st.integers(0, 4), max_size=6).map(lambda parts: [p for p in parts for _ in range(4)]),
    st.none() | st.sampled_from(["bot", "other"]),
    st.booleans(),
)
DEEDS = st.tuples(st.integers(0, 99), st.sampled_from(["delete", "flip", "cut"]), st.integers(0))


class Oracle:
    """What was written and what became of it; every question is answered by trying."""

    def __init__(self, prompts: list[Prompt]):
        self.there: dict[Key, bytes] = {}
        self.above: dict[Key, list[Key]] = {}  # all that a reader needs first
        self.decode: dict[Key, Callable[[bytes], object]] = {}
        for prompt in prompts:
            self._add(prompt)
        for namespace in {prompt.namespace for prompt in prompts}:
            key, value = about(namespace)
            self._written(key, value, [], decode_note)

    def _add(self, prompt: Prompt) -> None:
        path = path_of(prompt.tokens, prompt.namespace)
        values = dict(prefix(prompt.tokens, prompt.namespace, prompt.name, prompt.state))
        chunks = [one.key for one in path]
        for number, one in enumerate(path):
            self._written(one.key, values[one.key], chunks[:number], chunk_decoder(one))
        for one in path[-1:]:
            state, note = one.snapshot(), prompt_key(one)
            if prompt.state:
                self._written(state.key, values[state.key], chunks, state_decoder(state))
            if prompt.name is not None:
                self._written(note, values[note], chunks, decode_note)

    def _written(
        self, key: Key, value: bytes, above: list[Key], decode: Callable[[bytes], object]
    ) -> None:
        self.there[key], self.above[key], self.decode[key] = value, above, decode

    def do(self, number: int, what: str, where: int) -> None:
        if not self.there:
            return
        key = sorted(self.there)[number % len(self.there)]
        if what == "delete":
            del self.there[key]
        elif not self.there[key]:  # cut to nothing before
            return
        elif what == "flip":
            self.there[key] = flipped(self.there[key], where)
        else:
            self.there[key] = self.there[key][: where % len(self.there[key])]

    def whole(self, key: Key) -> bool:
        try:
            self.decode[key](self.there[key])
        except (KeyError, CorruptValueError):
            return False
        return True

    def state(self, key: Key) -> str:
        if not self.whole(key):
            return CORRUPT
        return WHOLE if all(map(self.whole, self.above[key])) else UNREACHABLE

    def within_reach(self, key: Key) -> bool:
        """Of a damaged value: as far as its name tells."""
        above = self.above[key]
        chunk = "." not in key.name
        return all(map(self.whole, above[:1] if chunk else above))

    def idle(self) -> set[Key]:
        """Notes about models of which there is nothing else."""
        used = {key.group for key in self.there if self.state(key) == WHOLE}
        return {
            model_key(namespace)
            for namespace in (ONE, OTHER)
            if model_key(namespace) in self.there
            and self.whole(model_key(namespace))
            and not any(path_of([part] * 4, namespace)[0].key.group in used for part in range(5))
        }


def chunk_decoder(one: Identity) -> Callable[[bytes], object]:
    return lambda value: decode_chunk(value, one, LAYOUT)


def state_decoder(one: Identity) -> Callable[[bytes], object]:
    return lambda value: decode_state(value, one)


def clear(store: Store) -> None:
    store.delete([one.key for one in store.scan()])


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompts=st.lists(PROMPTS, max_size=5), deeds=st.lists(DEEDS, max_size=5))
def test_a_survey_says_what_brute_force_says(make, kind, prompts, deeds) -> None:
    store = make(kind)
    oracle = Oracle(prompts)
    for deed in deeds:
        oracle.do(*deed)
    store.put(list(oracle.there.items()))
    found = survey(store)
    expected = {key: oracle.state(key) for key in oracle.there}
    assert {key: found.state(key) for key in found.values} == expected
    damaged = {key for key, state in expected.items() if state == CORRUPT}
    assert set(found.damage) == {key for key in damaged if oracle.within_reach(key)}
    assert set(found.idle_notes) == oracle.idle()
    ends = [
        LAYOUT.chunk_size * (1 + len(oracle.above[key]))
        for key, state in expected.items()
        if state == WHOLE and "." not in key.name
    ]
    assert found.longest == max(ends, default=0)
    assert found.bytes_of(found.values) == sum(map(len, oracle.there.values()))

    dry = sweep(store, found, dry=True)
    assert {one.key for one in store.scan()} == oracle.there.keys()
    swept = sweep(store, found)
    assert dry == swept and swept.spared == 0
    states = Counter(expected.values())
    assert (swept.corrupt, swept.unreachable) == (states[CORRUPT], states[UNREACHABLE])
    assert swept.notes == len(oracle.idle())
    left = {one.key for one in store.scan()}
    assert left == {k for k, s in expected.items() if s == WHOLE} - oracle.idle()
    again = survey(store)
    assert len(again.states[WHOLE]) == len(left) and not again.idle_notes
    clear(store)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_value_that_lost_a_part_is_lost(make, kind) -> None:
    store = make(kind)
    values = prefix(range(12), layout=LARGE)
    store.put(values)
    second = values[1][0]
    part = next(iter(store.client.scan_iter(match=f"*:{second.name}:*:1")))
    store.client.delete(part)
    found = survey(store)
    assert [found.state(key) for key, _ in values] == [WHOLE, LOST, UNREACHABLE]
    assert not found.damage
    swept = sweep(store, found)
    assert (swept.lost, swept.unreachable, swept.corrupt) == (1, 1, 0)
    first = values[0][0].name
    left = {name.decode() for name in store.client.scan_iter()}
    assert left and all(first in name.split(":") for name in left)


@pytest.mark.parametrize("kind", SERVERS)
def test_parts_of_no_value_are_collected_once_they_are_old(make, kind) -> None:
    store = make(kind)
    values = prefix(range(8), layout=LARGE)
    store.put(values)
    kept, lost = (key for key, _ in values)
    heads = [name for name in store.client.scan_iter() if name.endswith(lost.name.encode())]
    store.client.delete(*heads)
    assert store.collect() == 0  # they may be of a value that is being written
    for name in list(store.client.scan_iter()):
        content = store.client.dump(name)
        store.client.restore(name, 0, content, replace=True, idletime=1000)
    assert store.collect(dry=True) == store.collect() == 2
    assert store.collect() == 0
    assert store.get([kept, lost]) == [values[0][1], None]


def test_a_server_that_counts_uses_keeps_its_parts(make) -> None:
    store = make("redis")
    store.put(prefix(range(4), layout=LARGE))
    (head,) = [name for name in store.client.scan_iter() if name.count(b":") == 2]
    store.client.delete(head)
    try:
        store.client.config_set("maxmemory-policy", "allkeys-lfu")
        assert store.stats().policy == "allkeys-lfu"
        assert store.collect() == 0
    finally:
        store.client.config_set("maxmemory-policy", "noeviction")


# -- beside others


class Busy(MemoryStore):
    """Misses values in scans, and lets something happen before it is read."""

    def __init__(self) -> None:
        super().__init__(2**30)
        self.missed: set[Key] = set()
        self.meanwhile: Callable[[], Any] = lambda: None

    def scan(self) -> Iterator[Stored]:
        yield from [one for one in super().scan() if one.key not in self.missed]

    def peek(self, keys):
        happens, self.meanwhile = self.meanwhile, lambda: None
        happens()
        return super().peek(keys)


def test_what_a_scan_missed_is_asked_for() -> None:
    store, values = Busy(), prefix(range(40), state=True)
    store.put(values)
    store.missed = {key for key, _ in values[:-1]}
    found = survey(store)
    assert set(found.states[WHOLE]) == {key for key, _ in values}
    assert not any(sweep(store, found).to_dict().values())
    assert all(store.exists([key for key, _ in values]))


def test_what_left_meanwhile_is_not_lost() -> None:
    store, values = Busy(), prefix(range(40))
    store.put(values)
    store.meanwhile = lambda: store.delete([key for key, _ in values[5:]])
    found = survey(store)
    assert found.values.keys() == {key for key, _ in values[:5]}
    assert len(found.states[WHOLE]) == 5


def test_what_was_written_anew_meanwhile_is_kept() -> None:
    store, values = MemoryStore(2**30), prefix(range(40), name="bot", state=True)
    store.put(values)
    third, fourth = values[2], values[3]
    store.put([(third[0], flipped(third[1], 99)), (fourth[0], flipped(fourth[1], 99))])
    found = survey(store)
    assert set(found.damage) == {third[0], fourth[0]}
    store.put([third])
    swept = sweep(store, found)
    assert (swept.corrupt, swept.unreachable, swept.spared) == (1, 8, 1)
    store.put(values[3:])
    store.put([(third[0], flipped(third[1], 99))])
    found = survey(store)
    store.put([third])
    assert sweep(store, found).spared == 10
    assert len(survey(store).states[WHOLE]) == len(values)


def test_notes_stay_while_somebody_writes() -> None:
    store = MemoryStore(2**30)
    store.put([about(ONE), about(OTHER), *prefix(range(8), ONE)])
    found = survey(store)
    assert found.idle_notes == [model_key(OTHER)]
    store.put(prefix(range(8), OTHER))
    assert sweep(store, found).notes == 0
    assert sweep(store, survey(store)).notes == 0
    store.delete([key for key, _ in prefix(range(8), OTHER)])
    assert sweep(store, survey(store)).notes == 1
    assert {one.key for one in store.scan() if one.key.name.endswith(MODEL)} == {model_key(ONE)}


@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_take_nothing_from_a_writer(make, kind) -> None:
    """It writes parents first, some values in parts, and never damages one."""
    store, done = make(kind), threading.Event()
    written: list[tuple[Key, bytes]] = []

    def write() -> None:
        try:
            for number in range(60):
                layout = LARGE if number % 20 == 0 else LAYOUT
                values = prefix([*range(number % 3, 8), *[number] * 12], state=True, layout=layout)
                for value in values:
                    store.put([value])
                written.extend(values)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    rounds = 0
    while not done.is_set() or rounds < 2:
        swept = sweep(store, survey(store))
        assert (swept.corrupt, swept.lost, swept.unreachable, swept.leftovers) == (0, 0, 0, 0)
        rounds += 1
    writer.join()
    assert all(store.exists([key for key, _ in written]))


def test_a_long_path_is_followed() -> None:
    """Without recursion."""
    store, path = MemoryStore(2**30), path_of(range(12_000))
    store.put([(one.key, value_of(one)) for one in path])
    assert survey(store).longest == 12_000
    store.delete([path[0].key])
    found = survey(store)
    assert len(found.states[UNREACHABLE]) == len(path) - 1
    assert set(found.broken.values()) == {path[0].key}


def test_values_of_another_version_are_left_alone(monkeypatch) -> None:
    """An old `gc` on a store that a newer version uses too."""
    store = MemoryStore(2**20)
    monkeypatch.setattr(codec, "FORMAT", codec.FORMAT + 1)
    values = dict(prefix(list(range(16)), ONE, "bot", True))
    store.put(list(values.items()))
    monkeypatch.undo()
    store.put([about(ONE)])
    found = survey(store)
    foreign = {key for key in values if not is_note(key)}
    assert set(found.states[FOREIGN]) == foreign and not found.damage
    swept = sweep(store, found)
    assert swept.to_dict() == dict.fromkeys(swept.to_dict(), 0)
    assert {one.key for one in store.scan()} == {*values, about(ONE)[0]}
    store.close()
