"""The trial of the model's own cache: how it grows, and whether it resumes to the bit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.config import Config
from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.call import Call
from chunkcache.hf.carrier import Snapshot, Source
from chunkcache.hf.copy_in import CopyIn
from chunkcache.hf.facts import Facts
from chunkcache.hf.form import Ends, Form, FormError, Kind, kinds, windowed
from chunkcache.hf.linear import serve
from chunkcache.hf.sample import encoder_inputs
from chunkcache.hf.trial import MARGIN, Trial

_CHUNKS = 3  # that are watched
_CUT = "a forward cut at chunks"


class CopyTrial(Trial):
    """Proves what holds for a twin that keeps its own attention.

    Attributes:
        error: largest difference of logits to the model's own forward in one piece.
        limit: the longest prompt for which that is rounding; None if no end was seen. Sparse
            attention breaks ties by the length of the whole prompt, once there is one; windows are
            proved as far as they were filled.
        avoid: a token whose prompts are not reused; None if there is none.
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
        self.avoid: int | None = None
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
        self._compare(logits, carrier)
        self.avoid = self._moved_by(carrier, fixed)
        return carrier

    def _moved_by(self, carrier: CopyIn, fixed: Snapshot | None) -> int | None:
        """The padding token, if one inside a prompt shifts the positions of what comes behind.

        Such models (Speech2Text) count the tokens that are no padding, but in one forward only.
        """
        if self.pad is None:
            return None
        ids, size = list(self.ids[2][: 2 * self.chunk_size]), self.chunk_size
        ids[size // 2] = self.pad
        carried = carrier.open(Source([], fixed=fixed))
        cut = [carrier.logits(carried, ids[at : at + size]) for at in (0, size)]
        try:
            self.within(torch.cat(cut), self._plain(ids), _CUT)
        except UnsupportedModelError:
            return int(self.pad)
        return None

    def _compare(self, logits: torch.Tensor, carrier: CopyIn) -> None:
        """Compares with the model's own forward; failing that, finds up to which length they agree.

        Shorter prompts must agree as closely as rounding explains: what resumes wrongly may start
        with small errors.
        """
        try:
            self.error = self.within(logits, self._plain(self.ids[1]), _CUT)
        except UnsupportedModelError:
            longest = (self.tokens - 1) // self.chunk_size * self.chunk_size
            lengths = range(longest, self.chunk_size, -self.chunk_size)
            agreed = next((n for n in lengths if self._agrees(carrier, n)), None)
            if self._encodes or agreed is None:
                raise
            self.limit = min(agreed, self.limit or agreed)
        # Sparse attention has a choice from here on, and makes it by the length of the whole prompt.
        dense = getattr(self.model.config.get_text_config(decoder=True), "index_topk", None)
        if dense:
            self.limit = min(dense, self.limit or dense)

    def _agrees(self, carrier: CopyIn, length: int) -> bool:
        """Whether all prompts of a length come out alike whole and cut."""
        errors = []
        for ids in self.ids:
            cut, carried = [], carrier.open(Source([]))
            for at in range(0, length, self.chunk_size):
                cut.append(carrier.logits(carried, ids[at : min(length, at + self.chunk_size)]))
            errors.append(float((torch.cat(cut) - self._plain(ids[:length])).abs().max()))
        self.error = max(errors)
        return self.error <= MARGIN * self.noise

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

    def _plain(self, ids: list[int]) -> torch.Tensor:
        """Logits of the model's own forward in one piece."""
        inputs = {"input_ids": self.tensor(ids)}
        if self._encodes:
            inputs = {**self._encoded(0), "decoder_input_ids": self.tensor(ids)}
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits

    def _facts(self) -> Facts:
        caches = self._grown(self.ids[0], self._given(0), _CHUNKS)
        form = Form(caches[0])
        after = [form.read(cache) for cache in caches]
        another = form.read(self._grown(self.ids[1], self._given(1), 1)[0])
        windows = [windowed(caches[0], path) for path in form.paths]
        leaves, changing = kinds(after, another, [bool(w) for w in windows], self.chunk_size)
        self._bound(windows, after)
        first = after[0].tensors
        constants = {
            number: first[number]
            for number, leaf in enumerate(leaves)
            if leaf.kind is Kind.CONSTANT
        }
        shapes = tuple(tensor.shape for tensor in first)
        plain = after[0].plain
        steady = {path: value for path, value in plain.items() if path not in changing}
        return Facts(
            form, leaves, constants, steady, changing, shapes, tuple(t.dtype for t in first)
        )

    def _bound(self, windows: list[int], after: list[Ends]) -> None:
        """Nothing is proved beyond a window that the probe did not fill.

        What a cache forgets and what a mask hides need not be the same: a model may see all of a
        prompt in one piece and only the window when it goes on.
        """
        *_, before, last = (ends.tensors for ends in after)
        for window, one, other in zip(windows, before, last, strict=True):
            if window and one.shape != other.shape:
                width = max(window, self.tokens)
                self.limit = min(width, self.limit or width)

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
