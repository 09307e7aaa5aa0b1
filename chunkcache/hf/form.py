"""The form of a model's own cache: where its tensors are, whatever its class.

A cache is a graph of plain Python objects (layers, lists, dicts) with tensors and numbers at its ends.
`Form` is made from one example; it takes the ends out of another cache of the same form and makes a
cache from them again. Nothing is known about classes or names, so caches that models bring along
(xLSTM's, RWKV's list, DeepSeek-V4's compressed windows) are carried as well as transformers' own.

Which of the ends grow with the tokens is not asked of the class either: it is seen on caches after
one, two and three chunks (`kinds`).
"""

from __future__ import annotations

import copy
import enum
import types
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

Path = tuple[object, ...]
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_ENDS = (torch.Tensor, *_PLAIN)
_SHARED = (type, types.FunctionType, types.MethodType, torch.nn.Module, PreTrainedConfig)


class FormError(TypeError):
    """A cache that is not of the form it should have."""


class Ends(NamedTuple):
    """What a cache holds: tensors in the order of `Form.paths`, and plain values by path."""

    tensors: tuple[torch.Tensor, ...]
    plain: dict[Path, object]


class Kind(enum.Enum):
    """How one tensor of a cache depends on the tokens."""

    ROWS = "rows"  # so many more per chunk along one axis, the earlier ones unchanged
    STATE = "state"  # of another content after every token
    FIXED = "fixed"  # the same for all tokens of a sequence (cross-attention)
    CONSTANT = "constant"  # the same for all sequences


class Leaf(NamedTuple):
    """One tensor: its kind; of rows the axis along which they grow, and how many a chunk adds."""

    kind: Kind
    axis: int = 0
    per_chunk: int = 0


class _Slot:
    """Stands for a tensor."""


class Form:
    """Made from an example cache; `paths` says where its tensors are.

    Raises:
        FormError: the cache holds something that is neither a container nor an end.
    """

    def __init__(self, example: object):
        _separate(example)
        ends = dict(_walk(example, ()))
        self.paths = tuple(path for path, end in ends.items() if isinstance(end, torch.Tensor))
        self._slots = [_Slot() for _ in self.paths]
        memo: dict[int, object] = {
            id(ends[path]): slot for path, slot in zip(self.paths, self._slots, strict=True)
        }
        memo |= {id(part): part for part in _shared(example, set())}
        self._skeleton = copy.deepcopy(example, memo)

    def read(self, cache: object) -> Ends:
        """The ends of a cache of this form; tensors are not copied.

        Raises:
            FormError: the cache holds tensors elsewhere than the example did.
        """
        ends = dict(_walk(cache, ()))
        tensors = {path: end for path, end in ends.items() if isinstance(end, torch.Tensor)}
        if tuple(tensors) != self.paths:
            raise FormError("its cache holds other tensors than after the first forward")
        plain = {path: end for path, end in ends.items() if not isinstance(end, torch.Tensor)}
        return Ends(tuple(tensors.values()), plain)

    def write(self, tensors: Sequence[torch.Tensor], plain: Mapping[Path, object]) -> Any:
        """A new cache that holds these very tensors, and these plain values where they differ."""
        pairs = zip(self._slots, tensors, strict=True)
        memo: dict[int, object] = {id(slot): tensor for slot, tensor in pairs}
        memo |= {id(part): part for part in _shared(self._skeleton, set())}
        cache = copy.deepcopy(self._skeleton, memo)
        for path, value in plain.items():
            _put(cache, path, value)
        return cache


def kinds(
    after: Sequence[Ends], other: Ends, windows: Sequence[bool], chunk_size: int
) -> tuple[tuple[Leaf, ...], frozenset[Path]]:
    """The kind of every tensor, and the paths of the plain values that change with the tokens.

    Args:
        after: the ends after one, two, three ... chunks of one sequence.
        other: after one chunk of another sequence.
        windows: per tensor, whether it stops growing once a window is full, if it adds a row per
            token (it then counts as state).
    """
    leaves = []
    for number, windowed in enumerate(windows):
        series = [ends.tensors[number] for ends in after]
        leaf = _kind(series, other.tensors[number])
        full = windowed and leaf.per_chunk == chunk_size
        leaves.append(Leaf(Kind.STATE) if full else leaf)
    first, *others = [ends.plain for ends in (*after, other)]
    changing = {path for path in first for plain in others if plain.get(path) != first[path]}
    return tuple(leaves), frozenset(changing)


