"""generate() of transformers over forwards that it does not run: each row's own cache runs them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from chunkcache.errors import UnsupportedRequestError


class _Shell(GenerationMixin):  # type: ignore[misc]
    """generate() of a model whose forwards the cache runs (`step`), row by row."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last token of each row, `[rows, 1, vocabulary]`."""
        ids = input_ids if decoder_input_ids is None else decoder_input_ids
        if ids is None or past_key_values is None:
            raise UnsupportedRequestError(
                "prefixes are found by token ids: pass input_ids, not inputs_embeds"
            )
        logits = past_key_values.step(ids.tolist())
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The new ids and the cache: the rest is no business of generate()."""
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {"input_ids": input_ids, "past_key_values": kwargs["past_key_values"]}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The cache is there already."""


def make_shell(model: PreTrainedModel) -> PreTrainedModel:
    """An object with the settings of `model` and a generate() that works on a cache with `step()`."""
    shell = object.__new__(type(model))
    shell.__dict__ = dict(model.__dict__)
    shell.__class__ = type(type(model).__name__, (_Shell, type(model)), {})
    return shell
