"""How much sooner does the first token come, what does a miss cost, and what memory is shared?

Time to first token of `generate(max_new_tokens=1)` on a Llama of 200 M random parameters: plain
model, chunkcache cold (empty cache), chunkcache warm (shared prefix stored, private tokens new each
time), in exact and in fast mode. Then the KV of 32 sequences that share 4,096 tokens.
"""

from __future__ import annotations

import click
import torch

import chunkcache
from benchmarks.common import interleaved, llama_200m, median, save
from chunkcache.hf.model import CachedModel

VOCABULARY = 32_000


class Prompts:
    """Prompts of a fixed shared prefix and fresh private tokens."""

    def __init__(self, shared: int, private: int, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._private = private
        self._shared = self._ids(shared)

    def _ids(self, count: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (1, count), generator=self._generator)

    def next(self) -> torch.Tensor:
        """The shared prefix and private tokens never seen before."""
        return torch.cat([self._shared, self._ids(self._private)], 1)


def first_token(model: object, ids: torch.Tensor) -> None:
    """One greedy token."""
    model.generate(ids, max_new_tokens=1, do_sample=False)  # type: ignore[attr-defined]


def measure(model: object, modes: dict[str, CachedModel], shared: int, args: dict) -> dict:
    """Samples of plain, cold and warm runs, in turns."""
    prompts = Prompts(shared, args["private"], args["seed"] + shared)

    def flush() -> None:
        for cached in modes.values():
            cached.flush()

    calls = {"plain": lambda: first_token(model, prompts.next())}
    for name, cached in modes.items():
        calls[f"cold {name}"] = lambda cached=cached: first_token(cached, prompts.next())
    repeats = args["repeats"] * (1 if shared > 1024 else 3)
    interleaved(calls, 1, flush)
    samples = interleaved(calls, repeats, flush)
    warm = {
        f"warm {name}": lambda cached=cached: first_token(cached, prompts.next())
        for name, cached in modes.items()
    }
    for name, call in 2 * list(
        warm.items()
    ):  # in blocks, as a server sees one prefix again and again
        interleaved({name: call}, 2)
        samples[name] = samples.get(name, []) + interleaved({name: call}, 9)[name]
    assert all(cached.last_reuse[0].cached_tokens == shared for cached in modes.values())
    return {name: [round(value, 6) for value in values] for name, values in samples.items()}


def summary(samples: dict) -> dict:
    """Medians and the ratios that matter."""
    mid = {name: median(values) for name, values in samples.items()}
    best = {name: min(values) for name, values in samples.items()}
    return {
        "medians": mid,
        "cold / warm exact": mid["cold exact"] / mid["warm exact"],
        "cold / warm fast": mid["cold fast"] / mid["warm fast"],
        "plain / warm exact": mid["plain"] / mid["warm exact"],
        "cost at 0 % hits": mid["cold exact"] / mid["plain"] - 1,
        "cost at 0 % hits (fastest runs)": best["cold exact"] / best["plain"] - 1,
        "price of exact, cold": mid["cold exact"] / mid["cold fast"] - 1,
        "price of exact, warm": mid["warm exact"] / mid["warm fast"] - 1,
    }


def memory(model: object, sequences: int, shared: int, private: int, seed: int) -> dict:
    """KV held while `sequences` run over a shared prefix, against the unique tokens' bytes."""
    cached = chunkcache.wrap(model, config=chunkcache.Config(device_bytes="8GiB"))  # type: ignore
    prompts = Prompts(shared, private // 2, seed)
    batch = torch.cat([prompts.next() for _ in range(sequences)])
    held = []

    def watch(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        stats = cached.stats()
        held.append(stats.bytes + stats.tail_bytes)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    new = private - private // 2
    cached.generate(
        batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, stopping_criteria=[watch]
    )
    stats = cached.stats()
    unique = (shared + sequences * private) * stats.token_bytes
    return {
        "sequences": sequences,
        "shared": shared,
        "private": private,
        "bytes": held[-1],
        "unique_bytes": unique,
        "ratio": held[-1] / unique,
        "unshared_bytes": (shared + private) * sequences * stats.token_bytes,
    }


def decode(model: object, modes: dict[str, CachedModel], seed: int) -> dict:
    """Milliseconds per decoded token, one row and eight, behind 1,024 shared tokens."""
    result = {}
    for rows in (1, 8):
        prompts = Prompts(1024, 32, seed)
        batch = torch.cat([prompts.next() for _ in range(rows)])

        def ask(target: object, new: int, batch: torch.Tensor = batch) -> None:
            target.generate(batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)  # type: ignore

        for name, target in {"plain": model, **modes}.items():
            ask(target, 2)
            short = interleaved({"t": lambda t=target: ask(t, 2)}, 3)["t"]
            long = interleaved({"t": lambda t=target: ask(t, 34)}, 3)["t"]
            result[f"{name}, {rows} rows"] = (median(long) - median(short)) / 32 * 1000
    return result


@click.command()
@click.option("--shared", default="256,512,1024,2048,4096")
@click.option("--private", default=64)
@click.option("--repeats", default=5)
@click.option("--dtype", "dtypes", default="bfloat16,float32")
@click.option("--seed", default=0)
def main(shared: str, private: int, repeats: int, dtypes: str, seed: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    args = {"private": private, "repeats": repeats, "seed": seed}
    for dtype in dtypes.split(","):
        model = llama_200m(getattr(torch, dtype), seed)
        modes = {
            mode: chunkcache.wrap(model, config=chunkcache.Config(mode=mode))  # type: ignore
            for mode in ("exact", "fast")
        }
        proof = modes["exact"].proof
        print(f"{dtype}: {modes['exact'].stats().exactness}, rows x {proof.rows}, {proof.kernel}")
        print(
            "shared plain ms cold ms warm ms cold/warm plain/warm miss cost  exact/fast cold, warm"
        )
        rows: dict = {}
        for tokens in map(int, shared.split(",")):
            samples = measure(model, modes, tokens, args)
            found = summary(samples)
            rows[tokens] = {"samples": samples, **found}
            mid = found["medians"]
            columns = (
                f"{tokens:6}",
                f"{mid['plain'] * 1e3:8.0f}",
                f"{mid['cold exact'] * 1e3:7.0f}",
                f"{mid['warm exact'] * 1e3:7.1f}",
                f"{found['cold / warm exact']:9.1f}x",
                f"{found['plain / warm exact']:10.1f}x",
                f"{found['cost at 0 % hits']:+9.1%}",
                f"{found['price of exact, cold']:+.1%}, {found['price of exact, warm']:+.1%}",
            )
            print(" ".join(columns), flush=True)
        rows["decode ms per token"] = decode(model, modes, seed)
        print(
            "decode ms per token:", {k: round(v, 1) for k, v in rows["decode ms per token"].items()}
        )
        rows["memory"] = memory(model, 32, 4096, 128, seed)
        print(
            f"KV of 32 x (4,096 + 128): {rows['memory']['ratio']:.3f} of the unique tokens' bytes"
        )
        save(f"bench_ttft_{dtype}", args | {"shared": shared}, {dtype: rows})


if __name__ == "__main__":
    main()
