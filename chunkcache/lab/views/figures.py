"""Figures of reports and simulations, with matplotlib (the extra `plot`).

The background is transparent, ink is a grey that can be read on white and on dark pages, and lines differ
in their marks and dashes too, for print without colour. Colours are those of Okabe and Ito (2008), which
people with any colour vision tell apart. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkcache.errors import ConfigError
from chunkcache.lab.analysis.report import Histogram, Report
from chunkcache.lab.simulation.sweep import BELADY, Result
from chunkcache.lab.views.words import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#767676"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", "--", "-.", ":")
_SIZE = (6.4, 3.6)  # inches
_NEAR = 0.7  # of the highest rate: all others are above
_DATES = {".svg": "Date", ".png": "", ".pdf": "CreationDate"}  # what each calls the day it was made
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_Draw = Callable[["Axes", Report], None]


def tokens(value: float, _: Any = None) -> str:
    """A count, short.

    >>> tokens(512), tokens(1500), tokens(2e6)
    ('512', '1.5k', '2M')
    """
    for unit, name in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the form that the file's name asks for.

    Raises:
        ConfigError: another form, or a file that cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in _DATES:
        raise ConfigError(f"{path}: figures are {', '.join(_DATES)}")
    try:
        path.write_bytes(_drawn(figure, kind))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def to_svg(figure: Figure) -> str:
    """The picture as an element of a page."""
    text = _drawn(figure, ".svg").decode()
    return text[text.index("<svg") :]


def _drawn(figure: Figure, kind: str) -> bytes:
    """The same bytes for the same figure. In SVG text stays text."""
    from matplotlib import rc_context

    page = io.BytesIO()
    date = _DATES[kind]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chunkcache"}):
        metadata = {date: None} if date else {}
        figure.savefig(page, format=kind[1:], transparent=True, dpi=150, metadata=metadata)
    return page.getvalue()


def of_results(results: Sequence[Result], footprint: int | None = None) -> Figure:
    """Hit rate against capacity, a line for each policy; the bound is dashed and grey.

    Args:
        footprint: different tokens of the trace, where a cache without limit is drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, (axes,) = _figure(1)
    lines: dict[str, list[tuple[float, float]]] = {}
    most = max((one.capacity_tokens or 0 for one in results), default=0)
    whole = max(2 * most, footprint or 1)
    for one in results:
        label = one.policy if one.router is None else f"{one.policy}, {one.router}"
        size = whole if one.capacity_tokens is None else max(1, one.capacity_tokens)
        lines.setdefault(label, []).append((size, one.hit_rate))
    _curves(axes, lines)
    _capacity_axis(axes)
    low, high = (of([one.hit_rate for one in results], default=0.0) for of in (min, max))
    if low > _NEAR * high:  # from nothing on, lines would lie on each other
        axes.set_ylim(low - (high - low) / 4, high + (high - low) / 10 + 1e-3)
    axes.set_title("Hit rate by capacity", loc="left")
    return figure


def of_report(report: Report) -> Figure:
    """All figures of a report in one."""
    drawings = list(_drawings(report).values())
    figure, many = _figure(len(drawings))
    for axes, draw in zip(many, drawings, strict=True):
        draw(axes, report)
    return figure


def each_of_report(report: Report) -> dict[str, Figure]:
    """The same one by one, by title."""
    found = {}
    for title, draw in _drawings(report).items():
        figure, (axes,) = _figure(1)
        draw(axes, report)
        found[title] = figure
    return found


