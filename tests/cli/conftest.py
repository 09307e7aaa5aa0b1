"""Servers of Redis for commands."""

from tests.stores.kinds import server

__all__ = ["server"]
