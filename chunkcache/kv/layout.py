"""The device layout of chunks.

Per layer a block of n chunks is a tuple of tensors whose first dimension is chunks; how many and of
what shape is the layer's affair. Attention keeps keys `[n, kv_heads, head_dim, chunk]` (transposed,
so that scores are a plain product) and values `[n, kv_heads, chunk, value_dim]`. Any block viewed as
`[n * kv_heads, ...]` is one batch for `torch.bmm`, whatever node, request or pool its chunks belong
to; this is what lets phase 1 of a whole node be one call. Rejected: `[kv_heads, tokens, head_dim]`
(a batch over chunks and heads is no view of it, and bf16 products repack the keys on each call:
0.21 against 0.05 ms for 4 rows over 1,024 keys).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

KV = tuple[torch.Tensor, ...]


class Layer(ABC):
    """What one layer keeps of a token or of a chunk."""

    @abstractmethod
    def chunk_bytes(self, chunk_size: int, dtype: torch.dtype) -> int:
        """Bytes per chunk."""

    @abstractmethod
    def allocate(
        self, chunks: int, chunk_size: int, dtype: torch.dtype, device: torch.device
    ) -> KV:
        """Uninitialised memory for `chunks` chunks: tensors `[chunks, ...]`."""

    @abstractmethod
    def by_token(self, kv: KV) -> KV:
        """Views that tokens are written through: `[n, heads, chunk, width]`, a part of a token each."""

    @abstractmethod
    def wire(self, kv: KV) -> KV:
        """Views in the order in which stores keep chunks; of these, views as on the device."""


@dataclass(frozen=True)
class LayerShape(Layer):
    """Attention: `kv_heads` keys of `head_dim` and values of `value_dim` per token.

    Of a latent layer (MLA in its absorbed form) only keys are kept: its values are their first
    `value_dim` numbers.

    Raises:
        ValueError: values of a latent layer are wider than its keys.
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    latent: bool = False

    def __post_init__(self) -> None:
        if self.latent and self.value_dim > self.head_dim:
            raise ValueError(f"latent values of {self.value_dim} in keys of {self.head_dim}")

    def chunk_bytes(self, chunk_size: int, dtype: torch.dtype) -> int:
        """As the base class says."""
        numbers = self.head_dim + (0 if self.latent else self.value_dim)
        return self.kv_heads * numbers * dtype.itemsize * chunk_size

    def allocate(
        self, chunks: int, chunk_size: int, dtype: torch.dtype, device: torch.device
    ) -> KV:
        """Keys, and values unless the layer is latent."""
        keys = (chunks, self.kv_heads, self.head_dim, chunk_size)
        values = (chunks, self.kv_heads, chunk_size, self.value_dim)
        shapes = (keys,) if self.latent else (keys, values)
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)

    def by_token(self, kv: KV) -> KV:
        """As the base class says."""
        return (kv[0].transpose(2, 3), *kv[1:])

    def wire(self, kv: KV) -> KV:
        """Keys and values `[n, heads, chunk, width]`; turning keys twice leaves them as they were."""
        return self.by_token(kv)


@dataclass(frozen=True)
class ChunkLayout:
    """Shapes, type and place of the chunks of one model; without layers there are only tokens."""

    layers: tuple[Layer, ...]
    chunk_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.chunk_bytes // self.chunk_size

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk over all layers."""
        return sum(layer.chunk_bytes(self.chunk_size, self.dtype) for layer in self.layers)

    def attention(self, layer: int) -> LayerShape:
        """The shape of a layer that is attended to."""
        shape = self.layers[layer]
        assert isinstance(shape, LayerShape), f"layer {layer} keeps no keys"
        return shape

    def outline(self, layer: int) -> KV:
        """A chunk of one layer without memory: shapes and types."""
        return self._outlines[layer]

    @cached_property
    def alike(self) -> tuple[range, ...]:
        """All layers, as the longest runs of neighbours that keep the same."""
        starts = [n for n, one in enumerate(self.layers) if not n or one != self.layers[n - 1]]
        return tuple(map(range, starts, [*starts[1:], len(self.layers)]))

    @cached_property
    def _outlines(self) -> list[KV]:
        meta = torch.device("meta")
        return [layer.allocate(1, self.chunk_size, self.dtype, meta) for layer in self.layers]

    def allocate_alike(self, chunks: int) -> list[KV]:
        """Uninitialised memory, for each run of `alike` layers tensors `[layers, chunks, ...]`."""
        found = []
        for run in self.alike:
            parts = self.allocate_layer(run.start, len(run) * chunks)
            shapes = ((len(run), chunks, *part.shape[1:]) for part in parts)
            found.append(tuple(map(torch.Tensor.view, parts, shapes)))
        return found

    def allocate_layer(self, layer: int, chunks: int) -> KV:
        """Uninitialised memory for `chunks` chunks of one layer."""
        return self.layers[layer].allocate(chunks, self.chunk_size, self.dtype, self.device)

    def allocate(self, chunks: int) -> list[KV]:
        """Uninitialised memory for `chunks` chunks, a tuple of tensors per layer."""
        return by_layer(self.allocate_alike(chunks))


def by_layer(groups: Sequence[KV]) -> list[KV]:
    """Views of what lies together for layers that are alike, `[layers, ...]`: a tuple per layer."""
    return [layer for parts in groups for layer in zip(*map(torch.unbind, parts), strict=True)]
