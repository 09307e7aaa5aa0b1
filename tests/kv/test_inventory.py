"""What a store says of itself without reading everything, and looking that leaves no trace."""

from __future__ import annotations

import os

import pytest

from chunkcache.errors import ConfigError
from chunkcache.kv import selection
from chunkcache.kv.codec import encode_chunk, identities
from chunkcache.kv.inventory import Prompt, batches, take_inventory
from chunkcache.kv.notes import encode_note, model_key, prompt_key
from chunkcache.kv.survey import survey
from chunkcache.kv.totals import spaces, totals
from chunkcache.stores import Key, MemoryStore, Store
from chunkcache.stores.base import Stored
from chunkcache.tree import pack
from tests.stores.filling import LAYOUT, ONE, OTHER, about, flipped, path_of, prefix
from tests.stores.kinds import KINDS


def fill(store: Store) -> None:
    """Two families of one model, the second used last, and one of a model without a note."""
    store.put([about(ONE), *prefix([1] * 8 + [2] * 8, name="old", state=True)])
    store.put(prefix([1] * 8 + [3] * 4, name="new"))
    store.put(prefix([9] * 20, OTHER))
    store.put(prefix([5] * 12))


@pytest.mark.parametrize("kind", KINDS)
def test_families_and_sums(make, kind) -> None:
    store = make(kind)
    fill(store)
    found = take_inventory(store)
    one, two = path_of([1] * 4)[0].key.group, path_of([5] * 4)[0].key.group
    rows = {family.group: family for family in found.families}
    assert rows.keys() == {one, two, path_of([9] * 4, OTHER)[0].key.group}
    assert rows[one].prompts == [Prompt("new", 12), Prompt("old", 16)]
    assert (rows[one].chunks, rows[one].tokens, rows[one].snapshots) == (5, 20, 1)
    assert rows[one].model == "llama" and rows[one].namespace == ONE.hex()
    assert (rows[two].chunks, rows[two].prompts) == (3, [])
    if kind in ("memory", "disk"):
        assert found.families[0].group == two
    held = sum(one.bytes for one in store.scan())
    assert sum(row.bytes for row in found.families) + len(about(ONE)[1]) == held

    sums = totals(found, store.stats(), None)
    assert (sums["values"], sums["bytes"], sums["families"]) == (17, held, 3)
    assert (sums["chunks"], sums["snapshots"], sums["notes"], sums["tokens"]) == (13, 1, 3, 52)
    assert ("server" in sums) == (store.kind == "redis")
    by_name = {space.namespace: space for space in spaces(found)}
    known, unknown = by_name[ONE.hex()], by_name[OTHER.hex()]
    assert (known.model, known.dtype, known.token_bytes, known.tokens) == (
        "llama",
        "float32",
        48,
        32,
    )
    assert (unknown.model, unknown.token_bytes, unknown.tokens) == (None, None, 20)
    assert known.stored_token_bytes == known.chunk_bytes / 32 > 48


def test_what_the_server_says(make) -> None:
    store = make("redis")
    fill(store)
    server = totals(take_inventory(store), store.stats(), None)["server"]
    assert server["policy"] == "noeviction" and server["maxmemory"] is None
    assert server["used_memory"] > 0


def test_a_first_chunk_that_cannot_be_read_hides_the_namespace() -> None:
    store, values = MemoryStore(2**30), prefix([1] * 16, name="bot")
    store.put([about(ONE), (values[0][0], flipped(values[0][1], 99)), *values[1:]])
    for _ in range(2):
        (family,) = take_inventory(store).families
        assert (family.namespace, family.model, family.tokens) == ("", None, 0)
        assert family.prompts == [Prompt("bot", 16)]
        (space,) = spaces(take_inventory(store))
        assert space.stored_token_bytes is None
        store.delete([values[0][0]])


@pytest.mark.parametrize(
    "facts", [{}, {"model": 3, "token_bytes": "many", "dtype": None}, {"name": 5, "tokens": "x"}]
)
def test_notes_may_say_anything(facts: dict[str, object]) -> None:
    store, values = MemoryStore(2**30), prefix([1] * 8)
    last = path_of([1] * 8)[-1]
    notes = [(model_key(ONE), encode_note(facts)), (prompt_key(last), encode_note(facts))]
    store.put([*values, *notes, (Key("abc", "abcd.model"), b"nonsense")])
    found = take_inventory(store)
    (family,) = found.families
    assert (family.model, family.prompts) == (None, [])
    assert spaces(found)[0].token_bytes is None
    with pytest.raises(ConfigError, match="no note"):
        selection.model(found, "llama")