def _kind(series: list[torch.Tensor], other: torch.Tensor) -> Leaf:
    first = series[0]
    if all(_same(first, tensor) for tensor in series[1:]):
        return Leaf(Kind.CONSTANT if _same(first, other) else Kind.FIXED)
    axes = [axis for axis in range(first.dim()) if _grows(series, axis)]
    if len(axes) == 1:
        return Leaf(Kind.ROWS, axes[0], first.shape[axes[0]])
    return Leaf(Kind.STATE)


def _grows(series: list[torch.Tensor], axis: int) -> bool:
    """Whether every chunk adds as many rows along an axis as the first, and changes none."""
    step, whole = series[0].shape[axis], series[-1]
    if step == 0 or whole.dim() != series[0].dim() or whole.shape[axis] != step * len(series):
        return False
    return all(
        _same(tensor, whole.narrow(axis, 0, step * (number + 1)))
        for number, tensor in enumerate(series)
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def windowed(cache: object, path: Path) -> int:
    """How many tokens an object around a tensor says that it keeps; 0 if it does not keep a window.

    A window of a size that it does not tell counts as 1.
    """
    for depth in range(len(path)):
        owner = _get(cache, path[:depth])
        width = getattr(owner, "sliding_window", None)
        if width or getattr(owner, "is_sliding", None) is True:
            return width if isinstance(width, int) else 1
    return 0


def _separate(cache: object) -> None:
    """Gives every place a tensor of its own (DeepSeek-V4 keeps keys as values too)."""
    seen: set[int] = set()
    for path, end in list(_walk(cache, ())):
        if isinstance(end, torch.Tensor):
            if id(end) in seen:
                _put(cache, path, end.clone())
            seen.add(id(end))


def _walk(node: object, path: Path) -> Iterator[tuple[Path, object]]:
    """All ends below a node, in a stable order."""
    if isinstance(node, _ENDS):
        yield path, node
    elif not isinstance(node, _SHARED):
        for key, child in _children(node, path):
            yield from _walk(child, (*path, key))


def _children(node: object, path: Path) -> list[tuple[object, object]]:
    if isinstance(node, Mapping | list | tuple):
        own = getattr(node, "__dict__", {}).keys() - (
            {"data"} if isinstance(node, UserDict) else set()
        )
        if own:
            raise FormError(f"its cache holds a {type(node).__name__} with attributes of its own")
        return list(node.items() if isinstance(node, Mapping) else enumerate(node))
    if hasattr(node, "__dict__"):
        return list(vars(node).items())
    raise FormError(f"its cache holds a {type(node).__name__} ({'.'.join(map(str, path))})")


def _shared(node: object, seen: set[int]) -> Iterator[object]:
    """What copies of a cache share: configurations and modules it refers to."""
    if isinstance(node, (_Slot, *_ENDS)) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, _SHARED):
        yield node
        return
    for _, child in _children(node, ()):
        yield from _shared(child, seen)


def _get(node: Any, path: Path) -> Any:
    for key in path:
        node = getattr(node, str(key)) if _by_name(node, key) else node[key]
    return node


def _put(node: object, path: Path, value: object) -> None:
    owner: Any = _get(node, path[:-1])
    key: Any = path[-1]
    if not isinstance(value, torch.Tensor) and _get(owner, (key,)) == value:
        return
    if _by_name(owner, key):
        setattr(owner, key, value)
    elif isinstance(owner, tuple):
        raise FormError("its cache keeps what changes in a tuple")
    else:
        owner[key] = value


def _by_name(node: object, key: object) -> bool:
    return isinstance(key, str) and not isinstance(node, Mapping | list | tuple)
