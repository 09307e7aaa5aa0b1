"""The parity probe: what can be proved for this model, in this type, on this machine.

Random ids run through the model's own forward, through ours in one piece, and through ours cut, one
token at a time and among other rows. Equal logits within rounding prove the attention; equal bits
prove row invariance. No table of names decides; what a model does on the probe does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from chunkcache.attention.batch import Batch
from chunkcache.attention.choice import Wanted, choose
from chunkcache.attention.groups import Gate
from chunkcache.errors import ChunkcacheError, UnsupportedModelError
from chunkcache.hf.cache import ChunkCache
from chunkcache.hf.fingerprint import arithmetic, product_type
from chunkcache.hf.forward import ForwardHooks
from chunkcache.hf.linear import serve
from chunkcache.hf.twin import make_twin
from chunkcache.kv import Arena, ChunkLayout, LayerShape, Pool
from chunkcache.kv.sequence import Sequence
from chunkcache.lab.records import VerifyReport

MULTIPLES = (4, 8, 16, 32)  # of rows, tried in this order
_SEED = 20240515
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Proof:
    """What the probe established.

    Attributes:
        rows: the multiple that makes rows invariant; 0 if none does (then borders apply).
        error: largest difference of logits to the model's own forward.
        arithmetic: the device, libraries and switches it holds for.
        kernel: name of the attention kernel it holds for.
        linear: name of what multiplies in linear layers.
    """

    layout: ChunkLayout
    rows: int
    error: float
    tokens: int
    arithmetic: dict[str, object]
    kernel: str
    linear: str


def verify(model: PreTrainedModel, chunk_size: int = 64) -> VerifyReport:
    """Runs the probe on a model and reports; never raises for a model that is merely unsupported."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    try:
        check_model(model)
        twin = make_twin(model)
        hooks = ForwardHooks(twin)
        hooks.install(twin)
        proof = probe(model, twin, hooks, chunk_size)
    except UnsupportedModelError as error:
        return VerifyReport(model_type, "F", "no", float("nan"), error.reason, dtype=dtype)
    return VerifyReport(
        model_type,
        "A",
        "rows" if proof.rows else "borders",
        proof.error,
        "proved" if proof.rows else "matrix products here do not give rows the same bits",
        proof.rows,
        dtype,
        {
            "token_bytes": proof.layout.token_bytes,
            "probe_tokens": proof.tokens,
            "kernel": proof.kernel,
            "linear": proof.linear,
        },
    )


