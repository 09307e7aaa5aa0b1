"""Exact prefix reuse for Hugging Face models.

    cached = chunkcache.wrap(model, tokenizer)
    cached.generate(input_ids, max_new_tokens=32)
    cached.last_reuse, cached.stats()

Names are loaded when first used, so that `chunkcache --help` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "chunkcache.config": ("Config",),
    "chunkcache.hf": ("CachedModel", "verify", "wrap"),
    "chunkcache.lab": ("Recorder", "Reuse", "Stats", "TreeRow", "VerifyReport"),
    "chunkcache.errors": (
        "AdapterStateError",
        "AlreadyWrappedError",
        "AttentionMaskError",
        "ChunkcacheError",
        "ClosedError",
        "ConfigError",
        "CorruptValueError",
        "EmptyPromptError",
        "InvalidTokensError",
        "ModelChangedError",
        "ModelStateError",
        "OtherFormatError",
        "PoolExhaustedError",
        "PromptError",
        "PromptTooLongError",
        "QueueFullError",
        "TraceError",
        "ReleasedLeaseError",
        "RunLengthError",
        "StoreDownError",
        "StoreError",
        "StoreFullError",
        "TrainingModeError",
        "UnsupportedModelError",
        "UnsupportedRequestError",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from chunkcache.config import Config as Config
    from chunkcache.errors import *  # noqa: F403
    from chunkcache.hf import CachedModel as CachedModel
    from chunkcache.hf import verify as verify
    from chunkcache.hf import wrap as wrap
    from chunkcache.lab import Recorder as Recorder
    from chunkcache.lab import Reuse as Reuse
    from chunkcache.lab import Stats as Stats
    from chunkcache.lab import TreeRow as TreeRow
    from chunkcache.lab import VerifyReport as VerifyReport


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
