"""Colder tiers as a scrape sees them: what moved, and a store that dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import chunkcache
from chunkcache.demo.facts import Shop
from chunkcache.engine import Finished, Job, Runner, Sampling
from chunkcache.server.metrics import tier_metrics
from tests.server.conftest import CHUNK, MODEL, Running, chat, running, until
from tests.stores.servers import Server


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


def ask(server: Running, shop: Shop, number: int) -> None:
    messages = chat(shop, shop.questions[number].question)
    server.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert server.cached.settle(30)


def test_a_store_that_dies(
    cached: chunkcache.CachedModel, redis: Server, tmp_path: Path, shop: Shop
) -> None:
    names = [f"{name}?load=always" for name in (f"disk:{tmp_path}/kv", redis.url)]
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes="64MiB", stores=names)
    with (
        chunkcache.wrap(cached.model, cached.tokenizer, config) as stored,
        running(stored) as server,
    ):
        ask(server, shop, 0)
        stored.flush()
        ask(server, shop, 0)
        chunks = server.metric("chunkcache_store_loaded_chunks_total")
        assert chunks > 0
        assert chunks == stored.stats().stores["loaded"]
        assert server.metric("chunkcache_store_saved_values_total") >= 2 * chunks
        assert server.metric("chunkcache_store_corrupt_values_total") == 0
        assert server.metric("chunkcache_store_dropped_prefixes_total") == 0
        for name in ("disk", "redis"):
            assert server.metric("chunkcache_store_calls_total", store=name) > 0
            assert server.metric("chunkcache_store_failures_total", store=name) == 0
            assert server.metric("chunkcache_store_open", store=name) == 0

        redis.kill()

        def broken() -> bool:
            stored.flush()
            ask(server, shop, 1)
            return server.metric("chunkcache_store_open", store="redis") == 1

        until(broken)
        assert server.metric("chunkcache_store_failures_total", store="redis") > 0
        until(lambda: broken() and server.metric("chunkcache_store_skipped_calls_total") > 0)
        assert server.metric("chunkcache_store_open", store="disk") == 0
        assert server.metric("chunkcache_store_failures_total", store="disk") == 0


def test_without_stores_there_is_nothing_to_say(server: Running) -> None:
    assert "chunkcache_store" not in server.http.get("/metrics").text


def test_each_store_of_a_kind_has_a_line() -> None:
    """By its name in the report, whatever else that says."""
    calls = {"calls": 3, "failures": 2, "timeouts": 1, "skipped": 4, "open": True, "else": None}
    report = {"loaded": 5, "else": 1, "disk": calls, "disk-2": calls | {"open": False}}

    class Report(Collector):
        def collect(self):
            return tier_metrics(report)

    registry = CollectorRegistry()
    registry.register(Report())
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = {
        (sample.name, sample.labels.get("store")): sample.value
        for family in families
        for sample in family.samples
    }
    assert found == {("chunkcache_store_loaded_chunks_total", None): 5} | {
        (f"chunkcache_store_{name}", store): value
        for store in ("disk", "disk-2")
        for name, value in {
            "calls_total": 3,
            "failures_total": 2,
            "timeouts_total": 1,
            "skipped_calls_total": 4,
            "open": store == "disk",
        }.items()
    }


def test_a_request_that_waits_is_prepared(
    cached: chunkcache.CachedModel, tmp_path: Path, shop: Shop
) -> None:
    """While one runs, what stores have of the next one comes into memory."""
    config = chunkcache.Config(chunk_size=CHUNK, stores=[f"disk:{tmp_path}/kv?load=always"])
    ids = cached.tokenizer(shop.system_prompt).input_ids
    sampling = Sampling(4, temperature=0)
    with chunkcache.wrap(cached.model, cached.tokenizer, config) as stored:
        stored.preload(ids)
        assert stored.settle(30)
        stored.flush()
        runner = Runner(stored)
        try:
            loaded: list[int] = []

            def hold(event: object) -> None:
                """Keeps the first job running until the second one's prefix is there."""
                if not loaded:
                    until(lambda: stored.stats().stores["loaded"] > 0)
                    loaded.append(stored.stats().stores["loaded"])

            ended: list[object] = []
            runner.submit(Job([[5, 6, 7]], Sampling(40, temperature=0, ignore_eos=True), hold))
            until(lambda: runner.running == 1)
            runner.submit(Job([ids], sampling, ended.append))
            until(lambda: ended and isinstance(ended[-1], Finished))
            (reuse,) = ended[-1].result.reuse
            assert loaded and reuse.tiers == {"disk": reuse.cached_tokens}
            assert reuse.cached_tokens > 100
        finally:
            runner.close()
