"""From a prompt's ids to a row whose KV is there: match, lease, prefill, publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from chunkcache.attention.batch import Batch
from chunkcache.attention.choice import choose
from chunkcache.attention.groups import Decisions, Gate
from chunkcache.attention.kernel import Kernel
from chunkcache.config import Config
from chunkcache.hf.cache import ChunkCache
from chunkcache.hf.flights import Flight, Flights
from chunkcache.kv import Arena, PoolRun
from chunkcache.kv.sequence import Sequence
from chunkcache.kv.store import PrefixStore
from chunkcache.lab.records import Reuse
from chunkcache.tree import Lease, Match, Node, Piece


class Space(NamedTuple):
    """A namespace, and how often the model or its arithmetic had changed when it was entered.

    A model may change and change back while a request runs: the name is then the old one again, and
    what the request computed is a mixture all the same.
    """

    name: bytes
    epoch: int


@dataclass
class Row:
    """One prompt on its way; `Prefiller.close` gives everything back."""

    space: Space
    tokens: list[int]
    batch: Batch
    leases: list[Lease]
    reuse: Reuse
    names: tuple[str, ...] = ()
    flight: Flight | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """Tokens whose KV is there."""
        return self.batch.sequences[0].length


class Prefiller:
    """Opens rows, fills them and stores what was computed. Thread-safe; a row belongs to one thread.

    Args:
        borders: reuse and cut at multiples of `settings.border` only, and copy what is reused, so
            that a hit runs the very same products as a miss.
        current: the space of the model as it is now, None if nothing may be stored; KV of a model
            that changed meanwhile is not stored.
    """

    def __init__(
        self,
        twin: PreTrainedModel,
        store: PrefixStore,
        settings: Config,
        borders: bool,
        current: Callable[[], Space | None],
    ):
        self.twin = twin
        self.store = store
        self.settings = settings
        self.borders = borders
        self.current = current
        self.decisions = Decisions()
        self.flights = Flights(settings.chunk_size)
        self._gate = Gate(settings.two_phase, settings.two_phase_rows, settings.two_phase_tokens)

    # -- opening

    def open(self, space: Space, tokens: list[int], limit: int | None = None) -> Row:
        """A row with everything that can be reused of its first `limit` tokens (all but the last)."""
        limit = len(tokens) - 1 if limit is None else limit
        tree, flight = self.store.tree(space.name), None
        while flight is None:
            stored = tree.match(tokens, limit).tokens
            flight = self.flights.wait_or_start(space.name, tokens, stored)
        try:
            return self._lease(space, tokens, limit, flight)
        except BaseException:
            self.flights.land(flight)
            raise

    def _lease(self, space: Space, tokens: list[int], limit: int, flight: Flight) -> Row:
        lease = self.store.lease(space.name, tokens, limit)
        try:
            used = lease.tokens
            if self.borders:
                used -= used % self.settings.border
            batch = self._batch(tokens[:used], lease.pieces)
            reuse = self._reuse(len(tokens), limit, used, lease.match)
            names = _names(lease.match)
        except BaseException:
            lease.release()
            raise
        return Row(space, tokens, batch, [lease], reuse, names, flight)

    def _batch(self, tokens: list[int], pieces: tuple[Piece, ...]) -> Batch:
        """A row that reads whole chunks where they are, and owns a copy of a chunk used in part."""
        layout = self.store.layout
        whole, rest = divmod(len(tokens), layout.chunk_size)
        if self.borders:
            whole, rest = 0, len(tokens)
        runs = _runs(pieces)
        shared, behind = _cut(runs, whole)
        sequence = Sequence(layout.chunk_size, list(tokens), tuple(shared))
        arena = Arena(layout)
        if rest:
            needed = -(-rest // layout.chunk_size)
            sequence.tail = list(arena.extend(needed))
            at = 0
            for run in _cut(behind, needed)[0]:
                layers = range(len(layout.layers))
                arena.copy_chunks([run.layer(layer) for layer in layers], at)
                at += len(run)
            arena.clear_behind(needed - 1, rest - (needed - 1) * layout.chunk_size)
        return Batch(layout, [sequence], arena, self._kernel(), self._gate, self.decisions)

    def _kernel(self) -> Kernel:
        """One per row, with scratch memory of its own."""
        # Between borders a hit runs the same products as a miss, whatever their order inside.
        ordered = self.settings.mode == "exact" and not self.borders
        return choose(self.store.layout, self.settings.kernel, ordered)(self.store.layout)

    def _reuse(self, tokens: int, limit: int, used: int, match: Match) -> Reuse:
        found = match.tokens
        reason = str(match.reason.value)
        if used < found:
            reason = f"rounded down to a border of {self.settings.border} tokens"
        divergence = None if found >= limit else found
        return Reuse(tokens, used, {"device": used} if used else {}, divergence, reason)

    # -- filling

    def prefill(self, row: Row, until: int) -> None:
        """Computes KV up to token `until`, in steps, without gradients."""
        while row.length < until:
            end = min(until, self._step_end(row.length))
            ids = torch.tensor([row.tokens[row.length : end]], device=self.twin.device)
            cache = ChunkCache(row.batch, logits=False)
            with torch.no_grad():
                self.twin(input_ids=ids, past_key_values=cache, use_cache=True)

    def _step_end(self, at: int) -> int:
        if self.borders:
            return (at // self.settings.border + 1) * self.settings.border
        return at + self.settings.prefill_step

    def last_step(self, row: Row) -> int:
        """Where the last step before the prompt's end begins."""
        at = row.length
        while (end := self._step_end(at)) < len(row.tokens):
            at = end
        return at

    # -- storing

    def publish(self, row: Row, **labels: object) -> int:
        """Stores the row's whole chunks, lets it read them from there, and lands its flight.

        Returns the tokens of the row that are stored now.
        """
        try:
            return self._publish(row, labels)
        finally:
            self.land(row)

    def _publish(self, row: Row, labels: dict[str, object]) -> int:
        sequence = row.batch.sequences[0]
        tokens = sequence.tokens
        if self.borders:  # only what a whole step computed comes out the same next time
            tokens = tokens[: sequence.length - sequence.length % self.settings.border]
        stored = self.store_tokens(row.space, row.batch, 0, tokens, **labels)
        if not self.borders and stored > sequence.shared_tokens:
            self._rebase(row, stored)
        return stored

    def store_tokens(
        self, space: Space, batch: Batch, row: int, tokens: list[int], **labels: object
    ) -> int:
        """Stores whole chunks of one row of a batch; returns how many tokens are stored now.

        None from the first chunk on that holds an infinity or a NaN: a product over the whole chunk
        carries it to tokens before it, so that what is stored would depend on what came behind.
        """
        size, held = self.settings.chunk_size, batch.sequences[row].shared_tokens
        if not labels and len(tokens) - held < size:  # all whole chunks are stored and held
            return held
        if self.current() != space:
            return 0
        shared = held // size
        tokens = tokens[: (shared + batch.finite_chunks(row)) * size]

        def blocks(first: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return batch.tail_blocks(row, first - shared, count)

        return self.store.publish(space.name, tokens, blocks, **labels).tokens  # type: ignore[arg-type]

    def _rebase(self, row: Row, stored: int) -> None:
        """The row reads its stored chunks from the pool; only what is behind them stays private."""
        sequence, layout = row.batch.sequences[0], self.store.layout
        lease = self.store.hold(row.space.name, sequence.tokens, stored)
        row.leases.append(lease)
        drop = (lease.tokens - sequence.shared_tokens) // layout.chunk_size
        runs, _ = _cut(_runs(lease.pieces), lease.tokens // layout.chunk_size)
        keep = sequence.tail[drop:]
        arena = row.batch.arena.select(keep)
        moved = Sequence(layout.chunk_size, sequence.tokens, tuple(runs), list(range(len(keep))))
        row.batch.adopt(Batch(layout, [moved], arena, row.batch.kernel))

    def land(self, row: Row) -> None:
        """Others need not wait for this row any longer."""
        if row.flight is not None:
            self.flights.land(row.flight)
            row.flight = None

    def close(self, row: Row) -> None:
        """Gives back leases and flight; again does nothing."""
        self.land(row)
        for lease in row.leases:
            lease.release()
        row.leases.clear()


def _runs(pieces: tuple[Piece, ...]) -> list[PoolRun]:
    return [piece.run for piece in pieces if isinstance(piece.run, PoolRun)]


def _cut(runs: list[PoolRun], chunks: int) -> tuple[list[PoolRun], list[PoolRun]]:
    """The first `chunks` chunks of consecutive runs, and the rest."""
    head, rest = [], []
    for run in runs:
        if chunks >= len(run):
            head.append(run)
        elif chunks > 0:
            first, second = run.split(chunks)
            head.append(first)
            rest.append(second)
        else:
            rest.append(run)
        chunks -= min(chunks, len(run))
    return head, rest


def _names(match: Match) -> tuple[str, ...]:
    found: list[str] = []
    node: Node | None = match.node
    while node is not None:
        found += node.names
        node = node.parent
    return tuple(dict.fromkeys(found))
