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
        """Views of the first chunks: keys `[n, heads, dim, chunk]`, values `[n, heads, chunk, dim]`."""
        count = self.used if chunks is None else chunks
        keys, values = self._layers[layer]
        return keys[:count], values[:count]

    def extend(self, chunks: int) -> range:
        """Appends zeroed chunks; returns their ids. Amortised O(chunks)."""
        first = self.used
        if first + chunks > self._capacity:
            self._resize(max(first + chunks, first + first // 16))
        self.used += chunks
        return range(first, self.used)

    def _resize(self, capacity: int) -> None:
        for index, (keys, values) in enumerate(self._layers):
            wider = self.layout.allocate_layer(index, capacity)
            for old, new in zip((keys, values), wider, strict=True):
                new[: self.used].copy_(old[: self.used])
                new[self.used :].zero_()  # masked rows must hold finite numbers
            self._layers[index] = wider
        self._capacity = capacity

    def append(
        self, layer: int, chunk: int, offset: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Writes one row's consecutive tokens, from `offset` of chunk `chunk` on into those behind it.

        Args:
            keys: `[heads, tokens, dim]`; values: `[heads, tokens, value_dim]`.
        """
        size, tokens = self.layout.chunk_size, keys.shape[1]
        all_keys, all_values = self._layers[layer]
        done = 0
        if offset:
            done = min(size - offset, tokens)
            end = offset + done
            all_keys[chunk, :, :, offset:end] = keys[:, :done].transpose(1, 2)
            all_values[chunk, :, offset:end] = values[:, :done]
            chunk += 1
        whole = (tokens - done) // size
        if whole:
            part = slice(done, done + whole * size)
            heads, _, dim = keys.shape
            block = keys[:, part].reshape(heads, whole, size, dim)
            all_keys[chunk : chunk + whole] = block.permute(1, 0, 3, 2)
            block = values[:, part].reshape(heads, whole, size, values.shape[-1])
            all_values[chunk : chunk + whole] = block.permute(1, 0, 2, 3)
            done += whole * size
            chunk += whole
        if done < tokens:
            rest = tokens - done
            all_keys[chunk, :, :, :rest] = keys[:, done:].transpose(1, 2)
            all_values[chunk, :, :rest] = values[:, done:]

    def append_step(
        self,
        layer: int,
        chunks: torch.Tensor,
        offsets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Writes one token per row, at `offsets[row]` of chunk `chunks[row]`.

        Args:
            keys: `[rows, heads, dim]`; values: `[rows, heads, value_dim]`.
        """
        all_keys, all_values = self._layers[layer]
        all_keys[chunks, :, :, offsets] = keys
        all_values[chunks, :, offsets] = values

    def copy_chunks(self, source: list[KV], first: int) -> None:
        """Copies blocks of chunks (a pair per layer) to chunk `first` and behind."""
        for (keys, values), (from_keys, from_values) in zip(self._layers, source, strict=True):
            keys[first : first + len(from_keys)].copy_(from_keys)
            values[first : first + len(from_values)].copy_(from_values)

    def clear_behind(self, chunk: int, offset: int) -> None:
        """Forgets the tokens of a chunk from `offset` on: they belong to somebody else's prompt."""
        for keys, values in self._layers:
            keys[chunk, :, :, offset:] = 0
            values[chunk, :, offset:] = 0

    def select(self, ids: list[int]) -> Arena:
        """A new arena with copies of the named chunks, in that order (repeats allowed)."""
        other = Arena(self.layout, len(ids))
        other.extend(len(ids))
        index = torch.tensor(ids, dtype=torch.long, device=self.layout.device)
        for layer in range(len(self._layers)):
            keys, values = self.layer(layer)
            to_keys, to_values = other.layer(layer)
            torch.index_select(keys, 0, index, out=to_keys)
            torch.index_select(values, 0, index, out=to_values)
        return other
