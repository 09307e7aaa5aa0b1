"""Where stores are: the folder that is used if none is named, and names that may be shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from chunkcache.config import parse_bytes
from chunkcache.stores.open import BUDGET, read_admission


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """The user's own folder for values: `chunkcache` in XDG_CACHE_HOME, else where the system keeps caches.

    >>> str(cache_folder({"XDG_CACHE_HOME": "/var/cache/me"}))
    '/var/cache/me/chunkcache'
    """
    named = environment.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # others are to be ignored, says its specification
        return Path(named, "chunkcache")
    if platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local, "chunkcache")
    caches = "~/Library/Caches" if platform == "darwin" else "~/.cache"
    return Path(os.path.expanduser(caches), "chunkcache")


def shown(name: str) -> str:
    """Where a store is, without passwords and options.

    >>> shown("redis://me:secret@host:6379/0?ttl=1h"), shown("disk:/tmp/kv?ttl=7d")
    ('redis://host:6379/0', 'disk:/tmp/kv')
    """
    head, _, rest = name.partition("?")
    kind, mark, where = head.partition("://")
    if not mark:
        return head
    if "#" in where or (
        "@" in rest and "@" not in where
    ):  # it may be that a password was cut in two
        return f"{kind}://..."
    return f"{kind}://{where.rpartition('@')[2]}"


def budget(name: str) -> int | None:
    """The bytes that a store may hold; None if it sets no limit itself."""
    head, _, query = read_admission(name)[0].partition("?")
    kind, _, rest = head.partition(":")
    if kind == "memory":
        return parse_bytes(rest)
    return parse_bytes(dict(parse_qsl(query)).get("budget", BUDGET)) if kind == "disk" else None
