"""How fast are the tree's match, insert and eviction, and how many bytes does a stored chunk cost?

    python -m benchmarks.bench_tree [--repeats 60] [--out benchmarks/results/bench_tree.json]

10,000 stored prompts: 20 system prompts of 1,500 to 4,000 tokens, 2,000 dialogues on them, 5 turns
each of 100 to 600 tokens. The long prompt extends one of them to 102,400 tokens. Compared with a
naive tree in the same run: a dict node per chunk keyed by token tuples, and a heap of all leaves
built per eviction. Prints a table, then one JSON line; raw samples are kept in the file.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sortedcontainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chunkcache.tree import PrefixTree, pack

SEED, LONG, SIZE, VOCAB = 7, 102_400, 64, 128_000


class Plain:
    """A run that is only a length."""

    __slots__ = ("chunks",)

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return self.chunks

    def split(self, chunks: int) -> tuple[Plain, Plain]:
        return Plain(chunks), Plain(self.chunks - chunks)


def plain(first: int, chunks: int) -> Plain:
    return Plain(chunks)


class Naive:
    """A dict node per chunk, keyed by tuples of ids."""

    def __init__(self) -> None:
        self.root: dict[tuple[int, ...], Any] = {}

    def insert(self, tokens: list[int]) -> None:
        node = self.root
        for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
            node = node.setdefault(tuple(tokens[at : at + SIZE]), {})

    def match(self, tokens: list[int]) -> int:
        node, matched = self.root, 0
        for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
            below = node.get(tuple(tokens[at : at + SIZE]))
            if below is None:
                break
            node, matched = below, at + SIZE
        return matched


def prompts(rng: np.random.Generator) -> list[np.ndarray]:
    """10,000 prompts: every turn extends its dialogue, every dialogue a system prompt."""
    systems = [rng.integers(0, VOCAB, rng.integers(1_500, 4_000)) for _ in range(20)]
    weights = 1 / np.arange(1, 21)
    found = []
    for _ in range(2_000):
        text = systems[rng.choice(20, p=weights / weights.sum())]
        for _ in range(5):
            text = np.concatenate([text, rng.integers(0, VOCAB, rng.integers(100, 600))])
            found.append(text)
    return found


def sample(
    call: Callable[[], object], repeats: int, after: Callable[[], object] = lambda: None
) -> list[float]:
    """Milliseconds of each call, `after` untimed between them."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
        after()
    return times


def forest(stored: list[np.ndarray]) -> tuple[PrefixTree, float]:
    """The stored prompts in a tree, and the bytes it takes per chunk, tokens and objects."""
    tracemalloc.start()
    tree = PrefixTree(SIZE)
    for prompt in stored:
        tree.insert(prompt, plain)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return tree, size / tree.chunks


