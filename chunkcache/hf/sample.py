"""Random inputs of the right form: what a model can be run on to see what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.errors import UnsupportedModelError

_SHORT = 12  # tokens
Shape = Callable[[Any, int], tuple[int, ...]]


def _frames(config: Any, tokens: int) -> tuple[int, ...]:
    width = config.input_feat_per_channel * getattr(config, "input_channels", 1)
    return 4 * tokens, width  # a few frames become one position


def _image(config: Any, tokens: int) -> tuple[int, ...]:
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return config.num_channels, *sides


def _wave(config: Any, tokens: int) -> tuple[int, ...]:
    return (400 + 320 * tokens,)


# By the name of what an encoder takes.
_SHAPES: dict[str, Shape] = {
    "input_features": _frames,
    "pixel_values": _image,
    "input_values": _wave,
}


def encoder_inputs(model: PreTrainedModel, ids: list[int]) -> dict[str, torch.Tensor]:
    """What an encoder can be called with: these ids, or features made of them, one row.

    Raises:
        UnsupportedModelError: it takes something of unknown shape.
    """
    encoder = model.get_encoder()
    name = str(encoder.main_input_name)
    if name == "input_ids":
        return {name: torch.tensor([ids], device=model.device)}
    config = getattr(encoder, "config", model.config)
    try:
        shape = _SHAPES[name](config, len(ids))
    except (KeyError, AttributeError) as error:
        reason = f"its encoder takes {name}, of a shape that its configuration does not tell"
        raise UnsupportedModelError(str(model.config.model_type), reason) from error
    generator = torch.Generator().manual_seed(sum(ids))
    features = torch.randn(1, *shape, generator=generator, device="cpu")
    return {name: features.to(model.device, model.dtype)}


def short_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Arguments of a short forward."""
    ids = list(range(_SHORT))
    tensor = torch.tensor([ids], device=model.device)
    if model.config.is_encoder_decoder:
        return {**encoder_inputs(model, ids), "decoder_input_ids": tensor}
    return {"input_ids": tensor}
