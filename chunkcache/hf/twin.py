"""A twin of the user's model: the same weights, its own configuration and hooks.

Everything chunkcache needs to change (the attention implementation, hooks around forward) it changes
on the twin, so the user's model is never touched: it can be used in another thread meanwhile, and
there is nothing to undo. Parameters and buffers are shared objects, so the twin costs no memory and
follows in-place changes of the weights. Rejected: switching the attention of the user's model for
the time of a call (every other user of the model would see it).
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf import attention


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy that shares parameters and buffers and uses chunkcache's attention.

    Raises:
        UnsupportedModelError: the model object cannot be copied, or refuses the attention.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    try:
        twin: PreTrainedModel = copy.deepcopy(model, shared)
        attention.register()
        twin.set_attn_implementation(attention.NAME)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            str(model.config.model_type), f"its object cannot take another attention ({error})"
        ) from error
    _check_shared(model, twin)
    return twin


def _check_shared(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours is theirs, "the twin must share its parameters"


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers with their names, in a stable order."""
    return [*model.named_parameters(), *model.named_buffers()]
