"""One job through generate(): rows, padding, seeds, stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from chunkcache.engine.jobs import Answer, Delta, Job, Result
from chunkcache.engine.text import Row
from chunkcache.lab.records import Reuse

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel


class Watch:
    """A stopping criterion that reads each new token, hands on its text and decides who has ended.

    Criteria see a token before streamers do (transformers 5.23), and decide row by row, so one
    object serves both ends. It need not subclass transformers' base class, which only names
    `__call__`.
    """

    def __init__(self, job: Job, rows: Sequence[Row], first_row: int):
        self._job = job
        self._rows = rows
        self._first_row = first_row
        self.first_token_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """`input_ids` is [rows, tokens so far]; returns bool [rows], true where a row has ended."""
        if self.first_token_at is None:
            self.first_token_at = perf_counter()
        for number, (row, token) in enumerate(
            zip(self._rows, input_ids[:, -1].tolist(), strict=True)
        ):
            if row.finish_reason is None:
                self._tell(number, row.push(token))
        ended = [self._job.cancelled or row.finish_reason is not None for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)

    def finish(self) -> None:
        """generate() has returned: rows still open have reached their length."""
        for number, row in enumerate(self._rows):
            if row.finish_reason is None:
                self._tell(number, row.finish("length"))

    def _tell(self, number: int, text: str) -> None:
        reason = self._rows[number].finish_reason
        if (text or reason) and not self._job.cancelled:
            self._job.listener(Delta(self._first_row + number, text, reason))


def run_job(cached: CachedModel, job: Job, rows_at_once: int) -> Result:
    """Answer all prompts of a job, `rows_at_once` rows in one batch; stop early if it is cancelled.

    Raises:
        ChunkcacheError: as generate() does.
    """
    prompts = [prompt for prompt in job.prompts for _ in range(job.n)]
    answers: list[Answer] = []
    reuse: list[Reuse] = []
    first_token_at: float | None = None
    with _seeded(job.sampling.seed, cached.model.device):
        for first in range(0, len(prompts), rows_at_once):
            watch, rows = _run_rows(cached, job, prompts[first : first + rows_at_once], first)
            answers += [Answer(row.text, row.tokens, row.finish_reason or "length") for row in rows]
            reuse += cached.last_reuse
            first_token_at = first_token_at or watch.first_token_at
            if job.cancelled:
                break
    seconds = (first_token_at or perf_counter()) - job.submitted
    return Result(tuple(answers), tuple(reuse[:: job.n]), seconds)


def _run_rows(
    cached: CachedModel, job: Job, prompts: list[list[int]], first_row: int
) -> tuple[Watch, list[Row]]:
    config = cached.model.generation_config
    ends = () if job.sampling.ignore_eos else _listed(config.eos_token_id)
    rows = [Row(cached.tokenizer, job.sampling.stop, ends) for _ in prompts]
    watch = Watch(job, rows, first_row)
    pad = next(iter((*_listed(config.pad_token_id), *_listed(config.eos_token_id), 0)))
    ids, mask = left_pad(prompts, pad)
    cached.generate(
        ids.to(cached.model.device),
        attention_mask=mask.to(cached.model.device),
        stopping_criteria=[watch],
        pad_token_id=pad,
        num_beams=1,
        num_return_sequences=1,
        **job.sampling.arguments(config.top_k),
    )
    watch.finish()
    return watch, rows


def left_pad(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both int64 [prompts, longest prompt], with the padding on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample from `seed`, and leave the random state to others as it was found."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _listed(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
