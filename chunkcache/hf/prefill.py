"""From a prompt's ids to a row whose state is there: match, lease, prefill, publish."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

from chunkcache.config import Config
from chunkcache.hf.carrier import Carried, Carrier, Snapshot, Source
from chunkcache.hf.encoder import Encoding
from chunkcache.hf.flights import Flight, Flights
from chunkcache.kv import PoolRun
from chunkcache.kv.loader import Loaded
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tiers import Tiers
from chunkcache.lab.records import Reuse
from chunkcache.tree import Lease, Match, Node, Piece, pack

_CONTEXT = 12  # tokens on both sides of where a prompt leaves what is stored
_FETCHED = 256  # prompts that were prepared and not opened yet


class Space(NamedTuple):
    """A namespace, and how often the model or its arithmetic had changed when it was entered.

    A model may change and change back while a request runs: the name is then the old one again, and
    what the request computed is a mixture all the same.
    """

    name: bytes
    epoch: int


class Around(NamedTuple):
    """Ids around the first token of a prompt that is not stored, and those that are stored instead."""

    before: list[int]
    prompt: list[int]
    stored: list[int]


_NOWHERE = Around([], [], [])


@dataclass
class Row:
    """One prompt on its way; `Prefiller.close` gives everything back.

    Attributes:
        stops: positions at which a snapshot of the row is worth its bytes.
        whole: the prompt runs in one piece, and nothing of it is stored.
        taken: snapshots to be stored, by position.
        runs: whether colder tiers know that it runs.
        around: where the prompt left what is stored.
        waited: seconds for another row that computed the same.
    """

    space: Space
    tokens: list[int]
    carried: Carried
    leases: list[Lease]
    reuse: Reuse
    names: tuple[str, ...] = ()
    flight: Flight | None = field(default=None, repr=False)
    stops: frozenset[int] = frozenset()
    whole: bool = False
    taken: dict[int, Snapshot] = field(default_factory=dict, repr=False)
    runs: bool = False
    around: Around = field(default=_NOWHERE, repr=False)
    waited: float = 0.0

    @property
    def length(self) -> int:
        """Tokens whose state is there."""
        return self.carried.length


class Prefiller:
    """Opens rows, fills them and stores what was computed. Thread-safe; a row belongs to one thread.

    Args:
        carrier: carries state for the model.
        rows: whether products do not depend on where they are cut. If they do, exactness asks to
            reuse and cut at borders only, so that a hit runs the very same products as a miss.
        longest: prompts longer than this are not reused; None if all may be.
        avoid: prompts that contain this token are not reused; None if all may be.
        current: the space of the model as it is now, None if nothing may be stored; state of a model
            that changed meanwhile is not stored.
        tiers: colder ones than the store; None if there are none.
    """

    def __init__(
        self,
        carrier: Carrier,
        store: PrefixStore,
        settings: Config,
        rows: int,
        longest: int | None,
        avoid: int | None,
        current: Callable[[], Space | None],
        tiers: Tiers | None = None,
    ):
        self.carrier = carrier
        self.store = store
        self.settings = settings
        self.longest = longest
        self.avoid = avoid
        self.current = current
        self.tiers = tiers
        self.aligned = settings.mode == "exact" and not rows
        whole = carrier.layout.chunk_size if not carrier.reads_in_place else 1
        self.unit = settings.cut if self.aligned else whole
        self.flights = Flights(carrier.layout.chunk_size)
        self._fetched: OrderedDict[tuple[bytes, bytes], Loaded] = OrderedDict()

    @property
    def keeps_steps(self) -> bool:
        """Whether what decoding computed may be stored."""
        return not self.aligned and self.carrier.reads_in_place and not self.carrier.snapshots

    # -- opening

    def open(
        self,
        space: Space,
        tokens: list[int],
        limit: int | None = None,
        encoding: Encoding | None = None,
    ) -> Row:
        """A row with everything that can be reused of its first `limit` tokens (all but the last)."""
        if encoding is not None:
            space = Space(encoding.space(space.name), space.epoch)
        if why := self.unproved(tokens):
            return self._whole(space, tokens, encoding, why)
        limit = len(tokens) - 1 if limit is None else limit
        flight, waited = None, 0.0
        while flight is None:
            stored = self._found(space, tokens, limit)
            begin = perf_counter()
            flight = self.flights.wait_or_start(space.name, tokens, stored)
            waited += perf_counter() - begin
        try:
            colder = Loaded()
            if encoding is None:
                colder = self._load(space, tokens, stored, limit)
                fetched = self._fetched.pop((space.name, pack(tokens)), colder)
                colder = colder if colder.tokens else fetched
            row = self._lease(space, tokens, limit, flight, encoding, colder)
            row.waited = waited
        except BaseException:
            self.flights.land(flight)
            raise
        if self.tiers is not None:
            self.tiers.begin()
            row.runs = True
        return row

    def _load(self, space: Space, tokens: list[int], stored: int, limit: int) -> Loaded:
        """Brings from colder tiers what is not stored here."""
        limit -= limit % max(self.unit, self.carrier.layout.chunk_size)
        if self.tiers is None or limit <= stored or not self.may_store(space):
            return Loaded()
        return self.tiers.load(space.name, tokens, stored, limit)

    def prefetch(self, space: Space, tokens: list[int]) -> None:
        """Brings what is known of a prompt that will be opened soon, unless others are at it."""
        if self.tiers is None or self.unproved(tokens):
            return
        limit = len(tokens) - 1
        stored = self._found(space, tokens, limit)
        flight = self.flights.start_alone(space.name, tokens, stored)
        if flight is None:
            return
        try:
            loaded = self._load(space, tokens, stored, limit)
        finally:
            self.flights.land(flight)
        if loaded.tokens:  # its record will tell
            self._fetched[space.name, pack(tokens)] = loaded
            if len(self._fetched) > _FETCHED:
                self._fetched.popitem(last=False)

    def _found(self, space: Space, tokens: list[int], limit: int) -> int:
        """Tokens that a lease would let a row start from now."""
        if not self.carrier.snapshots:
            return self.store.tree(space.name).match(tokens, limit).tokens
        found = self.store.tree(space.name).snapshot_at(tokens, limit)
        return 0 if found is None else found.position

    def unproved(self, tokens: list[int]) -> str:
        """Why a prompt is one for which reuse is not proved; nothing if it is."""
        if self.longest is not None and len(tokens) > self.longest:
            return f"longer than {self.longest} tokens, up to which reuse is proved"
        if self.avoid is not None and self.avoid in tokens:
            return f"token {self.avoid} (padding) shifts the positions of those behind it"
        return ""

    def _whole(self, space: Space, tokens: list[int], encoding: Encoding | None, why: str) -> Row:
        """A row that reuses nothing and runs in one piece, as the plain model would."""
        reuse, fixed = Reuse(len(tokens), 0, {}, 0, why), None
        if encoding is not None:
            with self.store.lease(space.name, [], 0) as lease:
                fixed, known = self._encoded(space, encoding, lease)
            reuse = _with_encoder(reuse, encoding.tokens, known)
        carried = self.carrier.open(Source([], fixed=fixed))
        return Row(space, tokens, carried, [], reuse, whole=True)

    def _encoded(self, space: Space, encoding: Encoding, lease: Lease) -> tuple[Snapshot, bool]:
        """What is left of an encoder's input, and whether that was stored."""
        found = lease.snapshot(0)
        fixed = None if found is None else found.snapshot
        if isinstance(fixed, Snapshot) and fixed.key == encoding.key:
            return fixed, True
        fixed = self.carrier.encode(encoding.inputs, encoding.key)
        if self.may_store(space):
            self.store.keep(space.name, [], 0, fixed)
        return fixed, False

    def may_store(self, space: Space) -> bool:
        """Whether the model is still what it was when the space was entered."""
        now = self.current()
        return now is not None and now.epoch == space.epoch

    def _lease(
        self,
        space: Space,
        tokens: list[int],
        limit: int,
        flight: Flight,
        encoding: Encoding | None,
        colder: Loaded,
    ) -> Row:
        lease = self.store.lease(space.name, tokens, limit)
        try:
            used, snapshot = lease.tokens - lease.tokens % self.unit, None
            if self.carrier.snapshots:
                used, snapshot = self._resumable(lease, used)
            reuse = self._reuse(len(tokens), limit, used, lease.match, colder)
            fixed = None
            if encoding is not None:
                fixed, known = self._encoded(space, encoding, lease)
                reuse = _with_encoder(reuse, encoding.tokens, known)
            source = Source(tokens[:used], _runs(lease.pieces), snapshot, fixed)
            carried = self.carrier.open(source)
            if self.tiers is not None and used:
                self.tiers.used(space.name, tokens[:used], lease.match.node.hits)
            names = _names(lease.match)
            around = _around(tokens, lease, limit)
        except BaseException:
            lease.release()
            raise
        stops = self._stops(len(tokens), lease.tokens) if self.carrier.snapshots else frozenset()
        return Row(space, tokens, carried, [lease], reuse, names, flight, stops, around=around)

    def _resumable(self, lease: Lease, limit: int) -> tuple[int, Snapshot | None]:
        """The last position with a snapshot, and that; an encoder's, at the root, is not one."""
        found = lease.snapshot(limit) if limit else None
        if found is None or found.position == 0:
            return 0, None
        assert isinstance(found.snapshot, Snapshot)
        return found.position, found.snapshot

    def _reuse(self, tokens: int, limit: int, used: int, match: Match, colder: Loaded) -> Reuse:
        found = match.tokens
        reason = str(match.reason.value)
        if used < found - found % self.unit:
            reason = "stored behind the last snapshot"
        elif used < found:
            reason = f"rounded down to a border of {self.unit} tokens"
        elif colder.reason and found < limit - limit % self.unit:
            reason = colder.reason
        divergence = None if found >= limit else found
        return Reuse(tokens, used, _by_tier(used, colder.tokens), divergence, reason)

    # -- filling

    def prefill(self, row: Row, until: int) -> None:
        """Computes state up to token `until`, in steps, and takes snapshots on the way."""
        while row.length < until:
            end = min(until, self._step_end(row, row.length))
            self.carrier.forward(row.carried, row.tokens[row.length : end])
            self._take(row)

    def _take(self, row: Row) -> None:
        """Takes a snapshot where one is worth its bytes."""
        if row.length in row.stops and row.length not in row.taken:
            snapshot = row.carried.snapshot()
            if snapshot is not None:
                row.taken[row.length] = snapshot
                size = max(self.carrier.state_bytes, snapshot.bytes)  # windows grow until full
                self.carrier.state_bytes = size

    def _step_end(self, row: Row, at: int) -> int:
        """Where the forward that begins at `at` ends, if the prompt is long enough."""
        if row.whole:
            return len(row.tokens)
        if self.aligned:
            return (at // self.unit + 1) * self.unit
        end = at + self.settings.prefill_step
        return min([end, *(stop for stop in row.stops if stop > at)])

    def _stops(self, tokens: int, known: int) -> frozenset[int]:
        """Where a prompt of so many tokens, of which `known` are stored, leaves snapshots.

        Worth their bytes are the last position that a prompt like this one can be resumed at (its
        next turn will), where others left the same path, and one in every interval.
        """
        size = max(self.unit, self.carrier.layout.chunk_size)
        interval = self.settings.interval(self.carrier.state_bytes)
        ends = {end - end % size for end in (tokens - 1, tokens, known)} - {0}
        return frozenset(ends.union(range(interval, tokens, interval)))

    def last_step(self, row: Row) -> int:
        """Where the last step before the prompt's end begins."""
        at = row.length
        while (end := self._step_end(row, at)) < len(row.tokens):
            at = end
        return at

    def finish(self, row: Row) -> None:
        """Computes the whole prompt and stores it, if rows run alone."""
        self.prefill(row, self.last_step(row))
        rest = row.tokens[row.length :]
        self.carrier.finish(row.carried, rest)
        self.publish(row)

    # -- storing

    def publish(self, row: Row, **labels: object) -> int:
        """Stores the row's whole chunks, lets it read them from there, and lands its flight.

        Returns the tokens of the row that are stored now.
        """
        try:
            return 0 if row.whole else self._publish(row, labels)
        finally:
            self.land(row)

    def _publish(self, row: Row, labels: dict[str, object]) -> int:
        carried = row.carried
        self._take(row)
        tokens = carried.tokens(0)
        if self.aligned:  # only what a whole step computed comes out the same next time
            tokens = tokens[: carried.length - carried.length % self.unit]
        stored = self.store_tokens(row.space, carried, 0, tokens, **labels)
        self._keep(row, stored)
        if self.carrier.snapshots:
            self._offer(row.space, tokens[:stored], labels.get("name"))
        if stored > carried.held(0):
            self._rebase(row, stored)
        return stored

    def _keep(self, row: Row, stored: int) -> None:
        """Stores the snapshots that were taken; those beyond what is stored are lost."""
        for position, snapshot in row.taken.items():
            if position <= stored:
                self.store.keep(row.space.name, row.tokens, position, snapshot)
        row.taken.clear()

    def store_tokens(
        self, space: Space, carried: Carried, row: int, tokens: list[int], **labels: object
    ) -> int:
        """Stores whole chunks of one row; returns how many tokens are stored now.

        None from the first chunk on that holds an infinity or a NaN: a product over the whole chunk
        carries it to tokens before it, so that what is stored would depend on what came behind.
        """
        size, held = self.carrier.layout.chunk_size, carried.held(row)
        if not labels and len(tokens) - held < size:  # all whole chunks are stored and held
            return held
        if not self.may_store(space):
            return 0
        held -= held % size
        tokens = tokens[: held + carried.sound_chunks(row) * size]

        def blocks(first: int, count: int) -> list[tuple[Any, ...]]:
            return carried.blocks(row, first - held // size, count)

        stored = self.store.publish(space.name, tokens, blocks, **labels).tokens  # type: ignore[arg-type]
        if not self.carrier.snapshots:
            self._offer(space, tokens[:stored], labels.get("name"))
        return stored

    def _offer(self, space: Space, tokens: list[int], name: object) -> None:
        """Lets colder tiers have what is stored."""
        if self.tiers is not None and tokens:
            self.tiers.offer(space.name, tokens, name if isinstance(name, str) else None)

    def _rebase(self, row: Row, stored: int) -> None:
        """Holds what the row stored, and lets it read that from the pool."""
        lease = self.store.hold(row.space.name, row.carried.tokens(0), stored)
        row.leases.append(lease)
        self.carrier.rebase(row.carried, lease.tokens, _runs(lease.pieces))

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
        if row.runs and self.tiers is not None:
            self.tiers.end()
            row.runs = False


def _by_tier(used: int, colder: dict[str, int]) -> dict[str, int]:
    """The tokens used by where they were; those used last came from the coldest tier."""
    counts = {"device": max(0, used - sum(colder.values()))}
    for kind, tokens in colder.items():
        counts[kind] = min(tokens, used - sum(counts.values()))
    return {kind: tokens for kind, tokens in counts.items() if tokens}


def _shifted(position: int | None, by: int) -> int | None:
    return None if position is None else position + by


def _with_encoder(reuse: Reuse, tokens: int, known: bool) -> Reuse:
    """The record of a decoder's prompt and of the encoder's input before it."""
    cached = reuse.cached_tokens + (tokens if known else 0)
    return replace(
        reuse,
        prompt_tokens=reuse.prompt_tokens + tokens,
        cached_tokens=cached,
        tiers={"device": cached} if cached else {},
        divergence=0 if not known else _shifted(reuse.divergence, tokens),
        reason=reuse.reason if known else "this encoder input is not stored",
    )


def _around(tokens: list[int], lease: Lease, limit: int) -> Around:
    at = lease.tokens
    before = tokens[max(0, at - _CONTEXT) : at]
    if at >= limit:
        return Around(before, [], [])
    return Around(before, tokens[at : at + _CONTEXT], lease.behind(_CONTEXT))


def _runs(pieces: tuple[Piece, ...]) -> list[PoolRun]:
    return [piece.run for piece in pieces if isinstance(piece.run, PoolRun)]


def _names(match: Match) -> tuple[str, ...]:
    found: list[str] = []
    node: Node | None = match.node
    while node is not None:
        found += node.names
        node = node.parent
    return tuple(dict.fromkeys(found))
