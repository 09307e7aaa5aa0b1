"""Weights that are not plain tensors: digested by content, watched, and never taken for plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import chunkcache
from chunkcache.hf.fingerprint import digest_weights
from chunkcache.hf.linear import best
from tests.models import FULL_ATTENTION, build, prompt, run, same, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
HEAD = prompt(64)


class Coded(torch.Tensor):
    """A weight as whole numbers and one scale per row; products are made of what they stand for."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made  # type: ignore[no-any-return]

    @staticmethod
    def of(weight: torch.Tensor) -> Coded:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return Coded((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> Coded:
        return Coded(inner["codes"], inner["scale"])

    def plain(self) -> torch.Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            made = Coded(args[0].codes, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs, made)
        args, kwargs = torch.utils._pytree.tree_map_only(Coded, Coded.plain, (args, kwargs))
        return func(*args, **kwargs)


def coded(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
            weight = Coded.of(module.weight.detach())
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build("llama", FULL_ATTENTION["llama"], dtype)


def assert_reused(model: PreTrainedModel, exact: bool = True) -> None:
    """A hit has the bits of a miss, and the tokens of the plain model."""
    cached = wrapped(model)
    run(cached, HEAD + prompt(9, seed=1))
    tokens = HEAD + prompt(9, seed=2)
    hit = run(cached, tokens)
    assert cached.last_reuse[0].cached_tokens == 64
    assert same(hit, run(wrapped(model), tokens))
    if exact:
        plain = run(model, tokens)
        assert torch.equal(hit.sequences, plain.sequences)
        torch.testing.assert_close(hit.logits[0], plain.logits[0], atol=1e-5, rtol=1e-5)


def test_tensors_inside_tensors_are_reused_to_the_bit() -> None:
    model = coded(llama())
    assert_reused(model)
    twin = wrapped(model).proof.carrier.model
    assert twin.model.layers[0].mlp.up_proj.serving is None, "the compiled product reads numbers"
    assert twin.model.layers[0].mlp.gate_proj.serving == best(torch.float32)


@pytest.mark.parametrize("inner", ["codes", "scale"])
def test_tensors_inside_tensors_are_digested_and_watched(inner: str) -> None:
    model = coded(llama())
    before = digest_weights(model)
    cached = wrapped(model)
    run(cached, HEAD)
    weight = model.model.layers[1].mlp.up_proj.weight
    getattr(weight, inner)[3, 0] += 1
    assert digest_weights(model) != before
    run(cached, HEAD)
    assert cached.last_reuse[0].cached_tokens == 0
    getattr(weight, inner)[3, 0] -= 1
    setattr(weight, inner, getattr(weight, inner).clone())
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, HEAD)


def test_a_scale_beside_the_numbers_is_part_of_a_weight() -> None:
    """As bitsandbytes keeps it: an attribute of the parameter, or of an object there."""

    class State:
        def __init__(self) -> None:
            self.absmax = torch.ones(4)

    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.quant_state = State()
    before = digest_weights(model)
    cached = wrapped(model)
    weight.quant_state.absmax[2] = 0.5
    assert digest_weights(model) != before
    assert cached._state._watch.changed()


def _ao() -> Any:
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_of_torchao(name: str, dtype: torch.dtype) -> None:
    ao, model = _ao(), llama(dtype)
    ao.quantize_(model, getattr(ao, name)())
    assert chunkcache.verify(model, 16).tier == "A"
    assert_reused(model, exact=dtype == torch.float32)
    inner = model.model.layers[0].mlp.up_proj.weight.scale
    cached = wrapped(model)
    with torch.no_grad():
        inner[5] *= 2
    assert cached._state._watch.changed()


def test_activations_that_are_rounded_to_codes_keep_the_promise() -> None:
    """Roundings of attention tip codes over, so logits are the plain model's only up to a length."""
    ao, model = _ao(), llama()
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    cached, empty = wrapped(model), wrapped(model)
    for count in (60, 90):
        run(cached, HEAD[:40] + prompt(count - 40, seed=1))
        tokens = HEAD[:40] + prompt(count - 40, seed=2)
        empty.flush()
        assert same(run(cached, tokens), run(empty, tokens))


def test_a_checkpoint_quantised_by_transformers(tmp_path: Any) -> None:
    ao = _ao()
    llama().save_pretrained(tmp_path)
    config = TorchAoConfig(ao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    ).eval()
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ not in ("Parameter", "Tensor")
    assert_reused(model)


def test_packed_weights_are_refused() -> None:
    quantise = torch.ao.quantization.quantize_dynamic
    model = quantise(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(chunkcache.UnsupportedModelError, match="torchao"):
        chunkcache.wrap(model)


class Restless(torch.nn.Linear):
    """Keeps its weights elsewhere after each forward, as int8 layers of bitsandbytes do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = self.weight.data.clone()
        return super().forward(x)


def test_a_forward_that_changes_its_weights_is_refused() -> None:
    model = llama()
    model.lm_head.__class__ = Restless
    with pytest.raises(chunkcache.UnsupportedModelError, match="changes its own weights"):
        chunkcache.wrap(model)
