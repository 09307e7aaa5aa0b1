"""Every architecture of the zoo: reused to the bit, like the plain model, or refused with the cause."""

from __future__ import annotations

import os
import random
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import chunkcache
from chunkcache.hf.model import CachedModel
from chunkcache.native.library import libraries
from docs import generate_models
from tests.zoo import REFUSED, REUSED, ZOO, build, zoo_model

CASES = int(os.environ.get("CHUNKCACHE_FUZZ", "20"))  # per architecture
CHUNK, NEW = 16, 3
CLOSE = 1e-5  # of logits to the plain model's, in units of the largest
# Its plain logits in float32 are up to 1.9e-5 from those in float64, ours 6.5e-6 in the same case.
LOOSE = {"gemma4_text": 4e-5}


@cache
def pair(name: str) -> tuple[CachedModel, CachedModel]:
    """Two wrappers of one model: one that keeps what it saw, one that is emptied before each use."""
    model = zoo_model(name)
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes="64MiB")
    return chunkcache.wrap(model, config=config), chunkcache.wrap(model, config=config)


def ask(
    model: Any, rows: list[list[int]], encoded: list[list[int]] | None = None, **kwargs: Any
) -> Any:
    """Greedy generation with the logits of each step; prompts are padded on the left."""
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
        "use_cache": True,
    } | kwargs
    if encoded is None:
        ids, mask = padded(rows, left=True)
        return model.generate(ids, attention_mask=mask, **settings)
    ids, mask = padded(encoded, left=False)
    start = model.config.decoder_start_token_id
    prompts = torch.tensor([[start, *row] for row in rows])
    return model.generate(ids, attention_mask=mask, decoder_input_ids=prompts, **settings)


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    holes = [[0] * (width - len(row)) for row in rows]
    ids = [hole + row if left else row + hole for hole, row in zip(holes, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [hole + one if left else one + hole for hole, one in zip(holes, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def same_bits(left: Any, right: Any) -> bool:
    return torch.equal(left.sequences, right.sequences) and all(
        torch.equal(a, b) for a, b in zip(left.logits, right.logits, strict=True)
    )


def assert_like_plain(
    ours: Any, model: Any, rows: list[list[int]], encoded: list[list[int]] | None
) -> None:
    """Each row as the plain model gives it alone; a tie within rounding may fall either way."""
    for number, row in enumerate(rows):
        own = None if encoded is None else [encoded[number]]
        plain = ask(model, [row], own)
        for step, logits in enumerate(plain.logits):
            close = LOOSE.get(str(model.config.model_type), CLOSE)
            scale = max(1.0, logits.abs().max().item())
            error = (ours.logits[step][number] - logits[0]).abs().max().item()
            assert error <= close * scale, (number, step, error, scale)
            best, second = logits[0].topk(2).values.tolist()
            if best - second < 2 * close * scale:
                break  # the two may go on with different tokens from here
            at = step - NEW
            assert ours.sequences[number, at] == plain.sequences[0, at]


def ids(random_: random.Random, count: int) -> list[int]:
    return [random_.randrange(3, 96) for _ in range(count)]


@pytest.mark.parametrize("name", REUSED)
def test_a_shared_prefix_is_reused_to_the_bit(name: str) -> None:
    cached, empty = pair(name)
    random_ = random.Random(name)
    shared, encoded = ids(random_, 40), None
    if cached.model.config.is_encoder_decoder:
        encoded = [ids(random_, 23)]
    empty.flush()
    ask(cached, [shared + ids(random_, 9)], encoded)
    tail = shared + ids(random_, 15)
    hit = ask(cached, [tail], encoded)
    assert cached.last_reuse[0].cached_tokens >= 2 * CHUNK
    assert same_bits(hit, ask(empty, [tail], encoded))
    assert_like_plain(hit, cached.model, [tail], encoded)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_proved_is_refused_with_the_cause(name: str) -> None:
    report = chunkcache.verify(zoo_model(name), chunk_size=CHUNK)
    assert (report.tier, report.bit_exact) == ("F", "no")
    assert REFUSED[name] in report.reason
    with pytest.raises(chunkcache.UnsupportedModelError, match=REFUSED[name]):
        chunkcache.wrap(zoo_model(name), config=chunkcache.Config(chunk_size=CHUNK))


@pytest.mark.parametrize("name", REUSED)
def test_no_history_changes_an_answer(name: str) -> None:
    """Random prompts, lengths, batches, paddings and evictions; `make fuzz` runs many more."""
    cached, empty = pair(name)
    cached.flush()
    Fuzz(name, cached, empty).run(CASES)
    assert cached.stats().cached_tokens > 0


class Fuzz:
    """A history of requests that share prefixes, with chunks and snapshots leaving in between."""

    def __init__(self, name: str, cached: CachedModel, empty: CachedModel):
        self.random = random.Random(f"{name} {os.environ.get('CHUNKCACHE_FUZZ_SEED', 0)}")
        self.cached = cached
        self.empty = empty
        self.bits = True
        self.encodes = bool(cached.model.config.is_encoder_decoder)
        longest = cached.proof.limit or 110
        self.prompts = [ids(self.random, longest) for _ in range(2)]
        self.inputs = [ids(self.random, self.random.randint(1, 50)) for _ in range(2)]

    def run(self, cases: int) -> None:
        for _ in range(cases):
            self.request()
            self.disturb()
            self.cached.store.check()

    def request(self) -> None:
        count = self.random.choice([1, 1, 1, 2, 3])
        length = self.random.randint(1, 60)  # of a decoder's prompts, which are not padded
        rows = [self.prompt(length if self.encodes else None) for _ in range(count)]
        encoded = [self.random.choice(self.inputs) for _ in rows] if self.encodes else None
        ours = ask(self.cached, rows, encoded)
        self.empty.flush()
        cold = ask(self.empty, rows, encoded)
        assert not self.bits or same_bits(ours, cold), (rows, encoded)
        assert_like_plain(ours, self.cached.model, rows, encoded)

    def prompt(self, length: int | None) -> list[int]:
        """The head of a known prompt and a tail of its own; remembered for later ones."""
        base = self.random.choice(self.prompts)
        head = base[: self.random.randint(0, len(base))]
        longest = self.cached.proof.limit or 110
        tail = ids(self.random, self.random.choice([0, 1, 2, 7, 20, 40]))
        prompt = (head + tail)[: length or longest] or ids(self.random, 1)
        if length is not None:
            prompt += ids(self.random, length - len(prompt))
        self.prompts = [*self.prompts[-4:], prompt]
        return prompt

    def disturb(self) -> None:
        for tree in self.cached.store.trees():
            if self.random.random() < 0.3:
                tree.evict(self.random.randint(1, 6))
            if self.random.random() < 0.2:
                tree.evict_snapshots(self.random.randint(1, 50_000))
        if self.random.random() < 0.05:
            self.cached.flush()


def test_ties_limit_reuse_to_the_length_that_was_proved() -> None:
    """With few indexer heads many scores are zero, and which of them count depends on the length."""
    few = {"index_n_heads": 1, "index_topk": 32}
    model = build("deepseek_v32", ZOO["deepseek_v32"] | few)
    with chunkcache.wrap(model, config=chunkcache.Config(chunk_size=CHUNK)) as cached:
        longest = cached.proof.limit
        assert longest == few["index_topk"]
        random_ = random.Random(1)
        shared = ids(random_, 80)
        for tokens in (shared[:longest], shared[: longest - 5] + [5], shared, shared + [7]):
            ours = ask(cached, [tokens])
            assert_like_plain(ours, model, [tokens], None)
        assert cached.last_reuse[0].cached_tokens == 0
        assert cached.last_reuse[0].reason.startswith(f"longer than {longest} tokens")
        cached.store.check()


def test_preloads_that_cannot_be_kept_say_why() -> None:
    cached, _ = pair("t5")
    with pytest.raises(chunkcache.UnsupportedRequestError, match="encoder's input"):
        cached.preload(list(range(3, 60)))
    config = chunkcache.Config(chunk_size=CHUNK, snapshot_bytes=100)
    with (
        chunkcache.wrap(zoo_model("mamba2"), config=config) as small,
        pytest.raises(chunkcache.PoolExhaustedError, match="raise snapshot_bytes"),
    ):
        small.preload(list(range(3, 60)), name="bot")
    cached, _ = pair("deepseek_v32")
    with pytest.raises(chunkcache.PromptError, match="up to which reuse is proved"):
        cached.preload([5] * 70)


def test_a_named_prompt_leaves_a_snapshot_at_its_end() -> None:
    cached, _ = pair("bamba")
    cached.flush()
    random_ = random.Random(4)
    system = ids(random_, 4 * CHUNK)
    assert cached.preload(system, name="bot") == 4 * CHUNK
    ask(cached, [system + ids(random_, 9)])
    assert cached.last_reuse[0].cached_tokens == 4 * CHUNK
    assert cached.stats().named["bot"]["cached_tokens"] == 4 * CHUNK
    cached.flush()


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    """Where every row runs alone, its bits are the same in any company."""
    for name in ("bloom", "mamba2", "xlstm"):
        cached, empty = pair(name)
        random_ = random.Random(2)
        rows = [ids(random_, count) for count in (3, 40, 1, 17)]
        together = ask(cached, rows)
        for number, row in enumerate(rows):
            empty.flush()
            alone = ask(empty, [row])
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                assert torch.equal(ours[number], theirs[0]), name


@pytest.mark.parametrize("name", ["bloom", "bamba", "mamba2", "t5", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize(
    "beams", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_beams_and_samples_are_the_plain_models(name: str, beams: dict[str, Any]) -> None:
    cached, _ = pair(name)
    random_ = random.Random(3)
    rows = [ids(random_, 21)]
    encoded = [ids(random_, 18)] if cached.model.config.is_encoder_decoder else None
    for _ in range(2):  # a miss, then a hit
        torch.manual_seed(0)
        ours = ask(cached, rows, encoded, **beams)
        torch.manual_seed(0)
        plain = ask(cached.model, rows, encoded, **beams)
        assert torch.equal(ours.sequences, plain.sequences)


@pytest.mark.parametrize("name", ["phimoe", "bamba", "gemma2", "minicpm3", "bloom"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "torch"},
        {"exactness": "borders", "border": 3 * CHUNK},
        {"prefill_step": 5, "snapshot_interval": 48, "snapshot_bytes": "60KB"},
        {"mode": "fast", "prefill_step": 7},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_do_not_change_answers(name: str, settings: dict[str, Any]) -> None:
    model = zoo_model(name)
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes="1MiB", **settings)
    with (
        chunkcache.wrap(model, config=config) as cached,
        chunkcache.wrap(model, config=config) as e,
    ):
        history = Fuzz(name, cached, e)
        history.bits = settings.get("mode") != "fast"
        history.run(4)


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 60


@cache
def page() -> dict[str, list[str]]:
    lines = generate_models.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {cells[0]: cells for cells in rows if cells[0] in ZOO}


@pytest.mark.skipif(
    transformers.__version__ < "5.23" or not libraries()[0],
    reason="the page tells of newer versions, and of processors with a compiled kernel",
)
@pytest.mark.parametrize("name", REUSED)
def test_the_page_of_models_is_current(name: str) -> None:
    now = generate_models.row(name, pair(name)[0].proof)
    error = now.pop(5)
    assert float(error) <= 1e-4
    then = list(page()[name])
    then.pop(5)
    assert then == now


def test_the_page_names_every_model() -> None:
    assert page().keys() == ZOO.keys()
    assert {name for name, cells in page().items() if cells[1] == "F"} == REFUSED.keys()
