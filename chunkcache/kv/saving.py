"""One path from the pool to the tiers that it belongs in, a batch at a time, parents first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from chunkcache.errors import StoreError
from chunkcache.kv.codec import Identity, encode_chunk, encode_state, identities
from chunkcache.kv.loader import States
from chunkcache.kv.notes import encode_note, model_key, prompt_key
from chunkcache.kv.pool import PoolRun
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier, batch_of
from chunkcache.stores.base import Key
from chunkcache.tree import Lease, unpack

_log = logging.getLogger(__name__)
Encode = Callable[[bool], bytes]  # compressed or not


@dataclass(frozen=True)
class Path:
    """What is to be written.

    Attributes:
        data: token ids, packed; hits: how often its end was reused; name: of the prompt.
    """

    namespace: bytes
    data: bytes = field(repr=False)
    hits: int = 0
    name: str | None = None

    @property
    def rank(self) -> tuple[bool, int]:
        """Greater ones are written first."""
        return self.name is not None, self.hits

    @property
    def key(self) -> int:
        """Of namespace and tokens; two may have the same, which costs no more than a minute."""
        return hash((self.namespace, self.data))

    def covers(self, other: Path) -> bool:
        """Whether writing this one writes the other too."""
        same = self.namespace == other.namespace and other.name in (None, self.name)
        return same and self.data.startswith(other.data)


@dataclass
class _Share:
    """What of a path a tier admits and has room for, and what of that it lacks."""

    belongs: list[Identity]
    lacks: set[Identity]
    takes: bool = True  # until it fails, or keeps less than it is given

    @property
    def whole(self) -> list[Identity]:
        """What it has, without a gap."""
        return list(takewhile(lambda one: one not in self.lacks, self.belongs))


class Save:
    """One path on its way.

    Args:
        about: what the note on its namespace says.
        failed: hears of tiers that take nothing now.
    """

    def __init__(
        self,
        store: PrefixStore,
        tiers: Sequence[Tier],
        states: States | None,
        about: dict[str, Any],
        failed: Callable[[StoreError], None],
        path: Path,
    ):
        self.store = store
        self.states = states
        self.about = about
        self.failed = failed
        self.path = path
        self.layout = store.layout
        self.tokens: list[int] = unpack(path.data).tolist()
        self.chain = identities(path.namespace, path.data, self.layout.chunk_size)
        self.done = 0  # chunks
        self._strange: set[Key] = set()  # snapshots that cannot be stored
        with self._hold(len(self.tokens)) as lease:
            self.chain = self.chain[: lease.tokens // self.layout.chunk_size]
            named = path.name is not None
            admitted = {tier: tier.admits(lease.match.node, named) for tier in tiers}
        self.shares = {tier: self._share(tier, tokens) for tier, tokens in admitted.items()}

    def _share(self, tier: Tier, tokens: int) -> _Share:
        """A tier's part of the path.

        All is asked for at once, which is a use of each chunk, so that the end of a path leaves before
        its beginning, whatever is written meanwhile.
        """
        most = tier.room(self.layout)
        belong = self.chain[: min(most, tokens // self.layout.chunk_size)]
        try:
            there = tier.guard.exists([one.key for one in belong]) if belong else []
        except StoreError as error:
            self.failed(error)
            return _Share([], set(), takes=False)
        lacks = {one for one, known in zip(belong, there, strict=True) if not known}
        return _Share(belong, lacks)

    def _hold(self, tokens: int) -> Lease:
        return self.store.hold(self.path.namespace, self.tokens, tokens)

    @property
    def left(self) -> bool:
        """Whether a tier lacks chunks that may be stored here."""
        return self.done < len(self.chain) and bool(self._lacking)

    @property
    def _lacking(self) -> set[Identity]:
        shares = self.shares.values()
        later = {one for share in shares if share.takes for one in share.lacks}
        return later.difference(self.chain[: self.done])

    def step(self) -> int:
        """Writes a batch, parents first; returns the values written."""
        self._skip()
        end = min(len(self.chain), self.done + batch_of(self.layout))
        with self._hold(end * self.layout.chunk_size) as lease:
            end = min(end, lease.tokens // self.layout.chunk_size)
            batch = self.chain[self.done : end]
            if not batch:  # evicted meanwhile
                self.chain = self.chain[: self.done]
                return 0
            _settled(self.layout.device)
            values = {one: _once(partial(self._encode, one, lease)) for one in batch}
            written = sum(self._put(tier, values) for tier in self.shares)
        self.done = end
        return written

    def _skip(self) -> None:
        """Goes on to the first chunk that a tier lacks."""
        lacking = self._lacking
        while self.chain[self.done] not in lacking:
            self.done += 1

    def _put(self, tier: Tier, values: dict[Identity, Encode]) -> int:
        """Gives a tier what it lacks of some chunks; it gets no more once it keeps less than that."""
        share = self.shares[tier]
        new = [one for one in values if one in share.lacks] if share.takes else []
        if not new:
            return 0
        encoded = [(one.key, values[one](tier.admission.compress)) for one in new]
        try:
            written = tier.guard.put(encoded)
        except StoreError as error:
            share.takes = False
            self.failed(error)
            return 0
        share.lacks -= set(new[:written])
        share.takes = written == len(new)
        tier.count(saved=written)
        for one, (_, value) in zip(new[:written], encoded, strict=False):
            tier.moved("saved", one, len(value))
        return written

    def _encode(self, identity: Identity, lease: Lease, compress: bool) -> bytes:
        number = identity.start // self.layout.chunk_size
        for piece in lease.pieces:
            run = piece.run
            assert isinstance(run, PoolRun)
            if number < len(run):
                return encode_chunk(identity, run.chunk(number), self.layout, compress)
            number -= len(run)
        raise AssertionError("the lease ends before the chunk")

    # -- what lies behind chunks

    def finish(self) -> int:
        """Writes snapshots and notes, and notes a use of the whole path; returns the snapshots written."""
        written = 0
        for tier, share in self.shares.items():
            whole = share.whole
            if not whole:
                continue
            try:
                if self.states is not None:
                    written += self._put_states(tier, whole)
                self._note(tier, whole[-1])
                if self.done:
                    tier.guard.exists([one.key for one in whole])
            except StoreError as error:
                self.failed(error)
        return written

    def _put_states(self, tier: Tier, whole: Sequence[Identity]) -> int:
        """The snapshots behind chunks that a tier has."""
        assert self.states is not None
        end, written = len(whole) * self.layout.chunk_size, 0
        with self._hold(end) as lease:
            while (resume := lease.snapshot(end)) and resume.position:
                end = resume.position - 1
                one = self.chain[resume.position // self.layout.chunk_size - 1].snapshot()
                if one.key in self._strange or tier.guard.exists([one.key]) == [True]:
                    continue
                try:
                    parts = self.states.take_apart(resume.snapshot)
                    value = encode_state(one, *parts, tier.admission.compress)
                except TypeError as error:
                    _log.info("a snapshot cannot be stored: %s", error)
                    self._strange.add(one.key)
                    continue
                written += tier.guard.put([(one.key, value)])
        tier.count(saved=written)
        return written

    def _note(self, tier: Tier, last: Identity) -> None:
        """Says which model this is of, and which prompt."""
        notes: dict[Key, dict[str, Any]] = {model_key(self.path.namespace): self.about}
        if self.path.name is not None:
            tokens = last.start + self.layout.chunk_size
            notes[prompt_key(last)] = {"name": self.path.name, "tokens": tokens}
        there = tier.guard.exists(list(notes))
        new = [key for key, known in zip(notes, there, strict=True) if not known]
        if new:
            tier.guard.put([(key, encode_note(notes[key])) for key in new])


def _settled(device: torch.device) -> None:
    """Waits until what other streams compute on a device is there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _once(encode: Encode) -> Encode:
    """Several tiers encode a value once."""
    known: dict[bool, bytes] = {}

    def value(compress: bool) -> bytes:
        if compress not in known:
            known[compress] = encode(compress)
        return known[compress]

    return value
