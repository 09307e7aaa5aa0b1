"""A trained model that nobody here wrote: wrong reuse would show in what it says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkcache
from tests.models import DEVICE

CHUNK_BYTES = 16 * 1280  # 16 tokens of stories260K in float32


@pytest.fixture(scope="module")
def stories(shared_data):
    path = shared_data / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(DEVICE)
    golden = json.loads((path / "golden.json").read_text())
    return model, AutoTokenizer.from_pretrained(path), golden


@pytest.mark.parametrize("chunks", [1000, 5, 1], ids=["roomy", "tight", "one chunk"])
@pytest.mark.parametrize("exactness", ["auto", "borders"])
def test_golden_outputs_cold_warm_and_under_pressure(stories, chunks, exactness):
    model, tokenizer, golden = stories
    config = chunkcache.Config(
        chunk_size=16, device_bytes=CHUNK_BYTES * chunks, exactness=exactness
    )
    cached = chunkcache.wrap(model, tokenizer, config)
    expected = golden["greedy_ids_256"]
    for cut in (1, 100, 200, 1, 57):
        ids = torch.tensor([expected[:cut]], device=DEVICE)
        out = cached.generate(
            ids, max_new_tokens=len(expected) - cut, do_sample=False, eos_token_id=None
        )
        assert out[0].tolist() == expected
        cached.store.check()
        assert cached.stats().chunks <= chunks
    if chunks == 1000:
        assert cached.stats().cached_tokens > 100
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.encode() == golden["golden_256_steps"].encode()


def test_nll_of_a_tail_is_unchanged_by_reuse(stories, shared_data):
    model, tokenizer, _ = stories
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    ids = tokenizer(text)["input_ids"][:480]
    cached = chunkcache.wrap(model, tokenizer, chunkcache.Config(chunk_size=16, border=32))

    def tail_nll():
        total = 0.0
        for at in range(384, 480):
            out = cached.generate(
                torch.tensor([ids[:at]], device=DEVICE),
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            total -= out.logits[0][0].log_softmax(-1)[ids[at]].item()
        return total / 96

    with torch.no_grad():
        logits = model(torch.tensor([ids], device=DEVICE)).logits[0, 383:479].log_softmax(-1)
    plain = -logits[range(96), ids[384:480]].mean().item()
    reused = tail_nll()
    assert cached.stats().hit_rate > 0.9
    assert reused == pytest.approx(plain, abs=1e-5)
    assert plain < 3, "a wrong prefix costs far more"
