"""Sizes of caches as people write them."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_WITHOUT = ("unlimited", "inf")


def read_size(text: str, token_bytes: int | None, option: str) -> int | None:
    """Tokens, from tokens as 512k or 5M or from bytes as 16GiB; None is without limit.

    Args:
        token_bytes: of the KV of a token; option: where the text comes from.

    Raises:
        click.BadParameter: no size; click.UsageError: bytes, but nobody knows those of a token.
    """
    if text.lower() in _WITHOUT:
        return None
    if found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmg]?)", text.lower()):
        return int(float(found[1]) * _UNITS[found[2]])
    from chunkcache.config import parse_bytes
    from chunkcache.errors import ConfigError

    try:
        size = parse_bytes(text)
    except ConfigError as error:
        raise click.BadParameter(
            f"{text!r} is no size: tokens as 512k or 5M, bytes as 16GiB, or unlimited",
            param_hint=option,
        ) from error
    if token_bytes is None:
        raise click.UsageError(f"{option} {text} needs --token-bytes: see `chunkcache plan MODEL`")
    return size // token_bytes
