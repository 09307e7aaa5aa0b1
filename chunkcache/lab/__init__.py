"""What was reused and why not: records, statistics, reports and views. Imports no torch."""

from chunkcache.lab.records import Reuse, Stats, TreeRow, VerifyReport

__all__ = ["Reuse", "Stats", "TreeRow", "VerifyReport"]
