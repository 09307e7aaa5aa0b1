"""A cache to simulate, for the commands that read what one recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .sizes import read_size

if TYPE_CHECKING:
    from chunkcache.lab.analysis.report import Cache
    from chunkcache.lab.traces.trace import Trace

_OPTIONS = (
    click.option("--capacity", help="Simulate a cache of so many tokens: 512k, 5M, or unlimited."),
    click.option("--policy", help="Simulate a policy of `chunkcache simulate`."),
    click.option(
        "--token-bytes",
        type=click.IntRange(1),
        help="Of the KV of a token, for a capacity in bytes as 16GiB.",
    ),
)


def cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --capacity, --policy and --token-bytes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked_cache(trace: Trace, block_size: int | None, options: dict[str, Any]) -> Cache | None:
    """The cache to simulate, if one is asked for; what is not said of it is as in the trace.

    Raises:
        click.BadParameter, click.UsageError: no size.
    """
    capacity, policy = options["capacity"], options["policy"]
    if capacity is None and policy is None:
        return None
    from dataclasses import replace

    from chunkcache.lab.analysis.report import told_cache

    cache = told_cache(trace, block_size)
    if capacity is not None:
        size = read_size(capacity, options["token_bytes"], "--capacity")
        cache = replace(cache, capacity_tokens=size)
    return replace(cache, policy=policy or cache.policy)
