"""Plain settings of modules, as values that can be compared and hashed."""

from __future__ import annotations

from collections.abc import Hashable

_PLAIN = (bool, int, float, str, type(None))

# What libraries change on modules although it decides nothing in evaluation mode: a compiled copy of
# the call, and where the images of the last prompt put its positions.
VOLATILE = {
    "training",
    "_is_hf_initialized",
    "warnings_issued",
    "_compiled_call_impl",
    "rope_deltas",
}


def freeze(value: object, empty: bool = False) -> Hashable:
    """A setting as a hashable value that is never None; None for what is not one.

    Settings are plain values and containers of them. Empty containers count if `empty`: they may be
    caches as well.

    >>> freeze({"r": [8, 16]}), freeze([]), freeze(object())
    (('dict', (('r', ('list', (('int', 8), ('int', 16)))),)), None, None)
    """
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, dict):
        pairs = tuple((str(key), freeze(item, empty)) for key, item in value.items())
        known = all(item is not None for _, item in pairs)
        return ("dict", pairs) if known and (pairs or empty) else None
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, list | tuple):
        items = tuple(freeze(item, empty) for item in value)
        known = all(item is not None for item in items)
        return (type(value).__name__, items) if known and (items or empty) else None
    return None
