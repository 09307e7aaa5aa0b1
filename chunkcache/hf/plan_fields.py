"""What a model keeps, by arithmetic on its configuration: for models that cannot be observed.

The kinds of layers come from the cache that transformers makes for a configuration, the sizes from
its fields, which have several names. A state whose fields are not known is reported as such, never
guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.plan_observe import has_own_cache, model_class
from chunkcache.hf.plan_read import empty_kind, layer_config, window_kind
from chunkcache.lab.plan import Piece

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
_GROUPS = ("multi_query_group_num", "num_query_groups")
_HEAD_DIM = ("head_dim", "d_kv", "kv_channels")


class MissingFieldError(ValueError):
    """A configuration without a field that the arithmetic needs; the message names it."""


def calculate(config: PreTrainedConfig, dtype: torch.dtype) -> list[Piece]:
    """What every layer keeps, a piece or more each.

    Raises:
        MissingFieldError: no layers, heads or width under any name they are known by.
        UnsupportedModelError: a model with a cache of its own kind.
    """
    text = config.get_text_config(decoder=True)
    model = model_class(config)
    if model is not None and has_own_cache(model[0]):
        raise UnsupportedModelError(str(config.model_type), "it has a cache of its own kind")
    pieces = [
        piece
        for number, layer in enumerate(_cache_layers(text))
        for piece in _layer_pieces(text, dtype, number, layer)
    ]
    if not config.is_encoder_decoder:
        return pieces
    heads, width = _kv_heads(text), head_width(text)
    row = heads * width * dtype.itemsize
    return [
        *pieces,
        Piece("cross", len(pieces), _name(dtype), row, kv_heads=heads, head_width=width),
    ]


def _cache_layers(text: PreTrainedConfig) -> list[Any]:
    """The layers of the cache for a configuration; None stands for plain attention."""
    try:
        return list(DynamicCache(config=text).layers)
    except (AttributeError, TypeError, KeyError, ValueError):  # not a type that transformers knows
        return [None] * layer_count(text)


def _layer_pieces(
    text: PreTrainedConfig, dtype: torch.dtype, number: int, layer: Any
) -> Iterator[Piece]:
    fields = layer_config(text, number)
    linear, attends = hasattr(layer, "conv_states"), hasattr(layer, "get_seq_length")
    if layer is not None and not linear and not attends:
        yield Piece(empty_kind(text, number), 1, "")
        return
    if hasattr(layer, "compress_rate"):
        yield Piece("unknown", 1, "")
        return
    if linear:
        yield _state(fields, dtype)
    if not linear or hasattr(layer, "update"):
        yield _rows(text, dtype, number, layer)
    if hasattr(layer, "update_indexer"):
        row = int(_field(fields, "index_head_dim", "indexer_head_dim")) * dtype.itemsize
        yield Piece("index", 1, _name(dtype), row)


def _name(*dtypes: torch.dtype) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _field(config: Any, *names: str, default: Any = None) -> Any:
    """The first field that is there and not None, under any of its names.

    Raises:
        MissingFieldError: none is, and there is no default.
    """
    for name in names:
        if (found := getattr(config, name, None)) is not None:
            return found
    if default is None:
        raise MissingFieldError(f"its configuration has no {' or '.join(names)}")
    return default


# ---- attention


def _rows(text: PreTrainedConfig, dtype: torch.dtype, number: int, layer: Any) -> Piece:
    """Keys and values of a token."""
    fields = layer_config(text, number)
    window = getattr(layer, "sliding_window", None)
    kind = "" if window is None else window_kind(text, number)
    limit = None if window is None else window - 1  # the token that is read needs no place
    if rank := getattr(fields, "kv_lora_rank", None):
        row = (rank + _field(fields, "qk_rope_head_dim")) * dtype.itemsize
        return Piece(kind or "latent", 1, _name(dtype), row, limit=limit)
    heads, width = _kv_heads(fields, not kind), head_width(fields, not kind)
    return Piece(
        kind=kind or "full",
        layers=1,
        dtype=_name(dtype),
        row_bytes=heads * width * dtype.itemsize,
        limit=limit,
        kv_heads=heads,
        head_width=width,
    )


def layer_count(text: PreTrainedConfig) -> int:
    """Layers of the decoder.

    Raises:
        MissingFieldError: the configuration does not say.
    """
    return int(_field(text, *_LAYERS))


def query_heads(text: PreTrainedConfig) -> int:
    """Query heads of a layer; 0 if there are none or layers differ."""
    layers = (layer_config(text, number) for number in range(layer_count(text)))
    found = {_field(layer, *_HEADS, default=0) for layer in layers}
    return int(found.pop()) if len(found) == 1 else 0


def _kv_heads(text: PreTrainedConfig, full: bool = True) -> int:
    """KV heads of a layer; with `full` of one without a window, which may have its own number."""
    if full and (found := getattr(text, "num_global_key_value_heads", None)):
        return int(found)
    heads = _field(text, *_HEADS)
    grouped = getattr(text, "new_decoder_architecture", False)  # Falcon: then it is not multi-query
    if getattr(text, "multi_query", False) and not grouped:
        return 1
    if getattr(text, "multi_query_attention", False):
        return int(_field(text, *_GROUPS))
    attention = getattr(text, "attn_config", None)  # MPT, DBRX
    return int(_field(attention, "kv_n_heads", default=_field(text, *_KV_HEADS, default=heads)))


def head_width(text: PreTrainedConfig, full: bool = True) -> int:
    """Numbers in the key and the value of one head together, before any compression."""
    if getattr(text, "kv_lora_rank", None):
        key = _field(text, "qk_nope_head_dim") + _field(text, "qk_rope_head_dim")
        return int(key + _field(text, "v_head_dim"))
    if full and (found := getattr(text, "global_head_dim", None)):
        return 2 * int(found)
    if (found := _field(text, *_HEAD_DIM, default=0)) == 0:
        found = _field(text, *_WIDTH) // _field(text, *_HEADS)
    return int(found) + int(_field(text, "v_head_dim", default=found))


# ---- states


def _state(text: PreTrainedConfig, dtype: torch.dtype) -> Piece:
    """The state of a convolution or recurrence, where its fields are known."""
    for sizes in (_conv_only, _kimi, _delta, _mamba2, _mamba):
        try:
            conv, recurrent = sizes(text)
        except MissingFieldError:
            continue
        size = conv * dtype.itemsize + recurrent * torch.float32.itemsize
        types = [dtype, torch.float32] if recurrent else [dtype]
        return Piece("state", 1, _name(*types), fixed_bytes=size)
    return Piece("unknown", 1, "")


def _conv_only(text: PreTrainedConfig) -> tuple[int, int]:
    """LFM2: the last inputs of a convolution."""
    return _field(text, "hidden_size") * _field(text, "conv_L_cache"), 0


def _kimi(text: PreTrainedConfig) -> tuple[int, int]:
    """Kimi delta attention, whose fields are a dictionary of their own."""
    fields = _field(text, "linear_attn_config")
    heads, width = fields["num_heads"], fields["head_dim"]
    return 3 * heads * width * fields["short_conv_kernel_size"], heads * width * width


def _delta(text: PreTrainedConfig) -> tuple[int, int]:
    """Gated delta rule (Qwen3-Next and others): queries, keys and values; keys times values."""
    keys, key = _field(text, "linear_num_key_heads"), _field(text, "linear_key_head_dim")
    values, value = _field(text, "linear_num_value_heads"), _field(text, "linear_value_head_dim")
    channels = 2 * keys * key + values * value
    return channels * _field(text, "linear_conv_kernel_dim"), values * key * value


def _mamba2(text: PreTrainedConfig) -> tuple[int, int]:
    """Mamba-2: one decay per head, inputs shared by groups."""
    groups = _field(text, "mamba_n_groups", "mamba_ngroups", "n_groups")
    state = _field(text, "mamba_d_state", "ssm_state_size", "state_size")
    heads = _field(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    width = _field(text, "mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
    kernel = _field(text, "mamba_d_conv", "conv_kernel")
    return (heads * width + 2 * groups * state) * kernel, heads * width * state


def _mamba(text: PreTrainedConfig) -> tuple[int, int]:
    """Mamba-1: one state per channel."""
    channels = _field(text, "mamba_expand", "expand") * _field(text, "hidden_size")
    kernel = _field(text, "mamba_d_conv", "conv_kernel")
    return channels * kernel, channels * _field(text, "mamba_d_state", "state_size")
