"""Values as a model's prefixes leave them in a store, made without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chunkcache.kv import ChunkLayout, LayerShape
from chunkcache.kv.codec import Identity, encode_chunk, encode_state, identities
from chunkcache.kv.notes import encode_note, model_key, prompt_key
from chunkcache.stores import Key
from chunkcache.tree import pack

CPU = torch.device("cpu")
LAYOUT = ChunkLayout((LayerShape(1, 2, 3), LayerShape(1, 4, 4)), 4, torch.float32, CPU)
LARGE = ChunkLayout((LayerShape(1, 20_000, 20_000),), 4, torch.float32, CPU)  # in parts, in Redis
ONE, OTHER = bytes([0x1F]) * 32, bytes([0xE2]) * 32  # namespaces


def path_of(tokens: Sequence[int], namespace: bytes = ONE) -> list[Identity]:
    return identities(namespace, pack(list(tokens)), LAYOUT.chunk_size)


def value_of(identity: Identity, layout: ChunkLayout = LAYOUT) -> bytes:
    """Of a chunk, or of a snapshot; numbers tell their place."""
    if identity.is_snapshot:
        return encode_state(identity, [torch.full((3,), float(identity.start))], {"a": 1})
    chunk = [
        tuple(part[:, 0].fill_(identity.start) for part in kv) for kv in layout.allocate_alike(1)
    ]
    return encode_chunk(identity, chunk, layout)


def prefix(
    tokens: Sequence[int],
    namespace: bytes = ONE,
    name: str | None = None,
    state: bool = False,
    layout: ChunkLayout = LAYOUT,
) -> list[tuple[Key, bytes]]:
    """What is written for a prompt, in this order: chunks, the snapshot at its end, its note."""
    path = path_of(tokens, namespace)
    values = [(one.key, value_of(one, layout)) for one in path]
    if path and state:
        values.append((path[-1].snapshot().key, value_of(path[-1].snapshot())))
    if path and name is not None:
        facts = {"name": name, "tokens": len(path) * LAYOUT.chunk_size}
        values.append((prompt_key(path[-1]), encode_note(facts)))
    return values


def about(namespace: bytes = ONE, **facts: Any) -> tuple[Key, bytes]:
    """The note about a namespace."""
    usual = {"model": "llama", "dtype": "float32", "chunk_size": 4, "token_bytes": 48}
    return model_key(namespace), encode_note(usual | facts)


def flipped(value: bytes, bit: int) -> bytes:
    damaged = bytearray(value)
    damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    return bytes(damaged)
