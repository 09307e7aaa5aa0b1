"""Everything that touches transformers: cache, attention function, probe, fingerprint, wrap()."""

from chunkcache.hf.model import CachedModel, wrap
from chunkcache.hf.probe import verify

__all__ = ["CachedModel", "verify", "wrap"]
