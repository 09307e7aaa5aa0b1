"""The trial of the model's own cache: how it grows, and whether it resumes to the bit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.config import Config
from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.call import Call
from chunkcache.hf.copy_in import CopyIn, Facts
from chunkcache.hf.form import Ends, Form, FormError, Kind, kinds, windowed
from chunkcache.hf.linear import serve
from chunkcache.hf.sample import encoder_inputs
from chunkcache.hf.trial import Trial

_CHUNKS = 3  # that are watched
_CUT = "a forward cut at chunks"


class CopyTrial(Trial):
    """Proves what holds for a twin that keeps its own attention.

    Attributes:
        error: largest difference of logits to the model's own forward in one piece.
        limit: the longest prompt for which that is rounding; None if no end was seen. Sparse
            attention breaks ties by the length of the whole prompt, once there is one.
    """

    def __init__(self, model: PreTrainedModel, twin: PreTrainedModel, settings: Config):
        super().__init__(model, settings.chunk_size, _CHUNKS * settings.chunk_size + 24)
        if self.tokens < _CHUNKS * self.chunk_size + 4:
            raise self.refuse(
                f"it has {self.tokens + 1} positions; {_CHUNKS} chunks of {self.chunk_size} tokens "
                "are needed to see how its cache grows (lower chunk_size)"
            )
        self.twin = twin
        self.settings = settings
        self.error = 0.0
        self.limit: int | None = None
        self.linear = "torch"

    def run(self) -> CopyIn:
        """Runs all checks.

        Raises:
            UnsupportedModelError: with the reason.
        """
        self.linear = serve(self.twin, compiled=self.settings.kernel != "torch")
        try:
            carrier = CopyIn(self.twin, self._facts(), self.chunk_size)
            fixed = carrier.encode(self._encoded(0), b"") if self._encodes else None
            logits = self.resumption(carrier, fixed)
        except FormError as error:
            raise self.refuse(f"{error}; a larger chunk_size may help") from error
        self._compare(logits)
        return carrier

    def _compare(self, logits: torch.Tensor) -> None:
        """Finds the longest prompt of which the logits are the model's own."""
        size = self.chunk_size
        refused: UnsupportedModelError | None = None
        for length in (self.tokens, *range((self.tokens - 1) // size * size, size, -size)):
            try:
                self.error = self.within(logits[:length], self._plain(length), _CUT)
            except UnsupportedModelError as error:
                refused = refused or error
            else:
                self.limit = None if refused is None else length
                return
        assert refused is not None
        raise refused

    @property
    def _encodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _encoded(self, number: int) -> dict[str, torch.Tensor]:
        return encoder_inputs(self.model, self.ids[2 - number][: self.chunk_size + 7])

    def _given(self, number: int) -> dict[str, Any]:
        """What forwards get besides the ids: an encoder's output."""
        if not self._encodes:
            return {}
        with torch.no_grad():
            out = self.twin.get_encoder()(**self._encoded(number), return_dict=True)
        return {"encoder_outputs": out}

    def _plain(self, length: int) -> torch.Tensor:
        """Logits of the model's own forward in one piece."""
        ids = self.tensor(self.ids[0][:length])
        inputs = {"input_ids": ids}
        if self._encodes:
            inputs = {**self._encoded(0), "decoder_input_ids": ids}
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits

    def _facts(self) -> Facts:
        caches = self._grown(self.ids[0], self._given(0), _CHUNKS)
        form = Form(caches[0])
        after = [form.read(cache) for cache in caches]
        another = form.read(self._grown(self.ids[1], self._given(1), 1)[0])
        stops = [windowed(caches[0], path) for path in form.paths]
        leaves, changing = kinds(after, another, stops, self.chunk_size)
        first = after[0].tensors
        constants = {
            number: first[number]
            for number, leaf in enumerate(leaves)
            if leaf.kind is Kind.CONSTANT
        }
        shapes = tuple(tensor.shape for tensor in first)
        return Facts(form, leaves, constants, changing, shapes, tuple(t.dtype for t in first))

    def _grown(self, ids: list[int], given: dict[str, Any], chunks: int) -> list[Any]:
        """Copies of the model's cache after each chunk."""
        call, size = Call(self.twin), self.chunk_size
        cache, seen = None, []
        for number in range(chunks):
            part = ids[number * size : (number + 1) * size]
            with torch.no_grad():
                cache = call(part, cache, number * size, given).cache
            form = Form(cache)
            ends: Ends = form.read(cache)
            seen.append(form.write([tensor.clone() for tensor in ends.tensors], ends.plain))
        return seen
