"""Layers of which plain rows are kept, to be copied into a model's own cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chunkcache.kv.layout import KV, Layer


@dataclass(frozen=True)
class RowShape(Layer):
    """One growing tensor of a model's own cache: `per_chunk` rows of `width` numbers a chunk.

    Its type is its own: a cache may keep tensors of several.
    """

    per_chunk: int
    width: int
    dtype: torch.dtype

    def chunk_bytes(self, chunk_size: int, dtype: torch.dtype) -> int:
        """As the base class says; caches that compress keep fewer rows than tokens."""
        return self.per_chunk * self.width * self.dtype.itemsize

    def allocate(
        self, chunks: int, chunk_size: int, dtype: torch.dtype, device: torch.device
    ) -> KV:
        """Rows `[chunks, per_chunk, width]`."""
        return (torch.empty((chunks, self.per_chunk, self.width), dtype=self.dtype, device=device),)

    def by_token(self, kv: KV) -> KV:
        """Not written token by token: whole chunks are copied."""
        raise NotImplementedError("rows are stored by whole chunks")

    def wire(self, kv: KV) -> KV:
        """As they are."""
        return kv
