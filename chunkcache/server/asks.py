"""What a client may ask: the fields of chat and text completions, checked.

Fields that change nothing are ignored, as are fields nobody here knows. Fields whose effect is
missing are refused, since ignoring them would be a wrong answer that looks right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkcache.engine import Sampling
from chunkcache.server.fields import Fields
from chunkcache.server.problems import ApiError

DEFAULT_TOKENS = 512
_MOST_ANSWERS = 64
_REFUSED = ("tools", "functions", "function_call", "audio", "prediction", "web_search_options")
_TEXT_ONLY = ("logit_bias", "top_logprobs", "suffix", "cache_salt")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Ask:
    """A checked request, except for its prompt.

    Attributes:
        max_tokens: most tokens of an answer; None if the client leaves it to the server.
    """

    model: str | None
    n: int
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool

    def sampling(self, room: int | None) -> Sampling:
        """The settings of generate(), with `room` tokens left after the longest prompt."""
        default = DEFAULT_TOKENS if room is None else min(DEFAULT_TOKENS, room)
        return Sampling(
            max_new_tokens=self.max_tokens or default,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )


def read_ask(fields: Fields) -> Ask:
    """The common fields of both kinds of completion.

    Raises:
        ApiError: a field of the wrong type, out of range, or not supported.
    """
    _refuse_unsupported(fields)
    limits = [fields.whole(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    options = fields.inner("stream_options")
    stream = fields.flag("stream")
    if fields.get("stream_options") is not None and not stream:
        raise fields.wrong("stream_options", "is only allowed when 'stream' is true")
    stop = fields.texts("stop")
    if len(stop) > 16:
        raise fields.wrong("stop", "may hold at most 16 strings")
    top_k = fields.whole("top_k", -1)
    return Ask(
        model=fields.text("model"),
        n=fields.whole("n", 1, _MOST_ANSWERS) or 1,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=fields.number("temperature", 0, 2),
        top_p=_share(fields, "top_p"),
        top_k=0 if top_k == -1 else top_k,
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
        stop=stop,
        ignore_eos=fields.flag("ignore_eos"),
        stream=stream,
        include_usage=options.flag("include_usage"),
    )


def _refuse_unsupported(fields: Fields) -> None:
    for name in _REFUSED + _TEXT_ONLY:
        fields.refuse(name, [], {}, 0, "")
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("modalities", ["text"])
    fields.refuse("response_format", {"type": "text"})
    logprobs = fields.get("logprobs")
    if logprobs is not None and logprobs is not False:  # 0 asks for the chosen token's
        raise fields.wrong("logprobs", "is not supported", code="unsupported_value")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse(name, 0, why="is not supported, except as 0")
    fields.refuse("echo", False)
    fields.refuse("best_of", fields.get("n") or 1, why="is not supported, except as equal to 'n'")


def _share(fields: Fields, name: str) -> float | None:
    value = fields.number(name, 0, 1)
    if value == 0:
        raise fields.wrong(name, "must be above 0")
    return value


def read_messages(fields: Fields) -> list[dict[str, str]]:
    """The dialogue as a chat template takes it: role and text.

    Raises:
        ApiError: no list, an unknown role, or content that is not text.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "must be a list of at least one message")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(f"'{path}' must be an object", param=path, code="invalid_value")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(
            f"'{path}.role' must be one of {', '.join(_ROLES)}, not {role!r}",
            param=f"{path}.role",
            code="invalid_value",
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(f"'{path}': tools are not supported", param=path, code="unsupported_value")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{path}.content")}


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"'{path}' must be text", param=path, code="invalid_value")
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ApiError(
                f"'{path}[{place}]' must be a part of type 'text'; nothing else is supported",
                param=f"{path}[{place}]",
                code="unsupported_value",
            )
        if not isinstance(part.get("text"), str):
            raise ApiError(f"'{path}[{place}].text' must be a string", param=path)
    return "\n".join(part["text"] for part in content)


def read_prompts(fields: Fields) -> list[str] | list[list[int]]:
    """The prompts of a text completion, from a string, strings, ids, or lists of ids.

    Raises:
        ApiError: anything else, or nothing.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(item, list) and item and _are_ids(item) for item in prompt):
            return prompt
    raise fields.wrong("prompt", "must be a string, a list of strings, or one or more lists of ids")


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)
