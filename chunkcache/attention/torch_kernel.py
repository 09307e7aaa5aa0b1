"""The kernel for every device and type that torch knows: batched products and a softmax between."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.kernel import Kernel, Plan
from chunkcache.attention.partial import keeps_rows
from chunkcache.attention.plan import PrefillPlan, StepPlan
from chunkcache.attention.rule import Rule
from chunkcache.attention.two_phase import Block, attend_prefill, attend_step
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.layout import KV, ChunkLayout, LayerShape
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
        attended = [layer for layer in layout.layers if isinstance(layer, LayerShape)]
        widths = {layout.chunk_size, *(layer.value_dim for layer in attended)}
        self.keeps_rows = all(keeps_rows(width, layout.dtype) for width in widths)

    def step(self, sequences: Rows[Sequence], groups: list[Group], used: int) -> Plan:
        """As the base class says."""
        layout = self.layout
        plan = StepPlan(sequences, groups, used, layout.chunk_size, layout.device)
        return _Step(self, plan)

    def prefill(self, sequence: Sequence, tokens: int) -> Plan:
        """As the base class says."""
        chunks = [*map(len, sequence.shared), len(sequence.tail)]
        plan = PrefillPlan(sequence.length, tokens, chunks, self.layout.chunk_size)
        return _Prefill(self, plan, sequence)

    def block(self, layer: int, kv: KV) -> Block:
        """Keys and values of chunks of a layer."""
        shape = self.layout.attention(layer)
        if shape.latent:
            (keys,) = kv
            return Block(keys, keys[:, :, : shape.value_dim].transpose(2, 3))
        return Block(*kv)


class _Step(Plan):
    def __init__(self, kernel: TorchKernel, plan: StepPlan):
        self.kernel = kernel
        self.plan = plan

    def attend(self, layer: int, query: torch.Tensor, tails: KV, rule: Rule) -> torch.Tensor:
        kernel = self.kernel
        shared = [kernel.block(layer, group.run.layer(layer)) for group in self.plan.groups]
        last = kernel.block(layer, tails)
        return attend_step(query, shared, last, self.plan, rule, kernel.space, kernel.ordered)


class _Prefill(Plan):
    def __init__(self, kernel: TorchKernel, plan: PrefillPlan, sequence: Sequence):
        self.kernel = kernel
        self.plan = plan
        self.sequence = sequence

    def attend(self, layer: int, query: torch.Tensor, tails: KV, rule: Rule) -> torch.Tensor:
        kernel = self.kernel
        held = [*(run.layer(layer) for run in self.sequence.shared), tails]
        blocks = [kernel.block(layer, kv) for kv in held]
        return attend_prefill(query, blocks, self.plan, rule, kernel.space, kernel.ordered)
