"""What all ways of carrying a sequence's state from one forward to the next have in common.

A `Carrier` is what the probe proved for a model: attention over chunks where they lie (two_phase.py)
or the model's own cache, filled with copies (copy_in.py). A `Carried` is the state of the rows of one
request; it is what generate() is handed as `past_key_values`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from chunkcache.attention.groups import Decisions
from chunkcache.hf.form import Ends
from chunkcache.kv.layout import ChunkLayout
from chunkcache.kv.pool import PoolRun

Block = tuple[torch.Tensor, ...]


class Snapshot(NamedTuple):
    """State at one position that cannot be cut out of rows; its tensors are never changed.

    Attributes:
        key: the encoder's input that it is of; empty if it is not of one.
    """

    ends: Ends
    key: bytes = b""

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.ends.tensors)


class Source(NamedTuple):
    """What a row starts from.

    Attributes:
        tokens: stored already; runs: where their rows lie (and maybe more behind them).
        snapshot: the state behind the tokens; fixed: what an encoder's input left.
    """

    tokens: list[int]
    runs: Sequence[PoolRun] = ()
    snapshot: Snapshot | None = None
    fixed: Snapshot | None = None


class Carried(Cache, ABC):  # type: ignore[misc]
    """The rows of one request: their tokens, their state, and forwards that add to both.

    Attributes:
        pads: per row, the padding in front of its tokens in the caller's input_ids.
        prompt_left: how many forwards of generate() still add tokens of the prompt; None before it.
        after_prefill: called after forwards of several tokens.
        first_token_at: when the first token of the answers was known, by `perf_counter`.
    """

    pads: list[int]
    prompt_left: int | None = None
    after_prefill: Callable[[], None] | None = None
    first_token_at: float | None = None

    def forward_begins(self) -> None:
        """Called before each forward of generate(), which by then has read what the last one gave."""
        if self.prompt_left == 0 and self.first_token_at is None:
            self.first_token_at = perf_counter()

    def forward_ended(self) -> None:
        """Called after it."""
        if self.prompt_left:
            self.prompt_left -= 1

    @property
    @abstractmethod
    def rows(self) -> int:
        """Sequences."""

    @abstractmethod
    def tokens(self, row: int) -> list[int]:
        """The ids of a row whose state is there; not a copy."""

    @abstractmethod
    def held(self, row: int) -> int:
        """How many of a row's tokens need not be stored: they were read from the pool."""

    @abstractmethod
    def sound_chunks(self, row: int) -> int:
        """Whole chunks behind `held` up to the first that is not all finite numbers."""

    @abstractmethod
    def blocks(self, row: int, first: int, count: int) -> list[Block]:
        """Chunks of a row, counted from behind `held`, as the pool stores them, layer by layer."""

    @abstractmethod
    def snapshot(self) -> Snapshot | None:
        """A copy of the state of the only row as it is now; None if it may not be stored."""

    @property
    @abstractmethod
    def tail_bytes(self) -> int:
        """Memory of its own."""

    @property
    def length(self) -> int:
        """Tokens of the first row."""
        return len(self.tokens(0))

    @property
    def columns(self) -> int:
        """Stored tokens and padding of a row; the same for all rows."""
        return self.pads[0] + self.length


class Carrier(ABC):
    """A proven way to carry state for one model.

    Attributes:
        layout: of the chunks it stores.
        snapshots: whether a prefix can be resumed only where a snapshot was taken.
        state_bytes: of one snapshot.
        reads_in_place: whether any number of tokens can be read from the pool, where they lie.
        alone: whether every row runs its forwards alone, its prompt's last one before generate().
        model: runs the forwards; generator: its generate() works on what `join` gives.
        decisions: how often rows met shared chunks in one product.
    """

    layout: ChunkLayout
    snapshots: bool
    reads_in_place: bool
    alone: bool
    model: PreTrainedModel
    generator: PreTrainedModel

    def __init__(self) -> None:
        self.decisions = Decisions()
        self.state_bytes = 0

    @abstractmethod
    def open(self, source: Source) -> Carried:
        """One row that starts from what is stored."""

    def encode(self, inputs: dict[str, torch.Tensor], key: bytes) -> Snapshot:
        """What a row needs of an encoder's input, whose content is `key`; for encoder-decoders."""
        raise NotImplementedError("this model has no encoder")

    def finish(self, carried: Carried, ids: list[int]) -> None:
        """Adds the last tokens of the only row's prompt; only if rows run alone."""
        raise NotImplementedError("generate() runs the last step of a prompt")

    @abstractmethod
    def forward(self, carried: Carried, ids: list[int]) -> None:
        """Adds tokens to the only row; nobody reads its logits."""

    @abstractmethod
    def logits(self, carried: Carried, ids: list[int]) -> torch.Tensor:
        """Adds tokens to the only row and gives the logits of each, `[tokens, vocabulary]`."""

    @abstractmethod
    def join(self, rows: Sequence[Carried], copies: int, pads: list[int]) -> Carried:
        """One request of all rows, `copies` of each side by side; the rows are not used again."""

    @abstractmethod
    def rebase(self, carried: Carried, tokens: int, runs: Sequence[PoolRun]) -> None:
        """The only row may read its first `tokens` tokens from the pool from now on."""