def test_an_empty_store() -> None:
    store = MemoryStore(2**30)
    found = take_inventory(store)
    assert found.families == [] and spaces(found) == []
    assert totals(found, store.stats(), 5)["budget"] == 5
    assert survey(store).to_dict()["values"] == 0


# -- selections


def test_values_by_prefix() -> None:
    store = MemoryStore(2**30)
    fill(store)
    found = take_inventory(store)
    group = path_of([1] * 4)[0].key.group
    keys = selection.family(found, group[:9].upper())
    assert set(keys) == {key for key in found.values if key.group == group}
    assert keys[-1] == Key(group, group)
    with pytest.raises(ConfigError, match="more than one prefix"):
        selection.family(found, "")
    with pytest.raises(ConfigError, match="no prefix in the store begins with '012345678'"):
        selection.family(found, "012345678")


def test_values_by_namespace_and_model() -> None:
    store = MemoryStore(2**30)
    fill(store)
    found = take_inventory(store)
    groups = {path_of([1] * 4)[0].key.group, path_of([5] * 4)[0].key.group}
    wanted = {key for key in found.values if key.group in groups} | {model_key(ONE)}
    assert set(selection.space(found, ONE.hex()[:6])) == wanted
    assert set(selection.space(found, ONE.hex())) == wanted
    keys = selection.model(found, "llama")
    assert set(keys) == wanted and keys[-1] == model_key(ONE)
    others = selection.space(found, OTHER.hex()[:2])
    chunks = [key for key, _ in prefix([9] * 20, OTHER)]
    assert set(others) == set(chunks) and others[-1] == chunks[0]
    for what, name in ((selection.space, "00"), (selection.model, "gpt")):
        with pytest.raises(ConfigError, match="in the store"):
            what(found, name)


def test_a_model_that_has_only_a_note() -> None:
    store = MemoryStore(2**30)
    store.put([about(ONE)])
    found = take_inventory(store)
    assert selection.space(found, ONE.hex()[:2]) == [model_key(ONE)]
    assert selection.model(found, "llama") == [model_key(ONE)]


# -- looking


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_looking_is_no_use(make, kind) -> None:
    store = make(kind)
    fill(store)
    before = {one.key: one.used for one in store.scan()}
    survey(store)
    take_inventory(store)
    assert {one.key: one.used for one in store.scan()} == before
    assert (store.stats().hits, store.stats().misses) == (0, 0)


def test_looking_prolongs_no_life(make) -> None:
    store = make("redis", ttl=1000)
    fill(store)
    names = list(store.client.scan_iter())
    for name in names:
        store.client.expire(name, 100)
    survey(store)
    take_inventory(store)
    assert all(0 < store.client.ttl(name) <= 100 for name in names)


def test_expired_values_are_seen_and_left_alone(make, tmp_path) -> None:
    store = make("disk", ttl=1000)
    values = prefix([1] * 8)
    store.put(values)
    for path in (tmp_path / "store").glob("values/*/*"):
        os.utime(path, (1, 1))
    assert store.peek([values[0][0]]) == [None]
    assert store.collect(dry=True) == 2 and len(list(store.scan())) == 2
    assert len(survey(store).states["lost"]) == 2
    assert store.collect() == 2 and not list(store.scan())


def test_memory_is_bounded() -> None:
    def sizes(bytes_: list[int]) -> list[int]:
        values = [Stored(Key("ab", f"{n:04x}"), size, None) for n, size in enumerate(bytes_)]
        return [len(batch) for batch in batches(values)]

    assert sizes([]) == [] and sizes([1] * 40) == [16, 16, 8]
    assert sizes([2**40] * 3) == [1, 1, 1] and sizes([1, 2**26, 1]) == [1, 1, 1]


def test_a_chunk_under_another_first_chunk_is_out_of_reach() -> None:
    """Though whole, and what it says it is."""
    store = MemoryStore(2**30)
    ids = identities(ONE, pack([1] * 8), 4)
    moved = ids[1]._replace(key=Key("ab", ids[1].key.name))
    store.put([(moved.key, encode_chunk(moved, LAYOUT.allocate(1), LAYOUT))])
    assert survey(store).states["unreachable"] == [moved.key]
