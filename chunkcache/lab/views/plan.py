"""A plan of KV memory in a terminal. One GB is 10^9 bytes here, as memory is sold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from chunkcache.lab.plan import KINDS, Piece, Plan, Sessions
from chunkcache.lab.views.tables import columns, pairs
from chunkcache.lab.views.words import number, size

_METHODS = {
    "observed": "observed on a run without weights",
    "configuration": "calculated from the configuration",
}
_SOURCES = {
    "asked for": "as asked for",
    "configuration": "as the configuration says",
    "assumed": "assumed: the configuration names none",
}


_COMPARED = ("plain multi-head", "saved")


def decimal(value: float) -> str:
    """Bytes in decimal units, with three digits or one decimal.

    >>> decimal(8_192_000_000), decimal(81_920_000_000), decimal(819_200_000_000), decimal(999)
    ('8.19 GB', '81.9 GB', '819.2 GB', '999 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" else 2 if value < 10 else 1
    return f"{value:,.{digits}f} {unit}"


def plan_report(
    name: str, plan: Plan, contexts: Sequence[int], encoder_tokens: int, sessions: Sessions
) -> RenderableType:
    """All tables of a plan, one below the other."""
    parts = [
        _head(name, plan),
        _kinds(plan),
        _contexts(plan, contexts, encoder_tokens),
        _sessions(sessions),
    ]
    spaced = [line for part in parts for line in (part, Text())]
    return Group(*spaced[:-1])


def _head(name: str, plan: Plan) -> RenderableType:
    known = _METHODS[plan.method]
    lines = {
        "model type": plan.model_type,
        "attention": _attention(plan),
        "number type": f"{plan.dtype}, {_SOURCES[plan.dtype_source]}",
        "one more token": _token(plan),
        **({"beyond all windows": _late(plan)} if plan.late_token_bytes < plan.token_bytes else {}),
        **({"states": f"{number(plan.state_bytes)} B a sequence"} if plan.state_bytes else {}),
        **_encoder(plan),
        "how it is known": known + (f" ({plan.reason})" if plan.reason else ""),
    }
    if not plan.complete:
        lines["not known"] = "some layers: all sums are lower bounds"
    return pairs(f"KV of {escape(name)}", lines)


def _attention(plan: Plan) -> str:
    groups = " and ".join(map(str, plan.groups))
    words = {
        "MHA": f"MHA: each of {plan.heads} heads has keys and values of its own",
        "GQA": f"GQA: {plan.heads or 'all'} heads share the keys and values of {groups}",
        "MQA": f"MQA: {plan.heads or 'all'} heads share one set of keys and values",
        "MLA": f"MLA: {plan.heads or 'all'} heads share one latent",
        "recurrent": "none: a state of constant size",
        "unknown": "of a kind of its own",
    }
    return "; ".join((words[plan.attention], *plan.traits))


def _token(plan: Plan) -> str:
    text = f"{_exact(plan.token_bytes)} B"
    if plan.factor is None:
        return text
    if plan.factor == 1:
        return f"{text}, as plain multi-head attention takes"
    return f"{text}, {plan.factor:,.1f} times less than plain multi-head attention"


def _late(plan: Plan) -> str:
    return f"{_exact(plan.late_token_bytes)} B"


def _encoder(plan: Plan) -> dict[str, str]:
    if not plan.encoder_token_bytes:
        return {}
    return {"one encoder token": f"{_exact(plan.encoder_token_bytes)} B"}


def _exact(value: float) -> str:
    """A number of bytes, which is whole unless rows stand for several tokens.

    >>> _exact(819200.0), _exact(50616.5)
    ('819,200', '50,616.5')
    """
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


# ---- tables


def _kinds(plan: Plan) -> RenderableType:
    names = ["kind of layer", "layers", "bytes a token", "tokens kept", "bytes a sequence"]
    return columns("What the layers keep", names, [_kind(piece) for piece in plan.pieces])


def _kind(piece: Piece) -> list[str]:
    fixed = number(piece.layers * piece.fixed_bytes) if piece.fixed_bytes else "-"
    known = piece.kind != "unknown"
    token = _exact(piece.token_bytes) if piece.row_bytes or not piece.fixed_bytes else "-"
    return [KINDS[piece.kind], number(piece.layers), token if known else "?", _kept(piece), fixed]


def _kept(piece: Piece) -> str:
    if not piece.row_bytes:
        return "-"
    if piece.kind == "cross":
        return "encoder's"
    if piece.limit is not None:
        return f"last {number(piece.limit * piece.stride)}"
    return "all" if piece.stride == 1 else f"1 row per {piece.stride}"


def _contexts(plan: Plan, contexts: Sequence[int], encoder_tokens: int) -> RenderableType:
    compared = bool(plan.mha_token_bytes)
    rows = []
    for tokens in contexts:
        held = plan.bytes_at(tokens, encoder_tokens)
        plain = plan.mha_bytes_at(tokens, encoder_tokens)
        more = [decimal(plain), f"{plain / held:,.1f}x"] if compared else []
        rows.append([_length(tokens, plan), decimal(held), *more])
    title = "One sequence"
    if encoder_tokens:
        title += f" with {number(encoder_tokens)} encoder tokens"
    table = columns(title, ["tokens", "KV", *(_COMPARED if compared else [])], rows)
    table.columns[0].justify = "right"
    if any(_beyond(tokens, plan) for tokens in contexts):
        table.caption = f"* beyond the model's {number(plan.positions or 0)} positions"
        table.caption_justify = "left"
    return table


def _beyond(tokens: int, plan: Plan) -> bool:
    return plan.positions is not None and tokens > plan.positions


def _length(tokens: int, plan: Plan) -> str:
    return number(tokens) + (" *" if _beyond(tokens, plan) else "  ")


def _sessions(sessions: Sessions) -> RenderableType:
    factor = "-" if sessions.factor is None else f"{sessions.factor:,.1f}x"
    rows = [
        ["nothing shared", number(sessions.alone), decimal(sessions.alone_bytes), "", ""],
        [
            f"first {number(sessions.shared)} tokens stored once",
            number(sessions.sharing),
            decimal(sessions.own_bytes),
            decimal(sessions.common_bytes),
            factor,
        ],
    ]
    length = sessions.shared + sessions.private
    held = f"{size(sessions.budget)} ({decimal(sessions.budget)})"
    title = f"Sessions of {number(length)} tokens in {held}"
    return columns(title, ["", "fit", "each", "in common", "factor"], rows)
