"""Reuse by copying: the model's own cache is filled with what is stored, and its own code runs.

For models whose attention no registered function reaches, or whose state is not keys and values at
all. Every row has a cache of its own and runs its forwards alone, so padding, company and unequal
lengths cannot reach its state (transformers pads between prefix and tail, and recurrent layers take
that for tokens).

The same products run on the same state after a hit as after a miss: prefill is cut at the same
borders, and behind each border tensors lie in memory as they do after a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from chunkcache.hf.call import Call
from chunkcache.hf.carrier import Block, Carried, Carrier, Snapshot, Source
from chunkcache.hf.facts import Facts
from chunkcache.hf.form import Ends, Form, FormError, Kind, Path
from chunkcache.hf.running import announce
from chunkcache.hf.shell import make_shell
from chunkcache.kv.layout import ChunkLayout
from chunkcache.kv.pool import PoolRun

_log = logging.getLogger(__name__)


@dataclass
class OwnRow:
    """One sequence with a cache of the model's own; none before its first forward.

    Attributes:
        held: tokens that came from the pool; given: what else every forward gets.
        ready: logits of the last token, `[1, 1, vocabulary]`, that generate() has yet to ask for.
        first: the rows of its first chunk as they were when that was complete.
        sound: whether the cache is still what the probe saw; if not, nothing of it is stored.
    """

    tokens: list[int]
    cache: Any = None
    held: int = 0
    given: dict[str, Any] = field(default_factory=dict)
    ready: torch.Tensor | None = None
    first: tuple[torch.Tensor, ...] = ()
    sound: bool = True


class CopyIn(Carrier):
    """See the module; `model` is a twin that keeps its own attention."""

    reads_in_place = False
    alone = True

    def __init__(self, model: PreTrainedModel, facts: Facts, chunk_size: int):
        super().__init__()
        self.model = model
        self.call = Call(model)
        self._running = announce(model)
        self.facts = facts
        self.shapes = facts.row_shapes()
        dtype = self.shapes[0].dtype if self.shapes else torch.float32
        self.layout = ChunkLayout(tuple(self.shapes), chunk_size, dtype, model.device)
        self.snapshots = bool(facts.of(Kind.STATE) or facts.changing)
        self.generator = make_shell(model)

    def open(self, source: Source) -> OwnCache:
        """As the base class says."""
        row = OwnRow(list(source.tokens), None, len(source.tokens))
        if source.fixed is not None:
            hidden = source.fixed.ends.tensors[0]
            row.given = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
        if source.tokens or source.fixed is not None:
            row.cache = self._fill(source)
        return OwnCache(self, [row])

    def encode(self, inputs: dict[str, torch.Tensor], key: bytes) -> Snapshot:
        """What decoding needs of an encoder's input: its output, and keys and values made of that.

        The decoder makes these in its first forward; so a forward of one token is run and forgotten.
        """
        with torch.no_grad():
            out = self.model.get_encoder()(**inputs, return_dict=True)
            cache = self.call([0], None, 0, {"encoder_outputs": out}).cache
        tensors = self.facts.form.read(cache).tensors
        kept = (tensors[number] for number in self.facts.of(Kind.FIXED))
        return Snapshot(Ends((out.last_hidden_state, *kept), {}), key)

    def _fill(self, source: Source) -> Any:
        facts = self.facts
        tensors = {number: tensor.clone() for number, tensor in facts.constants.items()}
        chunks = len(source.tokens) // self.layout.chunk_size
        for layer, number in enumerate(facts.of(Kind.ROWS)):
            tensors[number] = facts.unpack(number, self._rows(source.runs, layer, chunks))
        plain: dict[Path, object] = {}
        if source.snapshot is not None:
            states = zip(facts.of(Kind.STATE), source.snapshot.ends.tensors, strict=True)
            tensors |= {number: state.clone() for number, state in states}
            plain |= source.snapshot.ends.plain
        if source.fixed is not None:  # nobody changes these, so all may read the same
            tensors |= dict(zip(facts.of(Kind.FIXED), source.fixed.ends.tensors[1:], strict=True))
        return facts.form.write([tensors[number] for number in range(len(tensors))], plain)

    def _rows(self, runs: Sequence[PoolRun], layer: int, chunks: int) -> torch.Tensor:
        parts = [run.layer(layer)[0] for run in runs]
        if not chunks:
            return self.layout.allocate_layer(layer, 0)[0].flatten(0, 1)
        return torch.cat(parts)[:chunks].flatten(0, 1)

    def forward(self, carried: Carried, ids: list[int]) -> None:
        """As the base class says."""
        self._run(carried, ids, last=True)

    def finish(self, carried: Carried, ids: list[int]) -> None:
        """Adds the last tokens of the prompt; generate() will ask for their logits."""
        _own(carried).sequences[0].ready = self._run(carried, ids, last=True)

    def logits(self, carried: Carried, ids: list[int]) -> torch.Tensor:
        """As the base class says."""
        return self._run(carried, ids, last=False)[0]

    def _run(self, carried: Carried, ids: list[int], last: bool) -> torch.Tensor:
        (row,) = _own(carried).sequences
        logits = self.advance(row, ids, last, prompt=True)
        if len(row.tokens) % self.layout.chunk_size == 0:
            self._settle(row)
        return logits

    def advance(
        self, row: OwnRow, ids: list[int], last: bool = True, prompt: bool = False
    ) -> torch.Tensor:
        """Adds tokens to a row; logits of the last one or of each, `[1, 1 or tokens, vocabulary]`."""
        self._running.prompt = prompt
        with torch.no_grad():
            out = self.call(ids, row.cache, len(row.tokens), row.given, last)
        row.cache = out.cache
        row.tokens += ids
        return out.logits

    def _settle(self, row: OwnRow) -> None:
        """Lays tensors out as a resume would: products of others may round otherwise."""
        ends = self.read(row)
        if ends is None:
            return
        if not row.first:
            row.first = tuple(rows.clone() for rows in self.first_chunk(ends))
        if not all(tensor.is_contiguous() for tensor in ends.tensors):
            tensors = [tensor.contiguous() for tensor in ends.tensors]
            row.cache = self.facts.form.write(tensors, ends.plain)

    def read(self, row: OwnRow) -> Ends | None:
        """The ends of a row's cache; None, and the row is no longer sound, if it became another.

        Three chunks show how a cache grows. One that goes on differently would be resumed wrongly.
        """
        if not row.sound:
            return None
        try:
            ends = self.facts.form.read(row.cache)
            flaw = self._flaw(row, ends)
        except FormError as error:
            flaw = str(error)
        if not flaw:
            return ends
        row.sound = False
        _log.warning("%s after %d tokens; this prompt is not stored", flaw, len(row.tokens))
        return None

    def _flaw(self, row: OwnRow, ends: Ends) -> str:
        """What contradicts the facts, if anything does."""
        facts = self.facts
        for number, shape in zip(facts.of(Kind.ROWS), self.shapes, strict=True):
            count = ends.tensors[number].shape[facts.leaves[number].axis]
            if count != len(row.tokens) * shape.per_chunk // self.layout.chunk_size:
                return "its cache stopped growing"
        same = zip(row.first, self.first_chunk(ends), strict=False)
        if not all(torch.equal(before, now) for before, now in same):
            return "its cache changed what was stored long before"
        if len(row.tokens) % self.layout.chunk_size:
            return ""  # what follows was seen at the ends of chunks
        if not all(torch.equal(ends.tensors[n], kept) for n, kept in facts.constants.items()):
            return "its cache changed what is the same for all prompts"
        if any(ends.plain.get(path) != value for path, value in facts.steady.items()):
            return "its cache changed a setting"
        return ""

    def first_chunk(self, ends: Ends) -> list[torch.Tensor]:
        """The rows of the first chunk, tensor by tensor."""
        facts = self.facts
        numbers = zip(facts.of(Kind.ROWS), self.shapes, strict=True)
        return [
            ends.tensors[number].narrow(facts.leaves[number].axis, 0, shape.per_chunk)
            for number, shape in numbers
        ]

    def join(self, rows: Sequence[Carried], copies: int, pads: list[int]) -> OwnCache:
        """As the base class says."""
        found = [row for carried in rows for row in _own(carried).sequences]
        joined = OwnCache(self, found)
        joined.reorder_cache(torch.arange(len(found)).repeat_interleave(copies))
        joined.pads = pads
        return joined

    def rebase(self, carried: Carried, tokens: int, runs: Sequence[PoolRun]) -> None:
        """Nothing moves: the row keeps its copy, and need not store it again."""
        _own(carried).sequences[0].held = tokens

    def copy(self, row: OwnRow) -> OwnRow:
        """A row that goes its own way from here."""
        form = Form(row.cache)
        tensors, plain = form.read(row.cache)
        cache = form.write([tensor.clone() for tensor in tensors], plain)
        return replace(row, tokens=list(row.tokens), cache=cache)


class OwnCache(Carried):
    """Rows with caches of the model's own."""

    def __init__(
        self,
        carrier: CopyIn,
        sequences: list[OwnRow],
        pads: list[int] | None = None,
    ):
        super().__init__(layers=[])
        self.carrier = carrier
        self.sequences = sequences
        self.pads = pads or [0] * len(sequences)

    @property
    def rows(self) -> int:
        return len(self.sequences)

    def tokens(self, row: int) -> list[int]:
        return self.sequences[row].tokens

    def held(self, row: int) -> int:
        return self.sequences[row].held

    @property
    def tail_bytes(self) -> int:
        layout, state = self.carrier.layout, self.carrier.state_bytes
        tokens = sum(len(row.tokens) for row in self.sequences)
        return tokens * layout.chunk_bytes // layout.chunk_size + state * self.rows

    def step(self, ids: list[list[int]]) -> torch.Tensor:
        """Adds a token to each row; its logits `[rows, 1, vocabulary]`."""
        self.forward_begins()
        pairs = zip(self.sequences, ids, strict=True)
        logits = torch.cat([self._step(row, new) for row, new in pairs])
        self.forward_ended()
        return logits

    def _step(self, row: OwnRow, ids: list[int]) -> torch.Tensor:
        logits, row.ready = row.ready, None
        return self.carrier.advance(row, ids) if logits is None else logits

    def sound_chunks(self, row: int) -> int:
        own, size = self.sequences[row], self.carrier.layout.chunk_size
        held, chunks = own.held // size, len(own.tokens) // size
        rows_of = self._rows_of(row)
        if rows_of is None:
            return 0
        for shape, rows in zip(self.carrier.shapes, rows_of, strict=True):
            finite = rows[held * shape.per_chunk : chunks * shape.per_chunk].isfinite().all(1)
            chunks = held + int(finite.cumprod(0).sum()) // shape.per_chunk
        return chunks - held

    def _rows_of(self, row: int) -> list[torch.Tensor] | None:
        """The growing tensors of a row, each `[rows, width]`; None if they may not be stored."""
        carrier = self.carrier
        ends = carrier.read(self.sequences[row])
        if ends is None:
            return None
        return [carrier.facts.pack(n, ends.tensors[n]) for n in carrier.facts.of(Kind.ROWS)]

    def blocks(self, row: int, first: int, count: int) -> list[Block]:
        found: list[Block] = []
        first += self.sequences[row].held // self.carrier.layout.chunk_size
        for shape, rows in zip(self.carrier.shapes, self._rows_of(row) or [], strict=True):
            part = rows[first * shape.per_chunk : (first + count) * shape.per_chunk]
            found.append((part.reshape(count, shape.per_chunk, shape.width),))
        return found

    def snapshot(self) -> Snapshot | None:
        facts = self.carrier.facts
        ends = self.carrier.read(self.sequences[0])
        if ends is None:
            return None
        tensors = tuple(ends.tensors[number].clone() for number in facts.of(Kind.STATE))
        return Snapshot(Ends(tensors, {path: ends.plain[path] for path in facts.changing}))

    # -- what generate() asks a cache

    @property
    def columns(self) -> int:
        return super().columns - (self.sequences[0].ready is not None)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams; a row that several follow is copied."""
        order = beam_idx.tolist()
        taken: set[int] = set()
        moved = []
        for number in order:
            row = self.sequences[number]
            moved.append(self.carrier.copy(row) if number in taken else row)
            taken.add(number)
        self.pads = [self.pads[number] for number in order]
        self.sequences = moved


def _own(carried: Carried) -> OwnCache:
    assert isinstance(carried, OwnCache)
    return carried
