"""The training log: a JSON file beside the weights that says how they came about."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch


class Log:
    """The record of a run: losses and accuracies, with the step, tokens and minutes so far."""

    def __init__(self, **record: object) -> None:
        self.started = time.monotonic()
        self.record = record | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        self.samples: list[dict[str, float]] = []
        self.steps = self.tokens = 0

    def minutes(self) -> float:
        """Return the minutes since the run began."""
        return (time.monotonic() - self.started) / 60

    def sample(self, **values: float) -> None:
        """Record and print values at the present step."""
        place = {"step": self.steps, "tokens": self.tokens, "minutes": round(self.minutes(), 2)}
        self.samples.append(place | {name: round(value, 4) for name, value in values.items()})
        print(json.dumps(self.samples[-1]), flush=True)

    def save(self, path: Path, **more: object) -> None:
        """Write the record as JSON."""
        run = {"steps": self.steps, "tokens": self.tokens, "minutes": round(self.minutes(), 2)}
        path.write_text(
            json.dumps({**self.record, **run, **more, "samples": self.samples}, indent=1) + "\n"
        )
