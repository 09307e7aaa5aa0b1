"""A twin of the user's model: the same weights, its own configuration and hooks.

Everything chunkcache needs to change (the attention implementation, hooks around forward) it changes
on the twin, so the user's model is never touched: it can be used in another thread meanwhile, and
there is nothing to undo. Parameters and buffers are shared objects, so the twin costs no memory and
follows in-place changes of the weights. Rejected: switching the attention of the user's model for
the time of a call (every other user of the model would see it).
"""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.attention import NAME, register
from chunkcache.hf.plain import compilers, peel


def make_twin(model: PreTrainedModel, attention: bool = True) -> PreTrainedModel:
    """A deep copy that shares parameters and buffers.

    Args:
        attention: it uses chunkcache's attention, not its own.

    Raises:
        UnsupportedModelError: the model object cannot be copied, or refuses the attention.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared = {id(part): part for part in [*tensors, *compilers(model)]}
    try:
        twin: PreTrainedModel = copy.deepcopy(model, shared)
        peel(twin)
        if attention:
            register()
            twin.set_attn_implementation(NAME)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            str(model.config.model_type), f"its object cannot take another attention ({error})"
        ) from error
    _check_shared(model, twin)
    return twin


def _check_shared(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours is theirs, "the twin must share its parameters"
