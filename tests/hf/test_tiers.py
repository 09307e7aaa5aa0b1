"""Prefixes in colder tiers: found after a restart, to the bit, and never instead of a right answer."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import chunkcache
from chunkcache.errors import ConfigError, StoreDownError
from chunkcache.kv.notes import decode_note
from chunkcache.stores.open import open_store
from tests.hf.test_zoo import ask, ids, same_bits
from tests.stores.servers import Server, wait_for
from tests.zoo import zoo_model

CHUNK = 16
KINDS = {  # a model of each tier
    "llama": "A",
    "minicpm3": "A",
    "gemma3_text": "A",
    "granitemoehybrid": "B",
    "qwen3_next": "B",
    "bloom": "C",
    "mamba2": "D",
    "rwkv": "D",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


def wrap(model: Any, *stores: str, **settings: Any) -> Any:
    return chunkcache.wrap(
        model, config=chunkcache.Config(chunk_size=CHUNK, stores=stores, **settings)
    )


def prompts(name: str) -> tuple[list[int], list[int]]:
    """One, and another that shares 64 tokens with it."""
    random_ = random.Random(name)
    shared = ids(random_, 64)
    return shared + ids(random_, 20), shared + ids(random_, 9)


def settle(cached: Any) -> None:
    tiers = cached._state._servings.tiers
    assert tiers is not None and tiers.flush(10)


@pytest.mark.parametrize("name", KINDS)
def test_a_restart_is_warm(name: str, tmp_path: Path) -> None:
    first, second = prompts(name)
    disk = f"disk:{tmp_path}/store"
    with wrap(zoo_model(name), disk) as before:
        assert before.proof.tier == KINDS[name]
        ask(before, [first])
    with wrap(zoo_model(name), disk) as after, wrap(zoo_model(name)) as cold:
        hit = ask(after, [second])
        (reuse,) = after.last_reuse
        assert reuse.tiers == {"disk": reuse.cached_tokens} and reuse.cached_tokens >= 3 * CHUNK
        assert same_bits(hit, ask(cold, [second]))
        again = ask(after, [second])
        assert set(after.last_reuse[0].tiers) == {"device"}
        assert same_bits(again, hit)
        after.store.check()


def test_two_wrappers_share_a_redis(server: Server) -> None:
    first, second = prompts("llama")
    with wrap(zoo_model("llama"), server.url) as one, wrap(zoo_model("llama"), server.url) as two:
        ask(one, [first])
        settle(one)
        ask(two, [second])
        assert two.last_reuse[0].tiers == {"redis": 64}
        ask(one, [second])
        assert one.last_reuse[0].tiers == {"device": 64}


def test_tiers_are_asked_in_order(tmp_path: Path, server: Server) -> None:
    """The disk has the beginning, Redis the rest, the device nothing."""
    first, second = prompts("llama")
    disk = f"disk:{tmp_path}/store"
    with wrap(zoo_model("llama"), disk) as one:
        ask(one, [first[:40]])
    with wrap(zoo_model("llama"), server.url) as one:
        ask(one, [first])
    with wrap(zoo_model("llama"), disk, server.url) as both:
        ask(both, [second])
        assert both.last_reuse[0].tiers == {"disk": 32, "redis": 32}


@pytest.mark.parametrize("other", ["weights", "tenant", "type"])
def test_what_is_of_something_else_is_not_found(other: str, tmp_path: Path) -> None:
    first, second = prompts("llama")
    disk, model = f"disk:{tmp_path}/store", copy.deepcopy(zoo_model("llama"))
    with wrap(zoo_model("llama"), disk) as one:
        ask(one, [first])
    settings = {"tenant": "b"} if other == "tenant" else {}
    if other == "weights":
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
    elif other == "type":
        model = model.to(torch.bfloat16)
    with wrap(model, disk, **settings) as changed:
        ask(changed, [second])
        assert changed.last_reuse[0].cached_tokens == 0


@pytest.mark.parametrize("name", ["llama", "granitemoehybrid"])
def test_damaged_values_are_misses_and_written_again(name: str, tmp_path: Path) -> None:
    first, second = prompts(name)
    disk, random_ = f"disk:{tmp_path}/store", random.Random(4)
    with wrap(zoo_model(name), disk) as one:
        ask(one, [first])
    for path in tmp_path.glob("store/values/*/*"):
        content = bytearray(path.read_bytes())
        content[random_.randrange(len(content) // 2, len(content))] ^= 1
        path.write_bytes(content)
    with wrap(zoo_model(name), disk) as two, wrap(zoo_model(name)) as cold:
        assert same_bits(ask(two, [second]), ask(cold, [second]))
        assert two.last_reuse[0].cached_tokens == 0
        assert two._state._servings.tiers.counts["corrupt"] > 0
    for _ in range(
        3
    ):  # states are read before chunks, so both are found damaged one after the other
        with wrap(zoo_model(name), disk) as again:
            ask(again, [first])
            reuse = again.last_reuse[0]
    assert reuse.tiers == {"disk": reuse.cached_tokens} and reuse.cached_tokens >= 3 * CHUNK


def test_a_store_that_dies_costs_nothing_but_its_hits(server: Server) -> None:
    first, second = prompts("llama")
    with wrap(zoo_model("llama"), server.url) as one, wrap(zoo_model("llama")) as cold:
        ask(one, [first])
        settle(one)
        server.kill()
        one.flush()
        assert same_bits(ask(one, [second]), ask(cold, [second]))
        assert one.last_reuse[0].cached_tokens == 0
        server.start()
        one._state._servings.guards[0]._closed_from = 0.0
        one.flush()
        ask(one, [first])
        settle(one)
        one.flush()
        ask(one, [second])
        assert one.last_reuse[0].tiers == {"redis": 64}


def test_names_of_stores_are_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in ("disk:x", [3]):
        with pytest.raises(ConfigError, match="list of names"):
            chunkcache.Config(stores=wrong)
    with pytest.raises(ConfigError, match="is no store"):
        wrap(zoo_model("llama"), "tape:0")
    with pytest.raises(StoreDownError, match="cannot be used"):
        wrap(zoo_model("llama"), f"disk:{tmp_path}/file")


def test_prompts_are_evicted_from_the_device_and_come_back(tmp_path: Path) -> None:
    """A pool of two prompts serves many, in any order."""
    random_, model = random.Random(6), zoo_model("llama")
    with wrap(model) as cold:
        size = cold.store.layout.chunk_bytes
    rows = [ids(random_, 70) for _ in range(6)]
    settings = {"device_bytes": 10 * size, "keep_answers": False}
    with wrap(model, f"disk:{tmp_path}/store", **settings) as cached, wrap(model) as cold:
        for number in range(30):
            row = random_.choice(rows)
            hit = ask(cached, [row])
            cold.flush()
            assert same_bits(hit, ask(cold, [row])), number
            settle(cached)
            cached.store.check()
        counts = cached._state._servings.tiers.counts
        assert counts["loaded"] > 0 and counts["failed"] == counts["corrupt"] == 0


@pytest.mark.parametrize("name", ["llama", "granitemoehybrid"])
def test_a_prompt_that_waits_is_prepared(name: str, tmp_path: Path) -> None:
    first, second = prompts(name)
    disk = f"disk:{tmp_path}/store?load=always"
    with wrap(zoo_model(name), disk) as before, wrap(zoo_model(name)) as cold:
        ask(before, [first])
        expected = ask(cold, [second])
    with wrap(zoo_model(name), disk) as after:
        after.prefetch([second])
        wait_for(lambda: after.stats().stores["loaded"] > 0, "the load")
        wait_for(lambda: not after._state.serving().prefiller.flights._running, "its end")
        loaded = after.stats().stores["loaded"]
        assert same_bits(ask(after, [second]), expected)
        (reuse,) = after.last_reuse
        assert reuse.tiers == {"disk": reuse.cached_tokens} and reuse.cached_tokens >= 3 * CHUNK
        assert after.stats().stores["loaded"] == loaded
        ask(after, [second])
        assert set(after.last_reuse[0].tiers) == {"device"}


def test_rows_of_a_batch_are_prepared_while_the_first_runs(tmp_path: Path) -> None:
    model, random_ = zoo_model("llama"), random.Random(8)
    rows = [ids(random_, 70) for _ in range(4)]
    disk = f"disk:{tmp_path}/store?load=always"
    with wrap(model, disk) as before, wrap(model) as cold:
        for row in rows:
            ask(before, [row])
        expected = ask(cold, rows)
    with wrap(model, disk) as after:
        assert same_bits(ask(after, rows), expected)
        assert [reuse.tiers for reuse in after.last_reuse] == 4 * [{"disk": 64}]
        after.store.check()


def test_what_cannot_be_prepared_harms_nobody(server: Server) -> None:
    first, second = prompts("llama")
    with wrap(zoo_model("llama"), server.url) as cached:
        ask(cached, [first])
        settle(cached)
        server.kill()
        cached.flush()
        cached.prefetch([second, [], [5]])
        ask(cached, [second])
        assert cached.last_reuse[0].cached_tokens == 0
    cached.prefetch([second])


def test_a_miss_says_that_a_store_is_to_blame(server: Server) -> None:
    first, second = prompts("llama")
    with wrap(zoo_model("llama"), f"{server.url}?load=always") as cached:
        ask(cached, [first])
        settle(cached)
        for key in server.client().scan_iter():
            value = bytearray(server.client().get(key))
            value[-1] ^= 1
            server.client().set(key, bytes(value))
        cached.flush()
        ask(cached, [second])
        assert cached.last_reuse[0].reason == "corrupt"
        settle(cached)
        server.kill()
        cached.flush()
        ask(cached, [second])
        assert cached.last_reuse[0].reason == "store down"


@pytest.mark.parametrize(
    "path, name",
    [("", "llama"), ("org/name", "org/name"), ("/home/me/secret/model", "model"), ("./x/y", "y")],
)
def test_notes_name_models_and_no_folders(path: str, name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(zoo_model("llama"))
    model.config._name_or_path = path
    with wrap(model, f"disk:{tmp_path}/store") as cached:
        ask(cached, [prompts("llama")[0]])
        settle(cached)
        with closing(open_store(f"disk:{tmp_path}/store")) as store:
            keys = [one.key for one in store.scan() if one.key.name.endswith(".model")]
            (note,) = store.get(keys)
            assert note is not None and decode_note(note)["model"] == name
