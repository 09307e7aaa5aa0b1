"""Policies by the names that settings and commands use."""

from __future__ import annotations

from collections.abc import Callable

from chunkcache.errors import ConfigError
from chunkcache.tree.policies import GDLF, LFU, LRU, PGDSF, TTL, Policy
from chunkcache.tree.queues import ARC, S3FIFO, SLRU, TwoQueues

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "slru": SLRU,
    "2q": TwoQueues,
    "s3fifo": S3FIFO,
    "arc": ARC,
    "pgdsf": PGDSF,
    "gdlf": GDLF,
}


def named_policy(name: str) -> Policy:
    """A new policy; `ttl:SECONDS` is least recently used with a time to live.

    >>> type(named_policy("2q")).__name__, named_policy("ttl:60").ttl
    ('TwoQueues', 60.0)

    Raises:
        ConfigError: there is no such policy.
    """
    kind, _, seconds = name.partition(":")
    if kind == "ttl":
        try:
            ttl = float(seconds)
        except ValueError:
            ttl = 0.0
        if 0 < ttl < float("inf"):
            return TTL(ttl)
    if name not in POLICIES:
        known = ", ".join([*POLICIES, "ttl:SECONDS"])
        raise ConfigError(f"there is no policy {name!r}; these are: {known}")
    return POLICIES[name]()
