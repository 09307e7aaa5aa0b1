"""The attention function that transformers calls by name, and the arguments it must not ignore."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.cache import NOTE, Note

NAME = "chunkcache"
_CHANGES_SCORES = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "alibi": "ALiBi biases",
    "head_mask": "a head mask",
    "indices": "sparse attention",
}


def chunk_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the new tokens over shared chunks and tails.

    Args:
        query: `[rows, query_heads, tokens, dim]`; key and value: the new tokens' own, as the cache
            handed them back.

    Returns:
        `[rows, tokens, query_heads, value_dim]`, zero for rows and tokens that are padding; no weights.

    Raises:
        UnsupportedModelError: for anything this function would have to ignore.
    """
    note: Note | None = getattr(key, NOTE, None)
    model_type = str(getattr(getattr(module, "config", None), "model_type", "this model"))
    if note is None:
        raise UnsupportedModelError(
            model_type,
            "keys are rebuilt between the cache and attention (latent or shared KV), "
            "which this version cannot follow",
        )
    for name, what in _CHANGES_SCORES.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(model_type, f"its attention uses {what}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(model_type, "its attention is not causal")
    if attention_mask is not None:
        raise UnsupportedModelError(model_type, "it builds its own attention mask")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(model_type, "attention weights are never formed")
    batch, layer = note
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    real = query[: batch.rows, :, : batch.new_tokens]
    out = batch.attend(layer, real, scale)
    if real.shape == query.shape:
        return out, None
    padded = out.new_zeros((query.shape[0], query.shape[2], *out.shape[2:]))
    padded[: out.shape[0], : out.shape[1]] = out
    return padded, None


def register() -> None:
    """Makes the function known under NAME; done when a model is wrapped, harmless if repeated."""
    AttentionInterface.register(NAME, chunk_attention)
