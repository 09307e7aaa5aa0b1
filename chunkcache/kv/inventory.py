"""What a store holds, told from names, notes and first chunks; no other value is read.

A family is everything behind one first chunk: the values of one group. Names say which values are
chunks, the first chunk says of which namespace they are and how many tokens each has, and notes say
what people call model and prompts. Whether values are whole is another question (survey.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from chunkcache.errors import CorruptValueError
from chunkcache.kv.codec import inspect
from chunkcache.kv.notes import MODEL, PROMPT, decode_note, model_key
from chunkcache.stores.base import Buffer, Key, Store, Stored
from chunkcache.tree import TOKEN_BYTES

CHUNK, SNAPSHOT = "", "state"  # kinds, with those of notes: what is behind the dot of a name
_BATCH, _BYTES = 16, 64 * 2**20  # values, and bytes of values, that are read together


def kind_of(key: Key) -> str:
    """Of a value: a chunk, a snapshot, or a note about a model or a prompt."""
    return key.name.partition(".")[2]


def chunk_of(key: Key) -> Key:
    """The chunk that a snapshot or a note is about."""
    return Key(key.group, key.name.partition(".")[0])


def listed(store: Store) -> dict[Key, Stored]:
    """All values of a store, each once."""
    return {one.key: one for one in store.scan()}


def batches(values: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Values that fit into memory together."""
    batch: list[Stored] = []
    waiting = 0
    for one in values:
        if batch and (len(batch) == _BATCH or waiting + one.bytes > _BYTES):
            yield batch
            batch, waiting = [], 0
        batch.append(one)
        waiting += one.bytes
    if batch:
        yield batch


class Prompt(NamedTuple):
    """What a note says of a prompt; `tokens` is None if it does not."""

    name: str
    tokens: int | None


@dataclass
class Family:
    """All that lies behind one first chunk.

    Attributes:
        namespace: hexadecimal digits; empty if the first chunk is missing or damaged.
        model: as its note calls it.
        chunk_size: tokens of a chunk; 0 if that is not known.
        chunk_bytes: of all chunks; bytes: of all values.
        used: seconds since the epoch; None if the store does not know.
    """

    group: str
    namespace: str = ""
    model: str | None = None
    prompts: list[Prompt] = field(default_factory=list)
    chunk_size: int = 0
    chunks: int = 0
    snapshots: int = 0
    chunk_bytes: int = 0
    bytes: int = 0
    used: float | None = None

    @property
    def tokens(self) -> int:
        """Of all chunks, those of paths that part ways among them."""
        return self.chunks * self.chunk_size

    def add(self, one: Stored) -> None:
        """Counts a value."""
        kind = kind_of(one.key)
        self.chunks += kind == CHUNK
        self.snapshots += kind == SNAPSHOT
        self.chunk_bytes += one.bytes if kind == CHUNK else 0
        self.bytes += one.bytes
        if one.used is not None:
            self.used = max(one.used, self.used or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        prompts = [prompt._asdict() for prompt in self.prompts]
        return asdict(self) | {"tokens": self.tokens, "prompts": prompts}


@dataclass(frozen=True)
class Inventory:
    """What a store holds.

    Attributes:
        values: all of them.
        families: the one used last comes first.
        models: notes about models, by the group of their keys.
    """

    values: dict[Key, Stored]
    families: list[Family]
    models: dict[str, dict[str, Any]]


def take_inventory(store: Store) -> Inventory:
    """Lists a store, and reads notes and first chunks. O(values).

    Raises:
        StoreError: by the store.
    """
    values = listed(store)
    families: dict[str, Family] = {}
    for one in values.values():
        if kind_of(one.key) != MODEL:
            families.setdefault(one.key.group, Family(one.key.group)).add(one)
    models: dict[str, dict[str, Any]] = {}
    for key, value in _peek(store, [one for one in values.values() if _tells(one.key)]):
        if kind_of(key) == MODEL:
            models[key.group] = _note(value)
        elif kind_of(key) == PROMPT:
            _name_prompt(families[key.group], _note(value))
        else:
            _describe(families[key.group], key, value)
    for family in families.values():
        family.model = text(models.get(note_of(family.namespace), {}).get("model"))
        family.prompts.sort(key=lambda prompt: prompt.name)
    return Inventory(values, sorted(families.values(), key=_order), models)


def _tells(key: Key) -> bool:
    return kind_of(key) in (MODEL, PROMPT) or key.name == key.group


def _peek(store: Store, wanted: Sequence[Stored]) -> Iterator[tuple[Key, Buffer]]:
    for batch in batches(wanted):
        keys = [one.key for one in batch]
        for key, value in zip(keys, store.peek(keys), strict=True):
            if value is not None:
                yield key, value


def _note(value: Buffer) -> dict[str, Any]:
    try:
        return decode_note(value)
    except CorruptValueError:
        return {}


def _name_prompt(family: Family, note: dict[str, Any]) -> None:
    name = text(note.get("name"))
    if name is not None:
        family.prompts.append(Prompt(name, count(note.get("tokens"))))


def _describe(family: Family, key: Key, value: Buffer) -> None:
    """What a first chunk tells of its family."""
    try:
        first = inspect(value, key)
    except CorruptValueError:
        return
    family.namespace = first.namespace.hex()
    family.chunk_size = len(first.data) // TOKEN_BYTES


def _order(family: Family) -> tuple[float, int, str]:
    return -(family.used or 0.0), -family.bytes, family.group


def text(value: object) -> str | None:
    """What a note says, if it is text."""
    return value if isinstance(value, str) else None


def count(value: object) -> int | None:
    """What a note says, if it is a number."""
    return value if isinstance(value, int) else None


def note_of(namespace: str) -> str:
    """The group of the note about a namespace, both as hexadecimal digits."""
    return model_key(bytes.fromhex(namespace)).group
