"""Reading every value of a store: which are damaged, which nobody can get at, and what may go.

A reader comes to a chunk through the one before it, and to a snapshot or the note about a prompt
through their chunk. So a value is unreachable if anything above it is missing, damaged or lost. What a
damaged value says of itself counts for nothing, so a damaged chunk is taken to be reachable, unless it
is not the first chunk and the first is not whole.

Others may write, read and evict meanwhile. Scans may miss what comes while they run: whatever stands
above a value is asked for by name, and writers write that first. A value that is listed and not there
was lost, unless it left: then it is listed no more. Before anything is deleted, what spoke against it
is read again. Should a writer be quicker all the same, it loses a value and the next request misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from chunkcache.errors import CorruptValueError, OtherFormatError
from chunkcache.kv.codec import inspect
from chunkcache.kv.inventory import CHUNK, batches, chunk_of, kind_of, listed
from chunkcache.kv.notes import MODEL, decode_note, is_note, model_key
from chunkcache.stores.base import Buffer, Key, Store, Stored
from chunkcache.tree import TOKEN_BYTES

WHOLE, CORRUPT, LOST, UNREACHABLE = "whole", "corrupt", "lost", "unreachable"
FOREIGN = "foreign"  # of another version's format: nobody here can tell more, so it stays
_STATES = (WHOLE, CORRUPT, LOST, UNREACHABLE, FOREIGN)
_SWEEP = 512  # values that are deleted together
Progress = Callable[[int, int], None]  # values that were read, and values in all


class Finding(NamedTuple):
    """What reading a value showed.

    Attributes:
        state: whole, corrupt, lost or foreign, whatever may be above it.
        parent: name of the chunk before it; empty for the first, and where nobody knows.
        end: position behind its last token; 0 for notes, and where nobody knows.
        note: the group of the key of the note about its namespace; empty for notes, and where nobody
            knows.
        reason: why it is corrupt.
    """

    bytes: int
    state: str
    parent: str = ""
    end: int = 0
    note: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        values: all that were there.
        broken: of each unreachable value, the nearest one above it that is missing, corrupt or lost.
    """

    values: dict[Key, Finding]
    broken: dict[Key, Key]

    def state(self, key: Key) -> str:
        """Of a value: unreachable ones are otherwise whole."""
        own = self.values[key].state
        return UNREACHABLE if own == WHOLE and key in self.broken else own

    @cached_property
    def states(self) -> dict[str, list[Key]]:
        """The values of each state."""
        found: dict[str, list[Key]] = {state: [] for state in _STATES}
        for key in self.values:
            found[self.state(key)].append(key)
        return found

    @property
    def damage(self) -> list[Key]:
        """Corrupt values that somebody may get at."""
        return [key for key in self.states[CORRUPT] if key not in self.broken]

    @property
    def idle_notes(self) -> list[Key]:
        """Notes about models of which there is nothing that anybody can get at."""
        used = {self.values[key].note for key in self.states[WHOLE]}
        return [
            key for key in self.states[WHOLE] if kind_of(key) == MODEL and key.group not in used
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest path that can be followed."""
        return max((self.values[key].end for key in self.states[WHOLE]), default=0)

    def bytes_of(self, keys: Iterable[Key]) -> int:
        """Sum over values."""
        return sum(self.values[key].bytes for key in keys)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        corrupt = [
            {
                "key": str(key),
                "bytes": self.values[key].bytes,
                "reachable": key not in self.broken,
                "reason": self.values[key].reason,
            }
            for key in sorted(self.states[CORRUPT])
        ]
        states = {
            state: {"values": len(keys), "bytes": self.bytes_of(keys)}
            for state, keys in self.states.items()
        }
        sums = {"values": len(self.values), "bytes": self.bytes_of(self.values)}
        damage = {"reachable_corrupt": len(self.damage), "corrupt_values": corrupt}
        return sums | {"longest_path": self.longest, "states": states} | damage


def survey(store: Store, progress: Progress | None = None) -> Survey:
    """Reads every value once, and those again that seem lost. Counts as no use. O(bytes).

    Raises:
        StoreError: by the store.
    """
    there = listed(store)
    values = _read(store, list(there.values()), progress)
    _forget_the_gone(store, values)
    _ask_for_the_missed(store, values)
    return Survey(values, _broken(values))


def _read(
    store: Store, wanted: Sequence[Stored], progress: Progress | None = None
) -> dict[Key, Finding]:
    found: dict[Key, Finding] = {}
    for batch in batches(wanted):
        read = store.peek([one.key for one in batch])
        found |= {one.key: _judge(one, value) for one, value in zip(batch, read, strict=True)}
        if progress is not None:
            progress(len(found), len(wanted))
    return found


def _judge(one: Stored, value: Buffer | None) -> Finding:
    if value is None:
        return Finding(one.bytes, LOST)
    try:
        if is_note(one.key):
            decode_note(value)
            return Finding(len(value), WHOLE)
        found = inspect(value, one.key)
    except OtherFormatError as error:
        return Finding(len(value), FOREIGN, reason=str(error))
    except CorruptValueError as error:
        return Finding(len(value), CORRUPT, reason=str(error))
    end = found.start + len(found.data) // TOKEN_BYTES
    return Finding(len(value), WHOLE, found.parent, end, model_key(found.namespace).group)


def _forget_the_gone(store: Store, values: dict[Key, Finding]) -> None:
    """Looks again at what was not there: it left, was lost, or was written anew."""
    absent = [key for key, one in values.items() if one.state == LOST]
    if absent:
        there = listed(store)
        for key in absent:
            del values[key]
        values |= _read(store, [there[key] for key in absent if key in there])


def _ask_for_the_missed(store: Store, values: dict[Key, Finding]) -> None:
    """Adds what stands above values and came while the scan ran."""
    new: Iterable[Key] = list(values)
    asked: set[Key] = set()
    while (
        missing := {
            above for key in new if (above := _above(key, values[key])) and above not in values
        }
        - asked
    ):
        asked |= missing
        read = _read(store, [Stored(key, 0, None) for key in missing])
        new = [key for key, one in read.items() if one.state != LOST]
        values |= {key: read[key] for key in new}


def _above(key: Key, found: Finding) -> Key | None:
    """What a reader must have found before; None if nothing."""
    kind = kind_of(key)
    if kind == MODEL or key.name == key.group:
        return None
    if kind != CHUNK:
        return chunk_of(key)
    return Key(key.group, found.parent or key.group)


def _broken(values: dict[Key, Finding]) -> dict[Key, Key]:
    """As in `Survey`. O(values): every link is followed once."""
    found: dict[Key, Key | None] = {}
    for start in values:
        path, key = [], start
        while key not in found:
            path.append(key)
            above = _above(key, values[key])
            if above is None or above not in values or values[above].state not in (WHOLE, FOREIGN):
                found[key] = above
            else:
                key = above
        for one in path:
            found[one] = found[key]
    return {key: culprit for key, culprit in found.items() if culprit is not None}


# -- cleaning up


@dataclass
class Swept:
    """What was dropped, or would be: values by reason, their bytes, and what the store itself found.

    Attributes:
        notes: about models that have no values.
        leftovers: what the store dropped as expired, or as no value's.
        spared: values that were made whole by others meanwhile.
    """

    corrupt: int = 0
    lost: int = 0
    unreachable: int = 0
    notes: int = 0
    leftovers: int = 0
    bytes: int = 0
    spared: int = 0

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def sweep(store: Store, found: Survey, dry: bool = False) -> Swept:
    """Drops what a survey found corrupt, lost or unreachable, and idle notes; then the store collects.

    Args:
        dry: only count.

    Raises:
        StoreError: by the store.
    """
    swept = Swept()
    for state in (UNREACHABLE, CORRUPT, LOST):
        keys = found.states[state]
        for at in range(0, len(keys), _SWEEP):
            gone = _still(store, found, keys[at : at + _SWEEP])
            _drop(store, found, gone, swept, dry)
            setattr(swept, state, getattr(swept, state) + len(gone))
    swept.spared = len(found.values) - len(found.states[WHOLE]) - len(found.states[FOREIGN])
    swept.spared -= swept.corrupt + swept.lost + swept.unreachable
    notes = found.idle_notes
    still = not swept.spared and not found.states[FOREIGN]
    if notes and still and listed(store).keys() <= found.values.keys():
        _drop(store, found, notes, swept, dry)  # else somebody writes, perhaps what they are about
        swept.notes = len(notes)
    swept.leftovers = store.collect(dry)
    return swept


def _still(store: Store, found: Survey, keys: Sequence[Key]) -> list[Key]:
    """Those against which the same speaks as before."""
    culprits = {key: found.broken[key] if found.state(key) == UNREACHABLE else key for key in keys}
    wanted = set(culprits.values())
    sizes = {key: found.values[key].bytes if key in found.values else 0 for key in wanted}
    now = _read(store, [Stored(key, size, None) for key, size in sizes.items()])
    return [key for key in keys if now[culprits[key]].state not in (WHOLE, FOREIGN)]


def _drop(store: Store, found: Survey, keys: Sequence[Key], swept: Swept, dry: bool) -> None:
    if not dry:
        store.delete(keys)
    swept.bytes += found.bytes_of(keys)
