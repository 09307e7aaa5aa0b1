"""transformers' Cache over a batch of chunked sequences.

`update()` stores the new KV and hands the model's own tensors back, with a note on the key that
tells the attention function where everything is. Nothing stored is ever concatenated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from chunkcache.attention.batch import Batch

NOTE = "_chunkcache_note"


class Note(NamedTuple):
    """What the attention function needs to know; travels on the key tensor."""

    batch: Batch
    layer: int


class ChunkLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's door to the batch; holds no tensors."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, cache: ChunkCache, index: int):
        super().__init__()
        self.cache = cache
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory belongs to the batch."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the real rows and tokens of `[rows, heads, tokens, dim]`; padding is dropped."""
        batch = self.cache.batch
        rows, tokens = batch.rows, batch.new_tokens
        batch.write(self.index, key_states[:rows, :, :tokens], value_states[:rows, :, :tokens])
        setattr(key_states, NOTE, Note(batch, self.index))
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns of the padded batch that are stored."""
        return self.cache.columns

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under its older name."""
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Key length and offset, if anybody builds a mask."""
        return self.cache.columns + int(query_length), 0

    def reset(self) -> None:
        """Not possible: the sequences belong to the request."""
        raise NotImplementedError("a ChunkCache serves one request and is not reset")


class ChunkCache(Cache):  # type: ignore[misc]
    """The cache of one generate() call.

    Args:
        batch: the rows.
        pads: per row, the padding in front of its tokens in the caller's input_ids.
        after_prefill: called once, after the first forward of several tokens.
        logits: False if nobody reads them: then as few as possible are computed.
    """

    def __init__(
        self,
        batch: Batch,
        pads: list[int] | None = None,
        after_prefill: Callable[[], None] | None = None,
        logits: bool = True,
    ):
        super().__init__(layers=[ChunkLayer(self, i) for i in range(len(batch.layout.layers))])
        self.batch = batch
        self.pads = pads or [0] * batch.rows
        self.after_prefill = after_prefill
        self.logits = logits

    @property
    def columns(self) -> int:
        """Stored tokens and padding of a row; the same for all rows."""
        return self.pads[0] + self.batch.sequences[0].length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams; tails are copied, shared chunks are not."""
        rows = beam_idx.tolist()
        if rows != list(range(self.batch.rows)):
            self.batch.adopt(self.batch.select(rows))
            self.pads = [self.pads[row] for row in rows]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self.reorder_cache(torch.arange(self.batch.rows).repeat_interleave(repeats))