def measure_long(stored: list[np.ndarray], rng: np.random.Generator, repeats: int) -> dict:
    tree, per_chunk = forest(stored)
    chunks, nodes = tree.chunks, tree.nodes
    head = stored[123]
    long = np.concatenate([head, rng.integers(0, VOCAB, LONG - len(head))])
    as_list = long.tolist()
    raw: dict[str, Any] = {
        "pack array": sample(lambda: pack(long), repeats),
        "pack list": sample(lambda: pack(as_list), repeats),
    }
    border = len(head) // SIZE * SIZE + 1
    again = lambda: tree.remove(long[: border + SIZE])  # noqa: E731
    added: list[int] = []
    raw["insert array"] = sample(
        lambda: added.append(tree.insert(long, plain).new_tokens), repeats, again
    )
    assert len(set(added)) == 1 and added[0] >= LONG - len(head), "every insert was a new one"
    tree.insert(long, plain)
    raw["match array"] = sample(lambda: tree.match(long, LONG - 1), repeats)
    raw["match list"] = sample(lambda: tree.match(as_list, LONG - 1), repeats)
    raw["lease array"] = sample(lambda: tree.lease(long, LONG - 1).release(), repeats)
    assert tree.match(long).tokens == LONG
    naive = Naive()
    for prompt in stored[::10]:
        naive.insert(prompt.tolist())
    naive.insert(as_list)
    raw["naive match list"] = sample(lambda: naive.match(as_list), max(5, repeats // 4))
    flat = {}
    for length in (1_000, 3_000, 10_000, 30_000, 100_000):
        part = long[:length]
        flat[length] = sample(lambda part=part: tree.match(part), repeats)
    deep = rng.integers(0, VOCAB, LONG)
    tree.insert(deep, lambda first, chunks: Plain(1))  # as decoding does: a node per chunk
    raw["match array, 1,600 nodes"] = sample(lambda: tree.match(deep, LONG - 1), repeats)
    lone = PrefixTree(SIZE)
    lone.insert(long, plain)
    raw["evict one of a long leaf"] = sample(lambda: lone.evict(1), repeats)
    tree.check()
    return {"raw": raw, "flat": flat, "bytes per chunk": per_chunk, "chunks": chunks,
            "nodes": nodes}  # fmt: skip


def measure_eviction(rng: np.random.Generator, repeats: int) -> dict:
    """One chunk out of 50,000 leaves; and, for the naive way, a heap of all leaves each time."""
    tree = PrefixTree(SIZE)
    head = rng.integers(0, VOCAB, 4 * SIZE)
    for _ in range(50_000):
        tree.insert(np.concatenate([head, rng.integers(0, VOCAB, 2 * SIZE)]), plain)
    assert tree.leaves == 50_000
    times = sample(lambda: tree.evict(1), 2_000)

    known = [node for node in tree if not node.children]  # kept by the naive way too, for free

    def naive() -> None:
        leaves = [(node.tick, node.serial) for node in known]
        heapq.heapify(leaves)
        heapq.heappop(leaves)

    return {"evict one of 50,000": times, "naive evict one of 50,000": sample(naive, repeats // 6)}


TARGETS = {
    "pack array": 0.060, "pack list": 1.0, "match array": 0.2, "match list": 1.2,
    "insert array": 0.5, "evict one of 50,000": 0.1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_tree.json"))
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    stored = prompts(rng)
    long = measure_long(stored, rng, options.repeats)
    raw = {**long["raw"], **measure_eviction(rng, options.repeats)}
    print(f"{'milliseconds':28}{'min':>9}{'median':>9}{'target':>9}")
    summary = {}
    for name, times in raw.items():
        low, middle, target = min(times), statistics.median(times), TARGETS.get(name)
        summary[name] = {"min_ms": round(low, 4), "median_ms": round(middle, 4), "target": target}
        print(f"{name:28}{low:9.4f}{middle:9.4f}{target or '':>9}")
    flat = {n: round(statistics.median(t) * 1e6 / n, 2) for n, t in long["flat"].items()}
    print("match, ns a token by length:", flat)
    print(f"bytes a stored chunk: {long['bytes per chunk']:.0f} ({4 * SIZE} of them tokens); "
          f"{long['chunks']} chunks in {long['nodes']} nodes")  # fmt: skip
    middle = {name: statistics.median(times) for name, times in raw.items()}
    ratios = {
        "match list, naive / tree": middle["naive match list"] / middle["match list"],
        "evict, naive / tree": middle["naive evict one of 50,000"] / middle["evict one of 50,000"],
    }
    print("ratios:", {name: round(value, 1) for name, value in ratios.items()})
    result = {
        "benchmark": "tree",
        "command": " ".join(["python -m benchmarks.bench_tree", *sys.argv[1:]]),
        "seed": SEED,
        "machine": f"{platform.machine()} {platform.processor()} {platform.system()}".strip(),
        "python": platform.python_version(), "numpy": np.__version__,
        "sortedcontainers": sortedcontainers.__version__, "stored_prompts": len(stored),
        "chunk_size": SIZE, "chunks": long["chunks"], "nodes": long["nodes"],
        "bytes_per_chunk": round(long["bytes per chunk"], 1), "match_ns_per_token": flat,
        "ratios": {name: round(value, 2) for name, value in ratios.items()}, "summary": summary,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {**result, "raw_ms": raw, "raw_match_ms_by_length": long["flat"]}
    options.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
