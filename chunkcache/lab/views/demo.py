"""The demo's story in words and tables, for readers who never heard of a KV cache."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from chunkcache.lab.demo_story import Story
from chunkcache.lab.views.stats import report
from chunkcache.lab.views.tables import columns, pairs
from chunkcache.lab.views.tree import tree
from chunkcache.lab.views.words import duration, number, share, size

_SHOWN = 40


def tell(story: Story, out: Console) -> None:
    """Prints the story."""
    for part in (_setting, _users, _gains, _closing):
        part(story, out)


def _say(out: Console, text: str) -> None:
    out.print(Text(text))
    out.print()


def _setting(story: Story, out: Console) -> None:
    users = len(story.visits)
    facts = story.system_prompt.count("\n")
    _say(
        out,
        f"{story.shop} has a support bot. Its instructions, the system prompt, hold {facts} facts. "
        f"{users} users each ask the bot one question.",
    )
    out.print(Text("The beginning of the system prompt:", style="bold"))
    for line in story.system_prompt.split("\n")[:4]:
        out.print(Text("  " + line, style="dim"))
    out.print(Text("  ...", style="dim"))
    out.print()
    _say(
        out,
        "A model reads a text once and notes keys and values (KV) for every token, a piece of a "
        "word. Without a cache it reads the whole system prompt again for every user. chunkcache "
        f"keeps the notes: the system prompt was read once ({number(story.preload_tokens)} tokens "
        f"in {duration(story.preload_seconds)}), and each user's prompt was read from there on.",
    )


def _users(story: Story, out: Console) -> None:
    names = [
        "question",
        "tokens",
        "reused",
        "read",
        "first token, plain",
        "cached",
        "faster",
        "answer",
    ]
    rows = [
        [
            _short(visit.question),
            number(visit.prompt_tokens),
            number(visit.cached_tokens),
            number(visit.prompt_tokens - visit.cached_tokens),
            duration(visit.cold_seconds),
            duration(visit.warm_seconds),
            f"{visit.cold_seconds / visit.warm_seconds:.1f}x",
            ("right" if visit.right else "wrong") + ("" if visit.same else ", CHANGED"),
        ]
        for visit in story.visits
    ]
    out.print(columns("How long each user waited for the first token", names, rows))
    out.print()
    if any(visit.same and not visit.right for visit in story.visits):
        _say(out, "A wrong answer is the small model's own: without the cache it says the same.")
    answers = [
        [_short(visit.question), visit.answer if visit.same else f"CHANGED: {visit.answer}"]
        for visit in story.visits[:3]
    ]
    out.print(columns("The first answers", ["question", "answer"], answers))
    out.print()


def _gains(story: Story, out: Console) -> None:
    sums, users = story.to_dict(), len(story.visits)
    cold, warm = sums["cold_seconds"], sums["warm_seconds"]
    out.print(
        pairs(
            "What the cache changed",
            {
                "mean time to first token": f"{duration(cold)} -> {duration(warm)}"
                f" ({cold / warm:.1f} times faster)",
                f"KV for {users} users at once": f"{size(story.private_bytes)} ->"
                f" {size(story.shared_bytes)}"
                f" ({share(story.shared_bytes, story.private_bytes)} of it)",
                "answers equal to the plain model's": f"{sums['same_answers']} of {users}",
                "answers that are right": f"{sums['right_answers']} of {users}",
                "price, once": f"{duration(story.wrap_seconds)} to check the model and"
                f" {duration(story.preload_seconds)} to read the system prompt",
            },
        )
    )
    out.print()


def _closing(story: Story, out: Console) -> None:
    _say(
        out,
        "The report below is what `chunkcache report` prints for a running server. The hit rate is "
        "the share of prompt tokens that did not have to be read again.",
    )
    out.print(report(story.stats.to_dict()))
    out.print()
    _say(out, "What is stored, as `chunkcache tree` shows it; shared beginnings are stored once:")
    out.print(tree([row.to_dict() for row in story.tree]))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
