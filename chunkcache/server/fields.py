"""Reading fields of a JSON body: each has a type and a range, and an error names the field.

pydantic was rejected: the few fields here need OpenAI's own error body with `param`, which costs
more to bend out of a library than to write, and unknown fields must pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chunkcache.server.problems import ApiError


class Fields:
    """The fields of a request body; null counts as not given, as OpenAI's clients mean it."""

    def __init__(self, body: Mapping[str, Any], prefix: str = ""):
        self._body = body
        self._prefix = prefix

    @classmethod
    def parse(cls, raw: bytes) -> Fields:
        """Fields of a JSON object.

        Raises:
            ApiError: anything else than a JSON object.
        """
        try:
            body = json.loads(raw)
            if b"\\ud" in raw.lower():  # half a surrogate pair is no text: nothing could encode it
                json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(body, dict):
            raise ApiError("the body must be a JSON object", code="invalid_json")
        return cls(body)

    def get(self, name: str) -> Any:
        """The value as it came; None if absent."""
        return self._body.get(name)

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "must be a whole number")
        return int(self._within(name, value, low, high))

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, "must be a number")
        return float(self._within(name, value, low, high))

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.get(name)
        if value not in (None, True, False):
            raise self.wrong(name, "must be true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "must be a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, none of them empty."""
        value = self.get(name)
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(x, str) and x for x in listed):
            raise self.wrong(name, "must be a string or a list of strings, none of them empty")
        return tuple(listed)

    def inner(self, name: str) -> Fields:
        """The fields of a nested object; absent is empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return Fields(value or {}, f"{self._prefix}{name}.")

    def refuse(self, name: str, *accepted: Any, why: str = "is not supported") -> None:
        """Raise if the field has a value other than null and those accepted."""
        value = self.get(name)
        if value is not None and value not in accepted:
            raise self.wrong(name, why, code="unsupported_value")

    def wrong(self, name: str, why: str, code: str = "invalid_value") -> ApiError:
        """The error that says what is wrong with a field."""
        path = self._prefix + name
        return ApiError(f"'{path}' {why}", param=path, code=code)

    def _within(self, name: str, value: float, low: float, high: float | None) -> float:
        if not (low <= value and (high is None or value <= high)):
            wanted = f"at least {low}" if high is None else f"between {low} and {high}"
            raise self.wrong(name, f"must be {wanted}, not {value}")
        return value
