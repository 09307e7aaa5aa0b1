"""What do requests pay for colder tiers that are written behind them?

The same requests with and without a disk store, in turns: a prompt that nothing is known of, one whose
beginning is in memory, and decoding. The store begins empty, so all that is computed is written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import click
import torch

import chunkcache
from benchmarks.bench_ttft import Prompts, first_token
from benchmarks.common import llama_200m, median, save
from chunkcache.hf.model import CachedModel

_NEW = 32


def decode(cached: CachedModel, prompts: Prompts) -> None:
    """A whole answer behind a known prefix."""
    cached.generate(prompts.next(), max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False)


def measure(
    wraps: dict[str, CachedModel], shared: int, private: int, repeats: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of request and wrapper. The other wrapper's writer rests meanwhile."""
    found: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, Callable[[CachedModel, Prompts], None]] = {
        "cold": lambda cached, prompts: first_token(cached, prompts.next()),
        "warm": lambda cached, prompts: first_token(cached, prompts.next()),
        "answer": decode,
    }
    for kind, ask in kinds.items():
        samples: dict[str, list[float]] = {name: [] for name in wraps}
        for number in range(repeats + 1):
            for name in sorted(wraps, reverse=number % 2 == 1):
                cached = wraps[name]
                prompts = Prompts(shared, private, seed + (1000 * number if kind == "cold" else 0))
                if kind == "cold":
                    cached.flush()
                else:
                    for _ in range(number):
                        prompts.next()
                begin = time.perf_counter()
                ask(cached, prompts)
                # A second one at once: the first one's chunks are written while it runs.
                ask(cached, prompts)
                if number:
                    samples[name].append(time.perf_counter() - begin)
                cached.settle(60)
        found[kind] = samples
    return found


@click.command()
@click.option("--shared", default=1024)
@click.option("--private", default=64)
@click.option("--repeats", default=31)
@click.option("--seed", default=0)
def main(shared: int, private: int, repeats: int, seed: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    result: dict[str, Any] = {}
    model = llama_200m(torch.bfloat16, seed)
    with tempfile.TemporaryDirectory() as folder:
        wraps = {
            name: chunkcache.wrap(model, config=chunkcache.Config(stores=stores))
            for name, stores in {"without": [], "with": [f"disk:{folder}/store"]}.items()
        }
        samples = measure(wraps, shared, private, repeats, seed)
        for kind, times in samples.items():
            ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
            result[kind] = {"ratio": median(ratios), "samples": times}
            print(
                f"{kind:7} {median(times['without']) * 1e3:7.1f} ms without stores, "
                f"{median(times['with']) * 1e3:7.1f} with: {median(ratios) - 1:+.1%}"
            )
        result["stores"] = wraps["with"].stats().stores
        for cached in wraps.values():
            cached.close()
    args = {"shared": shared, "private": private, "repeats": repeats, "seed": seed}
    save("bench_write_behind", args, result)


if __name__ == "__main__":
    main()
