"""The prefix tree: keys, nodes, leases, snapshots, eviction policies. Imports no torch."""

from chunkcache.errors import InvalidTokensError
from chunkcache.tree.keys import TOKEN_BYTES, Packed, common_prefix, pack, unpack
from chunkcache.tree.lease import Lease
from chunkcache.tree.named import POLICIES, named_policy
from chunkcache.tree.node import NEVER, Inserted, Match, Miss, Node, Piece, Run
from chunkcache.tree.order import LeafOrder
from chunkcache.tree.policies import GDLF, LFU, LRU, PGDSF, TTL, Policy, Priority
from chunkcache.tree.prefix_tree import PrefixTree
from chunkcache.tree.queues import ARC, S3FIFO, SLRU, TwoQueues
from chunkcache.tree.snapshots import Resume, Snapshot, SnapshotOrder

__all__ = [
    "ARC",
    "GDLF",
    "LFU",
    "LRU",
    "NEVER",
    "PGDSF",
    "POLICIES",
    "S3FIFO",
    "SLRU",
    "TOKEN_BYTES",
    "TTL",
    "Inserted",
    "InvalidTokensError",
    "LeafOrder",
    "Lease",
    "Match",
    "Miss",
    "Node",
    "Packed",
    "Piece",
    "Policy",
    "PrefixTree",
    "Priority",
    "Resume",
    "Run",
    "Snapshot",
    "SnapshotOrder",
    "TwoQueues",
    "common_prefix",
    "named_policy",
    "pack",
    "unpack",
]
