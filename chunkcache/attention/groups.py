"""Which rows of a batch attend to which chunks together: made once, again only when the batch changes."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

from chunkcache.kv.pool import PoolRun
from chunkcache.kv.sequence import Sequence


class Gate(NamedTuple):
    """When phase 1 is formed: the measured break-even, or never."""

    enabled: bool = True
    rows: int = 4
    tokens: int = 256


class Group(NamedTuple):
    """Consecutive chunks and the rows that attend to them in one product."""

    run: PoolRun
    rows: tuple[int, ...]


@dataclass
class Decisions:
    """How often phase 1 was formed, counted per plan and run of shared chunks."""

    grouped: int = 0
    refused: int = 0


def group_rows(
    sequences: Rows[Sequence], gate: Gate, chunk_size: int, decisions: Decisions | None = None
) -> list[Group]:
    """The shared runs of a batch with their rows, each row's in order of position.

    Runs are cut where the set of rows changes and where memory is not contiguous. A run that only
    one row reads, or that the gate refuses, becomes a group per row. O(rows x chunks).
    """
    slots = [_slots(sequence) for sequence in sequences]
    groups: list[Group] = []
    todo: list[tuple[list[int], int]] = [(list(range(len(slots))), 0)]
    while todo:
        rows, at = todo.pop()
        branches: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            if at < len(slots[row]):
                branches.setdefault(slots[row][at], []).append(row)
        for branch in branches.values():
            end = _shared_until(slots, branch, at)
            slab, start = slots[branch[0]][at]
            run = PoolRun(sequences[branch[0]].shared[0].pool, slab, start, end - at)
            groups += _gated(run, branch, gate, chunk_size, decisions)
            todo.append((branch, end))
    return groups


def _slots(sequence: Sequence) -> list[tuple[int, int]]:
    return [(run.slab, run.start + i) for run in sequence.shared for i in range(len(run))]


def _shared_until(slots: list[list[tuple[int, int]]], rows: list[int], at: int) -> int:
    """Where rows that agree at `at` part, or memory jumps."""
    first = slots[rows[0]]
    limit = min(len(slots[row]) for row in rows)
    end = at + 1
    while end < limit:
        slab, start = first[end - 1]
        if any(slots[row][end] != (slab, start + 1) for row in rows):
            break
        end += 1
    return end


def _gated(
    run: PoolRun, rows: list[int], gate: Gate, chunk_size: int, decisions: Decisions | None
) -> list[Group]:
    if len(rows) == 1:
        return [Group(run, tuple(rows))]
    worth = gate.enabled and len(rows) >= gate.rows and len(run) * chunk_size >= gate.tokens
    if decisions is not None:
        decisions.grouped += worth
        decisions.refused += not worth
    return [Group(run, tuple(rows))] if worth else [Group(run, (row,)) for row in rows]
