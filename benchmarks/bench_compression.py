"""What does lossless compression of stored chunks save, and what does it cost?

On real keys and values: of a trained model on text of its own kind, in the types it runs in. Bytes of
values with and without compression, and the processor's time to make and to read them, one thread.
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkcache
from benchmarks.common import median, save
from chunkcache.demo import model_path
from chunkcache.demo.facts import make_shop
from chunkcache.kv import ChunkLayout
from chunkcache.kv.codec import Identity, decode_chunk, encode_chunk, identities
from chunkcache.kv.layout import KV
from chunkcache.tree import pack

_REPEATS = 5


def chunks_of(model: Any, ids: list[int]) -> tuple[ChunkLayout, list[list[KV]], list[Identity]]:
    """The chunks that the cache stores for a prompt, and what they are of."""
    with chunkcache.wrap(model) as cached:
        cached.preload(ids, pin=False)
        (tree,) = cached.store.trees()
        layout = cached.store.layout
        pieces = tree.match(ids).pieces
        chunks = [
            [tuple(part.clone() for part in parts) for parts in piece.run.chunk(n)]
            for piece in pieces
            for n in range(len(piece.run))
        ]
    path = identities(bytes(32), pack(ids[: len(chunks) * layout.chunk_size]), layout.chunk_size)
    return layout, chunks, path


def seconds(work: Any) -> float:
    """Of the median of a few runs, processor time."""
    found = []
    for _ in range(_REPEATS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return median(found)


def measure(layout: ChunkLayout, chunks: list[list[KV]], path: list[Identity]) -> dict[str, Any]:
    """Bytes and rates, by whether they are compressed."""
    found: dict[str, Any] = {"chunks": len(chunks)}
    raw = len(chunks) * layout.chunk_bytes
    for name, compress in (("plain", False), ("compressed", True)):
        values = [
            encode_chunk(one, chunk, layout, compress)
            for one, chunk in zip(path, chunks, strict=True)
        ]

        def write(compress: bool = compress) -> None:
            for one, chunk in zip(path, chunks, strict=True):
                encode_chunk(one, chunk, layout, compress)

        def read(values: list[bytes] = values) -> None:
            for one, value in zip(path, values, strict=True):
                decode_chunk(value, one, layout)

        found[name] = {
            "bytes / KV": sum(map(len, values)) / raw,
            "write MiB/s": raw / 2**20 / seconds(write),
            "read MiB/s": raw / 2**20 / seconds(read),
        }
    return found


def prompts(stories: Path | None) -> dict[str, tuple[Path, list[int]]]:
    """Models and ids of text of their kind."""
    shop = make_shop(7, fact_tokens=400)
    asked = " ".join(one.question for one in shop.questions)
    ids = AutoTokenizer.from_pretrained(model_path())(f"{shop.system_prompt} {asked}")["input_ids"]
    found = {"built-in": (model_path(), ids)}
    if stories is not None:
        golden = json.loads((stories / "golden.json").read_text())
        found["stories260K"] = (stories, golden["greedy_ids_256"])
    return found


@click.command()
@click.option(
    "--stories", type=click.Path(exists=True, path_type=Path), help="Folder of stories260K."
)
@click.option("--tokens", default=448)
def main(stories: Path | None, tokens: int) -> None:
    """Prints a table and one JSON line; keeps the raw result in results/."""
    torch.set_num_threads(1)
    data = os.environ.get("CHUNKCACHE_DATA")
    if stories is None and data:
        stories = Path(data) / "stories260K"
    result = {}
    for name, (path, ids) in prompts(stories).items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(*chunks_of(copy.deepcopy(model).to(dtype), ids[:tokens]))
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            result[label] = found
            for kind in ("plain", "compressed"):
                one = found[kind]
                print(
                    f"{label:24} {kind:10} {one['bytes / KV']:.1%} of the KV, written at "
                    f"{one['write MiB/s']:5,.0f} MiB/s, read at {one['read MiB/s']:5,.0f}"
                )
    save("bench_compression", {"tokens": tokens}, result)


if __name__ == "__main__":
    main()