def _drawings(report: Report) -> Mapping[str, _Draw]:
    found: dict[str, _Draw] = {"Hit rate by capacity": _sizes, "Hit rate over time": _timeline}
    if report.reuse.tokens:
        found["Reuse distance"] = _reuse
    if report.lifetimes is not None:
        found["Lifetime of chunks"] = _lifetimes
    if len(report.first_tokens) > 1:
        found["Time to first token"] = _first_tokens
    return found


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'chunkcache[plot]'") from error
    across = min(2, count)
    down = -(-count // across)
    with rc_context(_style()):
        figure = Figure(figsize=(_SIZE[0] * across, _SIZE[1] * down), layout="constrained")
        made = [figure.add_subplot(down, across, number + 1) for number in range(count)]
    return figure, made


def _style() -> dict[str, Any]:
    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    return dict.fromkeys(inked, INK) | {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.alpha": 0.25,
        "grid.color": INK,
    }


def _curves(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    number = 0
    for label, points in lines.items():
        if label == BELADY:
            how: dict[str, Any] = {"color": INK, "linestyle": "--", "label": f"{label} (bound)"}
        else:
            how = {
                "color": _COLOURS[number % len(_COLOURS)],
                "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
                "marker": _MARKS[number % len(_MARKS)],
                "markersize": 4,
                "label": label,
            }
            number += 1
        axes.plot(*zip(*sorted(points), strict=True), linewidth=1.6, **how)
    axes.legend(frameon=False, labelcolor=INK)


def _capacity_axis(axes: Axes) -> None:
    from matplotlib.ticker import NullFormatter, PercentFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(tokens)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity in tokens")


def _sizes(axes: Axes, report: Report) -> None:
    prompt = max(1, report.prompt_tokens)
    sizes = [one.capacity_tokens or 0 for one in report.curve]
    hits = [one.hit_tokens / prompt for one in report.curve]
    bound = [one.belady_tokens / prompt for one in report.curve]
    axes.plot(sizes, hits, color=_COLOURS[0], linewidth=1.8, label="lru")
    axes.plot(sizes, bound, color=INK, linestyle="--", label=f"{BELADY} (bound)")
    here = _place(report.cache.capacity_tokens, report)
    label = f"now, {report.cache.policy}"
    axes.plot(
        [here], [report.whole_tokens / prompt], "o", color=_COLOURS[1], markersize=7, label=label
    )
    _capacity_axis(axes)
    axes.legend(frameon=False, labelcolor=INK)
    axes.set_title("Hit rate by capacity", loc="left")


def _place(capacity: int | None, report: Report) -> int:
    """Where a capacity is drawn: without limit at the end; nothing at all has no place on logarithms."""
    return max(1, report.footprint_tokens if capacity is None else capacity)


def _timeline(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import PercentFormatter

    step = report.requests / max(1, len(report.timeline))
    edges = [step * number for number in range(len(report.timeline) + 1)]
    axes.stairs(report.timeline, edges, color=_COLOURS[0], fill=True, alpha=0.35)
    axes.stairs(report.timeline, edges, color=_COLOURS[0], linewidth=1.4)
    axes.axhline(report.hit_rate, color=INK, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(tokens)
    axes.set_ylim(0, max(0.05, *report.timeline) * 1.05)
    axes.set_xlabel("prompts")
    axes.set_title("Hit rate over time", loc="left")


def _reuse(axes: Axes, report: Report) -> None:
    _bars(axes, report.reuse, tokens)
    axes.set_xlabel("different tokens used in between")
    axes.set_title("Reuse distance", loc="left")


def _lifetimes(axes: Axes, report: Report) -> None:
    assert report.lifetimes is not None
    seconds = report.lifetimes.unit == "seconds"
    _bars(axes, report.lifetimes, duration if seconds else tokens)
    axes.set_xlabel("stored for" if seconds else "stored for so many prompts")
    axes.set_title("Lifetime of chunks that left", loc="left")


def _bars(axes: Axes, histogram: Histogram, shown: Callable[[float], str]) -> None:
    from matplotlib.ticker import PercentFormatter

    all_ = max(1, sum(histogram.tokens))
    places = range(len(histogram.tokens))
    shares = [count / all_ for count in histogram.tokens]
    axes.bar(places, shares, width=0.9, color=_COLOURS[0])
    every = max(1, len(places) // 6)
    axes.set_xticks([place + 0.5 for place in places][::every])
    axes.set_xticklabels([shown(edge) for edge in histogram.edges[1:]][::every])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("share of tokens")


def _first_tokens(axes: Axes, report: Report) -> None:
    cached, seconds = zip(*report.first_tokens, strict=True)
    axes.plot(cached, seconds, "o", color=_COLOURS[0], markersize=3, alpha=0.5, rasterized=True)
    axes.xaxis.set_major_formatter(tokens)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens found in the cache")
    axes.set_ylabel("seconds")
    axes.set_title("Time to first token", loc="left")
