"""The model as it is now: what was proved for it, and where what it computes belongs.

Weights, adapters, settings and the machine's switches may change between requests, and while one
runs. Every request asks anew; what a request computed is stored only if nothing changed meanwhile.
"""

from __future__ import annotations

import itertools
import threading

import torch
from transformers import PreTrainedModel

from chunkcache.attention.groups import Decisions
from chunkcache.config import Config
from chunkcache.errors import ClosedError, ModelChangedError, UnsupportedModelError
from chunkcache.hf.adapters import Switches
from chunkcache.hf.fingerprint import Tensors, Watch, arithmetic, digest_weights, namespace
from chunkcache.hf.plain import compiles
from chunkcache.hf.prefill import Prefiller, Space
from chunkcache.hf.probe import Proof, Prover
from chunkcache.hf.sample import short_inputs
from chunkcache.hf.serving import Serving, Servings
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tiers import Tiers


class ModelState:
    """Proofs, namespaces and the store of one wrapped model. Thread-safe.

    Attributes:
        proof: what was proved for the model as the last request found it.

    Raises:
        UnsupportedModelError: nothing could be proved, or its forward changes it.
        AdapterStateError: its adapters are merged and switched off at once.
        ConfigError: the byte budget is smaller than one chunk.
    """

    def __init__(self, model: PreTrainedModel, settings: Config):
        self.model = model
        self.settings = settings
        self._switches = Switches(model)
        self._lock = threading.RLock()
        self._epochs = itertools.count()
        self._closed = False
        self._servings = Servings(settings, model.device)
        before = Tensors(model)
        self._weights = digest_weights(model)
        self._merged = self._switches.merged()
        self.proof: Proof = self._prove().proof
        self._watch = self._look()
        if not before.same():  # some models scale their weights when they first run
            self._hash()
        self._check_still()

    def _look(self) -> Watch:
        return Watch(self.model, self.proof.carrier.model, self._switches.modules)

    def _check_still(self) -> None:
        """Refuses a model whose own forwards change it: what else does could not be told from that."""
        if compiles(self.model):
            return  # the first call would compile it
        try:
            with torch.no_grad():
                self.model(**short_inputs(self.model))
            changed = self._watch.changed()
        except ModelChangedError:
            changed = True
        if changed:
            reason = (
                "its forward changes its own weights or settings, so no change could be noticed"
            )
            raise UnsupportedModelError(str(self.model.config.model_type), reason)

    def serving(self) -> Serving:
        """What serves the model as it is now; forgets the chunks of changed weights."""
        with self._lock:
            if self._closed:
                raise ClosedError("this wrapper was closed; wrap the model again")
            self._follow_weights()
            if self.proof.arithmetic != arithmetic(self.model.device):
                self._servings.forget()
            serving = self._servings.get(self._switches.state()) or self._prove()
            self.proof = serving.proof
            return serving

    def _follow_weights(self) -> None:
        changed, merged = self._watch.changed(), self._switches.merged()
        if changed or merged != self._merged:
            self._merged = merged
            if self._hash():
                self.flush()

    def _hash(self) -> bool:
        """Names the weights as they are now; whether that changed a name.

        Raises:
            ModelChangedError: they change meanwhile; what is computed would lie under a wrong name.
        """
        self._watch = self._look()
        self._weights = digest_weights(self.model)
        if not self._watch.same_tensors():
            raise ModelChangedError("the weights changed while they were hashed; try again")
        return self._servings.rename(self._space)

    def _prove(self) -> Serving:
        """Proves the model with its adapters as they are."""
        proof = Prover(self.model, self.settings).prove()
        return self._servings.add(proof, self._space, self.current)

    def _space(self, proof: Proof, prefiller: Prefiller) -> Space:
        settings = {
            "chunk_size": self.settings.chunk_size,
            "mode": self.settings.mode,
            "tier": proof.tier,
            "rows": proof.rows,
            "kernel": proof.kernel,
            "linear": proof.linear,
            "unit": prefiller.unit,
            "adapters": proof.adapters,
        }
        name = namespace(proof.carrier.model, self._weights, settings, self.settings.tenant)
        return Space(name, next(self._epochs))

    def current(self, serving: Serving) -> Space | None:
        """The space that may be stored to: none after close(), or when anything is not as it was.

        The twin has settings and hooks of its own, so tensors and arithmetic are all that can change
        under a running request; the next one looks at the rest.
        """
        with self._lock:
            same = serving.proof.arithmetic == arithmetic(self.model.device)
            same = same and self._servings.known(serving) and self._watch.same_tensors()
            return serving.space if same and not self._closed else None

    def training(self) -> bool:
        """Whether the model, or a part of it, is in training mode."""
        return self._watch.training()

    def last(self) -> Serving | None:
        """What served the last request, if it still may; looks at nothing that takes time."""
        with self._lock:
            return self._servings.serving(self.proof)

    @property
    def store(self) -> PrefixStore:
        """Everything that is stored."""
        store = self._servings.store
        assert store is not None, "it is made with the first proof"
        return store

    @property
    def tiers(self) -> Tiers | None:
        """Colder than the store, if there are any."""
        return self._servings.tiers

    @property
    def decisions(self) -> Decisions:
        """How often rows shared products, and why not."""
        return self._servings.decisions

    def flush(self) -> int:
        """Drops everything that no running request holds, pinned or not; returns the chunks freed."""
        return sum(tree.clear() for tree in self.store.trees())

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def close(self) -> None:
        """Drops everything; nothing is stored from now on."""
        with self._lock:
            self._closed = True
        self._servings.settle()  # requests that run meanwhile do not wait for that
        with self._lock:
            self._servings.close()
