"""Compression of numbers without loss: zstd behind byte shuffling. Needs zstandard."""

from __future__ import annotations

import math
from typing import Any

import torch

from chunkcache.errors import StoreDownError

WAY = "zstd, bytes of numbers apart"
_LEVEL = 1
_RATIO = 100_000  # bytes from one, at most: zeros


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A view of a tensor's numbers; of a copy if they do not lie one after another."""
    numbers: Any = _flat(tensor).numpy()
    return memoryview(numbers)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes in a row."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() == 1:  # contiguous whatever its stride, which `view` takes amiss
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of equal weight together (exponents of neighbours are alike), then compressed."""
    import zstandard

    numbers = _flat(tensor).view(tensor.numel(), tensor.element_size())
    planes = numbers.t()
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(bytes_of(planes))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_tensor(packed: torch.Tensor, dtype: str, shape: list[int]) -> torch.Tensor:
    """The inverse.

    Args:
        dtype, shape: of the result.

    Raises:
        ValueError: it is damaged, or of another type or shape.
        StoreDownError: zstandard is not installed here.
    """
    try:
        import zstandard
    except ImportError as error:  # whoever has it can read the value, so it is not damaged
        raise StoreDownError("a value is compressed; pip install zstandard to read it") from error
    kind = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype!r} is no type of numbers")
    size = kind.itemsize * math.prod(shape)
    if size > _RATIO * packed.numel():
        raise ValueError("it would unpack to far more than was ever packed")
    try:
        raw = zstandard.ZstdDecompressor().decompress(bytes_of(packed), max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(f"it does not unpack: {error}") from error
    if len(raw) != size:
        raise ValueError("it unpacks to another length")
    if not size:
        return torch.empty(shape, dtype=kind)
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(kind.itemsize, -1)
    return planes.t().contiguous().view(-1).view(kind).view(shape)
