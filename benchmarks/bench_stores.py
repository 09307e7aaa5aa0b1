"""How fast are chunks read from stores, against the machine's own rate?

Chunks of a Llama of 200 M parameters (768 KiB each). Loading means all of it: from the store, checked,
into the pool; `get` is only what the store does. Against it: reading the same files, from the system's
cache and, after it forgot them, from the disk; and redis-py's GET of the same bytes, with nothing done to
them, by a client as it comes and by one that reads in pieces as large as ours ("tuned"). Then the bytes
that a token takes in each store, against the arithmetic.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import redis
import torch

from benchmarks.common import interleaved, median, save
from chunkcache.kv import ChunkLayout, LayerShape
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier
from chunkcache.kv.tiers import Tiers
from chunkcache.stores.guard import Guard
from chunkcache.stores.open import open_store
from chunkcache.stores.redis_url import connect
from chunkcache.tree import TOKEN_BYTES
from tests.stores.servers import Server

LAYOUT = ChunkLayout(
    tuple(LayerShape(4, 64, 64) for _ in range(12)), 64, torch.bfloat16, torch.device("cpu")
)
SPACE = bytes(32)
Calls = dict[str, Callable[[], object]]


class Filled:
    """A store with the chunks of one prompt, and a pool to load them into."""

    def __init__(self, name: str, tokens: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = list(range(tokens))
        self.store = open_store(name)
        self.pool = PrefixStore(LAYOUT, 2**30)
        self.tiers = Tiers(self.pool, [Tier(Guard(self.store, 60.0))], patience=60.0)
        source = LAYOUT.allocate(tokens // LAYOUT.chunk_size)
        for part in (part for layer in source for part in layer):
            part.normal_(generator=generator)
        self.pool.publish(
            SPACE,
            self.tokens,
            lambda at, count: [tuple(part[at : at + count] for part in layer) for layer in source],
        )
        self.tiers.save(SPACE, self.tokens)
        self.keys = [one.key for one in self.store.scan() if "." not in one.key.name]
        self.bytes = sum(one.bytes for one in self.store.scan() if "." not in one.key.name)

    def forget(self) -> None:
        """Empties the pool, whose memory stays."""
        self.pool.tree(SPACE).clear()

    def load(self) -> None:
        """Everything, into the pool."""
        found = self.tiers.load(SPACE, self.tokens, 0, len(self.tokens))
        assert sum(found.tokens.values()) == len(self.tokens)

    def get(self) -> None:
        """Only what the store does."""
        assert all(self.store.get(self.keys))


def read_files(folder: Path) -> None:
    """All files, into fresh memory."""
    for path in folder.glob("values/*/*"):
        path.read_bytes()


def forget_files(folder: Path) -> None:
    """Has the system drop what it holds of them in memory."""
    os.sync()
    for path in folder.glob("values/*/*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def get_plain(client: redis.Redis, values: int) -> None:
    """One GET after the other."""
    for number in range(values):
        assert client.get(f"plain{number}")


def runs(
    kind: str, url: str, filled: Filled, folder: Path
) -> dict[str, tuple[Calls, Callable[[], None]]]:
    """What is measured side by side, by name, and what comes before each call."""
    calls: Calls = {"load": filled.load, "get": filled.get}
    if kind == "memory":
        return {kind: (calls, filled.forget)}
    if kind == "disk":
        calls["machine"] = lambda: read_files(folder)

        def uncached() -> None:
            filled.forget()
            forget_files(folder)

        return {kind: (calls, filled.forget), "disk, not cached": (calls, uncached)}
    plain, tuned = redis.Redis.from_url(url), connect(url, timeout=60.0)
    for number, value in enumerate(filled.store.get(filled.keys)):
        plain.set(f"plain{number}", bytes(value or b""))
    calls["machine"] = partial(get_plain, plain, len(filled.keys))
    calls["tuned"] = partial(get_plain, tuned, len(filled.keys))
    return {kind: (calls, filled.forget)}


def rates(samples: dict[str, list[float]], size: int) -> dict[str, float]:
    """MiB per second of the median."""
    return {name: size / 2**20 / median(times) for name, times in samples.items()}


def token_bytes(filled: Filled) -> dict[str, float]:
    """Of a token in the store, and what the numbers and ids alone take."""
    arithmetic = LAYOUT.token_bytes + TOKEN_BYTES
    stored = filled.bytes / len(filled.tokens)
    return {"stored": stored, "arithmetic": arithmetic, "ratio": stored / arithmetic}


@click.command()
@click.option("--tokens", default=4096)
@click.option("--repeats", default=15)
@click.option("--seed", default=0)
def main(tokens: int, repeats: int, seed: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "redis", "--unixsocket", f"{folder}/s")
        names = {
            "memory": "memory:1GiB",
            "disk": f"disk:{folder}/store",
            "redis": server.url,
            "redis by unix socket": f"unix://{folder}/s",
        }
        for kind, url in names.items():
            server.client().flushall()
            filled = Filled(url, tokens, seed)
            for label, (calls, before) in runs(kind, url, filled, folder / "store").items():
                interleaved(calls, 2, before)
                samples = interleaved(calls, repeats, before)
                found = rates(samples, filled.bytes)
                shares = {what: found[what] / found.get("machine", found[what]) for what in found}
                tuned = f", tuned {found['tuned']:,.0f}" if "tuned" in found else ""
                print(
                    f"{label:22} machine {found.get('machine', 0):7,.0f} MiB/s{tuned}, get "
                    f"{found['get']:9,.0f} ({shares['get']:.0%}), load {found['load']:6,.0f} "
                    f"({shares['load']:.0%})"
                )
                result[label] = {"rates": found, "shares": shares, "samples": samples}
            sizes = result[kind]["token_bytes"] = token_bytes(filled)
            print(f"{'':22} a token takes {sizes['stored']:,.0f} bytes, {sizes['ratio'] - 1:+.2%}")
            filled.tiers.close()
        server.kill()
    save("bench_stores", {"tokens": tokens, "repeats": repeats, "seed": seed}, result)


if __name__ == "__main__":
    main()
