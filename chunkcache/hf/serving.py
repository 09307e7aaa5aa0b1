"""What serves a model with its adapters as they were at one time: a proof, a twin, a tree.

Twins cost no weights, so each state of the adapters keeps its own, up to a number; what was stored
for a state that was forgotten is found again when it comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from chunkcache.attention.groups import Decisions
from chunkcache.config import Config
from chunkcache.hf.carrier import Source
from chunkcache.hf.prefill import Prefiller, Space
from chunkcache.hf.probe import Proof
from chunkcache.hf.wire import SnapshotWire
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier
from chunkcache.kv.tiers import Tiers
from chunkcache.stores import MemoryStore
from chunkcache.stores.guard import Guard
from chunkcache.stores.open import open_store, read_admission

_PATIENCE = 2.0  # seconds that a request waits for a colder tier, at most, at a time
_TRIES = 3
_READY = 64 * 2**20  # bytes of memory that the first load finds at hand
_DRAIN = 5.0  # seconds that the stores get at the end to take what they were offered
_KEPT = 16  # states of adapters whose twins are kept


@dataclass(eq=False)
class Serving:
    """One proof and what works by it; `space` is where its chunks belong as weights are now."""

    proof: Proof
    prefiller: Prefiller
    space: Space


class Servings:
    """All of one wrapper, over one store. Not thread-safe."""

    def __init__(self, settings: Config, device: torch.device):
        self.settings = settings
        self.store: PrefixStore | None = None
        self.tiers: Tiers | None = None
        self.colder = _colder(settings.stores, device)
        self.decisions = Decisions()
        self._known: OrderedDict[Hashable, Serving] = OrderedDict()
        self._snapshots: bool | None = None  # of the store; None if it is to be made anew

    def get(self, state: Hashable) -> Serving | None:
        """That of a state of the adapters."""
        serving = self._known.get(state)
        if serving is not None:
            self._known.move_to_end(state)
        return serving

    def known(self, serving: Serving) -> bool:
        """Whether it still serves."""
        return any(one is serving for one in self._known.values())

    def serving(self, proof: Proof) -> Serving | None:
        """What works by a proof."""
        return next((one for one in self._known.values() if one.proof is proof), None)

    def add(
        self,
        proof: Proof,
        space: Callable[[Proof, Prefiller], Space],
        current: Callable[[Serving], Space | None],
    ) -> Serving:
        """Makes the prefiller that a proof asks for.

        Args:
            space: names the tree; current: the space, or None if nothing may be stored.
        """
        carrier = proof.carrier
        carrier.decisions = self.decisions
        prefiller = Prefiller(
            carrier,
            self._store(proof),
            self.settings,
            proof.rows,
            proof.limit,
            proof.avoid,
            lambda: current(serving),  # asked when it is there
            self.tiers,
        )
        serving = Serving(proof, prefiller, space(proof, prefiller))
        self._known[proof.adapters] = serving
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return serving

    def _store(self, proof: Proof) -> PrefixStore:
        """The store of the others, if state is carried alike; it has one layout and one budget."""
        layout, settings = proof.carrier.layout, self.settings
        snapshots = proof.carrier.snapshots or proof.tier == "E"  # what encoders leave is one too
        store = self.store
        if store is None or (store.layout, self._snapshots) != (layout, snapshots):
            self.forget()
            part = settings.snapshot_budget if snapshots else 0
            store = PrefixStore(layout, settings.budget - part, settings.policy, part)
            self.store, self._snapshots = store, snapshots
            self.tiers = self._tiers(store, proof)
        return store

    def _tiers(self, store: PrefixStore, proof: Proof) -> Tiers | None:
        """The colder tiers; what an encoder's input leaves stays on the device."""
        if not self.colder or proof.tier == "E":
            return None
        carrier = proof.carrier
        states = SnapshotWire(carrier.layout.device) if carrier.snapshots else None
        tiers = Tiers(store, self.colder, states, _PATIENCE, _about(proof))
        tiers.measure(_chunk_seconds(proof))
        store.pool.prepare(_READY)
        return tiers

    @property
    def guards(self) -> list[Guard]:
        """Of the colder tiers."""
        return [tier.guard for tier in self.colder]

    def rename(self, space: Callable[[Proof, Prefiller], Space]) -> bool:
        """Gives all their space as the weights are now; says whether any name changed."""
        before = [serving.space.name for serving in self._known.values()]
        for serving in self._known.values():
            serving.space = space(serving.proof, serving.prefiller)
        return before != [serving.space.name for serving in self._known.values()]

    def forget(self) -> None:
        """Drops everything: nothing that was proved holds any longer."""
        self._known.clear()
        if self.tiers is not None:
            self.tiers.close()
            self.tiers = None
        if self.store is not None:
            self.store.close()
            self._snapshots = None

    def settle(self) -> None:
        """Gives the colder tiers a while to take what they were offered."""
        if self.tiers is not None:
            self.tiers.flush(_DRAIN)

    def close(self) -> None:
        """Drops everything, and closes the colder tiers."""
        self.forget()
        for guard in self.guards:
            guard.close()


def _colder(names: Sequence[str], device: torch.device) -> list[Tier]:
    """The tiers that settings name; two of a kind are told apart by a number."""
    found: list[Tier] = []
    try:
        for name in names:
            url, admission = read_admission(name)
            store = open_store(url)
            if isinstance(store, MemoryStore) and device.type == "cuda":
                store = MemoryStore(store.budget, _pinned)
            number = 1 + sum(tier.guard.kind == store.kind for tier in found)
            label = store.kind if number == 1 else f"{store.kind}-{number}"
            found.append(Tier(Guard(store, _PATIENCE), admission, label))
    except BaseException:
        for tier in found:
            tier.guard.close()
        raise
    return found


def _pinned(size: int) -> memoryview:
    """Memory that a GPU copies from without a detour."""
    numbers: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memoryview(numbers)


def _about(proof: Proof) -> dict[str, Any]:
    """The model, for people who look at a store."""
    config, layout = proof.carrier.model.config, proof.carrier.layout
    name = str(getattr(config, "_name_or_path", ""))
    hub = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    return {  # of a folder only its last part: others may read the store
        "model": (name if hub else Path(name).name) or config.model_type,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "chunk_size": layout.chunk_size,
        "token_bytes": layout.token_bytes,
    }


def _chunk_seconds(proof: Proof) -> float:
    """How long it takes to compute a chunk."""
    carrier = proof.carrier
    device = carrier.layout.device
    token = 1 if proof.avoid != 1 else 2

    def run() -> float:
        carried = carrier.open(Source([]))
        _wait(device)
        begin = perf_counter()
        with torch.no_grad():
            carrier.forward(carried, [token] * carrier.layout.chunk_size)
        _wait(device)
        return perf_counter() - begin

    return median(run() for _ in range(_TRIES))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
