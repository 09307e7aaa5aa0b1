"""What a wrapper tells of itself: the half of CachedModel that only reads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chunkcache.config import Config
from chunkcache.errors import TraceError
from chunkcache.hf.ledger import Ledger, tree_rows
from chunkcache.hf.probe import Proof
from chunkcache.hf.state import ModelState
from chunkcache.hf.tracing import Tracing
from chunkcache.kv.store import PrefixStore
from chunkcache.lab.analysis.making import make_report
from chunkcache.lab.analysis.report import Report
from chunkcache.lab.records import Divergence, Reuse, Stats, TreeRows
from chunkcache.lab.traces.trace import Trace


class Insight:
    """Records, sums, reports and the stored prefixes. Thread-safe."""

    model: Any
    tokenizer: Any
    settings: Config
    _ledger: Ledger
    _state: ModelState
    _tracing: Tracing

    @property
    def store(self) -> PrefixStore:
        """Everything that is stored."""
        return self._state.store

    @property
    def proof(self) -> Proof:
        """What was proved for the model as the last request found it."""
        return self._state.proof

    @property
    def last_reuse(self) -> list[Reuse]:
        """A record per prompt of this thread's last generate(), else of anybody's last."""
        return self._ledger.last

    def explain(self) -> list[Divergence]:
        """Where the prompts of this thread's last generate() left what was stored, with the text there."""
        return [
            Divergence(reuse, *map(self._shown, (around.before, around.stored, around.prompt)))
            for reuse, around in self._ledger.seen
        ]

    def stats(self) -> Stats:
        """Sums since wrap() and what is stored now."""
        kind, decisions = str(self.model.config.model_type), self._state.decisions
        tiers = self._state.tiers
        return self._ledger.stats(kind, self.settings, self.proof, self.store, decisions, tiers)

    def report(self, price: float | None = None, cached_price: float = 0.0) -> Report:
        """What the cache did with the last prompts, and what another size would do.

        As far back as `Config.history_bytes` reaches; see `lab.analysis.report` and docs/reports.md.

        Args:
            price, cached_price: of a million tokens of prompts, computed and reused.

        Raises:
            TraceError: there was no prompt yet.
        """
        history = self.history()
        if b'"input_length"' not in history:
            raise TraceError("there is nothing to report: no prompt has ended yet")
        with TemporaryDirectory() as folder:
            path = Path(folder, "history")
            path.write_bytes(history)
            name = str(self.model.config.model_type)
            return make_report(name, Trace(path), price=price, cached_price=cached_price)

    def history(self) -> bytes:
        """The last prompts as a trace of salted hashes, a line each."""
        return self._tracing.history.to_bytes()

    def tree_rows(self) -> TreeRows:
        """The stored prefixes, depth first: a list that a notebook shows as a picture and a table."""
        size = self.store.layout.token_bytes
        trees = self.store.trees()
        return TreeRows(row for tree in trees for row in tree_rows(tree, size, self._snippet))

    def _snippet(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids)) if self.tokenizer is not None else ""

    def _shown(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self._snippet(ids)
