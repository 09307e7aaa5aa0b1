"""Does a kernel keep its promise on this machine? Asked once of every compiled module.

Modules are compiled where chunkcache is installed, by whatever compiler is there. The model's own
probe is too short to see all of their code, so this one crosses a segment with one small layer.
"""

from __future__ import annotations

import torch

from chunkcache.attention import reference
from chunkcache.attention.batch import Batch
from chunkcache.attention.kernel import Kernels
from chunkcache.kv.arena import Arena
from chunkcache.kv.layout import ChunkLayout, LayerShape
from chunkcache.kv.sequence import Sequence

_TOKENS, _CHUNK, _HEADS, _FOLDED, _DIM = 1100, 64, 2, 3, 24
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def keeps_promise(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether attention is right, and the same bits in one piece, cut, and token by token."""
    layout = ChunkLayout((LayerShape(_HEADS, _DIM, _DIM),), _CHUNK, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    heads = _HEADS * (2 + _FOLDED)
    numbers = torch.randn(heads, _TOKENS, _DIM, generator=generator, device="cpu").to(dtype)
    keys, values, query = numbers[:_HEADS], numbers[_HEADS : 2 * _HEADS], numbers[2 * _HEADS :]
    whole = _run(layout, kernels, query, keys, values, [_TOKENS])
    at = torch.arange(_TOKENS, device="cpu")
    expected = reference.attend(query.double(), keys.double(), values.double(), at, _DIM**-0.5)
    near = (whole.double() - expected).abs().max().item() < _TOLERANCE[dtype]
    cuts = [70, 1, 430, 9, 1, 1, 1, 77, 500, 1]
    cut = _run(layout, kernels, query, keys, values, [*cuts, _TOKENS - sum(cuts)])
    return near and torch.equal(cut, whole)


def _run(
    layout: ChunkLayout,
    kernels: Kernels,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    batch = Batch(layout, [Sequence(_CHUNK)], Arena(layout), kernels(layout))
    parts, at = [], 0
    for size in sizes:
        new = slice(at, at + size)
        batch.begin([[0] * size])
        batch.write(0, keys[None, :, new], values[None, :, new])
        parts.append(batch.attend(0, query[None, :, new], _DIM**-0.5)[0])
        batch.end()
        at += size
    return torch.cat(parts)
