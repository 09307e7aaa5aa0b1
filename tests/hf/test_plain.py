"""Models as people hold them: compiled, dispatched by accelerate, with recomputation, in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import chunkcache
from tests.hf.test_zoo import ask, ids, same_bits
from tests.models import FULL_ATTENTION, build, prompt, run, same, stored, wrapped
from tests.zoo import ZOO

HEAD = prompt(64)


def llama() -> PreTrainedModel:
    return build("llama", FULL_ATTENTION["llama"])


def assert_reused(model: Any, plain: Any) -> None:
    """A hit has the bits of a miss, and the tokens of the plain model."""
    cached = wrapped(model)
    assert cached.proof.tier == "A" and cached.proof.rows
    run(cached, HEAD + prompt(9, seed=1))
    tokens = HEAD + prompt(9, seed=2)
    hit = run(cached, tokens)
    assert cached.last_reuse[0].cached_tokens == 64
    assert same(hit, run(wrapped(model), tokens))
    assert torch.equal(hit.sequences, run(plain, tokens).sequences)


# -- torch.compile


def eager(function: Any) -> Any:
    return torch.compile(function, backend="eager")  # no compiler is needed for this one


def compiled_whole(model: PreTrainedModel) -> Any:
    return eager(model)


def compiled_forward(model: PreTrainedModel) -> Any:
    model.forward = eager(model.forward)
    return model


def compiled_in_place(model: PreTrainedModel) -> Any:
    model.compile(backend="eager")
    return model


def compiled_layers(model: PreTrainedModel) -> Any:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = eager(layer)
    model.model.norm.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "way", [compiled_whole, compiled_forward, compiled_in_place, compiled_layers]
)
def test_a_compiled_model_is_wrapped_uncompiled(way: Any) -> None:
    assert_reused(way(llama()), llama())


def test_compiling_after_wrapping() -> None:
    model = llama()
    cached = wrapped(model)
    run(cached, HEAD)
    model.compile(backend="eager")  # of no concern to the twin
    run(cached, HEAD)
    assert cached.last_reuse[0].cached_tokens > 0
    model.forward = eager(model.forward)
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, HEAD)


def test_what_the_wrapper_does_not_define_is_answered_by_the_compiled_model() -> None:
    model = eager(llama())
    cached = wrapped(model)
    assert cached.given is model
    assert cached.config is model.config
    cached.generation_config = cached.generation_config
    with torch.no_grad():
        assert cached(torch.tensor([HEAD])).logits.shape == (1, 64, 128)


# -- accelerate


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    "where", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_a_model_that_accelerate_placed(folder: Any, where: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=where, dtype=torch.float32
    )
    assert_reused(model.eval(), llama())


def test_hooks_of_accelerate_are_taken_off_the_twin() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    assert any("_hf_hook" in module.__dict__ for module in model.modules())
    assert_reused(model, llama())
    assert any("_hf_hook" in module.__dict__ for module in model.modules())


def test_offloaded_weights_are_refused_with_what_to_do(folder: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    hooked = accelerate.cpu_offload(llama(), torch.device("cpu"))
    with pytest.raises(chunkcache.UnsupportedModelError, match="device_map"):
        chunkcache.wrap(hooked)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    on_disk = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=str(folder / "offloaded")
    )
    report = chunkcache.verify(on_disk.eval())
    assert report.tier == "F" and "disk" in report.reason


def test_weights_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = llama_skeleton()
    with pytest.raises(chunkcache.UnsupportedModelError, match="meta device"):
        chunkcache.wrap(model.eval())
    half = llama()
    half.lm_head.to("meta")
    with pytest.raises(chunkcache.UnsupportedModelError, match="meta device"):
        chunkcache.wrap(half)


def llama_skeleton() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**FULL_ATTENTION["llama"]))


# -- training


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputation_for_gradients_changes_nothing() -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    assert_reused(model, llama())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputation_that_is_switched_on_later_asks_for_a_new_wrap() -> None:
    model = llama()
    cached = wrapped(model)
    model.gradient_checkpointing_enable()  # its hook on the embeddings is a change like others
    with pytest.raises(chunkcache.ModelChangedError, match="wrap it again"):
        run(cached, HEAD)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_no_graph_of_gradients_is_kept(kind: str) -> None:
    model = llama() if kind == "llama" else build(kind, ZOO[kind])
    model.requires_grad_(True)
    with torch.enable_grad():
        cached = wrapped(model)
        out = run(cached, [token % 96 for token in HEAD])
    assert not out.logits[0].requires_grad
    kept = [tensor for chunk in stored_tensors(cached) for tensor in chunk]
    assert kept and not any(tensor.requires_grad or tensor.grad_fn for tensor in kept)
    assert all(parameter.grad is None for parameter in model.parameters())


def stored_tensors(cached: Any) -> list[list[torch.Tensor]]:
    if cached.proof.tier == "A":
        return list(stored(cached).values())
    runs = [node.run for tree in cached.store.trees() for node in tree.walk()]
    return [
        [run.layer(number)[0]] for run in runs for number in range(len(cached.proof.layout.layers))
    ]


# -- half precision


HALVES = [
    ("llama", "A"),
    ("mistral", "A"),
    ("deepseek_v2", "A"),
    ("lfm2", "B"),
    ("bloom", "C"),
    ("mamba", "D"),
    ("t5", "E"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "tier"), HALVES)
def test_half_precision_keeps_the_promise(name: str, tier: str, dtype: torch.dtype) -> None:
    import random

    model = zoo_copy(name, dtype)
    config = chunkcache.Config(chunk_size=16, device_bytes="64MiB")
    cached, empty = (chunkcache.wrap(model, config=config) for _ in range(2))
    assert cached.proof.tier == tier
    random_ = random.Random(name)
    head = ids(random_, 40)
    encoded = [ids(random_, 23)] if model.config.is_encoder_decoder else None
    ask(cached, [head + ids(random_, 9)], encoded)
    for count in (1, 2, 15):
        tail = [head + ids(random_, count)]
        hit = ask(cached, tail, encoded)
        assert cached.last_reuse[0].cached_tokens >= 32
        empty.flush()
        assert same_bits(hit, ask(empty, tail, encoded))


def zoo_copy(name: str, dtype: torch.dtype) -> PreTrainedModel:
    import copy

    from tests.zoo import zoo_model

    return copy.deepcopy(zoo_model(name)).to(dtype)
