"""Which policy hits most, on every workload there is, and how far is it from the best possible?

Workloads are the files of CHUNKCACHE_DATA: a production trace (Mooncake), tool-agent dialogues (tau-bench,
eight at once), a tree-of-thought search, few-shot prompts (BIG-Bench Hard, in random order, each with a
question of its own), and two-turn questions that share nothing (MT-Bench). Text becomes tokens of GPT-2.
Sizes are parts of all different tokens of a workload.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
from transformers import AutoTokenizer

from benchmarks.common import save
from chunkcache.lab.simulation.sweep import BELADY, Case, Result, Sweep
from chunkcache.lab.traces.dialogues import Asker, Turn, interleave, read_dialogues
from chunkcache.lab.traces.recorder import Recorder
from chunkcache.lab.traces.trace import Trace
from chunkcache.lab.views.figures import of_results
from chunkcache.lab.views.figures import save as save_figure
from chunkcache.tree import POLICIES

TOGETHER = 8  # dialogues
FEW_SHOTS = 3000  # requests


def mooncake(data: Path) -> Trace:
    """As it is."""
    return Trace(data / "traces" / "mooncake_conversation.jsonl")


def tau(data: Path, tokenizer: Any) -> Iterator[Turn]:
    """Agents at work, several at once."""
    asker = Asker(tokenizer)
    dialogues = read_dialogues(data / "conversations" / "tau_airline_gpt4o.json")
    return interleave(map(asker.turns, dialogues), TOGETHER)


def tree_of_thought(data: Path, tokenizer: Any) -> Iterator[Turn]:
    """Two prompts, filled in."""
    found = json.loads((data / "conversations" / "tot_game24_requests.json").read_text())
    for name, text in found["requests"]:
        filled = found["templates"][name].replace("{input}", text)
        yield Turn(tokenizer(filled)["input_ids"], [])


def few_shot(data: Path, tokenizer: Any, seed: int) -> Iterator[Turn]:
    """A question behind examples of its task."""
    choice = random.Random(seed)
    prompts = [path.read_text() for path in sorted((data / "prompts" / "bbh").glob("*.txt"))]
    heads = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for _ in range(FEW_SHOTS):
        question = (
            f"\n\nQ: {choice.random():.12f} {choice.random():.12f}\nA: Let's think step by step."
        )
        yield Turn(choice.choice(heads) + tokenizer(question)["input_ids"], [])


def questions(data: Path, tokenizer: Any) -> Iterator[Turn]:
    """Almost nothing shared."""
    asker = Asker(tokenizer)
    for messages in read_dialogues(data / "conversations" / "mt_bench_questions.jsonl"):
        for end in range(1, len(messages) + 1):
            yield from asker.turns(messages[:end])


def record(path: Path, turns: Iterable[Turn]) -> Trace:
    """Writes turns as a trace."""
    with Recorder(path) as recorder:
        for number, turn in enumerate(turns):
            recorder.write(turn.prompt, turn.answer, time=number)
    return Trace(path)


def workloads(data: Path, folder: Path, seed: int) -> Iterator[tuple[str, Trace]]:
    """All of them by name."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "gpt2")
    tokenizer.model_max_length = 10**9  # nothing is run
    yield "mooncake conversation", mooncake(data)
    yield "tau airline agents", record(folder / "tau", tau(data, tokenizer))
    yield "tree of thought", record(folder / "tot", tree_of_thought(data, tokenizer))
    yield "BBH few-shot", record(folder / "bbh", few_shot(data, tokenizer, seed))
    yield "MT-Bench questions", record(folder / "mt", questions(data, tokenizer))


def table(name: str, sweep: Sweep, results: list[Result]) -> str:
    """A workload as Markdown: hit rates, and percent of the optimum."""
    policies = list(dict.fromkeys(one.policy for one in results))
    cells = {(one.policy, one.capacity_tokens): one for one in results}
    tokens, prompts = sum(sweep.atoms.tokens), len(sweep.atoms.tokens)
    lines = [
        f"**{name}**: {prompts:,} prompts, {tokens:,} tokens, {sweep.footprint:,} different ones, chunks of "
        f"{sweep.chunk}",
        "",
        f"| capacity | {' | '.join(policies)} |",
        f"|---{'|---' * len(policies)}|",
    ]
    for size in dict.fromkeys(one.capacity_tokens for one in results):
        row = [cells[policy, size] for policy in policies]
        best = max(one.hit_tokens for one in row if one.policy != BELADY)
        lines.append(f"| {size:,} | {' | '.join(_cell(one, best) for one in row)} |")
    return "\n".join(lines)


def _cell(one: Result, best: int) -> str:
    rate = f"{100 * one.hit_rate:.1f}"
    if one.policy == BELADY:
        return rate
    text = f"{rate} ({one.percent_of_belady or 0:.0f})"
    return f"**{text}**" if one.hit_tokens == best else text


def draw(name: str, sweep: Sweep, results: list[Result], docs: Path) -> str:
    """Writes a figure of a workload; returns the Markdown that shows it."""
    path = Path("images", f"{name.lower().replace(' ', '-')}.svg")
    (docs / path).parent.mkdir(exist_ok=True)
    save_figure(of_results(results, sweep.footprint), docs / path)
    return f"![Hit rates of {name} by capacity and policy]({path})"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), envvar="CHUNKCACHE_DATA")
@click.option("--write", type=click.Path(path_type=Path), help="Document whose tables to replace.")
@click.option("--seed", default=0)
def main(data: Path | None, write: Path | None, seed: int) -> None:
    """Prints tables and one JSON line; keeps all results in results/."""
    data = data or Path(__file__).resolve().parents[2] / "shared" / "data"
    found: dict[str, Any] = {}
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for name, trace in workloads(data, Path(folder), seed):
            begin = time.perf_counter()
            sweep = Sweep(trace)
            cases = [Case(*case) for case in product([*POLICIES, BELADY], sweep.sizes())]
            results = sweep.run(cases)
            tables.append(table(name, sweep, results))
            print(f"{tables[-1]}\n", flush=True)
            if write is not None:
                tables[-1] += f"\n\n{draw(name, sweep, results, write.parent)}"
            found[name] = {
                "seconds": time.perf_counter() - begin,
                "footprint": sweep.footprint,
                "results": [one.to_dict() for one in results],
            }
    if write is not None:
        before, _, rest = write.read_text().partition("<!-- tables -->\n")
        after = rest.partition("<!-- end -->\n")[2]
        text = "\n\n".join(tables)
        write.write_text(f"{before}<!-- tables -->\n{text}\n<!-- end -->\n{after}")
    save("bench_policies", {"seed": seed, "cores": os.cpu_count()}, found)


if __name__ == "__main__":
    main()
