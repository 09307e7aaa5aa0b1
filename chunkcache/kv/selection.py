"""Values by what people call them: the beginning of a prefix's name or of a namespace, or a model."""

from __future__ import annotations

from chunkcache.errors import ConfigError
from chunkcache.kv.inventory import Inventory, kind_of, note_of
from chunkcache.kv.notes import MODEL
from chunkcache.stores.base import Key


def family(inventory: Inventory, beginning: str) -> list[Key]:
    """The values of the one family whose name begins so.

    Raises:
        ConfigError: there is none, or more than one.
    """
    groups = {family.group for family in inventory.families}
    return _of_families(inventory, {_only(groups, beginning, "prefix")})


def space(inventory: Inventory, beginning: str) -> list[Key]:
    """The values of the one namespace that begins so, and its note.

    Raises:
        ConfigError: there is none, or more than one.
    """
    known = {one.namespace: note_of(one.namespace) for one in inventory.families if one.namespace}
    alone = inventory.models.keys() - set(known.values())
    found = _only(known.keys() | alone, beginning, "namespace")
    return _of_notes(inventory, {known.get(found, found)})


def model(inventory: Inventory, name: str) -> list[Key]:
    """The values of all namespaces of a model, by the name that notes give it, and the notes.

    Raises:
        ConfigError: no note names it.
    """
    notes = {group for group, note in inventory.models.items() if note.get("model") == name}
    if not notes:
        raise ConfigError(f"no note in the store names a model {name!r}")
    return _of_notes(inventory, notes)


def _of_notes(inventory: Inventory, notes: set[str]) -> list[Key]:
    """The values of the namespaces that notes are about, and the notes, which come last."""
    groups = {one.group for one in inventory.families if note_of(one.namespace) in notes}
    about = [key for key in inventory.values if kind_of(key) == MODEL and key.group in notes]
    return _of_families(inventory, groups) + about


def _of_families(inventory: Inventory, groups: set[str]) -> list[Key]:
    """First chunks come last: whoever is interrupted finds the rest by the same name again."""
    keys = [key for key in inventory.values if key.group in groups and kind_of(key) != MODEL]
    return sorted(keys, key=lambda key: key.name == key.group)


def _only(names: set[str], beginning: str, what: str) -> str:
    found = sorted(name for name in names if name.startswith(beginning.lower()))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"no {what} in the store begins with {beginning!r}")
    shown = ", ".join(name[: len(beginning) + 8] for name in found[:3])
    raise ConfigError(f"{beginning!r} begins more than one {what} ({shown}, ..): give more digits")
