"""prompts.toml: prompts to compute ahead of time.

[[prompt]]
name = "support-bot"
text = "You are ..."          # or messages = [{role = "system", content = "You are ..."}]
pin = true
ttl = 3600                    # seconds; without it the prompt stays
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkcache.errors import ConfigError

_KNOWN = {"name", "text", "messages", "pin", "ttl"}


@dataclass(frozen=True)
class Preload:
    """The arguments of CachedModel.preload()."""

    name: str
    prompt: str | list[dict[str, str]]
    pin: bool = True
    ttl: float | None = None


def read_preloads(path: Path) -> list[Preload]:
    """The prompts of a file, in order.

    Raises:
        ConfigError: not TOML, or an entry that says too little, too much or something unknown.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("prompt", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: no [[prompt]] in it")
    return [_entry(entry, f"{path}: prompt {place}") for place, entry in enumerate(entries, 1)]


def _entry(entry: dict[str, Any], where: str) -> Preload:
    if unknown := sorted(entry.keys() - _KNOWN):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}")
    if ("text" in entry) == ("messages" in entry):
        raise ConfigError(f"{where}: give either text or messages")
    name, pin, ttl = entry.get("name"), entry.get("pin", True), entry.get("ttl")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name must be a string")
    if not isinstance(pin, bool):
        raise ConfigError(f"{where}: pin must be true or false")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl <= 0):
        raise ConfigError(f"{where}: ttl must be a number of seconds above 0")
    return Preload(name, _prompt(entry, where), pin, ttl)


def _prompt(entry: dict[str, Any], where: str) -> str | list[dict[str, str]]:
    if "text" in entry:
        if not isinstance(entry["text"], str) or not entry["text"]:
            raise ConfigError(f"{where}: text must be a string")
        return str(entry["text"])
    messages = entry["messages"]
    fit = isinstance(messages, list) and all(
        isinstance(one, dict)
        and one.keys() == {"role", "content"}
        and all(isinstance(part, str) for part in one.values())
        for one in messages
    )
    if not fit or not messages:
        raise ConfigError(f"{where}: messages must be a list of {{role, content}} with strings")
    return list(messages)
