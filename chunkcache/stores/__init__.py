"""Colder tiers: where values (one per chunk) are kept, by key. Imports no torch."""

from chunkcache.stores.base import Buffer, Key, Store, Stored, StoreStats
from chunkcache.stores.memory import MemoryStore

__all__ = ["Buffer", "Key", "MemoryStore", "Store", "StoreStats", "Stored"]
