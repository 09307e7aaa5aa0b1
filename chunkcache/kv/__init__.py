"""Chunks of KV in memory: their layout, the pool that holds them, the private tails of requests."""

from chunkcache.kv.arena import Arena
from chunkcache.kv.layout import ChunkLayout, LayerShape
from chunkcache.kv.pool import Pool, PoolRun

__all__ = ["Arena", "ChunkLayout", "LayerShape", "Pool", "PoolRun"]
