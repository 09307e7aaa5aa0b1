"""Values that stores keep: one per chunk or snapshot, all layers, self-describing.

The container is that of safetensors. Its metadata say what the value is of: format, namespace, the name
of the chunk before it, position, a CRC of every tensor, and a CRC of the metadata themselves. Tensors
lie in one canonical order, whatever the layout of the device: keys and values `[layers, kv_heads,
tokens, dim]` of neighbouring layers that are alike, rows as they are. Token ids are a tensor too, and
compared when a value is read: digests only find candidates. Whoever reads a value says what it must be
of; anything else is `CorruptValueError`, and a miss. Values of other formats are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from chunkcache.errors import CorruptValueError, OtherFormatError
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.packing import WAY, bytes_of, pack_tensor, unpack_tensor
from chunkcache.stores.base import Buffer, Key
from chunkcache.tree import TOKEN_BYTES

try:
    from isal.isal_zlib import crc32  # the same numbers, ten times as fast
except ImportError:
    from zlib import crc32

FORMAT = 1
_DIGEST = 16  # bytes of a name
_TOKENS, _FACTS = "tokens", "chunkcache"  # names in the container
_STATE = ".state"  # behind the names of snapshots
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Identity(NamedTuple):
    """What a value is of: the last chunk of a prefix.

    Attributes:
        key: of the value; parent: name of the chunk before it, empty for the first.
        start: position of the chunk's first token; data: its token ids, as the tree packs them.
    """

    namespace: bytes
    key: Key
    parent: str
    start: int
    data: bytes

    def snapshot(self) -> Identity:
        """Of the state behind the chunk."""
        return self._replace(key=Key(self.key.group, f"{self.key.name}{_STATE}"))

    @property
    def is_snapshot(self) -> bool:
        """Whether it is of a state, not of a chunk."""
        return self.key.name.endswith(_STATE)


def identities(namespace: bytes, data: bytes, chunk_size: int, first: int = 0) -> list[Identity]:
    """Of all whole chunks of packed token ids, from chunk `first` on. O(bytes).

    A name is the digest of namespace and all ids up to there, so equal names mean equal prefixes as
    surely as BLAKE2b (RFC 7693) has no collisions; ids are compared all the same.
    """
    size = chunk_size * TOKEN_BYTES
    group, name, found = "", "", []
    for start in range(0, len(data) - size + 1, size):
        part = data[start : start + size]
        parent = name
        name = _name(namespace, parent, part)
        group = group or name
        found.append(Identity(namespace, Key(group, name), parent, start // TOKEN_BYTES, part))
    return found[first:]


def _name(namespace: bytes, parent: str, data: bytes) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST, key=namespace[:64])
    digest.update(bytes.fromhex(parent))
    digest.update(data)
    return digest.hexdigest()


def encode_chunk(
    identity: Identity, chunk: Sequence[KV], layout: ChunkLayout, pack: bool = False
) -> bytes:
    """A value from one chunk as it lies on the device. O(bytes).

    Args:
        chunk: per run of layers that are alike tensors `[layers, ...]`.
        pack: compress what there is to compress; needs zstandard.
    """
    tensors: dict[str, torch.Tensor] = {}
    for run, parts in zip(layout.alike, chunk, strict=True):
        for number, part in enumerate(layout.layers[run.start].wire(parts)):
            tensors[_part(run, number)] = part
    return _encode(identity, tensors, {}, pack)


def _part(run: range, part: int) -> str:
    return f"layers {run.start}-{run.stop - 1}.{part}"


def decode_chunk(value: Buffer, identity: Identity, layout: ChunkLayout) -> list[KV]:
    """A chunk as `encode_chunk` takes it, in the shape (not the memory) that it has on the device.

    Tensors are views of the value if that can be written to, else of a copy. O(bytes).

    Raises:
        CorruptValueError: it is damaged, of another format, or not of `identity` and `layout`.
    """
    tensors, _ = _decode(value, identity)
    found: list[KV] = []
    for run in layout.alike:
        layer, outline = layout.layers[run.start], layout.outline(run.start)
        parts: list[torch.Tensor] = []
        for number, wanted in enumerate(layer.wire(outline)):
            part = tensors.pop(_part(run, number), None)
            shape = (len(run), *wanted.shape[1:])
            if part is None or part.shape != shape or part.dtype != wanted.dtype:
                raise CorruptValueError(f"{identity.key} has other tensors than its model")
            parts.append(part)
        found.append(layer.wire(tuple(parts)))
    if tensors:
        raise CorruptValueError(f"{identity.key} has tensors of more layers")
    return found


def encode_state(
    identity: Identity, tensors: Sequence[torch.Tensor], plain: Any, pack: bool = False
) -> bytes:
    """A value from a snapshot: tensors, and what else there is as JSON.

    Raises:
        TypeError: `plain` is more than JSON holds.
    """
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    return _encode(identity, named, {"plain": plain}, pack)


def decode_state(value: Buffer, identity: Identity) -> tuple[tuple[torch.Tensor, ...], Any]:
    """The inverse of `encode_state`.

    Raises:
        CorruptValueError: it is damaged, of another format, or not of `identity`.
    """
    tensors, facts = _decode(value, identity)
    try:
        return tuple(tensors[str(number)] for number in range(len(tensors))), facts["plain"]
    except KeyError as error:
        raise CorruptValueError(f"{identity.key} is no snapshot") from error


def _encode(
    identity: Identity, tensors: dict[str, torch.Tensor], more: dict[str, Any], pack: bool
) -> bytes:
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = _describe(identity) | more
    if pack:
        shapes = {name: [str(part.dtype), list(part.shape)] for name, part in parts.items()}
        facts |= {"packed": WAY, "shapes": shapes}
        parts = {name: pack_tensor(part) for name, part in parts.items()}
    parts[_TOKENS] = torch.frombuffer(bytearray(identity.data), dtype=torch.uint8)
    facts["crc"] = {name: _crc(part) for name, part in parts.items()}
    # One entry: safetensors writes several in any order, and equal chunks are to be equal bytes.
    return save(parts, {_FACTS: _text(facts | {"seal": _seal(facts)})})


def inspect(value: Buffer, key: Key) -> Identity:
    """What a value says it is of, after everything was checked that needs no prefix to compare with.

    Its name is the digest of what it says, so it is whole, and is what whoever asks for `key` with the
    right token ids gets.

    Raises:
        CorruptValueError: it is damaged, or lies under another's key.
        OtherFormatError: another version wrote it.
    """
    try:
        facts, parts = _parts(value, key)
        data = bytes(bytes_of(parts[_TOKENS]))
        namespace = bytes.fromhex(facts["namespace"])
        found = Identity(namespace, key, facts["parent"], facts["start"], data)
        wanted = _name(namespace, found.parent, data) + _STATE * found.is_snapshot
        if key.name != wanted or (not found.parent and not key.name.startswith(key.group)):
            raise CorruptValueError(f"{key} is of something else")
    except _UNREADABLE as error:
        raise CorruptValueError(f"{key} cannot be read: {error}") from error
    _decode(value, found)
    return found


def _decode(value: Buffer, identity: Identity) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors but the token ids, and the facts; every field of both was verified."""
    key = identity.key
    try:
        facts, parts = _parts(value, key)
        if facts | _describe(identity) != facts:
            raise CorruptValueError(f"{key} is of something else")
        if facts["crc"] != {name: _crc(part) for name, part in parts.items()}:
            raise CorruptValueError(f"the tensors of {key} are damaged")
        if bytes_of(parts.pop(_TOKENS)) != identity.data:
            raise CorruptValueError(f"{key} is of other token ids")
        return _unpacked(parts, facts), facts
    except _UNREADABLE as error:
        raise CorruptValueError(f"{key} cannot be read: {error}") from error


