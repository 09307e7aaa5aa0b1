"""The obviously right attention: one softmax over everything a row sees, in any float type.

Slow and plain; the tests' oracle for `two_phase`, and the meaning of its arguments.
"""

from __future__ import annotations

import torch

from chunkcache.attention.rule import Rule


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rule: Rule,
) -> torch.Tensor:
    """Causal attention of one sequence.

    Args:
        query: `[query_heads, tokens, dim]` at `positions`.
        keys, values: `[heads, length, dim]` for positions 0 .. length - 1; query_heads is a
            multiple of heads. Of a latent layer values are `keys[..., :value_dim]`.
        positions: `[tokens]` of the queries.

    Returns:
        `[tokens, query_heads, value_dim]`.
    """
    folded = query.shape[0] // keys.shape[0]
    keys = keys.repeat_interleave(folded, 0)
    values = values.repeat_interleave(folded, 0)
    scores = query @ keys.transpose(1, 2) * rule.scaling
    if rule.softcap is not None:
        scores = (scores / rule.softcap).tanh() * rule.softcap
    at = torch.arange(keys.shape[1], device=keys.device)
    scores = scores.masked_fill(_hidden(at, positions.unsqueeze(1), rule), -torch.inf)
    if rule.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = rule.sinks.to(scores).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ values).transpose(0, 1)


def _hidden(key: torch.Tensor, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Which keys (by position) a query at a position does not see."""
    hidden = key > query
    if rule.window is not None:
        hidden = hidden | (key <= query - rule.window)
    if rule.span is not None:
        hidden = hidden | (key // rule.span != query // rule.span)
    return hidden


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
