"""What happens around each forward of the wrapped model: positions, padded rows, and their removal.

A matrix product gives a row the same bits whatever the number of rows, if that number is a multiple
of a small one (the probe finds which). Forwards are therefore padded to it: a decoding step by dummy
rows, a prefill by dummy tokens behind the real ones. Dummies are never stored and nothing real
attends to them.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.errors import UnsupportedModelError, UnsupportedRequestError
from chunkcache.hf.cache import ChunkCache
from chunkcache.hf.running import Running, announce

_REPLACED = {"input_ids", "position_ids", "attention_mask", "cache_position"}


class ForwardHooks:
    """Hooks of one model; `install` adds them, and they act only on forwards with a ChunkCache.

    Args:
        multiple: what the rows of a forward are padded to; 1 pads nothing.
    """

    def __init__(self, model: PreTrainedModel, multiple: int = 1):
        self.multiple = multiple
        accepted = inspect.signature(model.forward).parameters
        catch_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self._takes_positions = "position_ids" in accepted or catch_all
        self._takes_columns = "cache_position" in accepted  # as before transformers 5
        self._takes_keep = "logits_to_keep" in accepted
        self._type = str(model.config.model_type)
        self._running = Running()

    def install(self, model: PreTrainedModel) -> None:
        """Registers both hooks."""
        self._running = announce(model)
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True)

    def before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Announces the new ids to the batch; returns the padded inputs."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ChunkCache):
            return None
        ids = self._ids(kwargs.get("input_ids", args[0] if args else None), kwargs)
        cache.forward_begins()
        self._running.cache = weakref.ref(cache)
        self._running.prompt = cache.prompt_left != 0
        batch = cache.batch
        positions = torch.tensor(batch.positions, device=ids.device).unsqueeze(1)
        positions = positions + torch.arange(ids.shape[1], device=ids.device)
        batch.begin(ids.tolist())
        new = {key: value for key, value in kwargs.items() if key not in _REPLACED}
        new["input_ids"] = self._pad(ids)
        if self._takes_positions:
            new["position_ids"] = self._pad(positions)
        elif len(set(batch.positions)) > 1 or any(cache.pads):
            raise UnsupportedModelError(self._type, "rows of unequal length need position_ids")
        if self._takes_columns:
            columns = torch.arange(new["input_ids"].shape[1], device=ids.device)
            new["cache_position"] = columns + cache.columns
        if self._takes_keep:
            wanted = kwargs.get("logits_to_keep", 0)
            new["logits_to_keep"] = self._keep(ids.shape[1], wanted) if cache.logits else 1
        return (), new

    def _ids(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise UnsupportedRequestError(
                "prefixes are found by token ids: pass input_ids, not inputs_embeds"
            )
        if kwargs.get("output_attentions"):
            raise UnsupportedRequestError("output_attentions: attention weights are never formed")
        return ids

    def _pad(self, ids: torch.Tensor) -> torch.Tensor:
        """More rows for one-token steps, more columns otherwise; dummies repeat what is last."""
        rows, columns = ids.shape
        missing = -(rows * columns) % self.multiple
        if not missing:
            return ids
        if columns == 1:
            return torch.cat([ids, ids[-1:].expand(missing, 1)])
        return torch.cat([ids, ids[:, -1:].expand(rows, missing)], 1)

    def _keep(self, columns: int, wanted: Any) -> Any:
        """How many columns of logits to compute, so that their rows are a good number too."""
        if not isinstance(wanted, int):
            raise UnsupportedRequestError("logits_to_keep must be a number")
        if wanted == 0 or columns == 1:
            return wanted
        padded = columns + -columns % self.multiple
        return -(-(padded - columns + wanted) // self.multiple) * self.multiple

    def after(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Cuts the padding off and completes the batch's forward."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ChunkCache):
            return None
        batch = cache.batch
        rows, tokens = batch.rows, batch.new_tokens
        width = kwargs["input_ids"].shape[1]
        keep = kwargs.get("logits_to_keep", 0) or width
        end = output.logits.shape[1] - (width - tokens)
        wanted = tokens if keep >= width else min(tokens, keep - (width - tokens))
        output.logits = output.logits[:rows, end - wanted : end] if cache.logits else None
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:rows, :tokens] for h in output.hidden_states)
        batch.end()
        cache.forward_ended()
        if tokens > 1 and cache.after_prefill is not None:
            cache.after_prefill()
        return output
