"""What a model's KV costs, from its configuration alone: no weights are read or made.

The model is observed on a run without weights where that works, since what it does is the truth
(plan_observe). Where its code needs numbers, its configuration is calculated (plan_fields), and the
plan says so. Both are tested to agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.plan_fields import (
    MissingFieldError,
    calculate,
    head_width,
    layer_count,
    query_heads,
)
from chunkcache.hf.plan_observe import observe
from chunkcache.hf.plan_read import Unobservable, layer_config
from chunkcache.lab.plan import Piece, Plan, merge

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ASSUMED = torch.bfloat16
_ODD_FIELDS = (
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)  # of a kind not expected
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions")


def plan(config: PreTrainedConfig, dtype: torch.dtype | None = None, observed: bool = True) -> Plan:
    """What the KV of a model costs.

    Args:
        dtype: of the model; by default the configuration's, and bfloat16 if it names none.
        observed: False to calculate the configuration without running the model.

    Raises:
        UnsupportedModelError: neither way works, or the model keeps nothing between tokens.
    """
    used, source = _dtype(config, dtype)
    pieces, reason = _pieces(config, used, observed)
    if not any(piece.row_bytes or piece.fixed_bytes for piece in pieces):
        raise UnsupportedModelError(str(config.model_type), "it keeps nothing between tokens")
    text = config.get_text_config(decoder=True)
    attends = any(piece.kv_heads or piece.kind == "latent" for piece in pieces)
    heads = query_heads(text) if attends else 0
    return Plan(
        model_type=str(config.model_type),
        method="configuration" if reason else "observed",
        reason=reason,
        dtype=str(used).removeprefix("torch."),
        dtype_source=source,
        pieces=merge(pieces),
        heads=heads,
        mha_token_bytes=_mha(pieces, text, heads, used.itemsize),
        positions=_positions(text),
    )


def _dtype(config: PreTrainedConfig, asked: torch.dtype | None) -> tuple[torch.dtype, str]:
    """The number type of KV, and who says so."""
    if asked is not None:
        return asked, "asked for"
    for part in (config, config.get_text_config(decoder=True)):
        named = getattr(part, "dtype", None)
        found = getattr(torch, named, None) if isinstance(named, str) else named
        if found in _TYPES:
            return found, "configuration"
    return _ASSUMED, "assumed"


def _pieces(
    config: PreTrainedConfig, dtype: torch.dtype, observed: bool
) -> tuple[list[Piece], str]:
    """What the layers keep, and why it was not observed; empty if it was."""
    reason = "not asked for"
    if observed:
        try:
            return observe(config, dtype), ""
        except Unobservable as error:
            reason = str(error)
    try:
        return calculate(config, dtype), reason
    except (MissingFieldError, *_ODD_FIELDS) as error:
        raise UnsupportedModelError(
            str(config.model_type), f"{error}; observed: {reason}"
        ) from error


def _mha(pieces: Sequence[Piece], text: PreTrainedConfig, heads: int, size: int) -> int:
    """Bytes per token of plain multi-head attention in all layers that mix tokens."""
    if not heads:
        return 0
    own = [piece for piece in pieces if piece.kv_heads and piece.kind != "cross"]
    idle = sum(piece.layers for piece in pieces if piece.kind == "none")
    rest = layer_count(text) - idle - sum(piece.layers for piece in own)
    width = head_width(layer_config(text, 0)) if rest > 0 else 0
    widths = sum(piece.layers * piece.head_width for piece in own) + max(0, rest) * width
    return heads * widths * size


def _positions(text: PreTrainedConfig) -> int | None:
    named = (getattr(text, name, None) for name in _POSITIONS)
    return next((found for found in named if isinstance(found, int) and found > 0), None)
