"""What every store does alike."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkcache.errors import ConfigError
from chunkcache.stores import Key
from chunkcache.stores.redis import PART, RedisStore

KEYS = [
    Key(f"{group:032x}", f"{name:032x}{kind}")
    for group in (1, 2)
    for name in (7, 8)
    for kind in ("", ".state")
]
SIZES = [0, 1, 100, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 5]
VALUES = st.tuples(st.sampled_from(SIZES), st.integers(0, 255)).map(lambda v: bytes([v[1]]) * v[0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4)),
        st.tuples(
            st.sampled_from(["get", "get for a while", "exists", "delete"]),
            st.lists(st.sampled_from(KEYS), unique=True),
        ),
    ),
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_a_store_is_a_dictionary(store, steps) -> None:
    """What was given out stays what it is until it is given back."""
    store.delete(KEYS)
    oracle: dict[Key, bytes] = {}
    out = []
    for what, given_ in steps:
        if what == "put":
            assert store.put(given_) == len(given_)
            oracle |= dict(given_)
        elif what.startswith("get"):
            values = store.get(given_)
            found = [None if one is None else bytes(one) for one in values]
            assert found == [oracle.get(key) for key in given_]
            if what == "get":
                out += [pair for pair in zip(values, found, strict=True) if pair[1] is not None]
            else:
                store.recycle([one for one in values if one is not None])
        elif what == "exists":
            assert store.exists(given_) == [key in oracle for key in given_]
        else:
            assert store.delete(given_) == len(oracle.keys() & set(given_))
            oracle = {key: value for key, value in oracle.items() if key not in given_}
    assert {one.key: one.bytes for one in store.scan()} == {k: len(v) for k, v in oracle.items()}
    assert all(bytes(value) == copy for value, copy in out)


def test_statistics_add_up(store) -> None:
    store.delete(KEYS)
    store.put([(KEYS[0], b"abc"), (KEYS[1], b"d" * (PART + 1))])
    store.get(KEYS[:3])
    found = store.stats()
    assert (found.hits, found.misses, found.written) == (2, 1, 2)
    assert found.bytes is not None and found.bytes >= PART + 4
    assert found.to_dict()["kind"] == store.kind


def test_looking_is_not_counted(store) -> None:
    store.delete(KEYS)
    store.put([(KEYS[0], b"abc"), (KEYS[1], b"d" * (PART + 1))])
    found = [None if one is None else bytes(one) for one in store.peek(KEYS[:3])]
    assert found == [b"abc", b"d" * (PART + 1), None]
    assert (store.stats().hits, store.stats().misses) == (0, 0)
    assert store.collect(dry=True) == store.collect() == 0
    assert store.exists(KEYS[:3]) == [True, True, False]


def test_threads_use_one_store(store) -> None:
    store.delete(KEYS)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        key, value = Key("f" * 32, f"{number:032x}"), os.urandom(1000 + PART * (number % 2))
        try:
            for _ in range(10):
                store.put([(key, value)])
                assert bytes(store.get([key])[0] or b"") == value
                assert store.exists([key]) == [True]
            assert store.delete([key]) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("kind", ["disk", "redis", "cluster", "sentinel"])
def test_values_outlive_who_wrote_them(make, kind) -> None:
    first = make(kind)
    first.put([(KEYS[0], b"x" * (PART + 9))])
    first.close()
    again = make(kind)
    assert bytes(again.get([KEYS[0]])[0] or b"") == b"x" * (PART + 9)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_used_longest_ago_leaves_first(make, kind) -> None:
    store = make(kind, budget=1000)
    store.put([(KEYS[0], b"a" * 400), (KEYS[1], b"b" * 400)])
    assert store.exists([KEYS[0]]) == [True]
    store.put([(KEYS[2], b"c" * 400)])
    assert store.exists(KEYS[:3]) == [True, False, True]
    assert store.put([(KEYS[3], b"d" * 1001)]) == 0
    assert store.exists(KEYS[:3]) == [True, False, True]
    found = store.stats()
    assert (found.values, found.bytes, found.evicted, found.refused) == (2, 800, 1, 1)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_of_one_prompt_the_end_leaves_first(make, kind) -> None:
    store = make(kind, budget=1000)
    store.put([(key, b"a" * 300) for key in KEYS[:3]])
    store.get(KEYS[:3])
    store.put([(KEYS[3], b"b" * 300)])
    assert store.exists(KEYS[:4]) == [True, True, False, True]


@pytest.mark.parametrize("kind", ["disk", "redis", "cluster"])
def test_values_expire_after_their_last_use(make, kind) -> None:
    store = make(kind, ttl=1.0)
    store.put([(KEYS[0], b"kept"), (KEYS[1], b"left"), (KEYS[2], b"p" * (PART + 1))])
    import time

    for _ in range(4):
        time.sleep(0.4)
        assert store.get([KEYS[0], KEYS[2]]) == [b"kept", b"p" * (PART + 1)]
    assert store.get([KEYS[1]]) == [None] and store.exists([KEYS[1]]) == [False]


@pytest.mark.parametrize("kind", ["redis", "cluster"])
def test_a_value_that_lost_a_part_is_forgotten(make, kind) -> None:
    """Else nobody would write it again."""
    store = make(kind)
    store.put([(KEYS[0], b"x" * (PART + 9)), (KEYS[1], b"whole")])
    (part,) = store.client.scan_iter("chunkcache:*:1")
    store.client.delete(part)
    assert store.exists(KEYS[:2]) == [True, True]
    assert store.get(KEYS[:2]) == [None, b"whole"]
    assert store.exists(KEYS[:2]) == [False, True]


@pytest.mark.parametrize(
    "url",
    [
        "http://x",
        "redis+cluster://",
        "redis+sentinel://a:1",
        "redis+other://a",
        "redis://a:b",
        "nonsense",
    ],
)
def test_other_urls_are_refused(url) -> None:
    with pytest.raises(ConfigError, match="no URL of Redis"):
        RedisStore.open(url)


def test_keys_are_what_they_seem() -> None:
    for key in KEYS:
        assert Key.parse(str(key)) == key
    for text in ("", "a", "a.", ".b", "a/b.c", "a.BB", "../x", "a...", "a.bb.C"):
        with pytest.raises(ValueError, match="not the name"):
            Key.parse(text)
