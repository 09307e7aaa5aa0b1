"""What the KV of a model costs: arithmetic on what one sequence keeps. Imports no torch.

A layer keeps rows that grow with the tokens (for all of them, for a window, or one row for several
tokens), states of a constant size, or nothing. `Piece` is one of these for several equal layers, and
every number of a plan follows from the pieces. Where they come from: chunkcache.hf.plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

KINDS = {
    "full": "full attention",
    "latent": "latent attention",
    "sliding": "sliding window",
    "chunked": "chunked window",
    "compressed": "compressed attention",
    "index": "index of sparse attention",
    "state": "recurrent, convolution state",
    "cross": "cross attention",
    "shared": "reads another layer's KV",
    "none": "no attention",
    "unknown": "cost not known",
}


@dataclass(frozen=True)
class Piece:
    """What each of some equal layers keeps for one sequence.

    Attributes:
        kind: a key of KINDS. Rows of "cross" grow with encoder tokens, all others with tokens.
        layers: how many layers keep it.
        dtype: number type, as "float16".
        row_bytes: bytes of one row, per layer.
        stride: tokens per row.
        limit: the most rows that are kept; None if all are.
        fixed_bytes: bytes that do not depend on the length, per layer.
        kv_heads: heads in a row; 0 where a row has none.
        head_width: numbers in the key and the value of one head together.
    """

    kind: str
    layers: int
    dtype: str
    row_bytes: int = 0
    stride: int = 1
    limit: int | None = None
    fixed_bytes: int = 0
    kv_heads: int = 0
    head_width: int = 0

    def bytes_at(self, tokens: int) -> int:
        """Bytes in all these layers after so many tokens.

        >>> Piece("sliding", 2, "float16", row_bytes=10, limit=7).bytes_at(100)
        140
        """
        rows = tokens // self.stride  # buffers of a row not complete yet are fixed bytes
        kept = rows if self.limit is None else min(rows, self.limit)
        return self.layers * (self.row_bytes * kept + self.fixed_bytes)

    @property
    def token_bytes(self) -> float:
        """Bytes in all these layers that one more token adds before a window is full."""
        found, rest = divmod(self.layers * self.row_bytes, self.stride)
        return found + rest / self.stride if rest else found

    def to_dict(self) -> dict[str, Any]:
        """All fields, the bytes of all layers together, and the kind in words."""
        sums = {
            "name": KINDS[self.kind],
            "token_bytes": self.token_bytes,
            "sequence_bytes": self.layers * self.fixed_bytes,
        }
        return asdict(self) | sums


@dataclass(frozen=True)
class Sessions:
    """How many sessions a budget holds, each of `shared + private` tokens.

    Attributes:
        alone: sessions that keep all their KV themselves.
        sharing: sessions that share the KV of the first `shared` tokens, stored once.
        alone_bytes: bytes of one session that shares nothing.
        common_bytes: bytes of the shared prefix.
        own_bytes: bytes of one session beside the shared prefix.
    """

    budget: int
    shared: int
    private: int
    alone: int
    sharing: int
    alone_bytes: int
    common_bytes: int
    own_bytes: int

    @property
    def factor(self) -> float | None:
        """Sessions with sharing per session without; None where not even one fits without."""
        return self.sharing / self.alone if self.alone else None

    def to_dict(self) -> dict[str, Any]:
        """All fields and the factor."""
        return asdict(self) | {"factor": self.factor}


@dataclass(frozen=True)
class Plan:
    """The KV of one model.

    Attributes:
        model_type: as transformers calls it.
        method: "observed" on a run without weights, or "configuration".
        reason: why it could not be observed; empty if it was.
        dtype: number type of the model.
        dtype_source: "asked for", "configuration" or "assumed".
        pieces: what the layers keep.
        heads: query heads per layer; 0 if the model has none or they differ.
        mha_token_bytes: bytes per token of plain multi-head attention with the same heads in the
            same layers; 0 without heads.
        positions: tokens the model was built for; None if it names no limit.
    """

    model_type: str
    method: str
    reason: str
    dtype: str
    dtype_source: str
    pieces: tuple[Piece, ...]
    heads: int
    mha_token_bytes: int
    positions: int | None

    @property
    def token_bytes(self) -> float:
        """Bytes that one more token adds while no window is full."""
        return sum(piece.token_bytes for piece in self._growing())

    @property
    def late_token_bytes(self) -> float:
        """Bytes that one more token adds once all windows are full."""
        return sum(piece.token_bytes for piece in self._growing() if piece.limit is None)

    @property
    def state_bytes(self) -> int:
        """Bytes per sequence that do not depend on its length: one snapshot of all states."""
        return sum(piece.layers * piece.fixed_bytes for piece in self.pieces)

    @property
    def encoder_token_bytes(self) -> float:
        """Bytes per token of the encoder's input."""
        return sum(piece.token_bytes for piece in self.pieces if piece.kind == "cross")

    @property
    def complete(self) -> bool:
        """Whether the cost of every layer is known; if not, all sums are lower bounds."""
        return all(piece.kind != "unknown" for piece in self.pieces)

    @property
    def factor(self) -> float | None:
        """How many times less a token takes than with plain multi-head attention."""
        known = self.mha_token_bytes and self.token_bytes
        return self.mha_token_bytes / self.token_bytes if known else None

    def _growing(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.kind != "cross"]

    def bytes_at(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Bytes of one sequence."""
        return sum(
            piece.bytes_at(encoder_tokens if piece.kind == "cross" else tokens)
            for piece in self.pieces
        )

    def mha_bytes_at(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Bytes of one sequence with plain multi-head attention; 0 without heads."""
        crossed = [piece for piece in self.pieces if piece.kind == "cross"]
        own = self.mha_token_bytes * tokens
        return own and own + sum(piece.bytes_at(encoder_tokens) for piece in crossed)

    def sessions(self, budget: int, shared: int, private: int, encoder_tokens: int = 0) -> Sessions:
        """How many sessions fit a budget in bytes.

        A window that reaches back into the shared prefix reads it there. A snapshot of the states
        is kept at the end of the prefix, and every session has states of its own. Encoder KV
        belongs to the prefix, since the decoder's KV depends on the encoder's input.

        Raises:
            ValueError: a negative number, or no private token.
        """
        if min(budget, shared, encoder_tokens) < 0 or private < 1:
            raise ValueError("sessions have at least one token of their own, and no number below 0")
        alone = self.bytes_at(shared + private, encoder_tokens)
        common = self.bytes_at(shared, encoder_tokens) if shared else 0
        own = self.bytes_at(private) if shared else alone
        return Sessions(
            budget=budget,
            shared=shared,
            private=private,
            alone=budget // alone,
            sharing=max(0, (budget - common) // own),
            alone_bytes=alone,
            common_bytes=common,
            own_bytes=own,
        )

    @property
    def attention(self) -> str:
        """MHA, GQA, MQA, MLA, or recurrent for a model that keeps states only."""
        if any(piece.kind == "latent" for piece in self.pieces):
            return "MLA"
        groups = self.groups
        if not groups:
            return "recurrent" if self.state_bytes else "unknown"
        if self.heads and groups == (self.heads,):
            return "MHA"
        return "MQA" if groups == (1,) else "GQA"

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of KV heads that layers have, each once."""
        held = {p.kv_heads for p in self.pieces if p.kv_heads and p.kind not in ("cross", "latent")}
        return tuple(sorted(held))

    @property
    def traits(self) -> tuple[str, ...]:
        """What else saves memory, in words."""
        kinds = {piece.kind for piece in self.pieces}
        names = {
            "sliding": "sliding windows",
            "chunked": "chunked windows",
            "compressed": "compressed rows",
            "index": "sparse",
            "shared": "shared layers",
            "cross": "encoder-decoder",
        }
        found = [name for kind, name in names.items() if kind in kinds]
        hybrid = "state" in kinds and self.token_bytes > 0 and "compressed" not in kinds
        return (*found, *(["hybrid"] if hybrid else []))

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        return {
            "model_type": self.model_type,
            "method": self.method,
            "reason": self.reason,
            "complete": self.complete,
            "dtype": self.dtype,
            "dtype_source": self.dtype_source,
            "attention": self.attention,
            "heads": self.heads,
            "groups": list(self.groups),
            "traits": list(self.traits),
            "positions": self.positions,
            "token_bytes": self.token_bytes,
            "late_token_bytes": self.late_token_bytes,
            "state_bytes": self.state_bytes,
            "encoder_token_bytes": self.encoder_token_bytes,
            "mha_token_bytes": self.mha_token_bytes,
            "factor": self.factor,
            "kinds": [piece.to_dict() for piece in self.pieces],
        }


def merge(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Equal pieces as one with their layers together, in the order of KINDS."""
    counts: dict[Piece, int] = {}
    for piece in pieces:
        key = replace(piece, layers=0)
        counts[key] = counts.get(key, 0) + piece.layers
    merged = [replace(key, layers=layers) for key, layers in counts.items()]
    order = list(KINDS)
    return tuple(sorted(merged, key=lambda piece: order.index(piece.kind)))
