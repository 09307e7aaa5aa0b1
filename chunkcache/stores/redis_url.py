"""Clients of redis-py by URL: one server, a set watched by Sentinel, a cluster."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from chunkcache.errors import ConfigError, StoreDownError

_READ = 2**20  # bytes: values are large, and each piece costs a turn of the interpreter
ERRORS = (RedisError, RedisClusterException, OSError)


def connect(url: str, timeout: float) -> Any:
    """A client of redis-py for a URL, as `RedisStore.open` takes them. Nothing is sent yet but to clusters.

    Raises:
        ConfigError: for another URL.
        StoreDownError: no node of a cluster answers.
    """
    settings: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_read_size": _READ,
        "retry": Retry(NoBackoff(), 0),  # who calls knows when to try again
    }
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    try:
        if kind == "" and scheme in ("redis", "rediss", "unix"):
            return redis.Redis.from_url(url, **settings)
        if scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
            raise ValueError("unknown scheme")
        settings |= {"username": unquote(parts.username or "") or None}
        settings |= {"password": unquote(parts.password or "") or None, "ssl": scheme == "rediss"}
        hosts = _hosts(parts.netloc.rpartition("@")[2])
        if kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in hosts]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, **settings)
        name, _, database = parts.path.strip("/").partition("/")
        if not name:
            raise ValueError("name the set: redis+sentinel://HOST:PORT/NAME")
        watchers: Any = Sentinel
        sentinel = watchers(hosts, sentinel_kwargs=_sentinel(parts.query, timeout))
        return sentinel.master_for(name, db=int(database or 0), **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{_hidden(url)} is no URL of Redis ({error})") from error
    except ERRORS as error:
        raise StoreDownError(f"{_hidden(url)} does not answer: {error}") from error


def _hosts(text: str) -> list[tuple[str, int]]:
    found = []
    if not text:
        raise ValueError("it names no host")
    for one in text.split(","):
        host, _, port = one.rpartition(":")
        found.append((host.strip("[]"), int(port)) if host else (port, 6379))
    return found


def _sentinel(query: str, timeout: float) -> dict[str, Any]:
    """Settings of the connections to the sentinels themselves."""
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    known: dict[str, Any] = {n: given[n] for n in ("username", "password") if n in given}
    return {"socket_timeout": timeout, "socket_connect_timeout": timeout, **known}


def _hidden(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
