"""The parity probe: what can be proved for this model, in this type, on this machine.

No table of names decides; what a model does on the probe does. The ways to carry state are tried
from the best one down, and the first that proves itself serves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from chunkcache.config import Config
from chunkcache.errors import ChunkcacheError, ModelChangedError, UnsupportedModelError
from chunkcache.hf.adapters import Switches
from chunkcache.hf.carrier import Carrier
from chunkcache.hf.fingerprint import arithmetic
from chunkcache.hf.forward import ForwardHooks
from chunkcache.hf.plain import check_around, check_model, compiles, plain_model
from chunkcache.hf.repair import mend
from chunkcache.hf.trial import fixed_rope_limit, position_limit
from chunkcache.hf.trial_copies import CopyTrial
from chunkcache.hf.trial_two_phase import TwoPhaseTrial
from chunkcache.hf.twin import make_twin
from chunkcache.hf.two_phase import TwoPhase
from chunkcache.kv.layout import ChunkLayout
from chunkcache.lab.records import VerifyReport

_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Proof:
    """What the probe established.

    Attributes:
        tier: "A" two-phase attention; "B" with snapshots; "C" copies; "D" with snapshots; "E"
            encoder-decoder.
        carrier: carries state as was proved.
        rows: the multiple that makes rows invariant; 0 if none does (then borders apply).
        error: largest difference of logits to the model's own forward.
        arithmetic: the device, libraries and switches it holds for.
        kernel: name of the attention kernel it holds for.
        linear: name of what multiplies in linear layers.
        limit: the longest prompt it holds for; None if no end was seen.
        avoid: a token of prompts for which it does not hold; None if there is none.
        refused: better ways that did not prove themselves, and why.
        adapters: the state of the adapters it holds for.
    """

    tier: str
    carrier: Carrier
    rows: int
    error: float
    tokens: int
    arithmetic: dict[str, object]
    kernel: str
    linear: str
    limit: int | None = None
    avoid: int | None = None
    refused: dict[str, str] = field(default_factory=dict)
    adapters: Hashable = ()

    @property
    def layout(self) -> ChunkLayout:
        """Of the chunks."""
        return self.carrier.layout


class Prover:
    """Proves a model as it is now, with the adapters that are active."""

    def __init__(self, model: PreTrainedModel, settings: Config):
        self.model = model
        self.settings = settings
        self.kind = str(model.config.model_type)
        # Compiled forwards would be compiled for every shape of the probe.
        self._plain = make_twin(model, attention=False) if compiles(model) else model

    def prove(self) -> Proof:
        """The best way that proves itself.

        Raises:
            UnsupportedModelError: none does; the reason says why.
            ConfigError: the kernel that is wanted is not to be had here.
            AdapterStateError, ModelChangedError: of adapters that cannot serve, or were switched.
        """
        switches = Switches(self.model)
        adapters = switches.state()
        proof = replace(self._prove(), adapters=adapters)
        if switches.state() != adapters:
            raise ModelChangedError("adapters were switched while the model was proved; ask again")
        return proof

    def _prove(self) -> Proof:
        ways: dict[str, Callable[[], Proof]] = {
            "two-phase": self._two_phase,
            "copies": self._copies,
        }
        if self.model.config.is_encoder_decoder:
            del ways["two-phase"]
        refused: dict[str, str] = {}
        for name, way in ways.items():
            try:
                proof = self._try(way)
            except UnsupportedModelError as error:
                refused[name] = error.reason
            else:
                proof.refused.update(refused)
                return proof
        reasons = list(dict.fromkeys(refused.values()))
        raise UnsupportedModelError(self.kind, "; ".join(reasons))

    def _try(self, way: Callable[[], Proof]) -> Proof:
        try:
            return way()
        except ChunkcacheError:
            raise
        except _MODEL_ERRORS as error:
            reason = f"its forward fails on the probe ({type(error).__name__}: {error})"
            raise UnsupportedModelError(self.kind, reason) from error

    @property
    def _wide(self) -> Config:
        """Settings with chunks as long as borders are apart.

        What a forward computes together is stored together: an expert's rows depend on all tokens
        between two borders, so chunks of two prompts must not meet there.
        """
        settings = self.settings
        if settings.mode == "fast":
            return settings
        return replace(settings, chunk_size=settings.cut, border=None)

    def _two_phase(self) -> Proof:
        trial, carrier = self._try_two_phase(self.settings)
        if not trial.rows and self._wide.chunk_size != self.settings.chunk_size:
            trial, carrier = self._try_two_phase(self._wide)
        tier = "B" if carrier.snapshots else "A"
        return self._proof(tier, carrier, trial, trial.rows, trial.kernel)

    def _try_two_phase(self, settings: Config) -> tuple[TwoPhaseTrial, TwoPhase]:
        twin = make_twin(self.model)
        mend(twin, settings.cut)
        hooks = ForwardHooks(twin)
        hooks.install(twin)
        trial = TwoPhaseTrial(self._plain, twin, hooks, settings)
        return trial, trial.run()

    def _copies(self) -> Proof:
        twin = make_twin(self.model, attention=False)
        mend(twin, self.settings.cut)
        trial = CopyTrial(self._plain, twin, self._wide)
        carrier = trial.run()
        tier = "D" if carrier.snapshots else "C"
        if self.model.config.is_encoder_decoder:
            tier = "E"
        return self._proof(tier, carrier, trial, 0, "the model's own")

    def _proof(
        self,
        tier: str,
        carrier: Carrier,
        trial: TwoPhaseTrial | CopyTrial,
        rows: int,
        kernel: str,
    ) -> Proof:
        facts = arithmetic(self.model.device)
        return Proof(
            tier,
            carrier,
            rows,
            trial.error,
            trial.tokens,
            facts,
            kernel,
            trial.linear,
            getattr(trial, "limit", None),
            getattr(trial, "avoid", None),
        )


def verify(model: Any, chunk_size: int = 64) -> VerifyReport:
    """Runs the probe on a model and reports; never raises for a model that is merely unsupported."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    settings = Config(chunk_size=chunk_size, border=chunk_size)
    try:
        plain = plain_model(model)
        check_model(plain)
        check_around(model, plain)
        proof = Prover(plain, settings).prove()
    except UnsupportedModelError as error:
        return VerifyReport(model_type, "F", "no", float("nan"), error.reason, dtype=dtype)
    return VerifyReport(
        model_type,
        proof.tier,
        "rows" if proof.rows else "borders",
        proof.error,
        "proved" if proof.rows else _why_borders(proof),
        proof.rows,
        dtype,
        {
            "token_bytes": proof.layout.token_bytes,
            "snapshot_bytes": proof.carrier.state_bytes,
            "longest_prompt": proof.limit,
            "refused": dict(proof.refused),
            "probe_tokens": proof.tokens,
            "kernel": proof.kernel,
            "linear": proof.linear,
        },
    )


def _why_borders(proof: Proof) -> str:
    if proof.tier in "DB":
        return "proved at borders: its state can be resumed where a snapshot was taken"
    if proof.tier == "A":
        return "proved at borders: matrix products here do not give rows the same bits"
    return "proved at borders: " + proof.refused.get("two-phase", "its own code runs")


def exactness(proof: Proof, mode: str) -> str:
    """In words, for statistics and reports."""
    if mode == "fast":
        return "within tolerance"
    return "bit-exact rows" if proof.rows else "bit-exact at borders"


__all__ = [
    "Proof",
    "Prover",
    "exactness",
    "fixed_rope_limit",
    "position_limit",
    "verify",
]
