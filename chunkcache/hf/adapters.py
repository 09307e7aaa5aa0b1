"""Adapters (PEFT): a PeftModel around the model, or adapter layers that transformers put into it.

Which adapters are active, how strong, and whether they are merged are settings of their layers. They
may change between requests. Every combination is served by a twin and a proof of its own, and names
trees of its own; so a request goes on with the adapters it began with, and what others stored is
found again after switching back. peft itself is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.errors import AdapterStateError, UnsupportedModelError
from chunkcache.hf.sample import short_inputs
from chunkcache.hf.settings import VOLATILE, freeze

_INTERNAL = vars(torch.nn.Module()).keys() | VOLATILE
_ACTIVE, _OFF, _MERGED = "_active_adapter", "_disable_adapters", "merged_adapters"


def is_peft(model: Any) -> bool:
    """Whether it is a PeftModel."""
    peft = sys.modules.get("peft")  # it is loaded if one exists
    return peft is not None and isinstance(model, peft.PeftModel)


def base_of(peft_model: Any) -> PreTrainedModel:
    """The model that a PeftModel put its layers into.

    Raises:
        UnsupportedModelError: its adapters are more than layers.
    """
    for name, config in peft_model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            reason = f"adapter {name!r} ({kind}) puts tokens without ids before each prompt"
            raise UnsupportedModelError(type(peft_model).__name__, reason)
        if getattr(config, "alora_invocation_tokens", None):
            reason = f"adapter {name!r} becomes active inside a prompt (invocation tokens)"
            raise UnsupportedModelError(type(peft_model).__name__, reason)
    model: PreTrainedModel = peft_model.get_base_model()
    return model


def check_adds_nothing(peft_model: Any, model: PreTrainedModel) -> None:
    """Compares a forward of a PeftModel with one of the model inside.

    Raises:
        UnsupportedModelError: they differ, so the PeftModel does something of its own.
    """
    inputs = short_inputs(model)
    with torch.no_grad():
        outside, inside = peft_model(**inputs).logits, model(**inputs).logits
    if not torch.equal(outside, inside):
        reason = "its forward does more than that of the model with its adapter layers"
        raise UnsupportedModelError(type(peft_model).__name__, reason)


class Switches:
    """The adapter layers of a model; none for most models."""

    def __init__(self, model: torch.nn.Module):
        self.modules = [module for module in model.modules() if hasattr(module, _ACTIVE)]
        self._layers = [_Layer(module) for module in self.modules]

    def state(self) -> Hashable:
        """Everything about adapters that may change without a new wrap. Microseconds per layer.

        Raises:
            AdapterStateError: their next forward would change the weights.
        """
        return tuple(layer.state() for layer in self._layers)

    def merged(self) -> Hashable:
        """Which adapters are in the weights now."""
        return tuple(tuple(getattr(module, _MERGED, ())) for module in self.modules)


class _Layer:
    """The settings of one adapter layer."""

    def __init__(self, module: torch.nn.Module):
        self._module = module
        own = {name for name in vars(module) if name not in _INTERNAL}
        plain = {n for n in own if freeze(getattr(module, n), empty=True) is not None}
        self._names = sorted(plain | {n for n in (_ACTIVE, _MERGED) if hasattr(module, n)})
        self._seen: list[Any] | None = None
        self._frozen: Hashable = None

    def state(self) -> Hashable:
        """Frozen settings; of one that is off nothing but that."""
        module = self._module
        if getattr(module, _OFF, False):
            if getattr(module, _MERGED, None):
                raise AdapterStateError(
                    "adapters are merged into the weights and switched off at once, so that the "
                    "next forward would take them out; call unmerge_adapter() first"
                )
            return "off"
        now = [getattr(module, name, None) for name in self._names]
        if now != self._seen:
            pairs = zip(self._names, now, strict=True)
            self._frozen = tuple((name, freeze(value, empty=True)) for name, value in pairs)
            self._seen = [_copy(value) for value in now]
        return self._frozen


def _copy(value: Any) -> Any:
    """Containers copied, what is in them not."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
