"""The records that requests leave behind, and their sums."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reuse:
    """What one prompt found in the cache.

    Attributes:
        prompt_tokens: length of the prompt, without padding.
        cached_tokens: tokens whose KV was reused instead of computed.
        tiers: cached tokens by where they lay; the values sum up to `cached_tokens`.
        divergence: index of the first token that differs from what is stored; None if all that may
            be reused is stored (the last token is always computed, since its logits are needed).
        reason: why reuse ended there, in words.
    """

    prompt_tokens: int
    cached_tokens: int
    tiers: dict[str, int]
    divergence: int | None
    reason: str

    @property
    def computed_tokens(self) -> int:
        """Tokens that had to be prefilled."""
        return self.prompt_tokens - self.cached_tokens

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """Where one prompt left what is stored, in text; without a tokenizer in ids.

    Attributes:
        reuse: what was found until there.
        before: the tokens that matched last; stored: what would have matched next, empty if nothing is
            stored there; prompt: what the prompt has instead.
    """

    reuse: Reuse
    before: str
    stored: str
    prompt: str

    def __str__(self) -> str:
        if self.reuse.divergence is None:
            return f"all {self.reuse.prompt_tokens:,} tokens were known but the last one"
        where = f"token {self.reuse.divergence + 1:,} of {self.reuse.prompt_tokens:,}"
        lines = [f"{where}: {self.reuse.reason}", f"  before:  {self.before!r}"]
        if self.stored:
            lines.append(f"  stored:  {self.stored!r}")
        return "\n".join([*lines, f"  prompt:  {self.prompt!r}"])

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Stats:
    """Sums since wrap(); token-weighted unless a name says otherwise.

    Attributes:
        requests: prompts run (rows of a batch count singly).
        prompt_tokens, cached_tokens: over all prompts.
        generated_tokens: tokens decoded.
        miss_tokens: tokens computed, by the reason of the miss.
        named: per preloaded prompt: requests that used it and tokens they reused.
        chunks, bytes: stored now; capacity_bytes: the budget.
        unleased, leased, pinned chunks: see `free + leased + evictable == total` in docs.
        tail_bytes: private KV of the requests running now.
        evicted_chunks, stored_chunks, refused_chunks: stored_chunks were new, refused_chunks found
            no room although everything evictable had left.
        phase_one, phase_one_refused: shared runs attended to by several rows in one product, and
            those the gate left to single rows.
        snapshots, snapshot_bytes: states stored now, of models that need them, and their budget and
            flow, which are apart from those of chunks.
        stores: values that moved between the device and colder tiers, and calls of each kind of store;
            empty without any.
        tenant: whose prompts these are; tiers: reused tokens by where they lay.
        token_seconds: that computing a token takes, by what requests took (see `pace.Pace`).
        exactness: "bit-exact rows", "bit-exact at borders" or "within tolerance".
        kernel: what computes attention.
    """

    model: str
    mode: str
    exactness: str
    kernel: str
    tier: str
    chunk_size: int
    token_bytes: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    miss_tokens: dict[str, int]
    named: dict[str, dict[str, int]]
    nodes: int
    chunks: int
    bytes: int
    capacity_bytes: int
    leased_chunks: int
    pinned_chunks: int
    evictable_chunks: int
    tail_bytes: int
    stored_chunks: int
    evicted_chunks: int
    refused_chunks: int
    phase_one: int
    phase_one_refused: int
    snapshots: int = 0
    snapshot_bytes: int = 0
    snapshot_capacity_bytes: int = 0
    stored_snapshots: int = 0
    evicted_snapshots: int = 0
    refused_snapshots: int = 0
    stores: dict[str, Any] = field(default_factory=dict)
    tenant: str = ""
    tiers: dict[str, int] = field(default_factory=dict)
    token_seconds: float | None = None

    @property
    def saved_seconds(self) -> float | None:
        """What computing the reused tokens would have taken; None before any token was computed."""
        return None if self.token_seconds is None else self.cached_tokens * self.token_seconds

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens / prompt tokens; 0 before the first prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, the hit rate and the seconds saved, for JSON."""
        more = {"hit_rate": self.hit_rate, "saved_seconds": self.saved_seconds}
        return asdict(self) | more

    def __str__(self) -> str:
        from chunkcache.lab.views.stats import report
        from chunkcache.lab.views.tables import plain

        return plain(report(self.to_dict()))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key.replace('_', ' '))}</th>"
            f"<td>{html.escape(_plain(value))}</td></tr>"
            for key, value in self.to_dict().items()
        )
        return f"<table>{rows}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)


@dataclass(frozen=True)
class TreeRow:
    """One node of the prefix tree, as shown to people; rows come depth first.

    Attributes:
        depth: 0 for prefixes that begin a prompt.
        start, tokens: position of the first token, and how many the node holds.
        hits: prompts that reused the node; idle: seconds since the last use.
        text: the beginning of the node, decoded; empty without a tokenizer. Siblings begin alike up to
            somewhere inside a chunk; most of what is alike is left out: `skipped` tokens.
        snapshots, snapshot_bytes: states that lie in it.
        hit_tokens: tokens of the node that prompts reused, summed over the prompts.
    """

    depth: int
    start: int
    tokens: int
    bytes: int
    hits: int
    idle: float
    pinned: bool
    leases: int
    names: tuple[str, ...]
    tier: str
    text: str
    snapshots: int = 0
    snapshot_bytes: int = 0
    skipped: int = 0
    hit_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


class TreeRows(list[TreeRow]):
    """A list of rows, depth first; a notebook shows it as a picture with a table under it."""

    def _repr_html_(self) -> str:
        from chunkcache.lab.views.icicle import notebook  # only notebooks need it

        return notebook([row.to_dict() for row in self])


TIERS = {
    "A": "two-phase attention over chunks",
    "B": "two-phase attention, and snapshots of states",
    "C": "copies into the model's own cache",
    "D": "copies, and snapshots of states",
    "E": "encoder-decoder: per input of the encoder",
    "F": "refused",
}


@dataclass(frozen=True)
class VerifyReport:
    """What the probe proved for a model.

    Attributes:
        tier: a letter of `TIERS`.
        bit_exact: "rows" (any cut, any batch), "borders" (hit equals cold) or "no".
        max_logit_error: largest difference to the model's own forward; NaN if refused early.
        rows: multiple that the rows of a forward are padded to; 0 where that does not help.
        reason: why not better, or "proved".
        details: among others token_bytes and snapshot_bytes that are stored, the kernel, and for
            better ways that did not prove themselves why.
    """

    model_type: str
    tier: str
    bit_exact: str
    max_logit_error: float
    reason: str
    rows: int = 0
    dtype: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def tier_name(self) -> str:
        """The tier in words."""
        return TIERS[self.tier]

    @property
    def supported(self) -> bool:
        """Whether wrap() accepts the model."""
        return self.tier != "F"

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)
