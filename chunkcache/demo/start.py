"""Starting weights from which recall is near: heads that look back, and heads that match.

The two-layer circuit that copies from a prompt ("induction heads", Olsson et al. 2022) took under
two minutes to appear from these weights. Two runs from ordinary random ones showed no recall after
2.5 and 3.1 million tokens, but at a Muon rate of 0.01 where this one had 0.003: not a clean
comparison, so how much the start contributes is not known. Here the first layer starts with heads
that attend 1, 2 and 3 tokens back, and the later layers with heads whose queries and keys
compare the last tokens here with the tokens before a place there, and whose values carry a token
onward. This is initialisation by structure in the manner of "mimetic initialization" (Trockman and
Kolter 2023); training moves every weight.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

CONSTANT = 0  # residual dimension that starts equal in all embeddings: heads of position read it
REACH = 3
_MIXED = 0.3  # share of the ordinary random weights kept under the structure


def set_start(model: LlamaForCausalLM) -> None:
    """Overwrite attention weights and embeddings of a model, from torch's random state."""
    config = model.config
    width = config.hidden_size
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_(std=0.05)
        embedding[:, CONSTANT] = 0.2
        spaces = _orthonormal((REACH + 1) * config.head_dim, width)
        read, *writes = spaces.reshape(REACH + 1, config.head_dim, width)
        for weight in _inner(model):
            weight.mul_(_MIXED)
        _look_back(model, read, writes)
        for layer in range(1, config.num_hidden_layers):
            _match(model, layer, read, writes)


def _inner(model: LlamaForCausalLM) -> list[torch.Tensor]:
    layers = model.model.layers
    projections = [p for layer in layers for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    return [projection.weight for projection in projections]


def _look_back(model: LlamaForCausalLM, read: torch.Tensor, writes: list[torch.Tensor]) -> None:
    """Let query head h of the first layer attend h + 1 tokens back.

    It copies what `read` sees there to where `writes[h]` points.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    half = size // 2
    speed = model.model.rotary_emb.inv_freq
    strength = 3.0 * torch.exp(-0.35 * torch.arange(half))
    for head in range(REACH):
        q, k = _head(attention.q_proj, head, size), _head(attention.k_proj, head // group, size)
        turn = (head + 1) * speed
        # After rotation the score is a sum of strength^2 cos((distance - reach) speed): its peak is
        # at that distance.
        k[:, CONSTANT] = torch.cat([strength, torch.zeros(half)])
        q[:, CONSTANT] = torch.cat([strength * turn.cos(), -strength * turn.sin()])
        _head(attention.v_proj, head // group, size).copy_(read)
        attention.o_proj.weight[:, head * size : (head + 1) * size] = writes[head].T * 0.15


def _match(
    model: LlamaForCausalLM, layer: int, read: torch.Tensor, writes: list[torch.Tensor]
) -> None:
    """Let the heads of a later layer find places preceded by the tokens that end here.

    They pass on the token at the place found.
    """
    attention, config = model.model.layers[layer].self_attn, model.config
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    # Only dimensions that RoPE hardly turns within a prompt can compare content at any distance.
    slow = (model.model.rotary_emb.inv_freq < 0.02).repeat(2).float()[:, None]
    for pair in range(config.num_key_value_heads):
        spread = [slow * _orthonormal(size, size) for _ in range(REACH)]
        here, there = [read, *writes[:-1]], writes
        k = sum(mix @ part for mix, part in zip(spread, there, strict=True))
        q = sum(mix @ part for mix, part in zip(spread, here, strict=True))
        _head(attention.k_proj, pair, size).add_(k)
        carried = _orthonormal(size, config.hidden_size)
        _head(attention.v_proj, pair, size).copy_(carried)
        for head in range(pair * group, (pair + 1) * group):
            _head(attention.q_proj, head, size).add_(q)
            attention.o_proj.weight[:, head * size : (head + 1) * size] = carried.T * 0.1


def _head(projection: torch.nn.Linear, head: int, size: int) -> torch.Tensor:
    return projection.weight[head * size : (head + 1) * size]


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Return a random (rows, columns) matrix with orthonormal rows."""
    basis: torch.Tensor = torch.linalg.qr(torch.randn(columns, rows)).Q
    return basis.T
