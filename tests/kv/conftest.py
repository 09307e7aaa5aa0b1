"""Stores of every kind for tests of what lies in them."""

from tests.stores.kinds import make, nodes, sentinels, server

__all__ = ["make", "nodes", "sentinels", "server"]
