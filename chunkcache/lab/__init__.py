"""What was reused and why not: records, statistics, reports and views. Imports no torch."""

from chunkcache.lab.records import Reuse, Stats, TreeRow, VerifyReport
from chunkcache.lab.traces.recorder import Recorder

__all__ = ["Recorder", "Reuse", "Stats", "TreeRow", "VerifyReport"]
