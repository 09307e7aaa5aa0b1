"""From the tensors that a model kept after prompts of several lengths to what its layers cost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from chunkcache.lab.plan import Piece

Shapes = dict[str, torch.Tensor]
"""Tensors (on any device; only shape and type are read) by where they were kept."""

_LAYER = re.compile(r"[a-z_]\.(\d+)(?:\.|$)")


class Unobservable(Exception):
    """A run that failed, or sizes that follow no rule; the message says which."""


@dataclass(frozen=True)
class _Rule:
    """How the bytes of one tensor follow the length; see Piece."""

    row_bytes: int = 0
    stride: int = 1
    limit: int | None = None
    fixed_bytes: int = 0


def read(runs: Mapping[int, Shapes], text: PreTrainedConfig, kind: str = "") -> list[Piece]:
    """What each layer keeps, by runs of several lengths in ascending order.

    Args:
        kind: of all rows; by default it is found from each tensor.

    Raises:
        Unobservable: a tensor whose size follows no rule.
    """
    layers: dict[int | None, Shapes] = defaultdict(dict)
    for kept in runs.values():  # the longest run last: its tensors stay
        for path, tensor in kept.items():
            layers[_layer(path)][path] = tensor
    return [
        piece
        for number, tensors in layers.items()
        for piece in _layer_pieces(runs, text, number, tensors, kind)
    ]


def _layer(path: str) -> int | None:
    """The layer that a tensor belongs to; None if it is of all layers together."""
    found = _LAYER.search(path)
    return int(found[1]) if found else None


def _layer_pieces(
    runs: Mapping[int, Shapes],
    text: PreTrainedConfig,
    number: int | None,
    tensors: Shapes,
    kind: str,
) -> list[Piece]:
    lengths = list(runs)
    rules = {
        path: _rule(path, lengths, [kept.get(path) for kept in runs.values()]) for path in tensors
    }
    stride = max(rule.stride for rule in rules.values())
    groups: dict[tuple[str, int, int | None], list[tuple[_Rule, torch.Tensor]]] = defaultdict(list)
    for path, rule in rules.items():
        found = kind or _kind(path, rule, tensors[path], text, number)
        key = (found, rule.stride, rule.limit)
        if found == "state" and stride > 1:
            key = ("compressed", stride, None)  # buffers of rows that are not complete yet
        groups[key].append((rule, tensors[path]))
    heads, width = _heads(tensors, text, number)
    layers = text.num_hidden_layers if number is None else 1
    return [
        Piece(
            kind=found,
            layers=layers,
            dtype=_types(tensor for _, tensor in group),
            row_bytes=sum(rule.row_bytes for rule, _ in group),
            stride=stride,
            limit=limit,
            fixed_bytes=sum(rule.fixed_bytes for rule, _ in group) // layers,
            kv_heads=heads if found in ("full", "sliding", "chunked", "cross") else 0,
            head_width=width if found in ("full", "sliding", "chunked", "cross") else 0,
        )
        for (found, stride, limit), group in groups.items()
    ]


def _types(tensors: Any) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _heads(tensors: Shapes, text: PreTrainedConfig, number: int | None) -> tuple[int, int]:
    """KV heads of a layer, and the numbers in key and value of one head; 0 for a latent."""
    named = {path.rsplit(".", 1)[-1]: tensor for path, tensor in tensors.items()}
    keys = named.get("keys")
    if keys is None or keys.ndim != 4 or _latent(keys, text, number):
        return 0, 0
    values = named.get("values", keys)  # a layer whose values are its keys keeps them once
    return keys.shape[1], keys.shape[-1] + values.shape[-1]


# ---- rules


def _rule(path: str, lengths: Sequence[int], tensors: Sequence[torch.Tensor | None]) -> _Rule:
    present = [tensor for tensor in tensors if tensor is not None]
    size = present[-1].element_size()
    grows = _growing(path, present)
    if grows is None:
        return _Rule(fixed_bytes=present[-1].numel() * size)
    counts = [0 if tensor is None else tensor.shape[grows] for tensor in tensors]
    widest = max(present, key=lambda tensor: tensor.shape[grows])
    row_bytes = widest.numel() // widest.shape[grows] * size
    if counts[-1] != counts[-2]:
        stride = _stride(path, lengths[-1] - lengths[-2], counts[-1] - counts[-2])
        return _Rule(row_bytes, stride)
    if path.endswith((".keys", ".values")):
        return _Rule(row_bytes, limit=counts[-1])
    return _Rule(fixed_bytes=row_bytes * max(counts))


def _growing(path: str, tensors: Sequence[torch.Tensor]) -> int | None:
    """The dimension in which shapes differ; None if all are the same."""
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise Unobservable(f"{path} changes its dimensions with the length")
    sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
    moving = [place for place, found in enumerate(sizes) if len(set(found)) > 1]
    if len(moving) > 1:
        raise Unobservable(f"{path} grows in more than one dimension")
    return moving[0] if moving else None


def _stride(path: str, tokens: int, rows: int) -> int:
    if rows < 1 or tokens % rows:
        raise Unobservable(f"{path} gains {rows} rows in {tokens} tokens")
    return tokens // rows


# ---- kinds


def _kind(
    path: str, rule: _Rule, tensor: torch.Tensor, text: PreTrainedConfig, number: int | None
) -> str:
    if not rule.row_bytes:
        return "state"
    if "indexer" in path:
        return "index"
    if rule.stride > 1:
        return "compressed"
    if rule.limit is not None:
        return window_kind(text, number)
    return "latent" if _latent(tensor, text, number) else "full"


def layer_config(text: PreTrainedConfig, number: int | None) -> PreTrainedConfig:
    """The fields of one layer, where a configuration has different ones for its layers."""
    if number is None or not getattr(text, "is_heterogeneous", False):
        return text
    return text.per_layer_config[number]


def window_kind(text: PreTrainedConfig, number: int | None) -> str:
    """Whether a layer with a window slides it or cuts the prompt into chunks."""
    names = getattr(text, "layer_types", None)
    if names and number is not None and number < len(names):
        return "chunked" if "chunked" in names[number] else "sliding"
    return "chunked" if getattr(text, "attention_chunk_size", None) else "sliding"


def _latent(tensor: torch.Tensor, text: PreTrainedConfig, number: int | None) -> bool:
    """Whether rows are latents, which all heads share, and their rotary part."""
    layer = layer_config(text, number)
    rank = getattr(layer, "kv_lora_rank", None)
    widths = {rank, getattr(layer, "qk_rope_head_dim", None)}
    return bool(rank) and tensor.shape[1] == 1 and tensor.shape[-1] in widths


def empty_layers(runs: Mapping[int, Shapes], text: PreTrainedConfig, cache: Any) -> list[Piece]:
    """Layers of a cache in which no run kept anything."""
    held = {_layer(path) for kept in runs.values() for path in kept}
    numbers = set(range(len(getattr(cache, "layers", [])))) - held
    return [Piece(empty_kind(text, number), 1, "") for number in sorted(numbers)]


def empty_kind(text: PreTrainedConfig, number: int) -> str:
    """Whether a layer that keeps nothing reads another layer's KV, or needs none."""
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is not None:
        return "shared" if modes[number] == "reuse" else "none"
    return "shared" if getattr(text, "num_kv_shared_layers", None) else "none"
