"""Stores by name, as settings and command lines give them."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from chunkcache.config import parse_bytes, parse_seconds
from chunkcache.errors import ConfigError
from chunkcache.stores.base import Store
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore

BUDGET = "10GiB"  # of a disk store that names none
TIMEOUT = 1.0  # seconds
_OPTIONS = {"memory": set(), "disk": {"budget", "ttl", "timeout"}, "redis": {"ttl", "timeout"}}
_ADMISSION = {"hits", "depth", "compress", "load"}  # of every kind


class Admission(NamedTuple):
    """Which chunks a store is given, how, and when it is read.

    Attributes:
        hits: how often a chunk must have been reused before it is written; those of pinned and named
            prompts are at once.
        depth: tokens of a prompt, from its beginning, that are written at most; None for all.
        compress: without loss; smaller and slower.
        always: read even where computing is estimated to be faster.
    """

    hits: int = 0
    depth: int | None = None
    compress: bool = False
    always: bool = False


def read_admission(name: str) -> tuple[str, Admission]:
    """The name of a store without the options `hits`, `depth`, `compress=zstd`, `load=always`, and these.

    >>> read_admission("disk:/tmp/kv?hits=1&ttl=7d")
    ('disk:/tmp/kv?ttl=7d', Admission(hits=1, depth=None, compress=False, always=False))

    Raises:
        ConfigError: a value is none of these.
    """
    head, mark, query = name.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    ours = {key: value for key, value in pairs if key in _ADMISSION}
    if not ours:
        return name, Admission()
    rest = urlencode([pair for pair in pairs if pair[0] not in _ADMISSION], safe="/:,")
    admission = Admission(
        _count(ours.get("hits", "0"), name),
        _count(ours["depth"], name) if "depth" in ours else None,
        _choice(ours, "compress", "zstd", "none", name),
        _choice(ours, "load", "always", "auto", name),
    )
    if admission.compress and importlib.util.find_spec("zstandard") is None:
        raise ConfigError(f"{name!r}: compression needs zstandard; pip install zstandard")
    return head + mark * bool(rest) + rest, admission


def _count(text: str, name: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name!r}: {text!r} is no whole number")
    return int(text)


def _choice(options: dict[str, str], key: str, yes: str, no: str, name: str) -> bool:
    value = options.get(key, no)
    if value not in (yes, no):
        raise ConfigError(f"{name!r}: {key} is {yes!r} or {no!r}, not {value!r}")
    return value == yes


def open_store(name: str) -> Store:
    """Opens the store that a name stands for.

    `memory:2GiB`, `disk:DIR?budget=20GiB&ttl=7d`, or a URL of Redis with `ttl` and `timeout` among its
    options (`redis://HOST:PORT/0?ttl=1h`, `rediss://`, `unix://`, `redis+sentinel://`,
    `redis+cluster://`). The options of `read_admission` mean nothing to the store itself.

    Raises:
        ConfigError: it is no name of a store, or an option is unknown.
        StoreDownError: the folder cannot be used, or no node of a cluster answers.
    """
    name, _ = read_admission(name)
    kind, _, rest = name.partition(":")
    if kind == "memory":
        return MemoryStore(parse_bytes(rest))
    if kind == "disk":
        folder, _, query = rest.partition("?")
        if not folder:
            raise ConfigError(f"{name!r} names no folder; write disk:DIR")
        options = dict(parse_qsl(query))
        _check(name, options, _OPTIONS["disk"])
        budget = parse_bytes(options.get("budget", BUDGET))
        return DiskStore(folder, budget, _ttl(options), _timeout(options))
    if kind.partition("+")[0] in ("redis", "rediss", "unix"):
        return _redis(name)
    raise ConfigError(f"{name!r} is no store; write memory:SIZE, disk:DIR or redis://HOST")


def _redis(name: str) -> Store:
    from chunkcache.stores.redis import RedisStore  # takes 0.15 s, and not everybody needs it

    parts = urlsplit(name)
    options = dict(parse_qsl(parts.query))
    ours = {key: options.pop(key) for key in _OPTIONS["redis"] if key in options}
    url = parts._replace(query=urlencode(options)).geturl()
    if parts.scheme == "unix" and not url.startswith("unix://"):
        url = url.replace("unix:", "unix://", 1)  # geturl() drops an empty host
    return RedisStore.open(url, _ttl(ours), _timeout(ours))


def _check(name: str, options: dict[str, str], known: set[str]) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ConfigError(
            f"{name!r}: unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )


def _ttl(options: dict[str, str]) -> float | None:
    return parse_seconds(options["ttl"]) if "ttl" in options else None


def _timeout(options: dict[str, str]) -> float:
    return parse_seconds(options["timeout"]) if "timeout" in options else TIMEOUT
