"""Which compiled modules there are, and which of them this processor can run.

They are optional: where no compiler was at hand when chunkcache was installed, or the processor is
of another kind, torch does the work. Their threads are torch's own: they are compiled
for OpenMP but linked to none, so that its symbol is the one that torch brought into the process.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Protocol

import torch  # before the modules: it brings the symbol that they need

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in memory.h
Shape = tuple[int, int, int, int, int, int, float, int, int, int, int, float]
Queries = tuple[int, int, int, int, int]
Matrices = tuple[int, int, int]
VERSION = 6  # of the modules' arithmetic and arguments; part of a kernel's name
SETS = ("avx512bf16", "avx512", "avx2")  # the best first


class Library(Protocol):
    """A compiled module; the meaning of the arguments is with the functions in module.cpp."""

    def prefill(self, shape: Shape, queries: Queries, *arguments: int) -> None:
        """New tokens of one sequence."""

    def step(self, shape: Shape, queries: Queries, *arguments: int) -> None:
        """One new token of each of many sequences."""

    def state_floats(self, shape: Shape, slots: int) -> int:
        """Memory for the states of a step."""

    def linear(self, *arguments: int | Matrices) -> None:
        """x w^T + bias, per head."""

    def copy(self, *arguments: int) -> None:
        """Chunks to other places, as they are or turned over."""

    def pairs(self) -> bool:
        """Whether `linear` serves bfloat16, and better than the libraries do on this processor."""


@cache
def libraries() -> tuple[dict[str, Library], dict[str, str]]:
    """The modules that run here by instruction set, best first; and why the others do not."""
    found: dict[str, Library] = {}
    missing: dict[str, str] = {}
    for name in SETS:
        try:
            module = import_module(f"chunkcache.native._{name}")
        except ImportError as error:
            missing[name] = str(error)
            continue
        if module.VERSION != VERSION:
            missing[name] = "compiled from other sources; install chunkcache again"
        elif not module.supported():
            missing[name] = "the processor lacks these instructions"
        else:
            found[name] = module
    return found, missing
