"""The kernel for every device and type that torch knows: batched products and a softmax between."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.kernel import Kernel, Plan
from chunkcache.attention.partial import keeps_rows
from chunkcache.attention.plan import PrefillPlan, StepPlan, plan_step
from chunkcache.attention.two_phase import Block, attend_prefill, attend_step
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.sequence import Sequence


class TorchKernel(Kernel):
    """See `partial` for the arithmetic.

    Args:
        ordered: merge in the order of position, as exactness needs; otherwise as is fastest.
    """

    name = "torch"

    def __init__(self, layout: ChunkLayout, ordered: bool = True):
        self.layout = layout
        self.ordered = ordered
        self.space = Workspace(layout.device)
        widths = {layout.chunk_size, *(layer.value_dim for layer in layout.layers)}
        self.keeps_rows = all(keeps_rows(width, layout.dtype) for width in widths)

    def step(self, sequences: Rows[Sequence], groups: list[Group], used: int) -> Plan:
        """As the base class says."""
        layout = self.layout
        plan = plan_step(sequences, groups, used, layout.chunk_size, layout.device)
        return _Step(plan, self.space, self.ordered)

    def prefill(self, sequence: Sequence, tokens: int) -> Plan:
        """As the base class says."""
        start = sequence.shared_tokens
        plan = PrefillPlan(sequence.length, tokens, start, self.layout.chunk_size)
        return _Prefill(plan, sequence, self.space, self.ordered)


class _Step(Plan):
    def __init__(self, plan: StepPlan, space: Workspace, ordered: bool):
        self.plan = plan
        self.space = space
        self.ordered = ordered

    def attend(self, layer: int, query: torch.Tensor, tails: KV, scaling: float) -> torch.Tensor:
        shared = [Block(*group.run.layer(layer)) for group in self.plan.groups]
        return attend_step(
            query, shared, Block(*tails), self.plan, scaling, self.space, self.ordered
        )


class _Prefill(Plan):
    def __init__(self, plan: PrefillPlan, sequence: Sequence, space: Workspace, ordered: bool):
        self.plan = plan
        self.sequence = sequence
        self.space = space
        self.ordered = ordered

    def attend(self, layer: int, query: torch.Tensor, tails: KV, scaling: float) -> torch.Tensor:
        shared = [Block(*run.layer(layer)) for run in self.sequence.shared]
        return attend_prefill(
            query, shared, Block(*tails), self.plan, scaling, self.space, self.ordered
        )
