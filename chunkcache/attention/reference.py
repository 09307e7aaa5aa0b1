"""The obviously right attention: one softmax over everything a row sees, in any float type.

Slow and plain; the tests' oracle for `two_phase`, and the meaning of its arguments.
"""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Causal attention of one sequence.

    Args:
        query: `[query_heads, tokens, dim]` at `positions`.
        keys, values: `[heads, length, dim]` for positions 0 .. length - 1; query_heads is a
            multiple of heads.
        positions: `[tokens]` of the queries.

    Returns:
        `[tokens, query_heads, value_dim]`.
    """
    folded = query.shape[0] // keys.shape[0]
    keys = keys.repeat_interleave(folded, 0)
    values = values.repeat_interleave(folded, 0)
    scores = query @ keys.transpose(1, 2) * scaling
    behind = torch.arange(keys.shape[1], device=keys.device) > positions.unsqueeze(1)
    scores = scores.masked_fill(behind, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)


def merge(
    left: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    right: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two partial states `(o, m, l)` of the same rows as one; m in natural logarithm.

    o is the unnormalised sum `[rows, dim]`; m and l are `[rows]`.
    """
    m = torch.maximum(left[1], right[1])
    a, b = (left[1] - m).exp(), (right[1] - m).exp()
    return (
        left[0] * a.unsqueeze(-1) + right[0] * b.unsqueeze(-1),
        m,
        left[2] * a + right[2] * b,
    )
