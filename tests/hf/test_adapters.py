"""Adapters of PEFT: each state of them has prefixes of its own, which switching never mixes or drops."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel, StoppingCriteria

import chunkcache
from chunkcache.hf.model import CachedModel
from tests.models import FULL_ATTENTION, build, prompt, run, same, wrapped
from tests.zoo import ZOO

HEAD = prompt(64)
pytestmark = [  # peft uses names that transformers will drop, and says what we know
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute"),
]


def lora(**more: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**settings | {"lora_dropout": 0.1, "init_lora_weights": False} | more)


def base(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build("llama", FULL_ATTENTION["llama"])


def two_adapters(seed: int = 0) -> PeftModel:
    model = get_peft_model(base(seed), lora(), adapter_name="red")
    model.add_adapter("blue", lora(target_modules=["k_proj", "up_proj"], r=2))
    model.set_adapter("red")
    return model.eval()


def close(ours: Any, plain: Any) -> bool:
    """Equal tokens, and logits within rounding."""
    pairs = zip(ours.logits, plain.logits, strict=True)
    near = all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in pairs)
    return near and torch.equal(ours.sequences, plain.sequences)


def ask(cached: CachedModel, plain: Any, tail: int, found: int) -> Any:
    """Asks, compares with the plain model, and says how much was found."""
    tokens = HEAD + prompt(9, seed=tail)
    ours = run(cached, tokens)
    assert cached.last_reuse[0].cached_tokens == found
    assert close(ours, run(plain, tokens))
    return ours


def test_a_peft_model_is_reused_to_the_bit_with_invariant_rows() -> None:
    model = two_adapters()
    cached, empty = wrapped(model), wrapped(model)
    assert cached.proof.tier == "A" and cached.proof.rows
    ask(cached, model, 1, 0)
    hit = ask(cached, model, 2, 64)
    assert same(hit, run(empty, HEAD + prompt(9, seed=2)))


def test_switching_adapters_switches_trees_and_keeps_both() -> None:
    model = two_adapters()
    cached = wrapped(model)
    first = ask(cached, model, 1, 0)
    model.set_adapter("blue")
    other = ask(cached, model, 1, 0)
    assert not torch.equal(first.logits[0], other.logits[0])
    with model.disable_adapter():
        none = ask(cached, model, 1, 0)
        assert close(none, run(base(), HEAD + prompt(9, seed=1)))
    ask(cached, model, 2, 64)
    cached.set_adapter("red")  # the wrapper passes on what it does not define
    ask(cached, model, 2, 64)
    with cached.disable_adapter():
        ask(cached, model, 2, 64)
    assert len(cached.store.trees()) == 3
    cached.store.check()


def test_adapters_inside_a_transformers_model() -> None:
    model = base()
    model.add_adapter(lora(), adapter_name="red")
    model.add_adapter(lora(r=2), adapter_name="blue")
    model.set_adapter("red")
    cached = wrapped(model.eval())
    ask(cached, model, 1, 0)
    model.set_adapter("blue")
    ask(cached, model, 1, 0)
    model.disable_adapters()
    ask(cached, model, 1, 0)
    model.enable_adapters()
    ask(cached, model, 2, 64)
    model.set_adapter("red")
    ask(cached, model, 2, 64)
    model.set_adapter(["red", "blue"])
    ask(cached, model, 2, 0)


def test_strength_is_part_of_the_name() -> None:
    model = two_adapters()
    cached = wrapped(model)
    ask(cached, model, 1, 0)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = layer.scaling["red"]
    layer.set_scale("red", 3)
    ask(cached, model, 1, 0)
    layer.scaling["red"] = before
    ask(cached, model, 2, 64)


def test_the_same_name_with_other_content_shares_nothing() -> None:
    one, two, again = (wrapped(two_adapters(seed)) for seed in (0, 1, 0))
    assert one._state.serving().space.name != two._state.serving().space.name
    assert one._state.serving().space.name == again._state.serving().space.name


def test_changed_adapter_weights_are_noticed() -> None:
    model = two_adapters()
    cached = wrapped(model)
    ask(cached, model, 1, 0)
    model.set_adapter("blue")
    ask(cached, model, 1, 0)
    model.set_adapter("red")
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.v_proj.lora_B["red"].weight[1, 2] += 0.5
    ask(cached, model, 2, 0)
    assert len(cached.store.trees()) == 1, "what was stored with other weights is gone"


@pytest.mark.filterwarnings("ignore:Already unmerged")  # layers of the other adapter only
def test_merging_is_a_change_of_weights() -> None:
    model = two_adapters()
    cached = wrapped(model)
    ask(cached, model, 1, 0)
    model.merge_adapter()
    ask(cached, model, 2, 0)
    ask(cached, model, 3, 64)
    with model.disable_adapter(), pytest.raises(chunkcache.AdapterStateError, match="unmerge"):
        run(cached, HEAD)
    model.unmerge_adapter()
    ask(cached, model, 2, 0)


def test_merged_and_unloaded_adapters_are_just_weights() -> None:
    model = two_adapters()
    cached = wrapped(model)
    plain = model.merge_and_unload()
    assert type(plain).__name__ == "LlamaForCausalLM"
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, HEAD)
    cached = wrapped(plain)
    ask(cached, plain, 1, 0)
    ask(cached, plain, 2, 64)


def test_adapters_that_come_later_need_a_new_wrap() -> None:
    model = two_adapters()
    cached = wrapped(model)
    model.add_adapter("c", lora())
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, HEAD)


def test_dropout_of_an_adapter_is_training_mode() -> None:
    model = base().eval()
    model.add_adapter(lora(), adapter_name="red")  # its layers are born in training mode
    for module in model.modules():
        if "lora_dropout" in module._modules:
            module.train()
    with pytest.raises(chunkcache.TrainingModeError, match="part of it"):
        chunkcache.wrap(model)
    cached = wrapped(model.eval())
    model.model.layers[0].self_attn.q_proj.train()
    with pytest.raises(chunkcache.TrainingModeError):
        run(cached, HEAD)


class Switch(StoppingCriteria):  # type: ignore[misc]
    """Switches adapters in the middle of an answer."""

    def __init__(self, model: PeftModel, cached: CachedModel):
        self.model, self.cached, self.calls = model, cached, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            self.model.set_adapter("blue")
            thread = threading.Thread(target=run, args=(self.cached, HEAD))
            thread.start()
            thread.join()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_request_goes_on_with_the_adapters_it_began_with() -> None:
    model = two_adapters()
    cached = wrapped(model)
    expected = run(model, HEAD, new=40)
    ours = run(cached, HEAD, new=40, stopping_criteria=[Switch(model, cached)])
    assert close(ours, expected)
    answer = ours.sequences[0].tolist()
    model.set_adapter("red")
    again = run(cached, answer)
    assert cached.last_reuse[0].cached_tokens >= 96, "its answer was stored as its own adapter's"
    assert same(again, run(wrapped(model), answer))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(config: Any) -> None:
    model = get_peft_model(base(), config).eval()
    with pytest.raises(chunkcache.UnsupportedModelError, match="tokens without ids"):
        chunkcache.wrap(model)
    assert chunkcache.verify(model).tier == "F"


def test_adapters_that_wake_up_inside_a_prompt_are_refused() -> None:
    config = lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(chunkcache.UnsupportedModelError, match="invocation tokens"):
        chunkcache.wrap(get_peft_model(base(), config).eval())


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lora(target_modules=["q_proj", "embed_tokens"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["dora", "modules_to_save", "embeddings", "ia3"],
)
def test_other_kinds_of_adapters(config: Any) -> None:
    model = get_peft_model(base(), config).eval()
    cached = wrapped(model)
    ask(cached, model, 1, 0)
    hit = ask(cached, model, 2, 64)
    assert same(hit, run(wrapped(model), HEAD + prompt(9, seed=2)))
    with model.disable_adapter():
        ask(cached, model, 1, 0)
    ask(cached, model, 3, 64)


def test_adapters_of_a_latent_projection_are_proved_another_way() -> None:
    """Absorbing the projection needs its plain matrix, which an adapter hides."""
    model = build("deepseek_v2", ZOO["deepseek_v2"])
    assert chunkcache.verify(model, 16).tier == "A"
    model = get_peft_model(model, lora(target_modules=["kv_b_proj"])).eval()
    cached = wrapped(model)
    assert cached.proof.tier == "C"
    tokens = [token % 96 for token in HEAD]
    run(cached, tokens)
    hit = run(cached, tokens)
    assert cached.last_reuse[0].cached_tokens > 0
    assert same(hit, run(wrapped(model), tokens))
    assert close(hit, run(model, tokens))


def test_adapters_of_an_encoder_decoder() -> None:
    model = build_t5()
    cached = wrapped(model)
    inputs = torch.tensor([prompt(20)]) % 96
    for _ in range(2):
        ours = cached.generate(inputs, max_new_tokens=4, do_sample=False)
        plain = model.generate(input_ids=inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(ours, plain)
    assert cached.last_reuse[0].cached_tokens == 20
    with model.disable_adapter():
        cached.generate(inputs, max_new_tokens=4, do_sample=False)
        assert cached.last_reuse[0].cached_tokens == 0


def build_t5() -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **ZOO["t5"])).eval()
    config = lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    return get_peft_model(model, config).eval()


def test_many_states_are_bounded_and_found_again() -> None:
    model = two_adapters()
    cached = wrapped(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    ask(cached, model, 1, 0)
    before = layer.scaling["red"]
    for scale in range(2, 19):
        layer.scaling["red"] = before * scale
        cached._state.serving()
    assert len(cached._state._servings._known) == 16
    layer.scaling["red"] = before
    ask(cached, model, 2, 64)
