"""Does a chat template let turn k+1 begin with turn k? Where not, its prefix cannot be reused.

A cache holds a turn's prompt and the answer as it was generated. The next prompt is rendered from text
again, and whatever a template changes in what was said before (thinking that is left out, a date, tools
that move, spaces that are stripped) ends the match there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chunkcache.errors import ConfigError
from chunkcache.lab.traces.dialogues import answer_ids

Message = dict[str, Any]
_CONTEXT = 12  # tokens on both sides of a divergence
_DAYS = ("01 January 2024", "02 February 2025")
_THINK = "<think>\nShort and friendly, then.\n</think>\n\n"
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Sample:
    """A dialogue to render, and tools that go with it."""

    name: str
    messages: list[Message]
    tools: list[Message] | None = None


@dataclass(frozen=True)
class Finding:
    """Where a prompt stops extending the one before and its answer.

    Attributes:
        turn: of the dialogue, from 2 on; 0 for what differs from day to day.
        token: index of the first that differs; lost: tokens from there on, of what was stored.
        why: in words; before: decoded tokens before it; stored, rendered: behind it, as they were and are.
    """

    sample: str
    turn: int
    token: int
    lost: int
    why: str
    before: str
    stored: str
    rendered: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Lint:
    """All findings, the turns that were looked at, and dialogues that a template refuses, with its words."""

    findings: list[Finding]
    turns: int
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        found = [one.to_dict() for one in self.findings]
        return {"findings": found, "turns": self.turns, "refused": self.refused}


def samples() -> list[Sample]:
    """Dialogues of the usual kinds, of three turns each."""
    asked = ["Hi, who are you?", "What can you do?", "Thanks, bye!"]
    said = ["I am your assistant.", "I answer  questions:\n\n- short ones\n- long ones", "Bye!"]
    system = [{"role": "system", "content": "You are a friendly assistant."}]
    plain = _turns(asked, said)
    thinking = _turns(asked, [_THINK + text for text in said])
    apart = [
        one | {"reasoning_content": "Short, then."} if one["role"] == "assistant" else one
        for one in plain
    ]
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    tools: list[Message] = [
        {"role": "user", "content": "How is the weather in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "name": "weather", "content": '{"sky": "clear"}'},
        {"role": "assistant", "content": "Clear."},
        {"role": "user", "content": "And tomorrow?"},
        {"role": "assistant", "content": "I do not know."},
    ]
    return [
        Sample("dialogue", plain),
        Sample("spaces around the answer", _turns(asked, [f"{text} " for text in said])),
        Sample("with a system prompt", system + plain),
        Sample("thinking in the answer", system + thinking),
        Sample("thinking beside the answer", system + apart),
        Sample("tools", system + tools, [_TOOL]),
    ]


def _turns(asked: Sequence[str], said: Sequence[str]) -> list[Message]:
    pairs = zip(asked, said, strict=True)
    roles = (("user", "assistant") for _ in asked)
    return [
        {"role": role, "content": text}
        for names, texts in zip(roles, pairs, strict=True)
        for role, text in zip(names, texts, strict=True)
    ]


class Linter:
    """Looks at one template.

    Args:
        tokenizer: of transformers.
        template: another than the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self._tokenizer = tokenizer
        self._template = template

    def lint(self, dialogues: Iterable[Sample]) -> Lint:
        """Renders dialogues turn by turn.

        Raises:
            ConfigError: the template is no Jinja.
        """
        from jinja2.exceptions import TemplateSyntaxError

        findings: list[Finding] = []
        refused: dict[str, str] = {}
        turns = 0
        for sample in dialogues:
            try:
                findings += self._dated(sample)
                found, count = self._extends(sample)
            except TemplateSyntaxError as error:
                raise ConfigError(f"the template, line {error.lineno}: {error.message}") from error
            except _refusals() as error:
                refused[sample.name] = " ".join(str(error).split()) or type(error).__name__
                continue
            findings += found
            turns += count
        return Lint(findings, turns, refused)

    def _extends(self, sample: Sample) -> tuple[list[Finding], int]:
        """Findings between neighbouring turns, and how many of these there are."""
        ends = [n for n, one in enumerate(sample.messages) if one["role"] == "assistant" and n]
        prompts = [self._prompt(sample, end) for end in ends]
        found = []
        for turn, (end, before, after) in enumerate(
            zip(ends, prompts, prompts[1:], strict=False), 2
        ):
            answer = self._answer(sample, end, before)
            finding = self._compare(sample, turn, before, answer, after)
            found += [finding] if finding else []
        return found, max(0, len(prompts) - 1)

    def _prompt(self, sample: Sample, end: int, day: str = "") -> list[int]:
        return self._render(sample, end, day, add_generation_prompt=True)

    def _render(self, sample: Sample, end: int, day: str = "", **more: Any) -> list[int]:
        template = self._tokenizer.get_chat_template(self._template, sample.tools)
        if day:  # stands in for the function that templates ask for the date
            template = f"{{%- macro strftime_now(form) -%}}{day}{{%- endmacro -%}}{template}"
        ids: list[int] = self._tokenizer.apply_chat_template(
            sample.messages[:end],
            tools=sample.tools,
            chat_template=template,
            tokenize=True,
            return_dict=False,
            **more,
        )
        return ids

    def _answer(self, sample: Sample, end: int, prompt: list[int]) -> list[int]:
        """What a model would have generated: what the template makes of it behind the prompt, if it does."""
        whole = self._render(sample, end + 1)
        message = sample.messages[end]
        parts = any(message.get(part) for part in ("tool_calls", "reasoning_content", "thinking"))
        if parts and whole[: len(prompt)] == prompt:  # only the template knows how they are written
            return whole[len(prompt) :]
        return answer_ids(self._tokenizer, prompt, str(message.get("content") or ""))

    def _compare(
        self, sample: Sample, turn: int, prompt: list[int], answer: list[int], after: list[int]
    ) -> Finding | None:
        stored = prompt + answer
        at = _common(stored, after)
        if at == len(stored):
            return None
        return self._finding(sample, turn, at, stored, after, self._why(at, prompt, answer, after))

    def _why(self, at: int, prompt: list[int], answer: list[int], after: list[int]) -> str:
        if at < len(prompt):
            begun = self._tokenizer.decode(prompt[at:])
            if at >= len(prompt) - _CONTEXT and "think" in begun:
                return "the prompt opens thinking that history does not have"
            return "what was said before is rendered otherwise"
        text, next_ = self._tokenizer.decode(answer), self._tokenizer.decode(after[len(prompt) :])
        if next_.startswith(text):
            return "the answer is cut into other tokens"
        if next_.lstrip().startswith(text.strip()):
            return "spaces around the answer are left out"
        if "<think>" in text:
            return "thinking is left out of history"
        return "the answer is rendered otherwise"

    def _dated(self, sample: Sample) -> list[Finding]:
        """What a template writes of the day, which ends every match when that is over."""
        ends = [n for n, one in enumerate(sample.messages) if one["role"] == "assistant" and n]
        end = ends[-1] if ends else len(sample.messages)
        one, other = (self._prompt(sample, end, day) for day in _DAYS)
        at = _common(one, other)
        if at == len(one) == len(other):
            return []
        return [self._finding(sample, 0, at, one, other, "the date is in the prompt")]

    def _finding(
        self, sample: Sample, turn: int, at: int, stored: list[int], after: list[int], why: str
    ) -> Finding:
        def shown(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids))

        return Finding(
            sample.name,
            turn,
            at,
            len(stored) - at,
            why,
            shown(stored[max(0, at - _CONTEXT) : at]),
            shown(stored[at : at + _CONTEXT]),
            shown(after[at : at + _CONTEXT]),
        )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refusals() -> tuple[type[Exception], ...]:
    """What templates raise for dialogues that they do not take."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError)
