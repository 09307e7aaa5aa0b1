"""Values as plain files in one folder, used by several processes at once.

A file's name is its key. It is written beside its place and moved there, so a reader finds a whole
value or none, whoever is killed when; a damaged one is found by who reads it. Reading never asks the
index (index.py), which only serves the budget. Files are not forced to the disk: what a power cut
damages is a miss later.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from threading import Lock

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores.base import Buffer, Key, Store, Stored, StoreStats
from chunkcache.stores.index import Index, Row
from chunkcache.stores.scratch import Scratch

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DEAD, _LEFT = (
    60.0,
    3600.0,
)  # seconds after which an unfinished file is nobody's: of a process that is
# not seen here any more (it may run in another container), and of any
_STEP = 1e-6  # seconds by which values of one call differ in age, the first being the youngest


class DiskStore(Store):
    """See the module.

    Args:
        folder: made if it is not there; only its owner may read it.
        budget: bytes of values; ttl: seconds after its last use that a value is kept, None for ever.
        timeout: seconds to wait for other processes.

    Raises:
        StoreDownError: the folder is not there and cannot be made, or is none.
    """

    kind = "disk"
    budget: int

    def __init__(
        self, folder: str | Path, budget: int, ttl: float | None = None, timeout: float = 1.0
    ):
        self.folder = Path(folder).expanduser()
        self.budget = budget
        self.ttl = ttl
        self._values = self.folder / "values"
        self._unfinished = self.folder / "unfinished"
        self._numbers = count()
        self._lock = Lock()
        self._used: dict[str, float] = {}  # uses that the index does not know of yet
        self._stats = StoreStats(self.kind, budget=budget)
        self._scratch = Scratch()
        self._index = self._open(timeout)

    def _open(self, timeout: float) -> Index | None:
        """The index; None if nothing may be written here."""
        try:
            for folder in (self.folder, self._values, self._unfinished):
                folder.mkdir(mode=0o700, parents=folder is self.folder, exist_ok=True)
            self._clean_up()
            return Index(self.folder / "index.sqlite", self._rows, timeout)
        except (OSError, sqlite3.OperationalError) as error:
            if not self._values.is_dir():
                raise StoreDownError(f"{self.folder} cannot be used: {error}") from error
            _log.warning("%s is only read: %s", self.folder, error)
            return None

    def _clean_up(self) -> None:
        """Removes what processes that died were writing."""
        for path in self._unfinished.iterdir():
            pid = path.name.partition("-")[0]
            alive = pid.isdigit() and _alive(int(pid))
            try:
                left = _age(path) > (_LEFT if alive else _DEAD)
            except FileNotFoundError:
                continue  # finished just now
            if left:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        _, _, own = name.partition(".")
        return self._values / own[:2] / name

    # -- reading

    def get(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says."""
        names = [str(key) for key in keys]
        found = [self._read(name) for name in names]
        self._note(names, [value is not None for value in found])
        hits = len(found) - found.count(None)
        self._stats.hits += hits
        self._stats.misses += len(found) - hits
        return found

    def peek(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says."""
        return [self._read(str(key), remove=False) for key in keys]

    def _read(self, name: str, remove: bool = True) -> Buffer | None:
        path = self._path(name)
        try:
            if self._expired(path):
                if remove:
                    self._remove([name])
                    self._stats.expired += 1
                return None
            return self._contents(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreDownError(f"{path} cannot be read: {error}") from error

    def _contents(self, path: Path) -> memoryview:
        """Everything in a file; readers need no copy of it to make tensors."""
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            buffer = self._scratch.take(size)
            read = 0
            while read < size and (count := file.readinto(buffer[read:])):
                read += count
            return buffer[:read]

    def recycle(self, values: Sequence[Buffer]) -> None:
        """As the base class says."""
        self._scratch.give(values)

    def _expired(self, path: Path) -> bool:
        return self.ttl is not None and _age(path) > self.ttl

    def exists(self, keys: Sequence[Key]) -> list[bool]:
        """As the base class says."""
        names = [str(key) for key in keys]
        try:
            found = [path.exists() and not self._expired(path) for path in map(self._path, names)]
        except OSError as error:
            raise StoreDownError(f"{self.folder} cannot be read: {error}") from error
        self._note(names, found)
        return found

    def _note(self, names: Sequence[str], found: Sequence[bool]) -> None:
        """Marks the files as used; the index hears of it with the next values that are put."""
        now = time.time()
        for number, (name, there) in enumerate(zip(names, found, strict=True)):
            if there:
                used = now - number * _STEP
                if self._index is not None:
                    with self._lock:
                        self._used[name] = used
                try:
                    os.utime(self._path(name), (used, used))
                except OSError:
                    continue  # gone meanwhile, or only readable: its age then stays what it was

    # -- writing

    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """As the base class says."""
        if self._index is None:
            raise StoreFullError(f"{self.folder} is only read")
        kept = 0
        fitting = [(str(key), value) for key, value in values if len(value) <= self.budget]
        self._stats.refused += len(values) - len(fitting)
        sizes = [(name, len(value)) for name, value in fitting]
        self._reserve(sizes)
        for name, value in fitting:
            kept += self._write(name, value)
        self._reserve(sizes)  # meanwhile others may have taken rows away whose files were not there
        self._stats.written += kept
        return kept

    def _reserve(self, sizes: Sequence[tuple[str, int]]) -> None:
        """Makes room within the budget before anything is written."""
        now = time.time()
        rows = [(name, size, now - i * _STEP) for i, (name, size) in enumerate(sizes)]
        with self._lock:
            used, self._used = self._used, {}
        try:
            gone = self._claim(rows, used)
        except sqlite3.OperationalError as error:
            if not self._make_room(2 * sum(size for _, size in sizes)):
                raise StoreFullError(f"{self.folder} cannot be written: {error}") from error
            try:
                gone = self._claim(rows, used)
            except sqlite3.OperationalError as again:
                raise StoreFullError(f"{self.folder} cannot be written: {again}") from again
        self._stats.evicted += self._unlink(gone)

    def _claim(self, rows: Sequence[Row], used: dict[str, float]) -> list[str]:
        assert self._index is not None
        if used:
            self._index.touch(used.items())
        return self._index.reserve(rows, self.budget)

    def _write(self, name: str, value: Buffer) -> bool:
        try:
            self._place(name, value)
        except OSError as error:
            if error.errno not in _FULL or not self._make_room(2 * len(value)):
                self._forget([name])
                raise StoreFullError(f"{self.folder} cannot be written: {error}") from error
            try:
                self._place(name, value)
            except OSError as again:
                self._forget([name])
                raise StoreFullError(f"{self.folder} cannot be written: {again}") from again
        return True

    def _place(self, name: str, value: Buffer) -> None:
        """Writes a file beside its place and moves it there."""
        path = self._path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part = self._unfinished / f"{os.getpid()}-{id(self)}-{next(self._numbers)}"
        try:
            with open(part, "xb", buffering=0, opener=_private) as file:
                _write_all(file.fileno(), value)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> bool:
        """Gives values up because the disk, not the budget, is full; whether there were any."""
        assert self._index is not None
        try:
            gone = self._index.oldest(size)
        except sqlite3.OperationalError:
            return False
        freed = self._unlink(gone)
        self._forget(gone)
        self._stats.evicted += freed
        return freed > 0

    def _forget(self, names: Sequence[str]) -> None:
        """Takes names out of the index; rows that stay are dropped when their turn comes."""
        if self._index is not None and names:
            try:
                self._index.forget(names)
            except sqlite3.OperationalError as error:
                _log.info(
                    "the index of %s keeps %d rows too many: %s", self.folder, len(names), error
                )

    def _unlink(self, names: Sequence[str]) -> int:
        """Removes files; others may have been quicker."""
        removed = 0
        for name in names:
            try:
                self._path(name).unlink()
                removed += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                _log.warning("a value cannot be removed from %s: %s", self.folder, error)
        return removed

    def _remove(self, names: Sequence[str]) -> int:
        removed = self._unlink(names)
        self._forget(names)
        return removed

    def delete(self, keys: Sequence[Key]) -> int:
        """As the base class says."""
        return self._remove([str(key) for key in keys])

    # -- looking after it

    def scan(self) -> Iterator[Stored]:
        """As the base class says."""
        for name, size, used in self._rows():
            yield Stored(Key.parse(name), size, used)

    def _rows(self) -> Iterator[Row]:
        """All files whose names are keys."""
        for folder in sorted(self._values.iterdir()):
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        Key.parse(entry.name)
                        status = entry.stat()
                    except (ValueError, FileNotFoundError):
                        continue  # nothing of ours, or gone meanwhile
                    yield entry.name, status.st_size, status.st_mtime

    def collect(self, dry: bool = False) -> int:
        """Drops values that expired, returns how many, and makes the index agree with the files."""
        if dry:
            return len(self._old())
        if self._index is None:
            raise StoreFullError(f"{self.folder} is only read")
        try:
            self._clean_up()
            dropped = self._unlink(self._old())
            self._index.rebuild()
        except (OSError, sqlite3.OperationalError) as error:
            raise StoreFullError(f"{self.folder} cannot be written: {error}") from error
        self._reserve([])
        return dropped

    def _old(self) -> list[str]:
        """Names of values that expired."""
        if self.ttl is None:
            return []
        return [name for name, _, used in self._rows() if time.time() - used > self.ttl]

    def stats(self) -> StoreStats:
        """As the base class says; values and bytes are not known while others write for too long."""
        found = StoreStats(**vars(self._stats))
        if self._index is not None:
            try:
                found.values, found.bytes = self._index.totals()
            except sqlite3.OperationalError as error:
                _log.info("the index of %s does not answer: %s", self.folder, error)
        return found

    def close(self) -> None:
        """As the base class says."""
        if self._index is not None:
            with self._lock:
                used, self._used = self._used, {}
            try:
                self._index.touch(used.items())
            except sqlite3.OperationalError as error:
                _log.info("the last uses of %s are not noted: %s", self.folder, error)
            self._index.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(descriptor: int, value: Buffer) -> None:
    view = memoryview(value)
    while view:
        view = view[os.write(descriptor, view) :]


def _age(path: Path) -> float:
    """Seconds since the last use; of a file that is gone, raises FileNotFoundError."""
    return time.time() - path.stat().st_mtime


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
