"""Train the demo model from nothing: `python -m chunkcache.demo.train --minutes 27 --seed 1`.

What makes recall from the prompt appear within a minute on two cores: starting weights that nearly
do it (`start.py`; from ordinary ones, two to three million tokens did not bring it about, nor did
sequences of repeated random tokens), prompts that grow from a few facts to hundreds, conversations
that ask about many facts, and a loss on answers only. The schedule follows the clock, so the seed
fixes the initial weights and the order of the data, while the number of steps depends on the
machine; the log records it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from chunkcache.demo import dialogues, model_path
from chunkcache.demo.build import MAX_LENGTH, VOCAB_SIZE, make_model, save
from chunkcache.demo.evaluate import report, teacher_forced_accuracy
from chunkcache.demo.log import Log
from chunkcache.demo.tokenizer import train_tokenizer


class Phase(NamedTuple):
    """A stretch of training on one shape of sequences, up to the share `until` of the time."""

    until: float
    rows: int
    length: int
    fact_tokens: tuple[int, int]


PHASES = (
    Phase(0.08, 12, 256, (30, 90)),
    Phase(0.25, 8, 512, (40, 220)),
    Phase(0.45, 6, 1024, (100, 620)),
    Phase(0.75, 4, 2048, (300, 1500)),
    Phase(1.0, 2, 3584, (1200, 3100)),
)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(
            inner, lr=0.003, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=0.002, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, progress: float) -> float:
    """Return the factor on the learning rates.

    It warms up for 50 steps, stays level, and falls along a cosine from 40 % of the time on.
    """
    warm = min(1.0, (step + 1) / 50)
    decay = max(0.0, (progress - 0.4) / 0.6)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(decay, 1.0))))


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the labelled tokens, which alone get logits.

    `ids` and `labels` are (rows, length).
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != dialogues.IGNORED
        logits = model.lm_head(hidden[wanted])
    return cross_entropy(logits.float(), labels[:, 1:][wanted])


def train(minutes: float, seed: int, out: Path) -> None:
    """Train tokenizer and model and save both, with the log, to `out`.

    Every twentieth of the time the unfinished model is saved there too.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(VOCAB_SIZE, MAX_LENGTH)
    model = make_model(tokenizer)
    log = Log(
        seed=seed,
        minutes_planned=minutes,
        params=model.num_parameters(),
        config=model.config.to_diff_dict(),
        phases=[phase._asdict() for phase in PHASES],
    )
    steppers = optimizers(model)
    bases = [stepper.param_groups[0]["lr"] for stepper in steppers]
    losses: list[float] = []
    checks = _every(minutes / 20)
    while (progress := log.minutes() / minutes) < 1.0:
        phase = next(phase for phase in PHASES if progress < phase.until)
        ids, labels = dialogues.batch(tokenizer, rng, phase.rows, phase.length, phase.fact_tokens)
        loss = answer_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, base in zip(steppers, bases, strict=True):
            stepper.param_groups[0]["lr"] = base * rate(log.steps, progress)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(loss.item())
        log.steps += 1
        log.tokens += ids.numel()
        if log.steps % 20 == 0:
            log.sample(loss=sum(losses[-20:]) / 20)
        if checks(log.minutes()):
            log.sample(**quick_check(model, tokenizer, phase))
            save(model, tokenizer, out)
            log.save(out / "training_log.json")
    save(model, tokenizer, out)
    log.save(out / "training_log.json")
    model.eval()
    log.save(out / "training_log.json", accuracy=report(model, tokenizer, 6, 10))


def quick_check(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase
) -> dict[str, float]:
    """Return teacher-forced accuracies on held-out shops, at sizes that the phase has reached."""
    model.eval()
    sizes = [size for size in (128, 512, 2048) if size == 128 or size <= 2 * phase.fact_tokens[1]]
    result = {
        f"accuracy_{size}": teacher_forced_accuracy(model, tokenizer, size, 4, 20) for size in sizes
    }
    model.train()
    return result


def _every(interval: float) -> Callable[[float], bool]:
    """Return a function of the time that is true once per interval."""
    due = interval

    def check(now: float) -> bool:
        nonlocal due
        if now < due:
            return False
        due = now + interval
        return True

    return check


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument(
        "--minutes", type=float, default=27.0, help="length of the run, measurement not counted"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=model_path(), help="folder to write model, tokenizer and log to"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.minutes, options.seed, options.out)


if __name__ == "__main__":
    main()
