"""What goes wrong with folders: killed writers, full and read-only disks, damaged indexes."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores import Key
from chunkcache.stores.disk import DiskStore
from tests.stores.writer import KEYS, value_of, versions

KILLS = int(os.environ.get("CHUNKCACHE_KILLS", "60"))
ONE, TWO, THREE = KEYS[:3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


Start = Callable[[Path, int], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts writers; none outlives its test."""
    running: list[subprocess.Popen[str]] = []

    def start_(folder: Path, seed: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.writer", str(folder), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        with process.stdout as lines:
            assert lines.readline() == "ready\n"
        return process

    yield start_
    for process in running:
        process.kill()
        process.wait()


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("values/*/*")}


def assert_values(store: DiskStore) -> None:
    """Every value is one that was written."""
    for key, value in zip(KEYS, store.get(KEYS), strict=True):
        assert value is None or bytes(value) in versions(key), key


def assert_whole(folder: Path) -> DiskStore:
    """The index knows of every file too; while nobody else writes."""
    store = DiskStore(folder, 600_000)
    assert_values(store)
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        known = dict(index.execute("select name, bytes from files").fetchall())
    assert files(folder).keys() <= known.keys()
    return store


def test_writers_may_be_killed_at_any_moment(folder: Path, start: Start) -> None:
    """Two at a time, so that one goes on while the other dies."""
    random_ = random.Random(5)
    running = [start(folder, seed) for seed in range(2)]
    for seed in range(2, KILLS):
        time.sleep(random_.random() * 0.05)
        victim = running.pop(0)
        victim.kill()
        victim.wait()
        running.append(start(folder, seed))
        if seed % 10 == 0:
            with closing(DiskStore(folder, 600_000)) as store:
                assert_values(store)
    for process in running:
        process.kill()
        process.wait()
    store = assert_whole(folder)
    store.put([(ONE, b"after")])
    assert store.get([ONE]) == [b"after"]
    left = folder / "unfinished"
    for path in left.iterdir():
        os.utime(path, (time.time() - 100,) * 2)
    store.collect()
    assert not list(left.iterdir())
    found = store.stats()
    assert (found.values, found.bytes) == (len(files(folder)), sum(files(folder).values()))
    assert found.bytes <= store.budget


def test_processes_share_one_budget(folder: Path, start: Start) -> None:
    writers = [start(folder, seed) for seed in range(3)]
    time.sleep(1.5)
    for writer in writers:
        writer.kill()
        writer.wait()
    assert_whole(folder)
    # A row is there before its file: what three were about to write when they died is all there is more.
    assert sum(files(folder).values()) <= 600_000


@pytest.mark.parametrize(
    "what", ["garbage", "truncated", "empty", "removed", "other schema", "less"]
)
def test_a_damaged_index_is_made_again(folder: Path, what: str) -> None:
    store = DiskStore(folder, 10_000)
    store.put([(ONE, b"1" * 100), (TWO, b"2" * 200)])
    store.close()
    index = folder / "index.sqlite"
    for beside in folder.glob("index.sqlite-*"):
        beside.unlink()
    if what == "garbage":
        index.write_bytes(os.urandom(index.stat().st_size))
    elif what == "truncated":
        index.write_bytes(index.read_bytes()[:5000])
    elif what == "empty":
        index.write_bytes(b"")
    elif what == "removed":
        index.unlink()
    elif what == "other schema":
        index.unlink()
        with closing(sqlite3.connect(index)) as other:
            other.executescript("create table files (name text); create table totals (x);")
    else:
        shutil.rmtree(folder / "unfinished")
    again = DiskStore(folder, 10_000)
    again.put([(THREE, b"3" * 300)])
    assert again.get([ONE, TWO, THREE]) == [b"1" * 100, b"2" * 200, b"3" * 300]
    again.collect()
    assert (again.stats().values, again.stats().bytes) == (3, 600)


def test_every_bit_of_the_index_may_flip(folder: Path) -> None:
    """At random places; the budget is kept in the end, and no value is lost but to the budget."""
    random_ = random.Random(3)
    for _ in range(60):
        shutil.rmtree(folder, ignore_errors=True)
        store = DiskStore(folder, 10_000)
        store.put([(key, value_of(key, 0)) for key in KEYS[:10]])
        store.close()
        index = folder / "index.sqlite"
        content = bytearray(index.read_bytes())
        for _ in range(3):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        index.write_bytes(content)
        again = DiskStore(folder, 10_000)
        for key in KEYS[10:20]:
            try:
                again.put([(key, value_of(key, 0))])
            except StoreFullError:
                continue
        for key, value in zip(KEYS, again.get(KEYS), strict=True):
            assert value is None or value == value_of(key, 0)
        again.collect()
        assert again.stats().bytes == sum(files(folder).values()) <= 10_000
        again.put([(ONE, b"after")])
        assert again.get([ONE]) == [b"after"]
        again.close()


