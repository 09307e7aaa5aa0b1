"""What a model keeps, seen on runs without weights.

The model is built on the meta device, where tensors have a shape and no numbers, and runs on prompts
of several lengths with the cache that `generate()` would give it. Sizes that follow the length are
rows per token, sizes that stop are windows, sizes that stay are states. Nothing depends on the names
of models. Rejected: fewer layers than the model has (configurations list their layers in many ways;
running all of them takes a second).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from chunkcache.hf.plan_read import Shapes, Unobservable, empty_layers, read
from chunkcache.lab.plan import Piece

_SHORT = (4, 6)  # tokens; below every window that models have
_ENCODER = (5, 9)
_CACHES = ("past_key_values", "cache_params", "state")
_DECODERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
_CODERS = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText")


def observe(config: PreTrainedConfig, dtype: torch.dtype) -> list[Piece]:
    """What every layer keeps, a piece or more each.

    Raises:
        Unobservable: the model cannot be built or run without weights.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model = _build(config, dtype)
            # Masks used as an index look for their numbers inside torch: there they keep everything.
            masks = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
            with masks, _NoNumbers():  # type: ignore[no-untyped-call]
                runs, crossed = _runs(model)
    except Unobservable:
        raise
    except Exception as error:  # model code raises what it likes where shapes alone do not do
        raise Unobservable(_first_line(error)) from error
    text = model.config.get_text_config(decoder=True)
    empty = empty_layers(runs, text, _new_cache(model))
    return read(runs, text) + read(crossed, text, kind="cross") + empty


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers for numbers that do not exist: every number is 1, and every search finds one.

    Routers of experts ask for them. What a cache keeps does not depend on the answers; if it did,
    its sizes would follow no rule.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((1, args[0].ndim), dtype=torch.long)
        return func(*args, **(kwargs or {}))


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160]}"


def model_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig] | None:
    """The class that generates with a configuration, and the part of it that the class takes.

    None if transformers has no class for it.
    """
    coder = config.is_encoder_decoder
    parts = [config] if coder else [config.get_text_config(decoder=True), config]
    for name in _CODERS if coder else _DECODERS:
        known = getattr(transformers, name)._model_mapping
        for part in parts:
            if type(part) in known:
                found = known[type(part)]
                return (found[0] if isinstance(found, tuple) else found), part
    return None


def has_own_cache(model: Any) -> bool:
    """Whether a model (or its class) keeps something else than the caches of transformers."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and not supports()


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the current device."""
    whole = copy.deepcopy(config)
    if hasattr(whole, "quantization_config"):
        del whole.quantization_config  # of weights; KV is kept in the model's type
    found = model_class(whole)
    if found is None:
        raise Unobservable(f"transformers has no model for {config.model_type or 'it'}")
    # The fused implementations look at numbers, or take one number type only.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: PreTrainedModel = found[0]._from_config(found[1], dtype=dtype, **plain)
    return model.eval()


# ---- running


def _runs(model: PreTrainedModel) -> tuple[dict[int, Shapes], dict[int, Shapes]]:
    """The tensors kept after prompts of several lengths: by tokens, and by encoder tokens."""
    coder = model.config.is_encoder_decoder
    lengths = _lengths(model)
    idle = _hung(model).keys()  # before any run
    runs = {tokens: _run(model, tokens, _ENCODER[0], idle) for tokens in lengths}
    if not coder:
        return runs, {}
    crossed = {_ENCODER[0]: runs[lengths[0]]}
    crossed[_ENCODER[1]] = _run(model, lengths[0], _ENCODER[1], idle)
    return (
        {tokens: _part(kept, cross=False) for tokens, kept in runs.items()},
        {tokens: _part(kept, cross=True) for tokens, kept in crossed.items()},
    )


def _part(kept: Shapes, cross: bool) -> Shapes:
    return {p: t for p, t in kept.items() if p.startswith("cross_attention_cache") == cross}


def _lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """Two short prompts; or one, and two beyond all windows, where there are any.

    Long ones end one token before a row of several tokens is complete: then buffers are fullest.
    """
    layers = getattr(_new_cache(model), "layers", [])
    windows = [layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")]
    rates = [layer.compress_rate for layer in layers if hasattr(layer, "compress_rate")]
    if not windows and not rates:
        return _SHORT
    step = math.lcm(2, *rates)
    first = -(-(max(windows, default=0) + _SHORT[-1]) // step) * step
    return (_SHORT[0], first - 1, first + 2 * step - 1)


def _new_cache(model: PreTrainedModel) -> Any:
    """The cache that `generate()` gives this model; None if the model makes one itself."""
    if has_own_cache(model) or not model.can_generate():
        return None
    text = model.config.get_text_config(decoder=True)
    return DynamicCache(config=text)


def _run(model: PreTrainedModel, tokens: int, encoder_tokens: int, idle: Collection[str]) -> Shapes:
    """All tensors with numbers that are kept after a prompt, by where they are kept.

    Args:
        idle: what modules hold anyway.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long)
    cache = _new_cache(model)
    arguments: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments = {
            "decoder_input_ids": ids,
            "encoder_outputs": _encoded(model, encoder_tokens),
        }
        cache = EncoderDecoderCache(cache, DynamicCache()) if cache is not None else None
    if cache is not None:
        name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
        arguments[name] = cache
    output = model(**arguments, use_cache=True)
    kept = next((output[name] for name in _CACHES if output.get(name) is not None), cache)
    hung = {path: tensor for path, tensor in _hung(model).items() if path not in idle}
    return dict(_tensors(kept)) | hung


def _encoded(model: PreTrainedModel, tokens: int) -> BaseModelOutput:
    """What an encoder would give, so that its input (text, sound, images) need not be known."""
    config = model.config
    encoders = (getattr(config, "encoder", None), config.get_text_config(encoder=True))
    widths = (getattr(part, "hidden_size", 0) for part in (*encoders, config.get_text_config()))
    width = next(filter(None, widths))
    encoded = BaseModelOutput(torch.zeros(1, tokens, width, dtype=model.dtype))
    encoded.attention_mask = None  # encoders of sound have a mask in their output
    return encoded


def _hung(model: PreTrainedModel) -> Shapes:
    """Tensors that modules hold beside parameters and buffers: states of models that say so."""
    if not getattr(model, "_is_stateful", False):
        return {}
    return {
        f"{module}.{name}": value
        for module, owner in model.named_modules()
        for name, value in vars(owner).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
    }


def _tensors(kept: Any, path: str = "", seen: set[int] | None = None) -> Iterator[Any]:
    """Every tensor with numbers inside an object, once, and the path to it."""
    seen = set() if seen is None else seen
    if kept is None or id(kept) in seen:
        return
    seen.add(id(kept))
    if isinstance(kept, torch.Tensor):
        if kept.is_floating_point() and kept.numel():
            yield path.lstrip("."), kept
    elif isinstance(kept, dict):
        for key, value in kept.items():
            yield from _tensors(value, f"{path}.{key}", seen)
    elif isinstance(kept, list | tuple):
        for place, value in enumerate(kept):
            yield from _tensors(value, f"{path}.{place}", seen)
    elif hasattr(kept, "__dict__") and not isinstance(kept, PreTrainedConfig):
        yield from _tensors(vars(kept), path, seen)
