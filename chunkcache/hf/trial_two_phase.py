"""The trial of two-phase attention: observed layers, parity, row invariance, resumption.

Random ids run through the model's own forward, through ours in one piece, and through ours cut, one
token at a time and among other rows. Equal logits within rounding prove the attention; equal bits
prove row invariance.
"""

from __future__ import annotations

import logging

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from chunkcache.attention.batch import Batch
from chunkcache.attention.choice import choose
from chunkcache.attention.groups import Gate
from chunkcache.config import Config
from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.cache import ChunkCache, Kept
from chunkcache.hf.forward import ForwardHooks
from chunkcache.hf.latent import mute
from chunkcache.hf.linear import serve
from chunkcache.hf.trial import Trial
from chunkcache.hf.two_phase import TwoPhase
from chunkcache.kv import Arena, ChunkLayout, LayerShape, Pool
from chunkcache.kv.sequence import Sequence

_log = logging.getLogger(__name__)
MULTIPLES = (4, 8, 16, 32)  # of rows, tried in this order
_KNOWN = (  # kinds of layers; not all versions of transformers have all
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "DummyLayer",
)


class TwoPhaseTrial(Trial):
    """Proves what holds for a twin whose hooks are installed; `carrier` is what was proved.

    Attributes:
        rows: the multiple that makes rows invariant; 0 if none does.
        error: largest difference of logits to the model's own forward.
    """

    def __init__(
        self, model: PreTrainedModel, twin: PreTrainedModel, hooks: ForwardHooks, settings: Config
    ):
        hidden = model.get_input_embeddings().weight.shape[1]
        size = settings.chunk_size
        # Long enough that element-wise work is split between threads as it will be later.
        super().__init__(model, size, max(2 * size + 40, min(1100, 80_000 // hidden)))
        self.twin = twin
        self.hooks = hooks
        self.settings = settings
        self.rows = 0
        self.error = 0.0
        self.linear = "torch"

    def run(self) -> TwoPhase:
        """Runs all checks; the twin's linear layers get the product that the proof is about.

        Raises:
            UnsupportedModelError: with the reason.
            ConfigError: the kernel that is wanted is not to be had here.
        """
        self.linear = serve(self.twin, compiled=self.settings.kernel != "torch")
        self.kept, self.layout = self.observe()
        self.hooks.multiple = 1
        self.error = self.parity()
        self._spare_expansions()
        self.rows = self._find_rows()
        fast = self.settings.mode == "fast"
        self.hooks.multiple = 1 if fast else max(1, self.rows)
        carrier = self._carrier(ordered=not fast)
        if not self.rows:
            whole = self._plain(self.ids[1])
            self.within(self.resumption(carrier), whole, "a resumed forward")
        return carrier

    def _find_rows(self) -> int:
        """Libraries of other devices choose the code of a product by its shape: no sample proves them."""
        stateful = any(one.states for one in self.kept)
        if stateful or self.settings.exactness != "auto" or self.model.device.type != "cpu":
            return 0
        if not choose(self.layout, self.settings.kernel)(self.layout).keeps_rows:
            return 0
        for multiple in MULTIPLES:
            self.hooks.multiple = multiple
            if self.invariant():
                return multiple
        return 0

    def _carrier(self, ordered: bool) -> TwoPhase:
        settings, layout = self.settings, self.layout
        gate = Gate(settings.two_phase, settings.two_phase_rows, settings.two_phase_tokens)
        keeps = choose(layout, settings.kernel)(layout).keeps_rows
        copies = ordered and not self.rows and not keeps
        kernels = choose(layout, settings.kernel, ordered and not copies)
        self.kernel = kernels(layout).name
        return TwoPhase(self.twin, layout, self.kept, lambda: kernels(layout), gate, copies)

    # -- what there is

    def observe(self) -> tuple[tuple[Kept, ...], ChunkLayout]:
        """What each layer caches, seen on the model's own cache after a short forward."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        ids = self.tensor(self.ids[0][:5])
        self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        kept: list[Kept] = []
        shapes: list[LayerShape] = []
        keys: torch.Tensor | None = None
        for number, layer in enumerate(cache.layers):
            kind = type(layer)
            if kind.__name__ not in _KNOWN or kind.__module__ != CacheLayerMixin.__module__:
                raise self.refuse(f"layer {number} keeps a {kind.__name__}")
            rows = None
            if getattr(layer, "keys", None) is not None:
                keys, rows = layer.keys, len(shapes)
                shapes.append(self._shape(number, layer.keys, layer.values))
            states = isinstance(layer, LinearAttentionLayer) and any(
                layer.has_previous_state.values()
            )
            window = getattr(layer, "sliding_window", None) if rows is not None else None
            kept.append(Kept(rows, layer.number_of_states if states else 0, window))
        if keys is None:
            raise self.refuse("it keeps no keys and values in the cache")
        layout = ChunkLayout(tuple(shapes), self.chunk_size, keys.dtype, keys.device)
        return tuple(kept), layout

    def _shape(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
        if keys.dim() != 4 or keys.shape[2] > 5 or values.shape[:3] != keys.shape[:3]:
            shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
            raise self.refuse(f"layer {number} caches tensors of {shapes}")
        heads, width, value_width = keys.shape[1], keys.shape[3], values.shape[3]
        if heads == 1 and width != value_width:  # the latent and its rotated part, as one key
            return LayerShape(1, width + value_width, width, latent=True)
        return LayerShape(heads, width, value_width)

    def _spare_expansions(self) -> None:
        """Latents are expanded for nothing, unless something else reads what they expand to."""
        muted = mute(self.twin)
        try:
            self.error = self.parity() if muted else self.error
        except (UnsupportedModelError, RuntimeError) as error:
            _log.info("%s needs its latents expanded: %s", self.kind, error)
            for module, kind in muted:
                module.__class__ = kind

    # -- parity

    def _plain(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=self.tensor(ids)).logits[0]
        return logits

    def parity(self) -> float:
        """Our forward in one piece against the model's own."""
        batch = self.single()
        ours = self.forward(batch, self.ids[0])[0]
        if len(batch.rules) < len(self.layout.layers):
            raise self.refuse("its attention is its own code, which no registered function reaches")
        self.kept = tuple(
            one if one.rows is None else one._replace(rules=frozenset(batch.rules[one.rows]))
            for one in self.kept
        )
        return self.within(ours, self._plain(self.ids[0]), "one forward")

    def single(self, sequence: Sequence | None = None) -> Batch:
        """A batch of one row, empty or with shared chunks."""
        kernel = choose(self.layout, self.settings.kernel)(self.layout)
        sequence = sequence or Sequence(self.layout.chunk_size)
        return Batch(self.layout, [sequence], Arena(self.layout), kernel)

    def forward(self, batch: Batch, *ids: list[int]) -> torch.Tensor:
        """Logits `[rows, tokens, vocabulary]` of new ids, the same number for each row."""
        tensor = torch.tensor(ids, device=self.model.device)
        cache = ChunkCache(batch, self.kept)
        with torch.no_grad():
            out = self.twin(input_ids=tensor, past_key_values=cache, use_cache=True)
        logits: torch.Tensor = out.logits
        return logits

    # -- row invariance

    def invariant(self) -> bool:
        """Whether cuts, single tokens, shared chunks and other rows leave every bit as it is."""
        whole = self.single()
        reference = self.forward(whole, self.ids[0])[0]
        return (
            self._lengths(reference)
            and self._all_cuts(whole, reference)
            and self._company(whole, reference)
        )

    def _lengths(self, reference: torch.Tensor) -> bool:
        """Prompts of other lengths: threads then share the work at other places."""
        for part in (0.97, 0.86, 0.71, 0.55, 0.37):
            length = int(self.tokens * part)
            logits = self.forward(self.single(), self.ids[0][:length])[0]
            if not torch.equal(logits, reference[:length]):
                return False
        return True

    def _all_cuts(self, whole: Batch, reference: torch.Tensor) -> bool:
        batch, ids = self.single(), self.ids[0]
        sizes = [max(1, self.chunk_size - 1), 1, 2, 1, 5, 1, self.chunk_size, 13, 1, 33, 3]
        while (at := batch.sequences[0].length) < self.tokens:
            size = sizes.pop(0) if sizes else self.tokens - at
            logits = self.forward(batch, ids[at : at + size])[0]
            if not torch.equal(logits, reference[at : at + logits.shape[0]]):
                return False
        return all(
            torch.equal(ours, theirs)
            for layer in range(len(self.layout.layers))
            for ours, theirs in zip(batch.arena.layer(layer), whole.arena.layer(layer), strict=True)
        )

    def _company(self, whole: Batch, reference: torch.Tensor) -> bool:
        """Decoding steps next to others, with and without shared chunks."""
        length, size = self.tokens - 4, self.chunk_size
        pool = Pool(self.layout, self.layout.chunk_bytes * 2)
        run = pool.allocate(1)
        assert run is not None
        for layer in range(len(self.layout.layers)):
            for to, source in zip(run.layer(layer), whole.arena.layer(layer, 1), strict=True):
                to.copy_(source)
        resumed = self.single(Sequence(size, self.ids[0][:size], (run,)))
        if length > size:
            self.forward(resumed, self.ids[0][size:length])
        others = [self.single(), self.single()]
        self.forward(others[0], self.ids[1][: length // 2])
        self.forward(others[1], self.ids[2][:7])
        together = Batch.join([others[0], resumed, others[1], resumed])
        together.gate = Gate(tokens=1)
        for at in range(length, self.tokens):
            step = [self.ids[1][at]], [self.ids[0][at]], [self.ids[2][at]], [self.ids[0][at]]
            logits = self.forward(together, *step)
            if not all(torch.equal(logits[row, 0], reference[at]) for row in (1, 3)):
                return False
        return True
