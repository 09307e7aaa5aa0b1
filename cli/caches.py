"""A cache to simulate, for the commands that read what one recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .sizes import read_size

if TYPE_CHECKING:
    from chunkcache.lab.analysis.told import Cache

_OPTIONS = (
    click.option("--capacity", help="Simulate a cache of so many tokens: 512k, 5M, or unlimited."),
    click.option("--policy", help="Simulate a policy of `chunkcache simulate`, other than belady."),
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


def asked_cache(options: dict[str, Any]) -> Callable[[Cache], Cache] | None:
    """What makes the cache to simulate of the one that a trace tells of; None if none is asked for.

    Raises:
        click.BadParameter, click.UsageError: no size.
    """
    capacity, policy = options["capacity"], options["policy"]
    if capacity is None and policy is None:
        return None
    changes: dict[str, Any] = {}
    if capacity is not None:
        changes["capacity_tokens"] = read_size(capacity, options["token_bytes"], "--capacity")
    if policy is not None:
        changes["policy"] = policy.lower()
    return lambda told: replace(told, **changes)
