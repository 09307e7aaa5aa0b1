"""A process that writes values to a folder until it is killed: `python -m tests.stores.writer DIR SEED`."""

from __future__ import annotations

import random
import sys

from chunkcache.errors import StoreFullError
from chunkcache.stores import Key
from chunkcache.stores.disk import DiskStore

KEYS = [Key(f"{number % 3:032x}", f"{number:032x}") for number in range(40)]


def value_of(key: Key, version: int) -> bytes:
    """What may lie under a key: its name again and again, of a length that depends on the version."""
    return str(key).encode() * (1 + version * 97)


def versions(key: Key) -> set[bytes]:
    return {value_of(key, version) for version in range(8)}


def main(folder: str, seed: int) -> None:
    random_, store = random.Random(seed), DiskStore(folder, 600_000)
    print("ready", flush=True)
    while True:
        keys = random_.sample(KEYS, 3)
        try:
            store.put([(key, value_of(key, random_.randrange(8))) for key in keys])
        except StoreFullError:
            continue
        store.get(keys)
        if random_.random() < 0.1:
            store.delete(keys[:1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
