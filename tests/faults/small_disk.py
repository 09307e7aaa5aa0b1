"""Models over a disk of 1 MiB that is mounted at DIR: `python -m tests.faults.small_disk DIR`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.faults.world import (
    KINDS,
    PATIENCE,
    assert_all_whole,
    check,
    check_again,
    count,
    guards,
    rows,
    wrap,
)

ASKED = [row for seed in range(12) for row in rows(seed, 3)]


def main(disk: Path) -> None:
    torch.set_num_threads(1)
    for name in KINDS:
        folder = disk / name
        place = f"disk:{folder}?budget=1GB"
        with wrap(name, place) as cached:
            smaller_than_the_budget(cached, name)
            assert_all_whole([place])
            taken_by_something_else(cached, name, folder)
            assert_all_whole([place])
        remount(disk, "ro")
        with wrap(name, place) as cached:
            only_read(cached, name)
        assert_all_whole([place])
        remount(disk, "rw")
        for path in folder.glob("values/*/*"):
            path.unlink()


def ask_all(cached: Any, name: str, asked: list[list[int]]) -> None:
    for row in asked:
        cached.flush()
        check(cached, name, row)
        assert cached.settle(PATIENCE)


def smaller_than_the_budget(cached: Any, name: str) -> None:
    ask_all(cached, name, ASKED)
    assert guards(cached)[0].store.stats().evicted > 0, "old values make room"
    check_again(cached, name, ASKED[-1], "disk")


def taken_by_something_else(cached: Any, name: str, folder: Path) -> None:
    """There is no value any more that could make room."""
    ballast = folder.parent / "ballast"
    fill(ballast, folder)
    failed = count(cached, "failed")
    ask_all(cached, name, ASKED[:20])
    assert count(cached, "failed") > failed and not guards(cached)[0].open
    ballast.unlink()
    for row in ASKED[:3]:
        check_again(cached, name, row, "disk", "there is room again")
    assert not list((folder / "unfinished").iterdir())


def fill(ballast: Path, folder: Path) -> None:
    for value in folder.glob("values/*/*"):
        value.unlink()
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def only_read(cached: Any, name: str) -> None:
    """As after errors of the disk."""
    ask_all(cached, name, ASKED[:8])
    assert count(cached, "failed") > 0 and count(cached, "saved") == 0
    check_again(cached, name, ASKED[2], "disk", "what is there")
    assert not guards(cached)[0].open


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
