"""What stores keep for people: which model a namespace is of, and what a prompt is called.

Nothing is ever answered from a note, so it has no more than a checksum; whoever looks after a store
(inventory.py) shows it. Notes are values like others and may leave at any time.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from chunkcache.errors import CorruptValueError
from chunkcache.kv.codec import Identity
from chunkcache.stores.base import Buffer, Key

MODEL, PROMPT = "model", "prompt"  # kinds, and the ends of their keys' names
_FORMAT = 1
_NAME = 32  # digits


def model_key(namespace: bytes) -> Key:
    """Of the note about a namespace: `model`, `dtype`, `chunk_size`, `token_bytes`."""
    name = namespace.hex()[:_NAME]
    return Key(name, f"{name}.{MODEL}")


def prompt_key(last: Identity) -> Key:
    """Of the note about a prompt that ends with a chunk: `name`, `tokens`."""
    return Key(last.key.group, f"{last.key.name}.{PROMPT}")


def is_note(key: Key) -> bool:
    """Whether a key is a note's."""
    return key.name.endswith((f".{MODEL}", f".{PROMPT}"))


def encode_note(facts: dict[str, Any]) -> bytes:
    """A note as JSON with a checksum.

    >>> decode_note(encode_note({"name": "bot"}))
    {'name': 'bot'}
    """
    text = json.dumps(facts, sort_keys=True)
    return json.dumps({"format": _FORMAT, "note": text, "crc": zlib.crc32(text.encode())}).encode()


def decode_note(value: Buffer) -> dict[str, Any]:
    """The inverse.

    Raises:
        CorruptValueError: it is damaged, or of another format.
    """
    try:
        found = json.loads(bytes(value))
        if found["format"] != _FORMAT or found["crc"] != zlib.crc32(found["note"].encode()):
            raise CorruptValueError("a note is damaged, or of another format")
        return dict(json.loads(found["note"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptValueError(f"a note cannot be read: {error}") from error
