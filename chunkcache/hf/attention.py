"""The attention function that transformers calls by name: what a layer's scores are, and who computes.

What the function is handed decides, not the class of the model: windows come with the mask, soft caps
and sinks as arguments, latent keys show in what the layer stores. What it does not know it refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from chunkcache.attention.rule import Rule
from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.cache import NOTE, Note
from chunkcache.hf.latent import Absorbed
from chunkcache.hf.mask import RuleMask
from chunkcache.hf.mask import register as register_mask
from chunkcache.hf.running import latest

NAME = "chunkcache"
_CHANGES_SCORES = {
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
            handed them back, or made of these (latent attention).

    Returns:
        `[rows, tokens, query_heads, value_dim]`, zero for rows and tokens that are padding; no weights.

    Raises:
        UnsupportedModelError: for anything this function would have to ignore.
    """
    _check(module, is_causal, kwargs)
    note: Note | None = getattr(key, NOTE, None)
    note = note or latest(module)
    if note is None:
        raise _refusal(module, "its attention runs without the cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = _rule(module, note, attention_mask, scale, kwargs)
    shape = note.batch.layout.attention(note.layer)
    if not shape.latent:
        if not hasattr(key, NOTE):
            raise _refusal(module, "keys are rebuilt between the cache and attention")
        return _attend(note, query, rule), None
    absorbed = Absorbed.of(module, query, key, value, shape)
    if absorbed is None:
        raise _refusal(module, "no plain linear layer expands its latent keys and values")
    return absorbed.leave(_attend(note, absorbed.enter(query), rule)), None


def _attend(note: Note, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    batch, width = note.batch, note.columns
    asked = query.shape[2]
    if asked < width:  # only the last tokens are wanted (Gemma 4, behind its last own keys)
        query = torch.nn.functional.pad(query, (0, 0, width - asked, 0))
    real = query[: batch.rows, :, : batch.new_tokens]
    out = batch.attend(note.layer, real, rule)
    if real.shape != query.shape:
        padded = out.new_zeros((query.shape[0], query.shape[2], *out.shape[2:]))
        padded[: out.shape[0], : out.shape[1]] = out
        out = padded
    return out[:, width - asked :]


def _rule(
    module: torch.nn.Module,
    note: Note,
    mask: torch.Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> Rule:
    """What the mask says, if nothing contradicts it; without one all earlier tokens are seen."""
    if mask is not None and not isinstance(mask, RuleMask):
        raise _refusal(module, "it builds its own attention mask")
    window, span = (None, None) if mask is None else (mask.window, mask.span)
    told = kwargs.get("sliding_window")
    if told is not None and told != window:
        raise _refusal(
            module, f"its mask has no window of {told} tokens, but its attention is told so"
        )
    if note.window is not None and note.window not in (window, span):
        raise _refusal(module, f"its cache forgets all but {note.window} tokens, its mask does not")
    if note.rules is not None and (window, span) not in note.rules:
        raise _refusal(module, "its mask is another one than when it was proved")
    return Rule(scaling, window, span, kwargs.get("softcap"), kwargs.get("s_aux"))


def _check(module: torch.nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    for name, what in _CHANGES_SCORES.items():
        if kwargs.get(name) is not None:
            raise _refusal(module, f"its attention uses {what}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise _refusal(module, "its attention is not causal")
    if kwargs.get("output_attentions"):
        raise _refusal(module, "attention weights are never formed")


def _refusal(module: torch.nn.Module, reason: str) -> UnsupportedModelError:
    kind = getattr(getattr(module, "config", None), "model_type", "this model")
    return UnsupportedModelError(str(kind), reason)


def register() -> None:
    """Makes the functions known under NAME; done when a model is wrapped, harmless if repeated."""
    AttentionInterface.register(NAME, chunk_attention)
    register_mask(NAME)
