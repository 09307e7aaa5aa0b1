"""What one generate() call asks for, read from its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from chunkcache.errors import PromptTooLongError, UnsupportedRequestError
from chunkcache.hf import arguments
from chunkcache.hf.encoder import Encoding, decoder_prompts, read_encodings

_ENCODED = frozenset({"decoder_input_ids"})


class Request(NamedTuple):
    """Rows to run, and what generate() is called with.

    Attributes:
        rows: prompts without padding; pads: how much stood before each.
        encodings: per row the encoder's input, None for models without an encoder.
        copies: rows that generate() makes of one prompt; ends: ids that end a row.
        arguments: of generate().
    """

    rows: list[list[int]]
    pads: list[int]
    encodings: list[Encoding] | list[None]
    copies: int
    ends: set[int]
    arguments: dict[str, Any]


def read_causal(
    inputs: Any, kwargs: dict[str, Any], model: PreTrainedModel, limit: int | None, *configs: Any
) -> Request:
    """A request to a model that continues its prompt; takes the mask out of `kwargs`."""
    arguments.refuse(kwargs, *configs)
    prompts = arguments.read_prompts(
        inputs,
        kwargs.pop("attention_mask", None),
        model,
        limit,
        arguments.assumed_pad(kwargs, *configs),
    )
    return Request(
        prompts.rows,
        prompts.pads,
        [None] * len(prompts.rows),
        _copies(kwargs, *configs),
        arguments.eos_ids(kwargs, *configs),
        {"input_ids": inputs, "attention_mask": prompts.mask},
    )


def read_encoded(
    inputs: Any, kwargs: dict[str, Any], model: PreTrainedModel, limit: int | None, *configs: Any
) -> Request:
    """A request to an encoder-decoder; takes masks and the decoder's prompt out of `kwargs`."""
    arguments.refuse(kwargs, *configs, also=_ENCODED)
    pad = arguments.assumed_pad(kwargs, *configs)
    encodings = read_encodings(inputs, kwargs.pop("attention_mask", None), model, pad)
    start = arguments.setting("decoder_start_token_id", kwargs, *configs)
    if start is None:
        start = arguments.setting("bos_token_id", kwargs, *configs)
    ids = decoder_prompts(kwargs.pop("decoder_input_ids", None), len(encodings), start)
    if len(ids) != len(encodings):
        raise UnsupportedRequestError(
            f"{len(encodings)} inputs, but {len(ids)} prompts of the decoder"
        )
    arguments.check_ids(ids, model)
    if limit is not None and max(ids.shape[1], *(one.tokens for one in encodings)) > limit:
        raise PromptTooLongError(f"the model has {limit} positions")
    nothing = BaseModelOutput(last_hidden_state=torch.zeros(len(ids), 1, 1, device=model.device))
    return Request(
        ids.tolist(),
        [0] * len(ids),
        encodings,
        _copies(kwargs, *configs),
        arguments.eos_ids(kwargs, *configs),
        {
            "inputs": inputs,  # some processors of logits look at it
            "decoder_input_ids": ids.to(model.device),
            "encoder_outputs": nothing,
        },
    )


def _copies(kwargs: dict[str, Any], *configs: Any) -> int:
    """Rows that generate() makes of one prompt."""
    beams = arguments.setting("num_beams", kwargs, *configs) or 1
    returned = arguments.setting("num_return_sequences", kwargs, *configs) or 1
    return int(beams) if beams > 1 else int(returned)
