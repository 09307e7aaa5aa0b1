"""What transformers calls by name to build an attention mask: a stand-in that says which rule it is.

Attention here masks by rules (causal, windows, spans), so a mask that is such a rule needs no numbers.
What a layer is handed tells its rule, as it does in transformers: there the mask decides what is seen,
whatever the configuration or the layer say besides. Anything else a model lays over a rule (its own
`and_mask_function`, blocks that see each other, hidden tokens) would be lost without a word, and might
act only behind the last position of the probe; it is refused. Mask functions are closures of
transformers' own functions, so their code and contents are compared, not their values on some positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_PARTS = (torch.Tensor.__getitem__, torch.Tensor.to)  # what of it has the same rule
_READS = (torch.Tensor.item, torch.Tensor.equal, torch.equal, torch.allclose)  # give no tensor


class RuleMask(torch.Tensor):
    """Stands for a boolean mask `[rows, 1, queries, keys]` that is a rule; it has no contents.

    Slices of it have the same rule. Whoever computes with it is refused.

    Attributes:
        window, span: as in `Rule`.
    """

    window: int | None
    span: int | None

    @classmethod
    def of(cls, shape: Sequence[int], window: int | None, span: int | None) -> RuleMask:
        """One of a rule; takes a byte, whatever the shape."""
        made = torch.ones(1, dtype=torch.bool).expand(*shape).as_subclass(cls)
        made.window, made.span = window, span
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Properties are those of a mask; anything that needs its numbers has none."""
        if func in _PARTS and isinstance(args[0], cls):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs or {})
        shape = isinstance(found, torch.Size)
        if func in _READS or (isinstance(found, (torch.Tensor, tuple, list)) and not shape):
            raise UnsupportedModelError("this model", "it computes with its attention mask")
        return found

    def __deepcopy__(self, memo: object) -> RuleMask:
        return self


def chunk_mask(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    config: Any,
    local_size: int | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> RuleMask:
    """The stand-in for a mask.

    Raises:
        UnsupportedModelError: it is not causal, sliding or chunked, or hides tokens besides.
    """
    hides = attention_mask is not None and not bool(attention_mask.all())
    rules = {} if hides else _rules(batch_size, local_size)
    for rule, known in rules.items():
        if _same(mask_function, known):
            return RuleMask.of((batch_size, 1, int(q_length), int(kv_length)), *rule)
    raise UnsupportedModelError(
        str(config.model_type), "it lays a mask of its own over the causal one"
    )


def _rules(
    batch_size: int, width: int | None
) -> dict[tuple[int | None, int | None], Callable[..., Any]]:
    """What a mask function may be, by the window and span that it then stands for."""
    if width is None:
        return {(None, None): causal_mask_function}
    unpadded = torch.zeros(batch_size, dtype=torch.long)
    return {
        (width, None): sliding_window_causal_mask_function(width),
        (None, width): chunked_causal_mask_function(width, unpadded),
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same, functions by their code and what they close over."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        parts = ("__closure__", "__defaults__", "__kwdefaults__")
        alike = all(_same(getattr(one, part), getattr(other, part)) for part in parts)
        return one.__code__ is other.__code__ and alike
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, CellType) and isinstance(other, CellType):
        return _same(one.cell_contents, other.cell_contents)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one.cpu(), other)
    return type(one) is type(other) and bool(one == other)


def register(name: str) -> None:
    """Makes the function known to transformers; harmless if repeated."""
    AttentionMaskInterface.register(name, chunk_mask)
