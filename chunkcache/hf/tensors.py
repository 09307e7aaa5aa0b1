"""The plain tensors of a model, also those inside tensors.

Quantised weights are tensors around tensors: codes and scales behind torch's `__tensor_flatten__`
(torchao), or beside the codes in the tensor's attributes (bitsandbytes). Their own pointers and bytes
say nothing, so everything that looks at weights looks at these parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Named = tuple[str, torch.Tensor]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NO_PART = (type, torch.nn.Module)
_DEPTH = 3  # of objects beside a tensor's numbers: a quantisation state may hold another one


def tensors_of(model: torch.nn.Module) -> list[Named]:
    """Parameters and buffers, taken apart, with their names, in a stable order."""
    whole = [*model.named_parameters(), *model.named_buffers()]
    return [part for name, tensor in whole for part in parts(name, tensor)]


def parts(name: str, tensor: torch.Tensor) -> Iterable[Named]:
    """The plain tensors that a tensor is made of: itself, if it is plain."""
    if type(tensor) in _PLAIN and not tensor.__dict__:  # nearly all
        return ((name, tensor),)
    return _parts(name, tensor)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[Named]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
    else:
        for inner in flatten()[0]:
            yield from parts(f"{name}.{inner}", getattr(tensor, inner))
    yield from _beside(name, vars(tensor), _DEPTH)


def _beside(name: str, values: dict[str, Any], depth: int) -> Iterator[Named]:
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            yield f"{name}.{key}", value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, _NO_PART):
            yield from _beside(f"{name}.{key}", vars(value), depth - 1)


def kind(tensor: torch.Tensor) -> str:
    """What a tensor says of itself besides its numbers: class, type, shape, and how to read it."""
    described = f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}"
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return described if flatten is None else f"{described} {flatten()[1]}"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a plain tensor, one after another."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
