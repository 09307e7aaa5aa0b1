"""transformers' Cache over a batch of chunked sequences.

`update()` stores the new KV and hands the model's own tensors back, with a note on the key that
tells the attention function where everything is. Nothing stored is ever concatenated. Layers with
a recurrent or convolutional state keep it in transformers' own layer objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from chunkcache.attention.batch import Batch
from chunkcache.attention.rule import Hiding
from chunkcache.hf.carrier import Block, Carried, Snapshot
from chunkcache.hf.form import Ends

NOTE = "_chunkcache_note"
Place = tuple[object, ...]  # of a state: (layer, "conv" or "recurrent", number)


class Note(NamedTuple):
    """What the attention function needs to know; travels on the key tensor.

    Attributes:
        window: how many tokens the layer's own cache would keep, None for all.
        rules: by which the layer may be attended to, None before that is proved.
        columns: tokens of the forward, padding included.
    """

    batch: Batch
    layer: int
    window: int | None
    rules: frozenset[Hiding] | None
    columns: int


class Kept(NamedTuple):
    """What one of the model's layers keeps.

    Attributes:
        rows: number of the layer in the layout, None if it keeps nothing per token.
        states: how many convolution and recurrent states it has.
        window: how many tokens its own cache would keep, None for all.
        rules: by which it is attended to, None before that is proved.
    """

    rows: int | None
    states: int = 0
    window: int | None = None
    rules: frozenset[Hiding] | None = None


class ChunkLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's door to the batch; holds no tensors."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, cache: ChunkCache, kept: Kept):
        super().__init__()
        self._open(cache, kept)

    def _open(self, cache: ChunkCache, kept: Kept) -> None:
        assert kept.rows is not None
        self.cache = cache
        self.index = kept.rows
        self.kept = kept
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory belongs to the batch."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the real rows and tokens of `[rows, heads, tokens, dim]`; padding is dropped."""
        batch = self.cache.batch
        rows, tokens = batch.rows, batch.new_tokens
        parts = [key_states[:rows, :, :tokens], value_states[:rows, :, :tokens]]
        if batch.layout.attention(self.index).latent:  # the latent and its rotated part are one key
            parts = [torch.cat(parts, -1)]
        batch.write(self.index, *parts)
        self.cache.latest = Note(
            batch, self.index, self.kept.window, self.kept.rules, key_states.shape[2]
        )
        setattr(key_states, NOTE, self.cache.latest)
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


class MixedLayer(LinearAttentionLayer, ChunkLayer):  # type: ignore[misc]
    """A layer with attention and a state side by side (Falcon-H1, Zaya)."""

    is_compileable = False

    def __init__(self, cache: ChunkCache, kept: Kept):
        LinearAttentionLayer.__init__(self, number_of_states=kept.states)
        self._open(cache, kept)

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


class NoLayer(ChunkLayer):
    """A layer that keeps nothing: it reads what another one stored, or has no attention."""

    def __init__(self, cache: ChunkCache):
        CacheLayerMixin.__init__(self)
        self.cache = cache
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not what the probe saw."""
        raise NotImplementedError("this layer kept nothing when the model was proved")


def _layer(cache: ChunkCache, kept: Kept) -> Any:
    if kept.rows is not None:
        return MixedLayer(cache, kept) if kept.states else ChunkLayer(cache, kept)
    return LinearAttentionLayer(number_of_states=kept.states) if kept.states else NoLayer(cache)


class ChunkCache(Carried):
    """The cache of one request.

    Args:
        batch: the rows; kept: what each of the model's layers keeps (all keep rows, if not given).
        pads: per row, the padding in front of its tokens in the caller's input_ids.
    """

    def __init__(
        self, batch: Batch, kept: tuple[Kept, ...] | None = None, pads: list[int] | None = None
    ):
        self.batch = batch
        self.latest: Note | None = None  # of the layer that was stored last
        self.kept = kept or tuple(Kept(number) for number in range(len(batch.layout.layers)))
        super().__init__(layers=[_layer(self, one) for one in self.kept])
        self.pads = pads or [0] * batch.rows
        self.after_prefill: Callable[[], None] | None = None
        self.logits = True  # False if nobody reads them: then as few as possible are computed

    # -- Carried

    @property
    def rows(self) -> int:
        return self.batch.rows

    def tokens(self, row: int) -> list[int]:
        return self.batch.sequences[row].tokens

    def held(self, row: int) -> int:
        return self.batch.sequences[row].shared_tokens

    def sound_chunks(self, row: int) -> int:
        return self.batch.finite_chunks(row)

    def blocks(self, row: int, first: int, count: int) -> list[Block]:
        return list(self.batch.tail_blocks(row, first, count))

    @property
    def tail_bytes(self) -> int:
        states = sum(state.nbytes for state in self.states().values())
        return self.batch.arena.bytes + states

    def snapshot(self) -> Snapshot:
        states = self.states()
        copies = tuple(state.clone() for state in states.values())
        places: dict[Place, object] = {place: number for number, place in enumerate(states)}
        return Snapshot(Ends(copies, places))

    # -- states

    def _stateful(self) -> Iterator[tuple[int, LinearAttentionLayer]]:
        for number, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionLayer):
                yield number, layer

    def states(self) -> dict[Place, torch.Tensor]:
        """All states that are there, `[rows, ...]` each."""
        found: dict[Place, torch.Tensor] = {}
        for number, layer in self._stateful():
            for kind, states in (
                ("conv", layer.conv_states),
                ("recurrent", layer.recurrent_states),
            ):
                found |= {
                    (number, kind, i): state for i, state in states.items() if state is not None
                }
        return found

    def set_states(self, states: dict[Place, torch.Tensor]) -> None:
        """Takes states over; they are changed in place from now on."""
        for number, layer in self._stateful():
            for (where, kind, i), state in states.items():
                if where == number:
                    layer.lazy_initialization(**{f"{kind}_states": state}, state_idx=i)
                    getattr(layer, f"{kind}_states")[i] = state
                    layer.has_previous_state[i] = True

    # -- what transformers asks a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that are stored."""
        return self.columns

    @property
    def is_compileable(self) -> bool:
        """Never: chunks come and go."""
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams; tails are copied, shared chunks are not."""
        rows = beam_idx.tolist()
        if rows != list(range(self.batch.rows)):
            self.batch.adopt(self.batch.select(rows))
            self.pads = [self.pads[row] for row in rows]
            for _, layer in self._stateful():
                LinearAttentionLayer.reorder_cache(layer, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self.reorder_cache(torch.arange(self.batch.rows).repeat_interleave(repeats))
