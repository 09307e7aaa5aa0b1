"""A model's snapshots as tensors and JSON, for colder tiers."""

from __future__ import annotations

import json
from typing import Any

import torch

from chunkcache.hf.carrier import Snapshot
from chunkcache.hf.form import Ends


class SnapshotWire:
    """See the module.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def take_apart(self, snapshot: Snapshot) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Tensors, and the paths and plain values in their order.

        Raises:
            TypeError: there is more than JSON holds (types, devices).
        """
        plain = [[list(path), value] for path, value in snapshot.ends.plain.items()]
        if _paths(json.loads(json.dumps(plain))) != snapshot.ends.plain:
            raise TypeError("its plain values are more than JSON holds")
        return snapshot.ends.tensors, plain

    def put_together(self, tensors: tuple[torch.Tensor, ...], plain: Any) -> Snapshot:
        """The inverse; tensors are on the model's device."""
        return Snapshot(Ends(tuple(one.to(self.device) for one in tensors), _paths(plain)))


def _paths(plain: Any) -> dict[tuple[object, ...], object]:
    return {tuple(path): value for path, value in plain}
