"""Is attention in two phases faster than the best plain torch attention for one decoding step?

One layer, heads of 128: 32 (MHA) or 32 over 8 (GQA). Plain: every row has its own copy of the
shared prefix; the best of scaled dot product attention with grouped heads folded into the query,
the same with a mask, and two batched products. Two-phase: the shared chunks once, the private tails
in an arena, exact arithmetic, in the kernel that the machine gets and in the torch kernel. "Row by
row" is the same kernel over the same memory with phase 1 switched off: what the gate decides about.
"""

from __future__ import annotations

import click
import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, save
from chunkcache.attention.batch import Batch
from chunkcache.attention.choice import choose
from chunkcache.attention.groups import Gate
from chunkcache.attention.rule import Rule
from chunkcache.kv import Arena, ChunkLayout, LayerShape, Pool
from chunkcache.kv.sequence import Sequence

CHUNK, DIM = 64, 128


def plain_ways(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict:
    """Attention over replicated KV: query `[rows, query_heads, 1, dim]`, keys `[rows, heads, n, dim]`."""
    rows, heads, length, dim = keys.shape
    folded = query.view(rows, heads, -1, dim)
    flat_keys = keys.view(rows * heads, length, dim).transpose(1, 2)
    flat_values = values.view(rows * heads, length, dim)
    mask = torch.zeros(1, 1, 1, length, dtype=query.dtype)

    def products() -> torch.Tensor:
        scores = torch.bmm(folded.reshape(rows * heads, -1, dim), flat_keys)
        weights = torch.softmax(scores * dim**-0.5, -1, dtype=torch.float32).to(query.dtype)
        return torch.bmm(weights, flat_values)

    return {
        "sdpa folded": lambda: F.scaled_dot_product_attention(folded, keys, values),
        "sdpa folded, mask": lambda: F.scaled_dot_product_attention(
            folded, keys, values, attn_mask=mask
        ),
        "bmm": products,
    }


def two_phase(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    shared: int,
    gate: Gate,
    kernel: str = "auto",
) -> tuple:
    """A step of a batch whose rows share `shared` tokens; the plan is made once, as over layers."""
    rows, heads, length, dim = keys.shape
    layout = ChunkLayout((LayerShape(heads, dim, dim),), CHUNK, keys.dtype, keys.device)
    pool = Pool(layout, 2 * layout.chunk_bytes * (shared // CHUNK))
    run = pool.allocate(shared // CHUNK)
    first = Arena(layout)
    first.extend(shared // CHUNK)
    first.append(0, 0, 0, keys[0, :, :shared], values[0, :, :shared])
    for to, source in zip(run.layer(0), first.layer(0), strict=True):
        to.copy_(source)
    arena, sequences = Arena(layout), []
    for row in range(rows):
        sequence = Sequence(CHUNK, list(range(length - 1)), (run,))
        sequence.tail = list(arena.extend(sequence.missing_chunks(1)))
        arena.append(0, sequence.tail[0], 0, keys[row, :, shared:-1], values[row, :, shared:-1])
        sequences.append(sequence)
    batch = Batch(layout, sequences, arena, choose(layout, kernel)(layout), gate)  # type: ignore
    batch.begin([[0]] * rows)
    rule = Rule(dim**-0.5)

    def step() -> torch.Tensor:
        batch.write(0, keys[:, :, -1:], values[:, :, -1:])
        return batch.attend(0, query, rule)

    return step, batch


def compare(
    dtype: torch.dtype,
    query_heads: int,
    heads: int,
    rows: int,
    shared: int,
    tail: int,
    repeats: int,
) -> dict:
    """Milliseconds of each way; outputs must agree."""
    keys = torch.randn(1, heads, shared, DIM).expand(rows, -1, -1, -1)
    values = torch.randn(1, heads, shared, DIM).expand(rows, -1, -1, -1)
    keys = torch.cat([keys, torch.randn(rows, heads, tail, DIM)], 2).to(dtype)
    values = torch.cat([values, torch.randn(rows, heads, tail, DIM)], 2).to(dtype)
    query = torch.randn(rows, query_heads, 1, DIM).to(dtype)
    ways = plain_ways(query, keys, values)
    off = Gate(enabled=False)
    step, batch = two_phase(query, keys, values, shared, Gate())
    ways["two-phase"] = step
    ways["row by row"], _ = two_phase(query, keys, values, shared, off)
    ways["two-phase, torch kernel"], _ = two_phase(query, keys, values, shared, Gate(), "torch")
    plain_names = set(ways) - {"two-phase", "row by row", "two-phase, torch kernel"}
    reference = F.scaled_dot_product_attention(
        query.view(rows, heads, -1, DIM).double(), keys.double(), values.double()
    ).reshape(rows, query_heads, DIM)
    error = (step()[:, 0].double() - reference).abs().max().item()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2), error
    interleaved(ways, 3)
    samples = interleaved(ways, repeats)
    best = {name: min(values) * 1e3 for name, values in samples.items()}
    best["plain"] = min(best[name] for name in plain_names)
    ours = best["two-phase"]
    return {
        "ms": best,
        "gain": best["plain"] / ours,
        "gain of phase 1": best["row by row"] / ours,
        "gain, torch kernel": best["plain"] / best["two-phase, torch kernel"],
        "grouped": rows > 1 and any(len(group.rows) > 1 for group in batch.groups()),
        "kernel": batch.kernel.name,
        "error": error,
    }


@click.command()
@click.option("--rows", default="1,2,4,8,16,32")
@click.option("--shared", default="512,1024,2048,4096")
@click.option("--tail", default=64)
@click.option("--repeats", default=15)
@click.option("--seed", default=0)
def main(rows: str, shared: str, tail: int, repeats: int, seed: int) -> None:
    """Prints a table and one JSON line; keeps all times in results/."""
    torch.manual_seed(seed)
    result = []
    print(
        "dtype     heads   rows  shared  plain ms  two-phase ms   gain  phase 1 alone  torch kernel"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for query_heads, heads in ((32, 32), (32, 8)):
            for count in map(int, rows.split(",")):
                for tokens in map(int, shared.split(",")):
                    found = compare(dtype, query_heads, heads, count, tokens, tail, repeats)
                    name = str(dtype).removeprefix("torch.")
                    case = {"dtype": name, "query_heads": query_heads, "heads": heads}
                    result.append(case | {"rows": count, "shared": tokens, **found})
                    best = found["ms"]
                    print(
                        f"{name:9} {query_heads}/{heads:<4} {count:5}  {tokens:6} {best['plain']:9.2f} "
                        f"{best['two-phase']:13.2f} {found['gain']:5.2f}x {found['gain of phase 1']:13.2f}x "
                        f"{found['gain, torch kernel']:12.2f}x",
                        flush=True,
                    )
    save("bench_two_phase", {"tail": tail, "repeats": repeats, "seed": seed}, {"cases": result})


if __name__ == "__main__":
    main()
