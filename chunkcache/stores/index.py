"""How much a disk store holds, and what was used longest ago: an SQLite file beside the values.

It only serves budgets. A row is there before its file is, so a process that dies leaves at most rows
without files, which leave like others. Whatever is wrong with the index itself, it is made again from
the files.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

_log = logging.getLogger(__name__)
_SCHEMA = """
create table if not exists files (name text primary key, bytes integer not null, used real not null)
    without rowid;
create index if not exists by_use on files (used, name);
create table if not exists totals (files integer not null, bytes integer not null);
insert into totals select 0, 0 where not exists (select 1 from totals);
create trigger if not exists added after insert on files begin
    update totals set files = files + 1, bytes = bytes + new.bytes; end;
create trigger if not exists removed after delete on files begin
    update totals set files = files - 1, bytes = bytes - old.bytes; end;
create trigger if not exists changed after update of bytes on files begin
    update totals set bytes = bytes + new.bytes - old.bytes; end;
"""
_UPSERT = (
    "insert into files values (?, ?, ?) "
    "on conflict (name) do update set bytes = excluded.bytes, used = excluded.used"
)
_TOUCH = "update files set used = ? where name = ?"
_FORGET = "delete from files where name = ?"
_OLDEST = "select name, bytes from files order by used, name limit ?"
_OUTSIDE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
)  # fmt: skip
_PAGE = 64  # rows that are looked at together

Row = tuple[str, int, float]  # name, bytes, time of last use
Result = TypeVar("Result")


class Index:
    """Rows of one folder, shared by all processes that use it. Thread-safe.

    Args:
        rows: lists what is there, should the index have to be made again.
        timeout: seconds to wait while other processes write.

    Raises:
        sqlite3.OperationalError: by any method: others write for too long, or the disk is full.
    """

    def __init__(self, path: Path, rows: Callable[[], Iterable[Row]], timeout: float):
        self.path = path
        self._rows = rows
        self._timeout = timeout
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self.rebuilt = 0
        if not self._complete():
            self.rebuild()  # somebody died between a file and its row

    def _complete(self) -> bool:
        """Whether all files have rows."""
        query = "select name from files"
        known = set(self._run(lambda connection: connection.execute(query).fetchall()))
        return all((name,) in known for name, _, _ in self._rows())

    def reserve(self, rows: Sequence[Row], budget: int) -> list[str]:
        """Adds rows; returns the names that have to leave for it, whose rows are gone already."""

        def work(connection: sqlite3.Connection) -> list[str]:
            connection.executemany(_UPSERT, rows)
            return _shrink(connection, budget)

        return self._run(work)

    def oldest(self, size: int) -> list[str]:
        """Names of at least `size` bytes, those used longest ago; they stay."""

        def work(connection: sqlite3.Connection) -> list[str]:
            names, freed = [], 0
            for name, count in connection.execute(_OLDEST, (-1,)):
                if freed >= size:
                    break
                names.append(name)
                freed += count
            return names

        return self._run(work)

    def touch(self, used: Iterable[tuple[str, float]]) -> None:
        """Notes uses."""
        pairs = [(when, name) for name, when in used]
        self._run(lambda connection: connection.executemany(_TOUCH, pairs))

    def forget(self, names: Iterable[str]) -> None:
        """Drops rows."""
        gone = [(name,) for name in names]
        self._run(lambda connection: connection.executemany(_FORGET, gone))

    def totals(self) -> tuple[int, int]:
        """Files and bytes. O(1)."""

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            files, size = connection.execute("select files, bytes from totals").fetchone()
            return int(files), int(size)

        return self._run(work)

    def rebuild(self) -> None:
        """Makes the index again from the files."""
        with self._lock:
            self._rebuild()

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._disconnect()

    # -- one transaction

    def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._lock:
            try:
                return self._try(work)
            except sqlite3.OperationalError as error:
                if not _damaged(error):
                    raise
                reason = error
            except (sqlite3.DatabaseError, TypeError, ValueError, OverflowError) as error:
                reason = error  # type: ignore[assignment]
            _log.warning("the index %s is damaged (%s); it is made again", self.path, reason)
            self._rebuild()
            return self._try(work)

    def _try(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        connection = self._connect()
        connection.execute("begin immediate")
        try:
            result = work(connection)
            connection.execute("commit")
            return result
        except BaseException:
            if connection.in_transaction:
                connection.execute("rollback")
            raise

    def _connect(self) -> sqlite3.Connection:
        """The connection; a new one if another process made the index again."""
        if self._connection is not None and self._inode == _inode(self.path):
            return self._connection
        self._disconnect()
        connection = sqlite3.connect(
            self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma wal_autocheckpoint = 64")  # pages; it may be a small disk
            connection.execute("pragma synchronous = off")  # it can be made again
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection, self._inode = connection, _inode(self.path)
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _rebuild(self) -> None:
        self._disconnect()
        self.rebuilt += 1
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        rows = list(self._rows())
        self._try(lambda connection: connection.executemany(_UPSERT, rows))


def _shrink(connection: sqlite3.Connection, budget: int) -> list[str]:
    """Drops rows until the rest is within the budget.

    Raises:
        ValueError: all are gone and it still is not: the sums are wrong.
    """
    (total,) = connection.execute("select bytes from totals").fetchone()
    gone: list[str] = []
    while total > budget:
        page = connection.execute(_OLDEST, (_PAGE,)).fetchall()
        if not page:
            raise ValueError(f"no files, but {total} bytes")
        for name, size in page:
            if total <= budget:
                break
            connection.execute(_FORGET, (name,))
            gone.append(name)
            total -= size
    return gone


def _damaged(error: sqlite3.OperationalError) -> bool:
    """Whether an error tells of what is in the file, not of who else uses it or of the disk."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF not in _OUTSIDE


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0
