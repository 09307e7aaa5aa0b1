"""Requests with inputs besides token ids (images, audio, token types): they run on the plain model.

Such inputs are no part of a stored prefix, so nothing is looked up and nothing stored. The request is
counted as a miss with its reason. An exception are token types of zero, which processors of
vision-language models send along with every prompt: where they change nothing, they are left out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.hf.arguments import known_arguments
from chunkcache.hf.sample import short_inputs
from chunkcache.lab.records import Reuse

_TYPES = ("token_type_ids", "mm_token_type_ids")


class Others:
    """Tells such requests from others, for one model."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        functions = (model.forward, model.prepare_inputs_for_generation)
        named = {name for run in functions for name in inspect.signature(run).parameters}
        self._named = named - known_arguments() | (named & set(_TYPES)) - {"self", "args", "kwargs"}
        self._neutral: dict[str, bool] = {}

    def take(self, inputs: Any, kwargs: dict[str, Any]) -> list[str]:
        """Names of a request's other inputs; removes from `kwargs` those that say nothing.

        A mask that hides a part of features is one: they cannot be cut as ids can.
        """
        for name in self._named & kwargs.keys():
            if kwargs[name] is None or (name in _TYPES and self._says_nothing(name, kwargs[name])):
                del kwargs[name]
        found = self._named & kwargs.keys()
        mask = kwargs.get("attention_mask")
        if inputs is not None and not is_ids(inputs) and isinstance(mask, torch.Tensor):
            found |= set() if bool((mask == 1).all()) else {"attention_mask"}
        return sorted(found)

    def _says_nothing(self, name: str, values: Any) -> bool:
        """Whether token types are all zero, and zeros change no bit of this model's logits."""
        if not isinstance(values, torch.Tensor) or bool(values.any()):
            return False
        if self._model.config.is_encoder_decoder:
            return False
        if name not in self._neutral:
            inputs = short_inputs(self._model)
            zeros = torch.zeros_like(inputs["input_ids"])
            with torch.no_grad():
                plain = self._model(**inputs).logits
                typed = self._model(**inputs, **{name: zeros}).logits
            self._neutral[name] = torch.equal(plain, typed)
        return self._neutral[name]


def missed(ids: Any, mask: Any, names: list[str]) -> list[Reuse]:
    """A record per prompt of a request that ran on the plain model.

    Args:
        ids, mask: as generate() got them, `[rows, tokens]`.
    """
    reason = f"the prompt has inputs besides token ids: {', '.join(names)}"
    if not is_ids(ids):
        return [Reuse(0, 0, {}, None, reason)]
    same = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
    counts = (mask if same else torch.ones_like(ids)).sum(1).tolist()
    return [Reuse(int(count), 0, {}, 0, reason) for count in counts]


def answers(result: Any, width: int) -> list[list[int]]:
    """The generated tokens of each row of what generate() gave, behind `width` of the prompt."""
    tokens = result if isinstance(result, torch.Tensor) else result.sequences
    rows: list[list[int]] = tokens[:, width:].tolist()
    return rows


def is_ids(inputs: Any) -> bool:
    """Whether these are rows of token ids, not features or nothing."""
    return isinstance(inputs, torch.Tensor) and inputs.dim() == 2 and not inputs.is_floating_point()
