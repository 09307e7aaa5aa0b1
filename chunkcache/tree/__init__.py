"""The prefix tree: keys, nodes, leases, snapshots, eviction policies. Imports no torch."""

from chunkcache.errors import InvalidTokensError
from chunkcache.tree.keys import TOKEN_BYTES, common_prefix, pack, unpack
from chunkcache.tree.lease import Lease
from chunkcache.tree.node import NEVER, Inserted, Match, Miss, Node, Piece, Run
from chunkcache.tree.order import LeafOrder
from chunkcache.tree.policies import LFU, LRU, Policy, Priority
from chunkcache.tree.prefix_tree import PrefixTree
from chunkcache.tree.snapshots import Resume, Snapshot, SnapshotOrder

__all__ = [
    "LFU",
    "LRU",
    "NEVER",
    "TOKEN_BYTES",
    "Inserted",
    "InvalidTokensError",
    "LeafOrder",
    "Lease",
    "Match",
    "Miss",
    "Node",
    "Piece",
    "Policy",
    "PrefixTree",
    "Priority",
    "Resume",
    "Run",
    "Snapshot",
    "SnapshotOrder",
    "common_prefix",
    "pack",
    "unpack",
]
