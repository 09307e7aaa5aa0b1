"""Scratch memory that is kept between calls.

Large temporaries come from fresh pages on every call (the allocator maps and unmaps them), which
costs as much as a pass of arithmetic; a step of decoding makes dozens. One workspace belongs to one
request at a time.

Element-wise kernels use vector code for whole blocks and scalar code for the rest of each thread's
share, and the two differ in the last bit of exp2. Buffers are therefore padded so that every
thread's share is whole blocks: a result then does not depend on the number of elements.
"""

from __future__ import annotations

import math

import torch

_BLOCK = 64  # at least two vectors of any instruction set
_GRAIN = 32768  # elements per thread from which torch splits element-wise work


def padded_size(elements: int, threads: int) -> int:
    """The smallest size from `elements` up that splits into whole blocks per thread.

    >>> padded_size(100, 2), padded_size(100_000, 3) % (3 * 64)
    (128, 0)
    """
    size = elements
    while True:
        shares = max(1, min(threads, -(-size // _GRAIN)))
        step = shares * _BLOCK
        rounded = -(-size // step) * step
        if rounded == size:
            return size
        size = rounded


class Workspace:
    """Named, growing buffers on one device.

    Args:
        block: scores worked on at a time. By default 2 MiB, what the second-level caches of two
            cores hold; elsewhere 256 MiB, because there each operation costs a launch.
    """

    def __init__(self, device: torch.device, block: int | None = None):
        self.device = device
        self.block = block or (2**19 if device.type == "cpu" else 2**26)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A view of `shape` over a buffer, and the padded flat buffer under it; contents are stale.

        What an earlier call with the same name returned is overwritten.
        """
        elements = math.prod(shape)
        size = padded_size(elements, torch.get_num_threads())
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.zeros(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        flat = buffer[:size]
        return flat[:elements].view(shape), flat