def check_model(model: PreTrainedModel) -> None:
    """Refuses what can be refused without running anything."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(type(model).__name__, "not a transformers PreTrainedModel")
    kind = str(model.config.model_type)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(kind, "encoder-decoder models are not supported yet")
    if not model.can_generate():
        raise UnsupportedModelError(kind, "it has no generate(); load it as a causal LM")
    if model.device.type == "meta":
        raise UnsupportedModelError(kind, "its weights are not loaded (meta device)")


def probe(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    hooks: ForwardHooks,
    chunk_size: int,
    *,
    rows: bool = True,
    kernel: Wanted = "auto",
) -> Proof:
    """Runs all checks; `rows=False` leaves row invariance out.

    `hooks` are installed on the twin; their row multiple is left at what was tried last. The twin's
    linear layers get the product that the proof is about.

    Raises:
        UnsupportedModelError: with the reason.
        ConfigError: `kernel` is not to be had here.
    """
    kind = str(model.config.model_type)
    try:
        with torch.no_grad():
            return _Probe(model, twin, hooks, chunk_size, kernel).run(rows)
    except ChunkcacheError:
        raise
    except _MODEL_ERRORS as error:
        reason = f"its forward fails on the probe ({type(error).__name__}: {error})"
        raise UnsupportedModelError(kind, reason) from error


class _Probe:
    def __init__(
        self,
        model: PreTrainedModel,
        twin: PreTrainedModel,
        hooks: ForwardHooks,
        chunk_size: int,
        kernel: Wanted,
    ):
        self.model = model
        self.twin = twin
        self.hooks = hooks
        self.kind = str(model.config.model_type)
        self.chunk_size = chunk_size
        self.wanted = kernel
        self.linear = "torch"
        self.layers = 0
        embeddings = model.get_input_embeddings()
        self.tokens = self._length(embeddings.weight.shape[1])
        words, generator = embeddings.weight.shape[0], torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, words, (3, self.tokens), generator=generator, device="cpu")
        self.ids: list[list[int]] = ids.tolist()

    def _length(self, hidden: int) -> int:
        """Long enough that element-wise work is split between threads as it will be later."""
        wanted = max(2 * self.chunk_size + 40, min(1100, 80_000 // hidden))
        limit = position_limit(self.model)
        return wanted if limit is None else min(wanted, limit - 1)

    def run(self, rows: bool) -> Proof:
        self.linear = serve(self.twin, compiled=self.wanted != "torch")
        layout = self.find_layout()
        self.layers = len(layout.layers)
        self.hooks.multiple = 1
        error = self.parity(layout)
        # Libraries of other devices choose the code of a product by its shape: no sample proves them.
        kernel = choose(layout, self.wanted)(layout)
        rows = rows and self.model.device.type == "cpu" and kernel.keeps_rows
        for multiple in MULTIPLES if rows else ():
            self.hooks.multiple = multiple
            if self.invariant(layout):
                return self._proof(layout, multiple, error)
        self.hooks.multiple = 1
        self.resumes(layout)
        return self._proof(layout, 0, error)

    def _proof(self, layout: ChunkLayout, multiple: int, error: float) -> Proof:
        name = choose(layout, self.wanted)(layout).name
        facts = arithmetic(self.model.device)
        return Proof(layout, multiple, error, self.tokens, facts, name, self.linear)

    def find_layout(self) -> ChunkLayout:
        """What each layer caches, seen on the model's own cache after a short forward."""
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=self._tensor(self.ids[0][:5]), past_key_values=cache, use_cache=True)
        shapes = []
        for number, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                kind = type(layer).__name__.removeprefix("Dynamic")
                reason = f"layer {number} keeps a {kind}, not the keys and values of every token"
                raise UnsupportedModelError(self.kind, reason + "; not supported yet")
            if not layer.is_initialized:
                raise UnsupportedModelError(self.kind, f"layer {number} caches nothing")
            shapes.append(self._shape(number, layer.keys, layer.values))
        if not shapes:
            raise UnsupportedModelError(self.kind, "it keeps no keys and values in the cache")
        first = cache.layers[0].keys
        return ChunkLayout(tuple(shapes), self.chunk_size, first.dtype, first.device)

    def _shape(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
        if keys.dim() != 4 or keys.shape[2] != 5 or values.shape[:3] != keys.shape[:3]:
            shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
            raise UnsupportedModelError(self.kind, f"layer {number} caches tensors of {shapes}")
        return LayerShape(keys.shape[1], keys.shape[3], values.shape[3])

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)

    def parity(self, layout: ChunkLayout) -> float:
        """Our forward in one piece against the model's own."""
        plain = self.model(input_ids=self._tensor(self.ids[0]), use_cache=False).logits[0].float()
        batch = self.single(layout)
        ours = self.forward(batch, self.ids[0])[0].float()
        if batch.attended != len(layout.layers):
            raise UnsupportedModelError(
                self.kind, "its attention is its own code, which no registered function reaches"
            )
        return self._within(ours, plain, "one forward")

    def _within(self, ours: torch.Tensor, plain: torch.Tensor, what: str) -> float:
        error = (ours - plain).abs().max().item()
        scale = max(1.0, plain.abs().max().item())
        dtype = self.model.dtype
        if dtype == torch.float32:
            dtype = product_type(self.model.device)
        # Roundings of many layers add up like a random walk.
        depth = max(1.0, self.layers / 8) ** 0.5
        allowed = _TOLERANCE.get(dtype, 1e-2) * scale * depth
        if not error <= allowed:
            reason = f"logits of {what} differ by {error:.2g} (at most {allowed:.2g} is rounding)"
            raise UnsupportedModelError(self.kind, reason)
        return error

    def single(self, layout: ChunkLayout, sequence: Sequence | None = None) -> Batch:
        """A batch of one row, empty or with shared chunks."""
        kernel = choose(layout, self.wanted)(layout)
        return Batch(layout, [sequence or Sequence(layout.chunk_size)], Arena(layout), kernel)

    def forward(self, batch: Batch, *ids: list[int]) -> torch.Tensor:
        """Logits `[rows, tokens, vocabulary]` of new ids, the same number for each row."""
        tensor = torch.tensor(ids, device=self.model.device)
        out = self.twin(input_ids=tensor, past_key_values=ChunkCache(batch), use_cache=True)
        logits: torch.Tensor = out.logits
        return logits

    def invariant(self, layout: ChunkLayout) -> bool:
        """Whether cuts, single tokens, shared chunks and other rows leave every bit as it is."""
        whole = self.single(layout)
        reference = self.forward(whole, self.ids[0])[0]
        return (
            self._lengths(layout, reference)
            and self._cuts(layout, whole, reference)
            and self._company(layout, whole, reference)
        )

    def _lengths(self, layout: ChunkLayout, reference: torch.Tensor) -> bool:
        """Prompts of other lengths: threads then share the work at other places."""
        for part in (0.97, 0.86, 0.71, 0.55, 0.37):
            length = int(self.tokens * part)
            logits = self.forward(self.single(layout), self.ids[0][:length])[0]
            if not torch.equal(logits, reference[:length]):
                return False
        return True

    def _cuts(self, layout: ChunkLayout, whole: Batch, reference: torch.Tensor) -> bool:
        batch, ids = self.single(layout), self.ids[0]
        sizes = [self.chunk_size - 1, 1, 2, 1, 5, 1, self.chunk_size, 13, 1, 33, 3]
        while (at := batch.sequences[0].length) < self.tokens:
            size = sizes.pop(0) if sizes else self.tokens - at
            logits = self.forward(batch, ids[at : at + size])[0]
            if not torch.equal(logits, reference[at : at + logits.shape[0]]):
                return False
        return all(
            torch.equal(ours, theirs)
            for layer in range(len(layout.layers))
            for ours, theirs in zip(batch.arena.layer(layer), whole.arena.layer(layer), strict=True)
        )

    def _company(self, layout: ChunkLayout, whole: Batch, reference: torch.Tensor) -> bool:
        """Decoding steps next to others, with and without shared chunks."""
        length = self.tokens - 4
        pool = Pool(layout, layout.chunk_bytes * 2)
        run = pool.allocate(1)
        assert run is not None
        for layer in range(len(layout.layers)):
            for to, source in zip(run.layer(layer), whole.arena.layer(layer, 1), strict=True):
                to.copy_(source)
        resumed = self.single(
            layout, Sequence(self.chunk_size, self.ids[0][: self.chunk_size], (run,))
        )
        if length > self.chunk_size:
            self.forward(resumed, self.ids[0][self.chunk_size : length])
        others = [self.single(layout), self.single(layout)]
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

    def resumes(self, layout: ChunkLayout) -> None:
        """Without row invariance a resumed forward must still agree within rounding."""
        batch, middle = self.single(layout), self.tokens // 2
        whole = self.forward(self.single(layout), self.ids[0])[0].float()
        self.forward(batch, self.ids[0][:middle])
        rest = self.forward(batch, self.ids[0][middle:])[0].float()
        self._within(rest, whole[middle:], "a resumed forward")


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens a prompt may have at most; None if the configuration names no limit."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    known = [getattr(config, name, None) for name in names]
    limits = [limit for limit in [*known, fixed_rope_limit(model)] if limit]
    return min(limits) if limits else None


def fixed_rope_limit(model: PreTrainedModel) -> int | None:
    """Tokens up to which rotary embeddings stay the same, for models that change them (else None).

    Beyond it (dynamic, longrope) KV depends on the length of the whole sequence and of its company,
    so prompt and answer together must stay inside.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    limits = []
    for parameters in kinds:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append(original or config.max_position_embeddings)
    return min(limits) if limits else None


def exactness(proof: Proof, mode: str) -> str:
    """In words, for statistics and reports."""
    if mode == "fast":
        return "within tolerance"
    return "bit-exact rows" if proof.rows else "bit-exact at borders"


__all__ = [
    "Proof",
    "check_model",
    "exactness",
    "fixed_rope_limit",
    "position_limit",
    "probe",
    "verify",
]