_UNREADABLE = (
    ValueError, KeyError, TypeError, RuntimeError, OverflowError, RecursionError,
    MemoryError,
)  # fmt: skip


def _parts(value: Buffer, key: Key) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The sealed metadata, and all tensors as views of the value, if it can be written to.

    The library's own reader makes two copies, which take longer than everything else here.
    """
    view = memoryview(value) if not memoryview(value).readonly else memoryview(bytearray(value))
    size = int.from_bytes(view[:8], "little")
    if not 0 < size <= len(view) - 8:
        raise ValueError("it is cut off")
    header = json.loads(bytes(view[8 : 8 + size]))
    if not isinstance(header, dict):
        raise ValueError("it has no header")
    facts = _unsealed(header.pop("__metadata__")[_FACTS], key)
    at, found = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at:
            raise ValueError("its tensors do not lie one after another")
        found[name] = _tensor(view[8 + size + begin : 8 + size + end], **entry)
        at = end
    if 8 + size + at != len(view):
        raise ValueError("it is longer or shorter than its tensors")
    return facts, found


def _tensor(
    data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]
) -> torch.Tensor:
    kind = _TYPES[dtype]
    if len(data) != data_offsets[1] - data_offsets[0]:
        raise ValueError("it is cut off")
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(data):
        raise ValueError("a tensor is of another size than its shape")
    return (
        torch.frombuffer(data, dtype=kind).view(shape) if data else torch.empty(shape, dtype=kind)
    )


def _unsealed(text: str, key: Key) -> dict[str, Any]:
    found: dict[str, Any] = dict(json.loads(text))
    if found.pop("seal", None) != _seal(found):
        raise CorruptValueError(f"the metadata of {key} are damaged")
    if found.get("format") != FORMAT:
        raise OtherFormatError(f"{key} is of format {found.get('format')!r}, not {FORMAT}")
    return found


def _describe(identity: Identity) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "namespace": identity.namespace.hex(),
        "name": identity.key.name,
        "parent": identity.parent,
        "start": identity.start,
    }


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)


def _seal(facts: dict[str, Any]) -> int:
    return crc32(_text(facts).encode())


def _crc(tensor: torch.Tensor) -> int:
    """Of a tensor's type, shape and numbers."""
    outline = f"{tensor.dtype} {list(tensor.shape)}"
    return crc32(bytes_of(tensor), crc32(outline.encode()))


def _unpacked(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "packed" not in facts:
        return tensors
    if facts["packed"] != WAY:
        raise ValueError(f"it is packed in another way: {facts['packed']!r}")
    return {name: unpack_tensor(part, *facts["shapes"][name]) for name, part in tensors.items()}
