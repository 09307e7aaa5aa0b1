"""The settings, all of them: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chunkcache.errors import ConfigError

_COUNTS = (
    "chunk_size", "two_phase_rows", "two_phase_tokens", "prefill_step", "border", "snapshot_interval",
)  # fmt: skip
_PROMPT, _SHARE = 2048, 4  # tokens whose snapshots may take one part in so many of their budget
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int) -> int:
    """A number of bytes from `"512MiB"`, `"2GB"`, `"1.5g"` or an int.

    >>> parse_bytes("512MiB"), parse_bytes("2GB"), parse_bytes(7)
    (536870912, 2000000000, 7)

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    if not found or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a number of bytes; write for example 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_seconds(text: str | float) -> float:
    """A number of seconds from `"90s"`, `"15m"`, `"1h"`, `"7d"` or a number.

    >>> parse_seconds("1.5h"), parse_seconds("7d"), parse_seconds(2)
    (5400.0, 604800.0, 2.0)

    Raises:
        ConfigError: for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)\s*", str(text).lower())
    if not found or isinstance(text, bool) or not float(found[1]):
        raise ConfigError(f"{text!r} is not a time; write for example 90s, 15m or 7d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@dataclass(frozen=True)
class Config:
    """How a wrapped model stores and reuses KV.

    Attributes:
        mode: "exact" (turning the cache on never changes an answer, bit for bit) or "fast".
        chunk_size: tokens per chunk. A prefix shorter than this is never stored.
        device_bytes: budget of stored chunks on the model's device, as a number or "2GiB". The
            growing tails of running requests are counted in the statistics, not here.
        policy: which chunks leave first: "lru", "lfu", "slru", "2q", "s3fifo", "arc", "pgdsf", "gdlf"
            or "ttl:SECONDS"; docs/policies.md compares them.
        tenant: prompts are shared only inside one tenant; part of the namespace.
        two_phase: let sequences that share chunks attend to them in one product.
        two_phase_rows: the fewest sequences for which that product is formed.
        two_phase_tokens: the fewest shared tokens for which it is formed.
        prefill_step: most tokens of one prefill forward.
        border: where prefill is cut if row invariance does not hold (the fallback of exact mode):
            at its multiples. By default at every chunk; if set, chunks are as long there.
        snapshot_interval: models with recurrent state can be resumed only where a snapshot of it was
            taken: at the end of each prompt, where prompts part, and every so many tokens. By
            default as often as a quarter of their budget allows in a prompt of 2,048 tokens.
        snapshot_bytes: budget of snapshots, out of `device_bytes`; by default half of it.
        exactness: "auto" probes for row invariance; "borders" forces the fallback.
        kernel: of attention and linear layers: "auto" takes the fastest that runs here, "native"
            insists on compiled attention, "torch" avoids compiled code. What differs in the last
            bits shares nothing.
        keep_answers: store the KV of generated tokens too, so that the next turn finds them.
        history_bytes: memory for salted hashes of the last requests, from which reports are made.
        stores: colder tiers, the fastest first: "memory:2GiB", "disk:DIR?budget=20GiB&ttl=7d",
            "redis://HOST:PORT?ttl=1h". What is stored is written to them behind the requests, and read
            where a prompt's match ends (not for encoder-decoders).
    """

    mode: Literal["exact", "fast"] = "exact"
    chunk_size: int = 64
    device_bytes: int | str = 2 * 2**30
    policy: str = "lru"
    tenant: str = ""
    two_phase: bool = True
    two_phase_rows: int = 4
    two_phase_tokens: int = 256
    prefill_step: int = 1024
    border: int | None = None
    snapshot_interval: int | None = None
    snapshot_bytes: int | str | None = None
    exactness: Literal["auto", "borders"] = "auto"
    kernel: Literal["auto", "native", "torch"] = "auto"
    keep_answers: bool = True
    history_bytes: int | str = 16 * 2**20
    stores: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "fast"):
            raise ConfigError(f"mode is {self.mode!r}; it can be 'exact' or 'fast'")
        if self.exactness not in ("auto", "borders"):
            raise ConfigError(f"exactness is {self.exactness!r}; it can be 'auto' or 'borders'")
        if self.kernel not in ("auto", "native", "torch"):
            raise ConfigError(f"kernel is {self.kernel!r}; it can be 'auto', 'native' or 'torch'")
        from chunkcache.tree import named_policy  # numpy takes a while to import

        named_policy(self.policy)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in ("border", "snapshot_interval"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number above 0")
        if self.chunk_size > 1024:
            raise ConfigError(f"chunk_size is {self.chunk_size}; at most 1024 tokens make a chunk")
        if self.cut % self.chunk_size:
            raise ConfigError(
                f"border ({self.border}) must be a multiple of chunk_size ({self.chunk_size})"
            )
        if isinstance(self.stores, str) or not all(isinstance(name, str) for name in self.stores):
            raise ConfigError(f"stores is {self.stores!r}; it must be a list of names")
        object.__setattr__(self, "stores", tuple(self.stores))
        object.__setattr__(self, "device_bytes", parse_bytes(self.device_bytes))
        object.__setattr__(self, "history_bytes", parse_bytes(self.history_bytes))
        if self.snapshot_bytes is not None:
            object.__setattr__(self, "snapshot_bytes", parse_bytes(self.snapshot_bytes))
        if not 0 <= self.snapshot_budget < max(1, self.budget):
            raise ConfigError(
                f"snapshot_bytes is {self.snapshot_budget}, but it is a part of device_bytes "
                f"({self.budget})"
            )

    @property
    def budget(self) -> int:
        """`device_bytes` as a number."""
        return parse_bytes(self.device_bytes)

    @property
    def history_budget(self) -> int:
        """`history_bytes` as a number."""
        return parse_bytes(self.history_bytes)

    @property
    def snapshot_budget(self) -> int:
        """`snapshot_bytes` as a number."""
        return self.budget // 2 if self.snapshot_bytes is None else parse_bytes(self.snapshot_bytes)

    def interval(self, bytes: int) -> int:
        """Tokens between snapshots of so many bytes; a multiple of the border."""
        wanted = self.snapshot_interval
        if wanted is None:
            wanted = _PROMPT * bytes * _SHARE // max(1, self.snapshot_budget)
        return max(1, -(-wanted // self.cut)) * self.cut

    @property
    def cut(self) -> int:
        """Tokens between borders."""
        return self.chunk_size if self.border is None else self.border
