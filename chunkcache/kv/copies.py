"""Chunks into their places in the pool: by compiled code where there is some, else by torch.

torch turns keys over at 2.5 GB/s on one core, and with more threads waits for those that read; ours
takes one core, and one call for all chunks, since each costs a turn of the interpreter.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from chunkcache.kv.layout import KV
from chunkcache.kv.pool import PoolRun
from chunkcache.native.library import Library, libraries


def lay_chunks(run: PoolRun, chunks: Sequence[Sequence[KV]]) -> None:
    """Writes chunks, as `decode_chunk` gives them, to the beginning of a run. O(bytes)."""
    places = [_parts(run.chunk(number)) for number in range(len(chunks))]
    for there, here in zip(
        zip(*places, strict=True), zip(*map(_parts, chunks), strict=True), strict=True
    ):
        copy_all(there, here)


def _parts(chunk: Sequence[KV]) -> list[torch.Tensor]:
    return [part for parts in chunk for part in parts]


def copy_all(
    there: Sequence[torch.Tensor], here: Sequence[torch.Tensor], library: Library | None = None
) -> None:
    """Copies tensors to others of the same shape and type.

    Args:
        library: what compiled code to use; the best there is if None.
    """
    library = library or next(iter(libraries()[0].values()), None)
    ways = {_way(to, from_) for to, from_ in zip(there, here, strict=True)}
    way = ways.pop() if len(ways) == 1 else None
    if library is None or way is None:
        for to, from_ in zip(there, here, strict=True):
            to.copy_(from_)
        return
    both = zip(here, there, strict=True)
    pairs = array("Q", (tensor.data_ptr() for pair in both for tensor in pair))
    library.copy(*way, pairs.buffer_info()[0], len(here))


class _Way(NamedTuple):
    """How to copy, as the compiled code takes it; strides of layers in bytes."""

    size: int
    turned: bool
    layers: int
    matrices: int
    rows: int
    columns: int
    from_stride: int
    to_stride: int


def _way(to: torch.Tensor, from_: torch.Tensor) -> _Way | None:
    """None if the tensors do not lie as the compiled code needs it: the whole of a layer without gaps."""
    size, layers = to.element_size(), len(to)
    plain = (to.shape, to.dtype) == (from_.shape, from_.dtype) and to.is_cpu and from_.is_cpu
    if not plain or not to.numel() or not to[0].is_contiguous():
        return None
    strides = (from_.stride(0) * size, to.stride(0) * size)
    if from_[0].is_contiguous():
        return _Way(size, False, layers, 1, 1, to[0].numel(), *strides)
    turned = from_.transpose(-2, -1) if from_.dim() > 2 else from_
    if size not in (2, 4) or not turned[0].is_contiguous():
        return None
    rows, columns = turned.shape[-2:]
    matrices = turned[0].numel() // (rows * columns)
    return _Way(size, True, layers, matrices, rows, columns, *strides)