def test_an_index_made_again_by_another_process_is_found(folder: Path) -> None:
    one, two = DiskStore(folder, 1000), DiskStore(folder, 1000)
    one.put([(ONE, b"1" * 400)])
    two.collect()
    one.put([(TWO, b"2" * 400)])
    two.put([(THREE, b"3" * 400)])
    assert one.exists([ONE, TWO, THREE]) == [False, True, True]
    assert one.stats().bytes == two.stats().bytes == 800


def test_a_folder_that_is_only_read_is_read(folder: Path) -> None:
    DiskStore(folder, 1000).put([(ONE, b"kept")])
    script = (
        "import sys\n"
        "from chunkcache.errors import StoreFullError\n"
        "from chunkcache.stores.disk import DiskStore\n"
        "from tests.stores.writer import KEYS\n"
        "store = DiskStore(sys.argv[1], 1000)\n"
        "assert store.get(KEYS[:2]) == [b'kept', None]\n"
        "assert store.exists(KEYS[:2]) == [True, False]\n"
        "try:\n"
        "    store.put([(KEYS[1], b'new')])\n"
        "except StoreFullError as error:\n"
        "    assert 'only read' in str(error)\n"
        "else:\n"
        "    raise AssertionError('written')\n"
        "assert store.delete(KEYS[:1]) == 0\n"
        "store.close()\n"
    )
    mounted(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}", script, folder)
    assert DiskStore(folder, 1000).get([ONE]) == [b"kept"]


def test_a_full_disk_gives_old_values_up(tmp_path: Path) -> None:
    """A disk of 2 MiB under a budget of 1 GiB."""
    script = (
        "import sys\n"
        "from chunkcache.errors import StoreFullError\n"
        "from chunkcache.stores import Key\n"
        "from chunkcache.stores.disk import DiskStore\n"
        "store = DiskStore(sys.argv[1] + '/store', 2**30)\n"
        "keys = [Key('ab', f'{n:04x}') for n in range(60)]\n"
        "kept = full = 0\n"
        "for key in keys:\n"
        "    try:\n"
        "        kept += store.put([(key, key.name.encode() * 25_000)])\n"
        "    except StoreFullError:\n"
        "        full += 1\n"
        "there = [key for key in keys if store.exists([key]) == [True]]\n"
        "assert keys[-1] in there and 8 <= len(there) < 30, (kept, full, len(there))\n"
        "for key in there:\n"
        "    assert store.get([key]) == [key.name.encode() * 25_000]\n"
        "try:\n"
        "    store.put([(keys[0], b'x' * 5_000_000)])\n"
        "except StoreFullError as error:\n"
        "    assert 'cannot be written' in str(error)\n"
        "else:\n"
        "    raise AssertionError('written')\n"
        "import os\n"
        "assert not os.listdir(sys.argv[1] + '/store/unfinished')\n"
        "store.close()\n"
    )
    mounted(f"mount -t tmpfs -o size=2m tmpfs {tmp_path}", script, tmp_path)


def mounted(mount: str, script: str, folder: Path) -> None:
    """Runs a script where something else is mounted, for it alone."""
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    command = [*unshare, sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreDownError, match="cannot be used"):
        DiskStore(tmp_path / "file", 1000)


def test_only_its_owner_can_read_it(folder: Path) -> None:
    DiskStore(folder, 1000).put([(ONE, b"secret")])
    assert folder.stat().st_mode & 0o077 == 0
    (path,) = folder.glob("values/*/*")
    assert path.stat().st_mode & 0o077 == 0


def test_strange_files_are_left_alone(folder: Path) -> None:
    store = DiskStore(folder, 1000)
    store.put([(ONE, b"1")])
    stranger = folder / "values" / "00" / "README.txt"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("mine")
    store.collect()
    assert [one.key for one in store.scan()] == [ONE] and stranger.exists()


def test_readers_never_see_half_a_value(folder: Path, start: Start) -> None:
    """While it is written again and again, longer and shorter."""
    store, key = DiskStore(folder, 10**9), Key("ab", "cd")
    writer = start(folder, 1)
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            for one, value in zip(KEYS, store.get(KEYS), strict=True):
                assert value is None or bytes(value) in versions(one)
    finally:
        writer.kill()
        writer.wait()
    assert store.get([key]) == [None]
