"""Recording requests as they end. A trace that cannot be written costs no request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from time import time

from chunkcache.errors import TraceError
from chunkcache.hf.prefill import Row
from chunkcache.lab.recorder import Recorder

_log = logging.getLogger(__name__)


class Tracing:
    """Adds the prompts of one wrapper to a trace. Thread-safe.

    Args:
        trace: a recorder, which stays open, or a file for token ids.
        tenant: whose prompts they are.

    Raises:
        TraceError: the file cannot be written.
    """

    def __init__(self, trace: Recorder | Path | str, tenant: str):
        self._own = not isinstance(trace, Recorder)
        self._recorder = trace if isinstance(trace, Recorder) else Recorder(Path(trace))
        self._tenant = tenant
        self._works = True

    def note(
        self, rows: Sequence[Row], answers: Sequence[Sequence[int]], counts: list[int]
    ) -> None:
        """Adds prompts that were answered.

        Args:
            answers: what was stored behind each; counts: tokens generated for each.
        """
        if not self._works:
            return
        try:
            for row, answer, count in zip(rows, answers, counts, strict=True):
                self._recorder.write(
                    row.tokens,
                    answer,
                    time=time(),  # of the day: processes go on with each other's traces
                    output=count,
                    prompt=row.names[0] if row.names else "",
                    tenant=self._tenant,
                    reuse=row.reuse.to_dict(),
                )
        except TraceError as error:
            self._works = False
            _log.warning("nothing is recorded any more: %s", error)

    def close(self) -> None:
        """Ends the trace, if nobody else has it."""
        self._works = False
        if self._own:
            self._recorder.close()
