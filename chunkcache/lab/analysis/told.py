"""The cache that a report or an explanation is about: the one that recorded a trace, or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chunkcache.errors import ConfigError
from chunkcache.lab.simulation.sweep import CHUNK
from chunkcache.lab.traces.trace import TOKENS, Trace
from chunkcache.tree import named_policy

_MOST = 2**48  # tokens


@dataclass(frozen=True)
class Cache:
    """What answered, or would have.

    Attributes:
        capacity_tokens: None is without limit; model: empty if nobody said.
    """

    capacity_tokens: int | None
    policy: str = "lru"
    chunk_size: int = CHUNK
    model: str = ""


Asked = Cache | Callable[[Cache], Cache]


def cache_of(trace: Trace, chunk: int | None = None, asked: Asked | None = None) -> Cache:
    """The cache to look at, once the trace was read.

    Args:
        chunk: tokens of a chunk, else what the trace says.
        asked: another one, or what makes another of the one that the trace tells of.

    Raises:
        ConfigError: chunks that are no multiple of the trace's blocks; no such policy.
    """
    told = _told(trace, chunk)
    cache = told if asked is None else asked if isinstance(asked, Cache) else asked(told)
    if cache.chunk_size % trace.form.block:
        raise ConfigError(
            f"blocks of {trace.form.block} tokens make no chunks of {cache.chunk_size}; try a multiple"
        )
    named_policy(cache.policy)
    return cache


def _told(trace: Trace, chunk: int | None) -> Cache:
    told = trace.cache
    if chunk is None:
        own = told.get("chunk_size")
        chunk = trace.form.block
        if trace.form is TOKENS:
            chunk = own if type(own) is int and 0 < own < _MOST else CHUNK
    capacity = told.get("capacity_tokens")
    known = type(capacity) is int and 0 <= capacity < _MOST
    policy, model = str(told.get("policy") or "lru"), str(told.get("model") or "")
    return Cache(capacity if known else None, policy, chunk, model)
