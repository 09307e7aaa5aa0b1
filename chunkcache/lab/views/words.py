"""Numbers, times and prompts as people read them."""

from __future__ import annotations

import unicodedata

# Characters that reorder what follows them until something ends it, and two that XML forbids.
_ACTS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff")


def number(value: float) -> str:
    """A count with thousands separators.

    >>> number(1234567)
    '1,234,567'
    """
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in binary units.

    >>> size(512), size(1536), size(3 * 2**20)
    ('512 B', '1.5 KiB', '3.0 MiB')
    """
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:,.1f} {unit}"
    return f"{value / 1024:,.1f} TiB"


def share(part: float, whole: float) -> str:
    """A percentage; of nothing it is a dash.

    >>> share(1, 3), share(0, 0)
    ('33.3%', '-')
    """
    return f"{100 * part / whole:.1f}%" if whole else "-"


def duration(seconds: float) -> str:
    """A time span in the unit that fits it.

    >>> duration(0.0123), duration(2.5), duration(90), duration(7200)
    ('12.3 ms', '2.50 s', '1.5 min', '2.0 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def counted(count: int, noun: str) -> str:
    """A count and what is counted.

    >>> counted(1, "hit"), counted(2000, "hit")
    ('1 hit', '2,000 hits')
    """
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def visible(text: str) -> str:
    r"""One line of text that is only ever shown: prompts may hold anything.

    What a terminal would act on, XML forbids, or makes what stands behind it run backwards becomes
    U+FFFD. Marks inside a script (right-to-left, joiners) stay.

    >>> ascii(visible("a\n\tb \x1b[2J")), ascii(visible("\u202e\x00\ud800"))
    ("'a b \\ufffd[2J'", "'\\ufffd\\ufffd\\ufffd'")
    """
    return "".join("\ufffd" if _acts(one) else one for one in " ".join(text.split()))


def _acts(character: str) -> bool:
    return character in _ACTS or unicodedata.category(character) in ("Cc", "Cs")
