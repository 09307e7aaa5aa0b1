"""What a kernel is: an implementation of exact attention over chunks.

Every kernel keeps the promise of `partial`: what a row gets is decided by the row and its keys
alone. Two kernels need not give the same bits, so the name of the one in use is part of the
namespace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.rule import Rule
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.sequence import Sequence


class Plan(ABC):
    """One forward of a batch, the same for all layers."""

    @abstractmethod
    def attend(self, layer: int, query: torch.Tensor, tails: KV, rule: Rule) -> torch.Tensor:
        """Attention of the new tokens of one layer; of several queries one after another, if asked.

        Args:
            query: `[rows, query_heads, tokens, dim]`; query heads are a multiple of the KV heads.
            tails: all arena chunks in use, the new tokens already in them.
            rule: what is done to scores, and which keys are hidden.

        Returns:
            `[rows, tokens, query_heads, value_dim]` in the query's type.
        """


class Kernel(ABC):
    """Makes plans; owns the scratch memory of one request. Not thread-safe.

    Attributes:
        keeps_rows: whether the promise can be kept for this layout; borders serve where it cannot.
    """

    name: str
    keeps_rows: bool = True

    @abstractmethod
    def step(self, sequences: Rows[Sequence], groups: list[Group], used: int) -> Plan:
        """One new token for each row; its chunks must be there already.

        Args:
            groups: shared runs and their rows.
            used: arena chunks in use; every one belongs to some row's tail.
        """

    @abstractmethod
    def prefill(self, sequence: Sequence, tokens: int) -> Plan:
        """New tokens of the only row of a batch, whose tail is the whole arena in order."""


Kernels = Callable[[ChunkLayout], Kernel]
