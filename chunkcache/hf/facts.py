"""What the probe saw of a model's own cache: how its tensors grow, and what of it is always the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chunkcache.hf.form import Form, Kind, Leaf, Path
from chunkcache.kv.rows import RowShape


@dataclass
class Facts:
    """What the probe saw of a model's own cache.

    Attributes:
        leaves: one per tensor of `form`.
        constants: the tensors that are the same for all sequences, by number; steady: the plain
            values that are.
        changing: paths of the plain values that change with the tokens.
        shapes: per tensor its shape after one chunk.
    """

    form: Form
    leaves: tuple[Leaf, ...]
    constants: dict[int, torch.Tensor]
    steady: dict[Path, object]
    changing: frozenset[Path]
    shapes: tuple[torch.Size, ...]
    types: tuple[torch.dtype, ...]

    def of(self, kind: Kind) -> list[int]:
        """Numbers of the tensors of one kind."""
        return [number for number, leaf in enumerate(self.leaves) if leaf.kind is kind]

    def row_shapes(self) -> list[RowShape]:
        """Of the tensors that grow with the tokens, in order."""
        return [self._shape(number) for number in self.of(Kind.ROWS)]

    def _shape(self, number: int) -> RowShape:
        leaf, shape = self.leaves[number], self.shapes[number]
        return RowShape(leaf.per_chunk, shape.numel() // leaf.per_chunk, self.types[number])

    def pack(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """`[rows, width]`: a growing tensor with its axis of tokens first."""
        return tensor.movedim(self.leaves[number].axis, 0).flatten(1)

    def unpack(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`, contiguous."""
        axis, shape = self.leaves[number].axis, list(self.shapes[number])
        del shape[axis]
        return rows.reshape(len(rows), *shape).movedim(0, axis).contiguous()
