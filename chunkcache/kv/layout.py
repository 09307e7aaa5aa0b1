"""The device layout of chunks.

Per layer a block of n chunks is two tensors: keys `[n, kv_heads, head_dim, chunk]` (transposed, so
that scores are a plain product) and values `[n, kv_heads, chunk, value_dim]`. Any block viewed as
`[n * kv_heads, ...]` is one batch for `torch.bmm`, whatever node, request or pool its chunks belong
to; this is what lets phase 1 of a whole node be one call. Rejected: `[kv_heads, tokens, head_dim]`
(a batch over chunks and heads is no view of it, and bf16 products repack the keys on each call:
0.21 against 0.05 ms for 4 rows over 1,024 keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps per token: `kv_heads` keys of `head_dim` and values of `value_dim`."""

    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class ChunkLayout:
    """Shapes, type and place of the chunks of one model."""

    layers: tuple[LayerShape, ...]
    chunk_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV over all layers."""
        return sum(layer.width for layer in self.layers) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk over all layers."""
        return self.token_bytes * self.chunk_size

    def allocate_layer(self, layer: int, chunks: int) -> KV:
        """Uninitialised memory for `chunks` chunks of one layer."""
        shape = self.layers[layer]
        keys = (chunks, shape.kv_heads, shape.head_dim, self.chunk_size)
        values = (chunks, shape.kv_heads, self.chunk_size, shape.value_dim)
        return (
            torch.empty(keys, dtype=self.dtype, device=self.device),
            torch.empty(values, dtype=self.dtype, device=self.device),
        )

    def allocate(self, chunks: int) -> list[KV]:
        """Uninitialised memory for `chunks` chunks, a pair of tensors per layer."""
        return [self.allocate_layer(layer, chunks) for layer in range(len(self.layers))]
