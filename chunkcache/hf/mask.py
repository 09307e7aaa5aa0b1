"""What transformers calls by name to build an attention mask: none is built, but none is dropped.

Attention here masks by rules (causal, windows, spans), so a mask that is such a rule needs no tensor.
Anything else a model lays over it (its own `and_mask_function`, blocks that see each other) would be
lost without a word, and might act only behind the last position of the probe; it is refused. Mask
functions are closures of transformers' own functions, so their code and contents are compared, not
their values on some positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from chunkcache.errors import UnsupportedModelError

_widths: ContextVar[set[int] | None] = ContextVar("widths", default=None)


def chunk_mask(
    mask_function: Callable[..., Any],
    batch_size: int,
    config: Any,
    local_size: int | None = None,
    **kwargs: Any,
) -> None:
    """No mask.

    Raises:
        UnsupportedModelError: the mask function is not causal, sliding or chunked.
    """
    if mask_function is causal_mask_function:
        return
    if not _is_rule(mask_function, batch_size, local_size):
        raise UnsupportedModelError(
            str(config.model_type), "it lays a mask of its own over the causal one"
        )
    widths = _widths.get()
    if widths is not None and local_size is not None:
        widths.add(local_size)


def _is_rule(mask_function: Callable[..., Any], batch_size: int, width: int | None) -> bool:
    if width is None:
        return False
    unpadded = torch.zeros(batch_size, dtype=torch.long)
    return _same(mask_function, sliding_window_causal_mask_function(width)) or _same(
        mask_function, chunked_causal_mask_function(width, unpadded)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same, functions by their code and what they close over."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ is other.__code__ and _same(one.__closure__, other.__closure__)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, CellType) and isinstance(other, CellType):
        return _same(one.cell_contents, other.cell_contents)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one.cpu(), other)
    return type(one) is type(other) and bool(one == other)


@contextmanager
def mask_widths() -> Iterator[set[int]]:
    """Collects the windows and spans that masks are asked for inside the block."""
    found: set[int] = set()
    token = _widths.set(found)
    try:
        yield found
    finally:
        _widths.reset(token)


def register(name: str) -> None:
    """Makes the function known to transformers; harmless if repeated."""
    AttentionMaskInterface.register(name, chunk_mask)
