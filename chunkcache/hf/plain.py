"""The transformers model inside what people hold: compiled, spread by accelerate, with adapters around it.

`torch.compile(model)` and a PeftModel are modules around the model. What they hold is wrapped, and
they stay what the wrapper passes everything else to. Compiled forwards are taken apart on copies:
a compiled graph is made for one shape of caches, and fixes another order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.adapters import base_of, check_adds_nothing, is_peft

_COMPILED = "_orig_mod"  # the module inside a compiled one
_COMPILED_FROM = "_torchdynamo_orig_callable"  # the function inside a compiled one


def plain_model(given: Any) -> PreTrainedModel:
    """The model that is wrapped.

    Raises:
        UnsupportedModelError: there is none inside, or adapters around it are more than layers.
    """
    model = uncompiled(given)
    if is_peft(model):
        model = base_of(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(type(given).__name__, "not a transformers PreTrainedModel")
    return model


def uncompiled(given: Any) -> Any:
    """What torch.compile was given."""
    while _is_compiled(given):
        given = given._modules[_COMPILED]
    return given


def check_model(model: PreTrainedModel) -> None:
    """Refuses what can be refused without running anything.

    Raises:
        UnsupportedModelError: with the reason, and what to do.
    """
    kind = str(model.config.model_type)
    if not model.can_generate():
        raise UnsupportedModelError(kind, "it has no generate(); load it as a causal LM")
    _check_generate(model, kind)
    _check_places(model, kind)


def _check_generate(model: PreTrainedModel, kind: str) -> None:
    own = model.__dict__.get("generate")
    found = type(model).generate if own is None else own
    if found is GenerationMixin.generate:
        return
    inner = getattr(model, "language_model", None)
    inside = isinstance(inner, PreTrainedModel) and inner.can_generate()
    raise UnsupportedModelError(
        kind,
        f"it has a generate() of its own ({getattr(found, '__qualname__', found)}), whose steps "
        "would be skipped; "
        + ("wrap its language_model for prompts of text" if inside else "use it as it is"),
    )


def _check_places(model: PreTrainedModel, kind: str) -> None:
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    if any(_offloads(hook) for hook in hooks):
        raise UnsupportedModelError(
            kind,
            "accelerate keeps some of its weights on disk or on another device until they are used, "
            'so they cannot be read and watched; load it with device_map={"": "cpu"} or onto one GPU',
        )
    places = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if any(place.type == "meta" for place in places):
        raise UnsupportedModelError(kind, "its weights are not loaded (meta device)")
    if len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise UnsupportedModelError(
            kind, f"its weights are on several devices ({names}); load it onto one"
        )
    if any(_packed(module) for module in model.modules()):
        raise UnsupportedModelError(
            kind,
            "torch's dynamic quantisation hides its weights in packed objects, which cannot be read "
            "and watched; quantise it with torchao",
        )


def _offloads(hook: Any) -> bool:
    inner = getattr(hook, "hooks", ())  # several in one
    return bool(getattr(hook, "offload", False)) or any(map(_offloads, inner))


def _packed(module: torch.nn.Module) -> bool:
    return any(isinstance(value, torch.ScriptObject) for value in module.__dict__.values())


def check_around(given: Any, model: PreTrainedModel) -> None:
    """Refuses a PeftModel that does more than the model inside; runs two short forwards.

    Raises:
        UnsupportedModelError
    """
    outer = uncompiled(given)
    if is_peft(outer):
        check_adds_nothing(outer, model)


def _is_compiled(module: Any) -> bool:
    return isinstance(module, torch.nn.Module) and _COMPILED in module._modules


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """All modules but those that only compile another: as they are in a copy that was peeled."""
    return (module for module in model.modules() if not _is_compiled(module))


def compiles(model: torch.nn.Module) -> bool:
    """Whether calling the model runs anything that torch.compile made."""
    return any(
        _is_compiled(module)
        or module.__dict__.get("_compiled_call_impl") is not None
        or hasattr(module.__dict__.get("forward"), _COMPILED_FROM)
        for module in model.modules()
    )


def compilers(model: torch.nn.Module) -> list[Any]:
    """What a copy of a model has to share, because it cannot be copied."""
    return [module.dynamo_ctx for module in model.modules() if _is_compiled(module)]


def peel(copied: torch.nn.Module) -> None:
    """Takes compiled code and accelerate's hooks off a copy of a model."""
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            while child is not None and _is_compiled(child):
                child = child._modules[_COMPILED]
            module._modules[name] = child
    for module in copied.modules():
        own = module.__dict__.get("forward")
        while (inner := _inside(module, own)) is not None:
            own = inner
        if isinstance(own, MethodType) and own.__func__ is type(module).forward:
            module.__dict__.pop("forward", None)
        elif isinstance(own, MethodType):
            module.__dict__["forward"] = MethodType(own.__func__, module)


def _inside(module: torch.nn.Module, forward: Any) -> Any:
    """What a forward was before it was compiled or hooked; None if it is neither."""
    if hasattr(forward, _COMPILED_FROM):
        return getattr(forward, _COMPILED_FROM)
    hook = module.__dict__.pop("_hf_hook", None)
    return None if hook is None else module.__dict__.pop("_old_forward", None)
