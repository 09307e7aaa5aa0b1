"""Plain settings of modules, as values that can be compared and hashed."""

from __future__ import annotations

from collections.abc import Hashable

PLAIN = (bool, int, float, str, type(None))
HOLDERS = (dict, list, tuple, set, frozenset)

# What libraries change on modules although it decides nothing here: a compiled copy of the call, that
# hooks which collect hidden states are there, and where the last prompt's images put its positions.
VOLATILE = {
    "training",
    "_is_hf_initialized",
    "warnings_issued",
    "_compiled_call_impl",
    "_output_capturing_hooks_installed",
    "rope_deltas",
}


def freeze(value: object, empty: bool = False) -> Hashable:
    """A setting as a hashable value that is never None; None for what is not one.

    Settings are plain values and containers of them. Empty containers count if `empty`: they may be
    caches as well.

    >>> freeze({"r": [8, 16]}), freeze([]), freeze(object())
    (('dict', (('r', ('list', (('int', 8), ('int', 16)))),)), None, None)
    """
    if isinstance(value, PLAIN):
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
