"""How soon does the first token come after a restart?

A process computes a prompt once and ends. Others start after it, each with an empty cache, and answer a
prompt with the same beginning: their first request finds it on disk or in Redis (on loopback). Against
that stand the same process's later requests, which find it in memory, and a process without stores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

import chunkcache
from benchmarks.bench_stores import forget_files
from benchmarks.bench_ttft import Prompts, first_token
from benchmarks.common import llama_200m, median, save
from tests.stores.servers import Server

_IN_MEMORY = 7  # requests that find their beginning in memory


def child(store: str, shared: int, private: int, seed: int, number: int) -> dict[str, Any]:
    """One process: starts, asks once, then again; everything is written when it ends."""
    model = llama_200m(torch.bfloat16, seed)
    prompts = Prompts(shared, private, seed)
    for _ in range(number * (_IN_MEMORY + 2)):  # private tokens that no process had before
        prompts.next()
    begin = time.perf_counter()
    settings = chunkcache.Config(stores=[store] if store else [])
    with chunkcache.wrap(model, config=settings) as cached:
        found: dict[str, Any] = {"wrap": time.perf_counter() - begin}
        for name in ["first", "second"] + ["memory"] * _IN_MEMORY:
            ids = prompts.next()
            begin = time.perf_counter()
            first_token(cached, ids)
            found.setdefault(name, []).append(time.perf_counter() - begin)
            if name == "first":
                found["tiers"] = cached.last_reuse[0].tiers
        found["settled"] = cached.settle(60)
        found["stores"] = cached.stats().stores
    return found


def run(store: str, args: dict[str, Any], number: int) -> dict[str, Any]:
    """A child of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_restart", "--child", store]
    command += [f"--{name}={args[name]}" for name in ("shared", "private", "seed")]
    out = subprocess.run([*command, f"--number={number}"], capture_output=True, check=True)
    return dict(json.loads(out.stdout.splitlines()[-1]))


def measure(stores: dict[str, str], folder: Path, args: dict[str, Any]) -> dict[str, Any]:
    """Samples of all processes, in turns."""
    samples: dict[str, list[Any]] = {name: [] for name in ["cold", *stores, "disk, not in memory"]}
    for store in stores.values():
        run(store, args, 0)
    for number in range(1, args["starts"] + 1):
        if number <= max(2, args["starts"] // 2):
            samples["cold"].append(run("", args, number))
        for name, store in stores.items():
            samples[name].append(run(store, args, number))
        forget_files(folder)
        samples["disk, not in memory"].append(run(stores["disk"], args, number))
    return samples


def summary(samples: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians over processes, and ratios."""
    cold = median([one["first"][0] for one in samples["cold"]])
    found: dict[str, Any] = {"cold ms": cold * 1e3}
    for name, runs in samples.items():
        if name != "cold":
            assert all(sum(one["tiers"].values()) for one in runs), "nothing was found"
            first = median([one["first"][0] for one in runs])
            memory = median([median(one["memory"]) for one in runs])
            found[name] = {
                "first ms": first * 1e3,
                "in memory ms": memory * 1e3,
                "first / in memory": median([o["first"][0] / median(o["memory"]) for o in runs]),
                "cold / first": cold / first,
            }
    return found


@click.command()
@click.option("--shared", default=4096)
@click.option("--private", default=64)
@click.option("--starts", default=5)
@click.option("--seed", default=0)
@click.option("--child", "store", default=None, hidden=True)
@click.option("--number", default=0, hidden=True)
def main(shared: int, private: int, starts: int, seed: int, store: str | None, number: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    if store is not None:
        print(json.dumps(child(store, shared, private, seed, number)))
        return
    args = {"shared": shared, "private": private, "starts": starts, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "redis")
        try:
            stores = {"disk": f"disk:{folder}/store", "redis": server.url}
            samples = measure(stores, folder / "store", args)
        finally:
            server.kill()
    found = summary(samples)
    print(f"first token behind {shared:,} + {private} tokens, cold: {found['cold ms']:,.0f} ms")
    for name, one in found.items():
        if isinstance(one, dict):
            print(
                f"{name:20} {one['first ms']:6.0f} ms after a restart, {one['in memory ms']:4.0f} ms "
                f"in memory: {one['first / in memory']:.2f}x; cold takes {one['cold / first']:.1f}x"
            )
    save("bench_restart", args, {"summary": found, "samples": samples})


if __name__ == "__main__":
    main()
