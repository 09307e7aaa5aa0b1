"""Prometheus metrics, in a registry of the app's own.

Token counters come in pairs, queries and hits, so that a ratio of rates is the hit rate over any
window; a hit-rate gauge would fix the window. Names have no colons: those are for recording rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunkcache.engine import Result, Runner

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel

_MOVED = {  # sums over all stores
    "loaded": ("loaded_chunks", "Chunks that colder tiers had"),
    "saved": ("saved_values", "Values written to colder tiers"),
    "corrupt": ("corrupt_values", "Damaged values that were found"),
    "dropped": ("dropped_prefixes", "Prefixes that were not written, because too many waited"),
}
_CALLS = {  # of each store
    "calls": ("calls", "Calls of a store"),
    "failures": ("failures", "Calls that failed, those that took too long among them"),
    "timeouts": ("timeouts", "Calls that took too long"),
    "skipped": ("skipped_calls", "Calls that were not made, because the store had failed"),
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts requests as they end; memory is read when it is asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._queries = Counter(
            "chunkcache_prefix_query_tokens", "Prompt tokens", registry=self.registry
        )
        self._hits = Counter(
            "chunkcache_prefix_hit_tokens",
            "Prompt tokens whose KV was reused",
            ["tier"],
            registry=self.registry,
        )
        self._generated = Counter(
            "chunkcache_generated_tokens", "Tokens of answers", registry=self.registry
        )
        self._requests = Counter(
            "chunkcache_requests",
            "HTTP completions by outcome: ok, cancelled, error",
            ["outcome"],
            registry=self.registry,
        )
        self._first = Histogram(
            "chunkcache_time_to_first_token_seconds",
            "From the arrival of a request to its first token, waiting included",
            registry=self.registry,
            buckets=_SECONDS,
        )
        for outcome in ("ok", "cancelled", "error"):
            self._requests.labels(outcome)

    def watch(self, cached: CachedModel, runner: Runner) -> None:
        """Read from a model and a runner what they count themselves."""
        self.registry.register(_Watched(cached, runner))

    def count(self, outcome: str, result: Result | None) -> None:
        """A job has ended."""
        self._requests.labels(outcome).inc()
        if result is None:
            return
        self._first.observe(result.first_token_seconds)
        self._generated.inc(sum(answer.tokens for answer in result.answers))
        for row in result.reuse:
            self._queries.inc(row.prompt_tokens)
            for tier, tokens in row.tiers.items():
                self._hits.labels(tier).inc(tokens)

    def page(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, cached: CachedModel, runner: Runner):
        self._cached = cached
        self._runner = runner

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are checked when they are collected."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The values of this moment."""
        stats = self._cached.stats()
        stored = {
            "device": stats.bytes,
            "tail": stats.tail_bytes,
            "snapshot": stats.snapshot_bytes,
        }
        held = GaugeMetricFamily("chunkcache_bytes", "Bytes of KV held, by place", labels=["place"])
        for place, size in stored.items():
            held.add_metric([place], size)
        yield held
        simple = {
            "capacity_bytes": ("Byte budget of stored chunks", stats.capacity_bytes),
            "chunks": ("Chunks stored", stats.chunks),
            "leased_chunks": ("Chunks that running requests read", stats.leased_chunks),
            "pinned_chunks": ("Chunks that are never evicted", stats.pinned_chunks),
            "requests_running": ("Requests running", self._runner.running),
            "requests_waiting": ("Requests in the queue", self._runner.waiting),
        }
        for name, (help_text, value) in simple.items():
            yield GaugeMetricFamily(f"chunkcache_{name}", help_text, value=value)
        yield from tier_metrics(stats.stores)


def tier_metrics(report: Mapping[str, Any]) -> Iterator[Metric]:
    """What moved between the device and colder tiers, and what each store did; nothing without any."""
    for key, (name, help_text) in _MOVED.items():
        if key in report:
            yield CounterMetricFamily(f"chunkcache_store_{name}", help_text, value=report[key])
    stores = {name: found for name, found in report.items() if isinstance(found, Mapping)}
    if not stores:
        return
    for key, (name, help_text) in _CALLS.items():
        calls = CounterMetricFamily(f"chunkcache_store_{name}", help_text, labels=["store"])
        for store, found in stores.items():
            calls.add_metric([store], found[key])
        yield calls
    broken = GaugeMetricFamily(
        "chunkcache_store_open",
        "1 while a store that failed is left alone (its breaker is open)",
        labels=["store"],
    )
    for store, found in stores.items():
        broken.add_metric([store], found["open"])
    yield broken
