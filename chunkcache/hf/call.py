"""How a model's forward takes its own cache, ids and positions, whatever it calls them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from chunkcache.errors import UnsupportedModelError

_CACHES = ("past_key_values", "cache_params", "state")  # as transformers' generate() knows them


class Called(NamedTuple):
    """What a forward gives: logits `[1, tokens or 1, vocabulary]`, and the model's cache."""

    logits: torch.Tensor
    cache: Any


class Call:
    """A forward of one sequence with the model's own cache; it makes one if there is none.

    Raises:
        UnsupportedModelError: the forward takes no cache of a known name.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        names = [name for name in _CACHES if name in accepted]
        if not names:
            reason = f"its forward takes none of {', '.join(_CACHES)}"
            raise UnsupportedModelError(str(model.config.model_type), reason)
        self.cache = names[0]
        decoder = "decoder_" if model.config.is_encoder_decoder else ""
        self.ids = decoder + "input_ids"
        self.positions = decoder + "position_ids" if decoder + "position_ids" in accepted else None
        self.columns = "cache_position" in accepted  # as forwards took before transformers 5
        self.keep = "logits_to_keep" in accepted

    def __call__(
        self, ids: list[int], cache: Any, at: int, given: dict[str, Any], last: bool = True
    ) -> Called:
        """Runs new ids behind the `at` tokens that the cache holds.

        Args:
            given: what else goes to the forward; last: only the last token's logits are wanted.
        """
        device = self.model.device
        kwargs: dict[str, Any] = {"use_cache": True, self.ids: torch.tensor([ids], device=device)}
        if cache is not None:
            kwargs[self.cache] = cache
            _tell_length(cache, at)
        positions = torch.arange(at, at + len(ids), device=device)
        if self.positions is not None:
            kwargs[self.positions] = positions.unsqueeze(0)
        if self.columns:
            kwargs["cache_position"] = positions
        if self.keep and last:
            kwargs["logits_to_keep"] = 1
        out = self.model(**kwargs, **given)
        cache = getattr(out, self.cache, None)
        if cache is None:
            reason = f"its forward gives no {self.cache} back"
            raise UnsupportedModelError(str(self.model.config.model_type), reason)
        return Called(out.logits[:, -1:] if last else out.logits, cache)


class _Counted:
    """Mixed into a cache that miscounts its tokens: MiniMax asks a layer that keeps none."""

    counted: int
    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the cache holds."""
        return self.counted

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first."""
        if getattr(self.layers[layer_idx], "is_initialized", False):
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
            return sizes
        return self.counted + query_length, 0


@functools.cache
def _counted(kind: Hashable) -> type:
    """A class of caches, counting."""
    assert isinstance(kind, type)
    return type(kind.__name__, (_Counted, kind), {})


def _tell_length(cache: Any, tokens: int) -> None:
    """Sees to it that a cache knows how many tokens it holds."""
    if isinstance(cache, Cache) and not isinstance(cache, _Counted) and _length(cache) != tokens:
        cache.__class__ = _counted(cast(Hashable, type(cache)))
    if isinstance(cache, _Counted):
        cache.counted = tokens


def _length(cache: Cache) -> int | None:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no layer of it counts
        return None
