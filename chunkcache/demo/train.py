"""Train the demo model, in two runs:

    python -m chunkcache.demo.train --minutes 27 --seed 1 --out first
    python -m chunkcache.demo.train --minutes 14.1 --seed 2 --init first

The first starts from nothing, on prompts that grow from a few facts to hundreds. The second goes on
from it on prompts of all sizes at once, mostly short, with learning rates that fall to zero.

Recall from the prompt appears within two minutes on two cores. What we believe brings it about:
starting weights that nearly do it (`start.py`, with what was and was not compared), the growing
prompts, conversations that ask about many facts, and a loss on answers only; they were not taken
away one at a time. Both schedules follow the clock, so the seed fixes the initial weights and the
order of the data, while the number of steps depends on the machine; the log records it. The first
run of the packaged model was made with an earlier form of the branches' facts, as its log says.
"""

from __future__ import annotations

import argparse
import json
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

LOG_NAME = "training_log.json"


class Shape(NamedTuple):
    """The shape of one batch of conversations, and the tokens of facts that each is about."""

    rows: int
    length: int
    fact_tokens: tuple[int, int]


class Phase(NamedTuple):
    """A stretch of training up to the share `until` of the time, on shapes drawn evenly."""

    until: float
    shapes: tuple[Shape, ...]


class Plan(NamedTuple):
    """A whole run: its phases, and the learning rates and how they rise and fall.

    They rise for `warm_up` steps, are level until the share `level` of the time, and fall to the
    share `floor`.
    """

    phases: tuple[Phase, ...]
    matrix_rate: float
    outer_rate: float
    warm_up: int
    level: float
    floor: float

    def record(self) -> dict[str, object]:
        """Return the plan in plain containers, for the log."""
        phases = [
            {"until": phase.until, "shapes": [shape._asdict() for shape in phase.shapes]}
            for phase in self.phases
        ]
        return self._asdict() | {"phases": phases}


FROM_START = Plan(
    phases=(
        Phase(0.08, (Shape(12, 256, (30, 90)),)),
        Phase(0.25, (Shape(8, 512, (40, 220)),)),
        Phase(0.45, (Shape(6, 1024, (100, 620)),)),
        Phase(0.75, (Shape(4, 2048, (300, 1500)),)),
        Phase(1.0, (Shape(2, 3584, (1200, 3100)),)),
    ),
    matrix_rate=0.003,
    outer_rate=0.002,
    warm_up=50,
    level=0.4,
    floor=0.02,
)
# Short prompts, with room for many questions, come most often: they are what is measured first, and
# a step on them costs least.
ONWARD = Plan(
    phases=(
        Phase(
            1.0,
            (
                Shape(10, 640, (60, 350)),
                Shape(8, 896, (300, 560)),
                Shape(8, 896, (300, 560)),
                Shape(4, 1536, (500, 1000)),
                Shape(2, 3072, (1500, 2600)),
            ),
        ),
    ),
    matrix_rate=0.002,
    outer_rate=0.001,
    warm_up=15,
    level=0.15,
    floor=0.0,
)


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(
            inner,
            lr=plan.matrix_rate,
            momentum=0.95,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(outer, lr=plan.outer_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, progress: float, plan: Plan) -> float:
    """Return the factor on the learning rates.

    It warms up, stays level, and falls along a cosine, as the plan says.
    """
    warm = min(1.0, (step + 1) / plan.warm_up)
    decay = max(0.0, (progress - plan.level) / (1 - plan.level))
    fall = 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))
    return warm * (plan.floor + (1 - plan.floor) * fall)


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the labelled tokens, which alone get logits.

    `ids` and `labels` are (rows, length).
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != dialogues.IGNORED
        logits = model.lm_head(hidden[wanted])
    return cross_entropy(logits.float(), labels[:, 1:][wanted])


def train(minutes: float, seed: int, out: Path, init: Path | None = None) -> None:
    """Train tokenizer and model, or the model in `init` further, and save both to `out`.

    The log goes there as well; that of `init` is kept in it. Every eighth of the time the
    unfinished model is saved too.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    plan = ONWARD if init else FROM_START
    tokenizer, model = load(init) if init else untrained()
    log = Log(
        seed=seed,
        minutes_planned=minutes,
        params=model.num_parameters(),
        config=model.config.to_diff_dict(),
        plan=plan.record(),
        earlier_run=json.loads((init / LOG_NAME).read_text()) if init else None,
    )
    model.train()
    steppers = optimizers(model, plan)
    bases = [stepper.param_groups[0]["lr"] for stepper in steppers]
    losses: list[float] = []
    checks = _every(minutes / 8)
    while (progress := log.minutes() / minutes) < 1.0:
        phase = next(phase for phase in plan.phases if progress < phase.until)
        ids, labels = dialogues.batch(tokenizer, rng, *rng.choice(phase.shapes))
        loss = answer_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, base in zip(steppers, bases, strict=True):
            stepper.param_groups[0]["lr"] = base * rate(log.steps, progress, plan)
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
            log.save(out / LOG_NAME)
    save(model, tokenizer, out)
    log.save(out / LOG_NAME)
    model.eval()
    log.save(out / LOG_NAME, accuracy=report(model, tokenizer, 6, 10))


def untrained() -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Return a new tokenizer and the model as it starts."""
    tokenizer = train_tokenizer(VOCAB_SIZE, MAX_LENGTH)
    return tokenizer, make_model(tokenizer)


def load(folder: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Return tokenizer and model of an earlier run, the weights in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def quick_check(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase
) -> dict[str, float]:
    """Return teacher-forced accuracies on held-out shops, at sizes that the phase has reached."""
    model.eval()
    most = 2 * max(shape.fact_tokens[1] for shape in phase.shapes)
    sizes = [size for size in (128, 512, 2048) if size == 128 or size <= most]
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
        "--init", type=Path, help="folder of an earlier run, to train its model further"
    )
    parser.add_argument(
        "--out", type=Path, default=model_path(), help="folder to write model, tokenizer and log to"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.minutes, options.seed, options.out, options.init)


if __name__ == "__main__":
    main()
