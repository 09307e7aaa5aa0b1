"""Images and sound: prompts of text are reused, all else runs on the plain model and is counted."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import chunkcache
from chunkcache.hf.model import CachedModel
from tests.models import prompt as random_ids
from tests.models import randomised

IMAGE = 120  # the placeholder's id
_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _TEXT | {"model_type": "llama"}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYES = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN = {"image_token_id": IMAGE, "video_token_id": 121} | {
    "text_config": _TEXT | {"rope_parameters": _MROPE},
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
_SPEECH = {
    "vocab_size": 128,
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_target_positions": 256,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llava": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": _EYES | {"model_type": "clip_vision_model"},
            "text_config": _LLAMA,
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
    ),
    "Qwen2VL": (
        "Qwen2VLForConditionalGeneration",
        _QWEN | {"vision_config": _QWEN_EYES | {"embed_dim": 32, "hidden_size": 64}},
    ),
    "Qwen2_5_VL": (
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN
        | {
            "vision_config": _QWEN_EYES
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            }
        },
    ),
    "Gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _TEXT
            | {
                "head_dim": 16,
                "sliding_window": 12,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": _EYES | {"model_type": "siglip_vision_model"},
            "image_token_index": IMAGE,
            "boi_token_index": 121,
            "eoi_token_index": 122,
            "mm_tokens_per_image": 4,
        },
    ),
    "Idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _EYES,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
    ),
    "Mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": _TEXT
            | {
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "attention_heads": 2,
                "num_global_layers": 1,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
    ),
    "Speech2Text": (
        "Speech2TextForConditionalGeneration",
        _SPEECH | {"max_source_positions": 512, "input_feat_per_channel": 8, "conv_channels": 16},
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        _SPEECH
        | {"max_source_positions": 50, "num_mel_bins": 8, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Blip2": (
        "Blip2ForConditionalGeneration",
        {
            "vision_config": _EYES,
            "qformer_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
            "text_config": {
                "model_type": "opt",
                "vocab_size": 128,
                "hidden_size": 64,
                "ffn_dim": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
                "word_embed_proj_dim": 64,
            },
            "image_token_index": IMAGE,
            "num_query_tokens": 4,
        },
    ),
}


@cache
def model_of(name: str) -> PreTrainedModel:
    """A random model; shared, so do not change it."""
    kind, settings = MODELS[name]
    found = getattr(transformers, kind)
    return randomised(found(found.config_class(**settings)))


def wrapped(model: PreTrainedModel) -> CachedModel:
    return chunkcache.wrap(model, config=chunkcache.Config(chunk_size=16))


def ids(length: int, seed: int = 0) -> list[int]:
    """Ids below all placeholders."""
    return [min(token, 110) for token in random_ids(length, seed)]


def ask(model: Any, *rows: list[int], **more: Any) -> Any:
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return model.generate(
        input_ids=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        **{"attention_mask": mask} | more,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def same(left: Any, right: Any) -> bool:
    pairs = zip(left.logits, right.logits, strict=True)
    return torch.equal(left.sequences, right.sequences) and all(torch.equal(a, b) for a, b in pairs)


def close(left: Any, right: Any) -> bool:
    pairs = zip(left.logits, right.logits, strict=True)
    near = all(torch.allclose(a, b, atol=2e-5, rtol=1e-5) for a, b in pairs)
    return near and torch.equal(left.sequences, right.sequences)


def with_image(name: str, seed: int = 0) -> tuple[list[int], dict[str, Any]]:
    """A prompt with an image in it, and what goes along."""
    torch.manual_seed(seed)
    head, tail = ids(30), ids(9, seed=1)
    if name.startswith("Qwen"):
        tokens = [*head, 122, IMAGE, 123, *tail]
        types = [[int(token == IMAGE) for token in tokens]]
        pixels = {"pixel_values": torch.randn(4, 3 * 2 * 14 * 14)}
        grid = {"image_grid_thw": torch.tensor([[1, 2, 2]])}
        return tokens, pixels | grid | {"mm_token_type_ids": torch.tensor(types)}
    if name == "Idefics3":
        return [*head, IMAGE, *tail], {"pixel_values": torch.randn(1, 1, 3, 28, 28)}
    tokens = [*head, *[IMAGE] * 4, *tail]
    more: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 28, 28)}
    if name == "Gemma3":
        more["token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in tokens]])
    return tokens, more


SEEING = ["Llava", "Qwen2VL", "Qwen2_5_VL", "Gemma3", "Idefics3"]


@pytest.mark.parametrize("name", [*SEEING, "Mllama"])
def test_prompts_of_text_are_reused(name: str) -> None:
    model = model_of(name)
    cached = wrapped(model)
    assert cached.proof.tier == ("C" if name == "Mllama" else "A")
    head = ids(64)
    ask(cached, head + ids(9, seed=1))
    rows = [head + ids(5, seed=2), head[:40] + ids(3, seed=3)]
    hit = ask(cached, *rows)
    assert [reuse.cached_tokens for reuse in cached.last_reuse] == [
        64,
        32 if name == "Mllama" else 40,
    ]
    assert same(hit, ask(wrapped(model), *rows))
    for number, row in enumerate(rows):
        alone = ask(model, row)
        assert torch.equal(hit.sequences[number, -4:], alone.sequences[0, -4:])


@pytest.mark.parametrize("name", SEEING)
def test_prompts_with_images_run_on_the_plain_model(name: str) -> None:
    model = model_of(name)
    cached = wrapped(model)
    tokens, more = with_image(name)
    _, another = with_image(name, seed=1)
    assert same(ask(cached, tokens, **more), ask(model, tokens, **more))
    (reuse,) = cached.last_reuse
    assert (reuse.prompt_tokens, reuse.cached_tokens, reuse.divergence) == (len(tokens), 0, 0)
    assert reuse.reason.startswith("the prompt has inputs besides token ids: ")
    assert "pixel_values" in reuse.reason
    stats = cached.stats()
    assert (stats.chunks, stats.requests, stats.generated_tokens) == (0, 1, 4)
    assert stats.miss_tokens == {reuse.reason: len(tokens)}
    # The same ids as text are another prompt, before and after.
    text = ask(cached, tokens)
    assert cached.last_reuse[0].cached_tokens == 0
    assert close(text, ask(model, tokens))
    for image in (more, another):
        assert same(ask(cached, tokens, **image), ask(model, tokens, **image))
        assert cached.last_reuse[0].cached_tokens == 0
    assert not same(ask(model, tokens, **more), ask(model, tokens, **another))
    assert same(ask(cached, tokens), text)
    assert cached.last_reuse[0].cached_tokens > 0
    cached.close()
    with pytest.raises(chunkcache.ClosedError):
        ask(cached, tokens, **more)


def test_token_types_that_say_nothing_are_left_out() -> None:
    """Processors send them with every prompt."""
    cached = wrapped(model_of("Gemma3"))
    ask(cached, ids(40))
    types = {"token_type_ids": torch.zeros(1, 40, dtype=torch.long), "pixel_values": None}
    ask(cached, ids(40), **types)
    assert cached.last_reuse[0].cached_tokens == 32
    types["token_type_ids"][0, 3] = 1
    ask(cached, ids(40), **types)
    assert "token_type_ids" in cached.last_reuse[0].reason


def test_token_types_of_zero_that_do_say_something() -> None:
    from tests.models import tiny

    model = tiny("gpt2")  # adds the embedding of its types
    cached = wrapped(model)
    types = {"token_type_ids": torch.zeros(1, 40, dtype=torch.long)}
    ours = ask(cached, ids(40), **types)
    assert same(ours, ask(model, ids(40), **types))
    assert not same(ours, ask(model, ids(40)))
    assert "token_type_ids" in cached.last_reuse[0].reason


def test_images_and_text_side_by_side() -> None:
    """Qwen2-VL keeps where an image put the positions on itself."""
    model = model_of("Qwen2VL")
    cached = wrapped(model)
    tokens, more = with_image("Qwen2VL")
    expected = {"image": ask(model, tokens, **more), "text": ask(wrapped(model), ids(50))}
    wrong: list[str] = []

    def work(kind: str) -> None:
        for _ in range(5):
            result = ask(cached, tokens, **more) if kind == "image" else ask(cached, ids(50))
            if not same(result, expected[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("image", "text") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cached.stats().requests == 20


# -- encoders of sound


def hear(model: Any, features: torch.Tensor, **more: Any) -> Any:
    return model.generate(
        input_features=features,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


def test_speech_is_found_by_content() -> None:
    model = model_of("Speech2Text")
    cached = wrapped(model)
    torch.manual_seed(0)
    one, two = torch.randn(1, 60, 8), torch.randn(1, 60, 8)
    cold = hear(cached, one)
    assert "encoder input" in cached.last_reuse[0].reason
    stored = cached.store.flow.snapshots_stored
    assert same(hear(cached, one.clone()), cold)
    assert cached.store.flow.snapshots_stored == stored, "nothing was encoded again"
    other = hear(cached, two)
    assert cached.store.flow.snapshots_stored == stored + 1
    assert not same(other, cold)
    for features, ours in ((one, cold), (two, other)):
        assert close(ours, hear(model, features))
    both = hear(cached, torch.cat([one, two]))
    assert torch.equal(both.sequences, torch.cat([cold.sequences, other.sequences]))


def test_speech_with_padding_runs_on_the_plain_model() -> None:
    model = model_of("Speech2Text")
    cached = wrapped(model)
    torch.manual_seed(0)
    features, mask = torch.randn(2, 60, 8), torch.ones(2, 60, dtype=torch.long)
    mask[1, 40:] = 0
    ours = hear(cached, features, attention_mask=mask)
    assert same(ours, hear(model, features, attention_mask=mask))
    assert "attention_mask" in cached.last_reuse[0].reason
    assert cached.stats().generated_tokens == 12


@pytest.mark.parametrize(
    ("name", "advice"), [("Whisper", "use it as it is"), ("Blip2", "wrap its language_model")]
)
def test_a_generate_of_its_own_is_refused(name: str, advice: str) -> None:
    with pytest.raises(chunkcache.UnsupportedModelError, match=r"generate\(\) of its own") as found:
        chunkcache.wrap(model_of(name))
    assert advice in str(found.value)
    report = chunkcache.verify(model_of(name))
    assert report.tier == "F" and advice in report.reason


def test_the_language_model_inside_is_wrapped_instead() -> None:
    cached = wrapped(model_of("Blip2").language_model)
    ask(cached, ids(40))
    ask(cached, ids(40))
    assert cached.last_reuse[0].cached_tokens == 32
