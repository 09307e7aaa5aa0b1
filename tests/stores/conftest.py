"""Stores of every kind for all tests in this folder."""

from tests.stores.kinds import make, nodes, sentinels, server, store

__all__ = ["make", "nodes", "sentinels", "server", "store"]
