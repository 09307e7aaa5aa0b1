"""The private, growing KV of the sequences of one batch: their tails, chunk by chunk.

All tails share one block per layer, so that attention over tails of any lengths is one batched
product without padding to the longest. Chunks are appended at the end of the block; which row owns
which chunk is the caller's knowledge (`Sequence.tail`). Memory grows by single chunks while the
block is small and by 1/16 later, layer by layer, so neither the size nor the peak is doubled.
"""

from __future__ import annotations

import torch

from chunkcache.kv.layout import KV, ChunkLayout


class Arena:
    """`used` chunks of memory in the device layout, per layer."""

    def __init__(self, layout: ChunkLayout, chunks: int = 0):
        self.layout = layout
        self.used = 0
        self._capacity = 0
        self._layers: list[KV] = layout.allocate(0)
        if chunks:
            self._resize(chunks)

    @property
    def bytes(self) -> int:
        """Bytes held, used or not."""
        return self._capacity * self.layout.chunk_bytes

    def layer(self, layer: int, chunks: int | None = None) -> KV:
        """Views of the first chunks of one layer (those in use): tensors `[n, ...]`."""
        count = self.used if chunks is None else chunks
        return tuple(tensor[:count] for tensor in self._layers[layer])

    def extend(self, chunks: int) -> range:
        """Appends zeroed chunks; returns their ids. Amortised O(chunks)."""
        first = self.used
        if first + chunks > self._capacity:
            self._resize(max(first + chunks, first + first // 16))
        self.used += chunks
        return range(first, self.used)

    def _resize(self, capacity: int) -> None:
        for index, held in enumerate(self._layers):
            wider = self.layout.allocate_layer(index, capacity)
            for old, new in zip(held, wider, strict=True):
                new[: self.used].copy_(old[: self.used])
                new[self.used :].zero_()  # masked rows must hold finite numbers
            self._layers[index] = wider
        self._capacity = capacity

    def _by_token(self, layer: int) -> KV:
        """Views of all memory of one layer, `[n, heads, chunk, width]`."""
        return self.layout.layers[layer].by_token(self._layers[layer])

    def append(self, layer: int, chunk: int, offset: int, *parts: torch.Tensor) -> None:
        """Writes one row's consecutive tokens, from `offset` of chunk `chunk` on into those behind it.

        Args:
            parts: `[heads, tokens, width]`: keys, and values unless the layer is latent.
        """
        for held, part in zip(self._by_token(layer), parts, strict=True):
            _write(held, chunk, offset, part)

    def append_step(
        self, layer: int, chunks: torch.Tensor, offsets: torch.Tensor, *parts: torch.Tensor
    ) -> None:
        """Writes one token per row, at `offsets[row]` of chunk `chunks[row]`.

        Args:
            parts: `[rows, heads, width]`: keys, and values unless the layer is latent.
        """
        for held, part in zip(self._by_token(layer), parts, strict=True):
            held[chunks, :, offsets] = part

    def copy_chunks(self, source: list[KV], first: int) -> None:
        """Copies blocks of chunks (a tuple of tensors per layer) to chunk `first` and behind."""
        for held, other in zip(self._layers, source, strict=True):
            for to, part in zip(held, other, strict=True):
                to[first : first + len(part)].copy_(part)

    def clear_behind(self, chunk: int, offset: int) -> None:
        """Forgets the tokens of a chunk from `offset` on: they belong to somebody else's prompt."""
        for layer in range(len(self._layers)):
            for held in self._by_token(layer):
                held[chunk, :, offset:] = 0

    def select(self, ids: list[int]) -> Arena:
        """A new arena with copies of the named chunks, in that order (repeats allowed)."""
        other = Arena(self.layout, len(ids))
        other.extend(len(ids))
        index = torch.tensor(ids, dtype=torch.long, device=self.layout.device)
        for layer in range(len(self._layers)):
            for held, to in zip(self.layer(layer), other.layer(layer), strict=True):
                torch.index_select(held, 0, index, out=to)
        return other


def _write(held: torch.Tensor, chunk: int, offset: int, part: torch.Tensor) -> None:
    """Tokens `[heads, tokens, width]` into `[n, heads, chunk, width]`: a chunk begun, whole ones, a rest."""
    size, (heads, tokens, width) = held.shape[2], part.shape
    done = 0
    if offset:
        done = min(size - offset, tokens)
        held[chunk, :, offset : offset + done] = part[:, :done]
        chunk += 1
    whole = (tokens - done) // size
    if whole:
        block = part[:, done : done + whole * size].reshape(heads, whole, size, width)
        held[chunk : chunk + whole] = block.transpose(0, 1)
        done += whole * size
    if done < tokens:
        held[chunk + whole, :, : tokens - done] = part[:, done:]
