"""Reports: sums that add up, bounds that hold, and what people see of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import ConfigError, TraceError
from chunkcache.lab.analysis.making import make_report
from chunkcache.lab.analysis.pace import Pace
from chunkcache.lab.analysis.report import Report
from chunkcache.lab.analysis.told import Cache
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.simulation.sweep import Result
from chunkcache.lab.traces.recorder import History, Recorder
from chunkcache.lab.traces.trace import Trace
from chunkcache.lab.views.figures import of_report, of_results, save, to_svg
from chunkcache.lab.views.page import to_page
from chunkcache.lab.views.report import advice, outlook, sections
from chunkcache.lab.views.sections import bar, to_markdown, to_terminal
from chunkcache.tree import named_policy
from tests.lab.traces import data

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
TURNS = st.lists(st.tuples(IDS, IDS, st.sampled_from(["", "bot", "<b>"])), min_size=1, max_size=25)


def record(folder: Path, turns, **told) -> Trace:
    """A trace of tokens; `told` of each request."""
    path = folder / "trace.jsonl"
    path.unlink(missing_ok=True)
    with Recorder(path) as recorder:
        for number, (tokens, answer, name) in enumerate(turns):
            recorder.write(tokens, answer, time=number, prompt=name, tenant=name, **told)
    return Trace(path)


def simulated(trace: Trace, cache: Cache) -> Simulator:
    size = None if cache.capacity_tokens is None else cache.capacity_tokens // cache.chunk_size
    simulator = Simulator(trace.form, cache.chunk_size, size, named_policy(cache.policy))
    simulator.run(trace)
    return simulator


@settings(max_examples=40, deadline=None)
@given(
    TURNS,
    st.one_of(st.none(), st.integers(0, 20)),
    st.sampled_from([1, 2]),
    st.sampled_from(["lru", "lfu", "s3fifo"]),
)
def test_everything_adds_up(
    tmp_path_factory: pytest.TempPathFactory, turns, capacity: int | None, chunk: int, policy: str
) -> None:
    trace = record(tmp_path_factory.mktemp("t"), turns)
    cache = Cache(capacity, policy, chunk)
    report = make_report("a", trace, cache)
    simulator = simulated(trace, cache)
    assert (report.source, report.cache) == ("simulated", cache)
    assert report.cached_tokens == report.whole_tokens == simulator.outcome.hit_tokens
    assert report.prompt_tokens == sum(len(tokens) for tokens, _, _ in turns)
    assert sum(report.misses.values()) == report.prompt_tokens - report.cached_tokens
    assert sum(report.tiers.values()) == report.cached_tokens
    for parts in (report.prompts, report.tenants):
        assert sum(part.requests for part in parts.values()) == report.requests == len(turns)
        assert sum(part.prompt_tokens for part in parts.values()) == report.prompt_tokens
        assert sum(part.cached_tokens for part in parts.values()) == report.cached_tokens
    assert report.cached_tokens <= report.belady_tokens <= report.unlimited_tokens
    assert report.misses.get("evicted", 0) == report.unlimited_tokens - report.cached_tokens
    left = 0 if report.lifetimes is None else sum(report.lifetimes.tokens)
    assert left == simulator.evicted * chunk
    assert sum(report.reuse.tokens) >= report.unlimited_tokens


@settings(max_examples=30, deadline=None)
@given(TURNS, st.one_of(st.none(), st.integers(0, 20)))
def test_other_sizes_are_what_a_simulation_says(
    tmp_path_factory: pytest.TempPathFactory, turns, capacity: int | None
) -> None:
    trace = record(tmp_path_factory.mktemp("t"), turns)
    report = make_report("a", trace, Cache(capacity, "lru", 2))
    sizes = [one.capacity_tokens for one in report.sizes]
    assert capacity in sizes and sizes[-1] is None
    for one in report.sizes:
        found = simulated(trace, Cache(one.capacity_tokens, "lru", 2)).outcome
        assert one.hit_tokens == found.hit_tokens <= one.belady_tokens
    bounds = [one.belady_tokens for one in report.sizes]
    assert bounds == sorted(bounds)
    assert [one.hit_tokens for one in report.curve] == sorted(
        one.hit_tokens for one in report.curve
    )
    assert all(one.hit_tokens <= one.belady_tokens for one in report.curve)


def test_the_production_trace_has_the_published_figures() -> None:
    trace = Trace(data("traces/mooncake_conversation.jsonl"))
    report = make_report("mooncake", trace, Cache(5_120_000, "lru", 512), price=2.0)
    assert (report.requests, report.prompt_tokens) == (12_031, 144_793_823)
    assert (report.unlimited_tokens, report.cached_tokens) == (54_098_411, 31_238_981)
    assert [one.hit_tokens for one in report.sizes][-1] == 54_098_411
    assert report.seconds == pytest.approx(3537, abs=1)
    assert report.money is not None
    assert report.money.saved == pytest.approx(2 * 31.238981)
    assert report.money.saved + report.money.spent == pytest.approx(2 * 144.793823)


# -- what a cache recorded


def recorded(folder: Path, **more) -> Trace:
    """Three prompts of 8 tokens: new, reused but for what was evicted, reused in the middle of a chunk."""
    path = folder / "trace.jsonl"
    with Recorder(path) as recorder:
        recorder.about(
            model="m", policy="lru", chunk_size=2, capacity_tokens=6, token_bytes=1, mode="exact"
        )
        for time, cached, reason, tiers in (
            (0, 0, "never seen", {}),
            (1, 4, "evicted", {"device": 2, "disk": 2}),
            (2, 5, "never seen", {"device": 5}),
        ):
            last = 7 if time < 2 else 0
            reuse = {"cached_tokens": cached, "reason": reason, "tiers": tiers, "divergence": None}
            recorder.write(
                [1, 2, 3, 4, 5, 6, last, 8],
                time=time,
                reuse=reuse,
                seconds=8.0 - cached,
                first_token=9.0 - cached,
                **more,
            )
    return Trace(path)


def test_a_recorded_trace_tells_what_the_cache_did(tmp_path: Path) -> None:
    report = make_report("a", recorded(tmp_path))
    assert report.source == "recorded"
    assert report.cache == Cache(6, "lru", 2, "m")
    assert (report.cached_tokens, report.whole_tokens) == (9, 8)
    assert report.tiers == {"device": 7, "disk": 2}
    # Of the second prompt two tokens more were known; its last one is never a hit.
    assert report.misses == {"never seen": 8 + 2 + 3, "evicted": 2}
    assert report.token_seconds == pytest.approx(1.0)
    assert report.saved_seconds == pytest.approx(9.0)
    assert report.first_tokens == [(0, 9.0), (4, 5.0), (5, 4.0)]
    assert report.seconds == 2


def test_another_cache_can_be_asked_for(tmp_path: Path) -> None:
    report = make_report("a", recorded(tmp_path), Cache(None, "lru", 2))
    assert report.source == "simulated"
    assert report.cached_tokens == report.unlimited_tokens == 6 + 6
    assert report.token_seconds is None  # the times are of another cache's work


def test_a_history_forgets_what_is_old() -> None:
    history = History(2, 1000)
    history.about(capacity_tokens=4)
    for number in range(100):
        history.write([number, 1, 2, 3], time=number)
    found = history.to_bytes()
    assert len(found) < 1200
    lines = [json.loads(line) for line in found.splitlines()]
    assert lines[0]["block_size"] == 2 and lines[1]["cache"] == {"capacity_tokens": 4}
    assert [line["timestamp"] for line in lines[2:]] == [
        1000 * number for number in range(100 - len(lines) + 2, 100)
    ]


def test_an_empty_history_has_no_report(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(History(2, 0).to_bytes())
    with pytest.raises(TraceError, match="no request"):
        Trace(path)


def test_chunks_must_be_made_of_blocks() -> None:
    trace = Trace(data("traces/mooncake_conversation.jsonl"))
    with pytest.raises(ConfigError, match="multiple"):
        make_report("a", trace, chunk=700)


# -- the pace


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=30),
    st.floats(0, 1),
    st.floats(1e-5, 1e-2),
)
def test_the_pace_of_a_line_is_its_slope(tokens: list[int], fixed: float, pace: float) -> None:
    found = Pace.of((count, fixed + pace * count) for count in tokens).token_seconds
    if len(set(tokens)) > 1:
        assert found == pytest.approx(pace, rel=1e-3)
    else:
        assert found == pytest.approx(pace + fixed / tokens[0])


def test_no_pace_without_tokens() -> None:
    assert Pace().token_seconds is None
    assert Pace.of([(10, 2.0), (20, 1.0)]).token_seconds == pytest.approx(0.1)


# -- what people see


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report(tmp_path: Path) -> Report:
    trace = recorded(tmp_path, prompt="<script>alert(1)</script>|`x`")
    return make_report("a <trace>", trace, price=1.0)


def test_a_page_needs_nothing_and_runs_nothing(report: Report) -> None:
    text = to_page(report)
    page = _Page()
    page.feed(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>|`x`" in page.text and "a <trace>" in page.text
    links = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")
    ]
    assert links and all(link is not None and link.startswith("data:") for link in links)
    assert "60.0%" not in page.text and "37.5%" in page.text


def test_markdown_keeps_names_in_their_cells(report: Report) -> None:
    text = to_markdown(report.name, sections(report))
    assert "\\<script\\>" in text and "\\|\\`x\\`" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
            assert len(cells) == 1


def test_the_terminal_shows_each_section(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    from chunkcache.lab.views.tables import console

    console().print(to_terminal(sections(report)))
    text = capsys.readouterr().out
    for section in sections(report):
        assert section.title in text
    assert "<script>" in text and "9.00 s, at" in text
    assert {one.title for one in outlook(report)} < {one.title for one in sections(report)}


def test_figures_are_pictures(report: Report, tmp_path: Path) -> None:
    for suffix in ("svg", "png", "pdf"):
        save(of_report(report), tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"\.svg"):
        save(of_report(report), tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(of_report(report), tmp_path / "missing" / "a.svg")
    results = [
        Result("lru", size, 1, 10, 5, 0.5, 50.0, 1, None, None, {}) for size in (1, 10, None)
    ]
    results += [
        Result("belady", size, 1, 10, 9, 0.9, 100.0, 1, None, None, {}) for size in (1, 10, None)
    ]
    root = ElementTree.fromstring(to_svg(of_results(results)))
    texts = {"".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"lru", "belady (bound)"} <= texts


def test_figures_are_the_same_each_time(report: Report) -> None:
    assert to_svg(of_report(report)) == to_svg(of_report(report))


@pytest.mark.parametrize(
    ("turns", "capacity", "said"),
    [
        ([(list(range(40)), [], "")] * 20, None, "40 tokens would be enough"),
        ([([n, n, n, n], [], "") for n in range(40)], None, "never seen"),
        ([([n % 5, 1, 2, 3, 4], [], "") for n in range(50)], 16, "tokens would hit"),
    ],
)
def test_advice_follows_from_the_figures(
    tmp_path: Path, turns, capacity: int | None, said: str
) -> None:
    found = advice(make_report("a", record(tmp_path, turns), Cache(capacity, "lru", 1)))
    assert any(said in line for line in found), found


def test_bars() -> None:
    assert bar(1, 0) == "" and len(bar(5, 5)) == 24
    assert [len(bar(part, 100)) for part in (1, 50, 100)] == [1, 12, 24]


# -- odd traces and odd prompts


def test_lifetimes_are_those_of_a_clock_that_began_long_ago(tmp_path: Path) -> None:
    """Recorded traces count seconds since 1970."""
    with Recorder(tmp_path / "t") as recorder:
        for number in range(6):
            recorder.write([number] * 8, time=1.7e9 + number)
    lives = make_report("a", Trace(tmp_path / "t"), Cache(16, "lru", 4)).lifetimes
    assert lives is not None and lives.unit == "seconds"
    assert lives.edges[-1] <= 8 and sum(lives.tokens) == 4 * 8


def test_short_prompts_of_whole_blocks_are_new_not_too_short(tmp_path: Path) -> None:
    line = {"input_length": 300, "output_length": 1, "hash_ids": [7]}
    (tmp_path / "t").write_text(f"{json.dumps(line)}\n" * 3)
    report = make_report("a", Trace(tmp_path / "t"))
    assert (report.cached_tokens, report.misses) == (600, {"never seen": 300})


def test_nothing_is_a_prompt_too(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t") as recorder:
        for tokens in ([], [1], [], [1]):
            recorder.write(tokens)
    report = make_report("a", Trace(tmp_path / "t"), Cache(None, "lru", 1))
    assert (report.unlimited_tokens, report.belady_tokens, report.cached_tokens) == (0, 0, 0)
    assert report.prompt_tokens == sum(report.misses.values()) == 2


def test_a_policy_that_forgets_does_so_without_limit(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t") as recorder:
        for number in range(5):
            recorder.write(list(range(9)), time=100 * number)
    report = make_report("a", Trace(tmp_path / "t"), Cache(100, "ttl:10", 4))
    assert [one.hit_tokens for one in report.sizes] == [0] * len(report.sizes)
    assert report.unlimited_tokens == 4 * 8
    assert report.misses == {"never seen": 13, "evicted or expired": 32}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("capacity", [0, None])
def test_figures_of_caches_that_hold_nothing(tmp_path: Path, capacity: int | None) -> None:
    with Recorder(tmp_path / "t") as recorder:
        for number in range(3):
            recorder.write([number] * 3)
    report = make_report("a", Trace(tmp_path / "t"), Cache(capacity, "lru", 64))
    assert to_svg(of_report(report)) and advice(report)


def test_names_cannot_act_on_a_terminal_or_a_page(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t") as recorder:
        for tenant in ("\x1b[2Ja", "b\ud800\u202e"):
            recorder.write([1, 2, 3], prompt=tenant, tenant=tenant)
    report = make_report("a\x1b", Trace(tmp_path / "t"))
    markdown = to_markdown(report.name, sections(report))
    for text in (to_page(report), str(sections(report))):
        assert not any(mark in text for mark in "\x1b\ud800\u202e")
    assert "\x1b" not in "".join(markdown.splitlines()[1:])
    to_page(report).encode()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"reuse": {"cached_tokens": 4}}, "cannot have been cached"),
        ({"reuse": {"cached_tokens": -1}}, "cannot have been cached"),
        ({"reuse": {"cached_tokens": 10**30}}, "cannot have been cached"),
        ({"reuse": {"cached_tokens": 1, "tiers": {"disk": "many"}}}, "tiers"),
        ({"reuse": {"cached_tokens": 1, "tiers": ["disk"]}}, "tiers"),
        ({"reuse": {"cached_tokens": 1.0}}, "cached_tokens"),
        ({"reuse": 3}, "cached_tokens"),
        ({"seconds": 1e308}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"first_token": "soon"}, "first_token"),
    ],
)
def test_records_that_cannot_be_are_told(tmp_path: Path, fields, why: str) -> None:
    (tmp_path / "t").write_text(json.dumps({"tokens": [1, 2, 3]} | fields) + "\n")
    with pytest.raises(TraceError, match=why):
        list(Trace(tmp_path / "t"))


def test_caches_that_cannot_be_are_not_believed(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t") as recorder:
        recorder.about(capacity_tokens=-5, chunk_size=10**30, policy=None, model=7)
        recorder.write([1, 2, 3], reuse={"cached_tokens": 0})
    assert make_report("a", Trace(tmp_path / "t")).cache == Cache(None, "lru", 64, "7")


def test_requests_with_a_cache_of_their_own_are_requests(tmp_path: Path) -> None:
    line = {"input_length": 512, "output_length": 1, "hash_ids": [7], "cache": {"hit": 1}}
    (tmp_path / "t").write_text(f"{json.dumps(line)}\n" * 3)
    assert len(list(Trace(tmp_path / "t"))) == 3
    (tmp_path / "log").write_text(json.dumps({"messages": [], "tokens": [1, 2]}) + "\n")
    with pytest.raises(TraceError, match="no request"):
        Trace(tmp_path / "log")


def test_a_file_of_hashes_tells_no_finer_place_than_a_block(tmp_path: Path) -> None:
    reuse = {"cached_tokens": 13, "divergence": 13, "tiers": {"device": 9, "disk": 4}, "reason": ""}
    with Recorder(tmp_path / "t", block=4) as recorder:
        recorder.write(list(range(20)), reuse=reuse)
    (one,) = Trace(tmp_path / "t")
    assert one.reuse == reuse | {
        "cached_tokens": 12, "divergence": 12, "tiers": {"device": 9, "disk": 3},
    }  # fmt: skip
