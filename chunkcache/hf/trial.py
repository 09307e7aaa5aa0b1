"""What trials of all ways to carry state share: random ids, the model's own logits, comparisons."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.carrier import Carried, Carrier, Snapshot, Source
from chunkcache.hf.fingerprint import product_type
from chunkcache.hf.sample import encoder_inputs
from chunkcache.hf.twin import make_twin
from chunkcache.kv import Pool, PoolRun

_SEED = 20240515
MARGIN, _MOST = 4, 10  # times what rounding of the embeddings does, and times what is usual
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Trial:
    """Random prompts of one model, long enough for what is to be proved.

    Args:
        tokens: how many are wanted; fewer are taken if the model has no positions for them.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int, tokens: int):
        self.model = model
        self.kind = str(model.config.model_type)
        self.chunk_size = chunk_size
        limit = position_limit(model)
        self.tokens = tokens if limit is None else min(tokens, limit - 1)
        words = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, words, (3, self.tokens), generator=generator, device="cpu")
        self.pad = getattr(_text(model), "pad_token_id", None)
        if self.pad is not None:
            ids[ids == self.pad] = (self.pad + 1) % words  # it may stand for no token at all
        self.ids: list[list[int]] = ids.tolist()
        self.layers = int(getattr(_text(model), "num_hidden_layers", 0) or 1)

    def tensor(self, ids: list[int]) -> torch.Tensor:
        """One row on the model's device."""
        return torch.tensor([ids], device=self.model.device)

    def refuse(self, reason: str) -> UnsupportedModelError:
        """To be raised."""
        return UnsupportedModelError(self.kind, reason)

    def within(self, ours: torch.Tensor, plain: torch.Tensor, what: str) -> float:
        """The largest difference of logits.

        Raises:
            UnsupportedModelError: it is more than rounding.
        """
        ours, plain = ours.float(), plain.float()
        error = (ours - plain).abs().max().item()
        scale = max(1.0, plain.abs().max().item())
        dtype = self.model.dtype
        if dtype == torch.float32:
            dtype = product_type(self.model.device)
        # Roundings of many layers add up like a random walk.
        depth = max(1.0, self.layers / 8) ** 0.5
        usual = _TOLERANCE.get(dtype, 1e-2) * scale * depth
        allowed = usual if error <= usual else min(_MOST * usual, MARGIN * self.noise)
        if not error <= allowed:
            allowed = max(allowed, usual)
            raise self.refuse(
                f"logits of {what} differ by {error:.2g} (at most {allowed:.2g} is rounding)"
            )
        return error

    @cached_property
    def noise(self) -> float:
        """How far logits move if every embedding is rounded otherwise in its last bit.

        Some models carry the rounding of their first layers to the logits many times enlarged; their
        own float32 is then as far from float64.
        """
        twin = make_twin(self.model, attention=False)
        ids = self.tensor(self.ids[0])
        generator = torch.Generator().manual_seed(_SEED)

        def nudge(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
            signs = torch.randint(0, 2, out.shape, generator=generator).mul(2).sub(1)
            return out + out * signs.to(out) * torch.finfo(out.dtype).eps

        with torch.no_grad():
            inputs = {"input_ids": ids}
            if self.model.config.is_encoder_decoder:
                inputs = {**encoder_inputs(self.model, self.ids[2]), "decoder_input_ids": ids}
            before = twin(**inputs, use_cache=False).logits
            twin.get_input_embeddings().register_forward_hook(nudge)
            return float((twin(**inputs, use_cache=False).logits - before).abs().max())

    def resumption(self, carrier: Carrier, fixed: Snapshot | None = None) -> torch.Tensor:
        """Runs the second prompt cut at chunks, and again from what was stored after two of them.

        The second, since what is known of a cache was seen on the first. Returns the logits of the
        whole run, `[tokens, vocabulary]`.

        Raises:
            UnsupportedModelError: what was resumed is not bit for bit the same.
        """
        size, ids = self.chunk_size, self.ids[1]
        if self.tokens < 2 * size + 8:
            raise self.refuse(
                f"it has {self.tokens + 1} positions, too few to try two chunks of {size} tokens on "
                "(lower chunk_size)"
            )
        cold = carrier.open(Source([], fixed=fixed))
        head = [carrier.logits(cold, ids[at : at + size]) for at in (0, size)]
        snapshot = cold.snapshot() if carrier.snapshots else None
        carrier.state_bytes = 0 if snapshot is None else snapshot.bytes
        run = _stored(carrier, cold, 2)
        warm = carrier.open(Source(ids[: 2 * size], [run], snapshot, fixed))
        for cut in self._cuts():
            cold_part, warm_part = (carrier.logits(each, ids[cut]) for each in (cold, warm))
            if not torch.equal(cold_part, warm_part):
                error = (cold_part.float() - warm_part.float()).abs().max().item()
                raise self.refuse(f"a resumed forward is not the same bit for bit ({error:.2g})")
            head.append(cold_part)
        return torch.cat(head)

    def _cuts(self) -> list[slice]:
        """Pieces behind the second chunk: one more chunk, a rest, and single tokens."""
        size, end = self.chunk_size, self.tokens
        edges = [2 * size, min(3 * size, end - 4), end - 3, end - 2, end - 1, end]
        return [slice(a, b) for a, b in pairwise(edges) if a < b]


def _stored(carrier: Carrier, carried: Carried, chunks: int) -> PoolRun:
    """The first chunks of a row as a pool keeps them."""
    layout = carrier.layout
    pool = Pool(layout, chunks * (layout.chunk_bytes or 4 * layout.chunk_size))
    run = pool.allocate(chunks)
    assert run is not None and len(run) == chunks
    for layer, block in enumerate(carried.blocks(0, 0, chunks)):
        for to, source in zip(run.layer(layer), block, strict=True):
            to.copy_(source)
    return run


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens a prompt may have at most; None if the configuration names no limit."""
    config = _text(model)
    names = ["max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len"]
    if model.config.is_encoder_decoder:
        names = names[:2]  # T5's positions are relative, whatever n_positions says
    known = [getattr(config, name, None) for name in names]
    limits = [limit for limit in [*known, fixed_rope_limit(model)] if limit and limit > 0]
    return min(limits) if limits else None


def fixed_rope_limit(model: PreTrainedModel) -> int | None:
    """Tokens up to which rotary embeddings stay the same, for models that change them (else None).

    Beyond it (dynamic, longrope) KV depends on the length of the whole sequence and of its company,
    so prompt and answer together must stay inside.
    """
    config = _text(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    limits = []
    for parameters in kinds:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append(original or config.max_position_embeddings)
    return min(limits) if limits else None
