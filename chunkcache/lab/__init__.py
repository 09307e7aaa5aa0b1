"""What was reused and why not: records, statistics, reports and views. Imports no torch."""

from chunkcache.lab.recorder import Recorder
from chunkcache.lab.records import Reuse, Stats, TreeRow, VerifyReport

__all__ = ["Recorder", "Reuse", "Stats", "TreeRow", "VerifyReport"]
