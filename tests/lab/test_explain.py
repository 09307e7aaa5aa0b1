"""Explanations: every token has one cause, and what is promised of a change is what it brings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.lab.analysis.causes import MOVABLE, NEW, REUSED, REWRITTEN
from chunkcache.lab.analysis.explain import Explainer
from chunkcache.lab.analysis.parting import holes
from chunkcache.lab.analysis.places import differing
from chunkcache.lab.analysis.roles import Roles
from chunkcache.lab.analysis.told import Cache
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.recorder import Recorder
from chunkcache.lab.traces.trace import TOKENS, Trace
from chunkcache.lab.views.explain import of_one, sections
from chunkcache.tree import LRU, pack
from tests.lab.traces import data, mooncake

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
TURNS = st.lists(st.tuples(IDS, IDS, st.sampled_from(["", "a"])), min_size=1, max_size=25)


def record(path: Path, turns, **how) -> Trace:
    path.unlink(missing_ok=True)
    with Recorder(path, **how) as recorder:
        for tokens, answer, tenant in turns:
            recorder.write(tokens, answer, tenant=tenant)
    return Trace(path)


def letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def common(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


# -- every token has a cause


@settings(max_examples=50, deadline=None)
@given(TURNS, st.one_of(st.none(), st.integers(0, 20)), st.sampled_from([1, 2, 3]))
def test_causes_add_up(
    tmp_path_factory: pytest.TempPathFactory, turns, capacity: int | None, chunk: int
) -> None:
    trace = record(tmp_path_factory.mktemp("t") / "t", turns)
    explainer = Explainer(trace, Cache(capacity, "lru", chunk))
    found = explainer.explain()
    assert sum(found.tokens.values()) == found.prompt_tokens == sum(len(t) for t, _, _ in turns)
    size = None if capacity is None else capacity // chunk
    simulator = Simulator(TOKENS, chunk, size, LRU())
    assert found.tokens.get(REUSED, 0) == simulator.run(trace).hit_tokens
    for parting, (tokens, _, tenant) in zip(explainer.partings(), turns, strict=True):
        before = [p + a for p, a, of in turns[: parting.number - 1] if of == tenant]
        longest = max((common(tokens, one) for one in before), default=0)
        assert parting.known == min(longest, len(tokens) - 1)
        assert parting.whole == parting.known - parting.known % chunk
        assert all(gain >= 0 for gain in parting.gains(chunk))


@pytest.mark.parametrize("capacity", [None, 3_000_000])
def test_blocks_are_explained_too(capacity: int | None) -> None:
    trace, requests = mooncake()
    found = Explainer(trace, Cache(capacity, "lru", 512)).explain()
    hit = {None: 54_098_411, 3_000_000: 20_087_299}[capacity]
    assert found.tokens[REUSED] == hit
    assert found.tokens.get("evicted", 0) == 54_098_411 - hit
    assert found.tokens[NEW] == 144_793_823 - 54_098_411
    assert found.groups == [] and found.requests == len(requests)


# -- holes


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), max_size=90),
    st.lists(st.integers(0, 3), max_size=90),
    st.integers(0, 200),
)
def test_behind_a_hole_texts_are_the_same(
    head: list[int], one: list[int], other: list[int], length: int
) -> None:
    tail = [100 + n for n in range(length)]
    prompt, known = head + one + tail, head + other + tail
    at = common(prompt, known)
    here = there = at
    for hole in holes(pack(prompt), pack(known), len(prompt)):
        assert (hole.at, hole.there) == (here, there) and hole.run > 0
        here, there = hole.at + hole.length, hole.there + hole.old
        assert prompt[here : here + hole.run] == known[there : there + hole.run]
        here, there = here + hole.run, there + hole.run
        assert prompt[here : here + 1] != known[there : there + 1] or here == len(prompt)


@pytest.mark.parametrize(("hole", "run"), [(1, 40), (57, 40), (300, 200), (1500, 1000)])
def test_holes_of_all_sizes_are_found(hole: int, run: int) -> None:
    tail = [1000 + n for n in range(run)]
    prompt = [1] * 10 + [2] * hole + tail
    known = [1] * 10 + [3] * (hole + 7) + tail
    (found,) = holes(pack(prompt), pack(known), len(prompt))
    assert found == (10, hole, 10, hole + 7, run)


@pytest.mark.parametrize(("hole", "run"), [(1, 20), (300, 100), (5000, 1000)])
def test_chance_is_no_text(hole: int, run: int) -> None:
    tail = [1000 + n for n in range(run)]
    assert not holes(pack([1, *[2] * hole, *tail]), pack([1, *[3] * hole, *tail]), 10**6)


# -- what is promised


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=12),
    st.integers(0, 150),
    st.integers(40, 400),
    st.integers(1, 60),
    st.sampled_from([1, 16, 64]),
)
def test_moving_saves_what_was_promised(
    tmp_path_factory: pytest.TempPathFactory,
    dates: list[int],
    before: int,
    behind: int,
    question: int,
    chunk: int,
) -> None:
    """A date in the middle of what all prompts share, and the same prompts with the date behind it."""
    head = [10_000 + n for n in range(before)]
    text = [20_000 + n for n in range(behind)]
    asked = [[30_000 + 100 * n + m for m in range(question)] for n in range(len(dates))]
    middle, last = [], []
    for date, own in zip(dates, asked, strict=True):
        day = [40_000 + date] * 3
        middle.append((head + day + text + own, [], ""))
        last.append((head + text + day + own, [], ""))
    folder = tmp_path_factory.mktemp("t")
    now = Explainer(record(folder / "a", middle), Cache(None, "lru", chunk)).explain()
    then = Explainer(record(folder / "b", last), Cache(None, "lru", chunk)).explain()
    # A date that came before is known up to its question in both; what follows it counts there.
    gained = then.tokens.get(REUSED, 0) - now.tokens.get(REUSED, 0)
    repeated = sum(date in dates[:n] for n, date in enumerate(dates))
    assert now.tokens.get(MOVABLE, 0) - chunk * repeated <= gained <= now.tokens.get(MOVABLE, 0)
    if not repeated:
        assert gained == now.tokens.get(MOVABLE, 0)
    if now.tokens.get(MOVABLE):
        (group,) = now.groups
        assert group.tokens == now.tokens[MOVABLE]
        assert group.where == f"token {before + 1:,}"


def test_rewritten_history_is_told_from_dates(tmp_path: Path) -> None:
    """A turn whose thinking is left out of the next prompt."""
    first = list(range(100, 200))
    think, answer, asked = [1] * 20, list(range(300, 400)), list(range(500, 540))
    turns = [(first, think + answer, ""), (first + answer + asked, [], "")]
    found = Explainer(record(tmp_path / "t", turns), Cache(None, "lru", 10)).explain()
    assert found.tokens == {NEW: 100 + 40, REUSED: 100, REWRITTEN: 100}
    assert found.groups[0].rewritten
    told = sections(found)[-1].rows
    assert any("lint-template" in line for (line,) in told)


def test_what_left_is_told_from_what_is_new(tmp_path: Path) -> None:
    prompts = [list(range(n * 100, n * 100 + 50)) for n in (0, 1, 2, 0)]
    trace = record(tmp_path / "t", [(tokens, [], "") for tokens in prompts])
    found = Explainer(trace, Cache(100, "lru", 10)).explain()
    assert found.tokens == {NEW: 160, "evicted": 40}
    assert any("had left" in line for (line,) in sections(found)[-1].rows)


# -- in words


@pytest.mark.parametrize(
    ("line", "part", "text", "kinds"),
    [
        ("Today is 2026-11-21.", "21", "2026-11-21.", ("date",)),
        ("Today is 21 November 2026", "21", "21", ("date",)),
        ("Today is Nov. 21, 2026", "21", "21", ("date",)),
        ("It is Tuesday.", "Tues", "Tuesday.", ("date",)),
        ("今天是2026年11月21日", "21", None, ("date",)),
        ("Now: 14:05:33 UTC", "05:3", "14:05:33", ("time",)),
        ("Now: 9 pm", "9", "9", ("time",)),
        ("Now: 2026-11-03T09:30:00Z", "09", "2026-11-03T09:30:00Z", ("time",)),
        ("Now: 2026-11-03T09:30:00Z", "03T09", "2026-11-03T09:30:00Z", ("time", "date")),
        ("id 3fa85f64-5717-4562-b3fc-2c963f66afa6 end", "5717", None, ("identifier",)),
        ("Session sess_9f8e7d6c5b4a: go", "9f8e7d", None, ("identifier",)),
        ("Mail anna@example.org now", "anna", "anna@example.org", ("address",)),
        ("You have 4711 points", "71", "4711", ("number",)),
        ("See decision 12", "12", "12", ("number",)),
        ("Market 7 is open", "7", "7", ("number",)),
        ("You talk to Anna today", "Anna", "Anna", ("text",)),
    ],
)
def test_kinds(line: str, part: str, text: str | None, kinds: tuple[str, ...]) -> None:
    ids = list(map(ord, line))
    found = differing(ids, line.index(part), len(part), letters, Roles([]))
    assert found.kinds == kinds
    assert text is None or found.text == text
    assert (found.before + found.text + found.after).replace(" ", "") in line.replace(" ", "")


@pytest.mark.parametrize(
    ("prompt", "where"),
    [
        ("<|im_start|>system\nA\nB X", "line 2 of the system prompt"),
        ("<|start_header_id|>system<|end_header_id|>\n\nA\nB X", "line 2 of the system prompt"),
        ("<|system|>A\nB<|end|><|user|>Hello X", "line 1 of the user message"),
        ("<|im_start|>system\nA<|im_end|>\n<|im_start|>user\nB X", "line 1 of the user message"),
        ("<|im_start|>system\nA\nUser: B\nX", "line 3 of the system prompt"),
        ("<|im_start|>system\n<context>\n<date>X", "line 2 of the system prompt"),
        ("<|im_start|>system\n\n\nX", "line 3 of the system prompt"),
        ("<bos><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\nB\nX",
         "line 2 of the assistant message"),
        ("<s>[INST] <<SYS>>\nA\nX", "line 2 of the system prompt"),
        ("<s>[INST] A [/INST] B X", "line 1 of the assistant message"),
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A\nX", "line 2 of the assistant message"),
        ("<\uff5cUser\uff5c>A\nX", "line 2 of the user message"),
        ("<|start|>system<|message|>A X", "line 1 of the system prompt"),
        ("System: A\nUser: B\nC\nD X", "line 3 of the user message"),
        ("A\nB\nC X", "line 3 of the prompt"),
        ("The user is kind.\nX", "line 2 of the prompt"),
    ],
)  # fmt: skip
def test_places(prompt: str, where: str) -> None:
    ids = list(map(ord, prompt))
    found = differing(ids, len(ids) - 1, 1, letters, Roles([prompt]))
    assert found.where == where
    role = Roles([prompt]).at(ids, len(ids) - 1, letters)
    assert (role or "prompt") in found.where


def test_one_prompt_is_shown_with_its_context(tmp_path: Path) -> None:
    texts = [
        "You help people. Date: 1 May. " + "Be kind. " * 9,
        "You help people. Date: 2 May. " + "Be kind. " * 9,
    ]
    trace = record(tmp_path / "t", [(list(map(ord, text)), [], "") for text in texts])
    explainer = Explainer(trace, Cache(None, "lru", 8), decode=letters)
    parting = explainer.partings()[1]
    assert (parting.known, parting.other) == (texts[1].index("2"), 1)
    before, known, new = explainer.around(parting) or ("", "", "")
    assert texts[0].count(before + known) == texts[1].count(before + new) == 1
    rows = [
        row for section in of_one(parting, explainer.around(parting), 8) for row in section.rows
    ]
    assert ("longest known prefix", "23, of prompt 1") in rows


# -- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Chats under one system prompt with the time in it."""
    policy = " ".join(f"Rule {n}: be kind to customer {n}." for n in range(40))
    path = tmp_path / "log.jsonl"
    with path.open("w") as file:
        for n in range(12):
            system = f"You are an agent.\nTime: 2026-11-21 {n:02d}:{4 * n:02d}\n{policy}"
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": f"Question {n}?"},
                {"role": "assistant", "content": "Yes."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_a_chat_log_is_explained(log: Path) -> None:
    done = run(log, "--tokenizer", "demo", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["requests"], found["bad_lines"]) == (12, 0)
    assert sum(found["tokens"].values()) == found["prompt_tokens"]
    (group,) = found["groups"]
    assert group["requests"] == 11 and group["kind"] in ("time", "date and time")
    assert group["where"] == "line 2 of the system prompt"
    assert found["tokens"][MOVABLE] > 0.7 * found["prompt_tokens"]
    text = run(log, "--tokenizer", "demo").stdout
    assert "Move the" in text and "line 2 of the system prompt" in text and "\x1b" not in text
    assert run(log, "--tokenizer", "demo", "--markdown").stdout.startswith("# log.jsonl")


def test_one_request_of_a_log(log: Path) -> None:
    done = run(log, "--tokenizer", "demo", "--request", 3, "--json")
    found = json.loads(done.stdout)
    assert found["number"] == 3 and found["context"]["known"] != found["context"]["prompt"]
    assert "first that differs" in run(log, "--tokenizer", "demo", "--request", 3).stdout
    assert "none of number 13" in run(log, "--tokenizer", "demo", "--request", 13).stderr


def test_a_log_without_a_tokenizer_is_told(log: Path) -> None:
    done = run(log)
    assert done.exit_code == 1 and "--tokenizer" in done.stderr


def test_hashes_have_no_text(tmp_path: Path) -> None:
    turns = [([1, 2, 3, 4, n, *range(10, 80)], [], "") for n in range(5)]
    record(tmp_path / "t", turns, block=2)
    done = run(tmp_path / "t", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["groups"] == [] and found["tokens"] == {NEW: 5 * 75 - 4 * 4, REUSED: 4 * 4}
    assert run(tmp_path / "t", "--request", 2).exit_code == 0


def test_wrong_usage(log: Path) -> None:
    assert run(log, "--tokenizer", "demo", "--json", "--markdown").exit_code == 2
    assert run(log, "--tokenizer", "demo", "--capacity", "many").exit_code == 2
    assert run(log, "--tokenizer", "demo", "--policy", "never").exit_code == 1


def test_real_dialogues_have_nothing_to_move(tmp_path: Path) -> None:
    """Agents whose prompts grow turn by turn: what differs are their customers."""
    dialogues = json.loads(data("conversations/tau_airline_gpt4o.json").read_text())[:40]
    log = tmp_path / "log.json"
    log.write_text(json.dumps(dialogues))
    found = json.loads(run(log, "--tokenizer", "demo", "--json").stdout)
    assert found["tokens"].get(MOVABLE, 0) < 0.005 * found["prompt_tokens"]
    assert found["tokens"][REUSED] > 0.9 * found["prompt_tokens"]


# -- odd traces and odd prompts


def chats(turns: list[list[tuple[str, str]]]) -> list[tuple[list[int], list[int], str]]:
    """Prompts of ChatML, in letters."""
    texts = [
        "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in one) for one in turns
    ]
    return [(list(map(ord, text)), [], "") for text in texts]


def explained(folder: Path, turns, cache: Cache | None = None):
    trace = record(folder / "t", turns)
    return Explainer(trace, cache or Cache(None, "lru", 16), decode=letters).explain()


def test_what_was_reused_cannot_be_gained_again(tmp_path: Path) -> None:
    """A cache knew more than the trace shows: everything was preloaded."""
    tail = list(range(1000, 1200))
    with Recorder(tmp_path / "t") as recorder:
        for day in range(4):
            recorder.write([1, 2, day, *tail], reuse={"cached_tokens": 192, "reason": "never seen"})
    found = Explainer(Trace(tmp_path / "t"), chunk=64).explain()
    assert found.tokens == {REUSED: 4 * 192, NEW: 4 * 11}


def test_what_is_said_the_same_again_is_no_template(tmp_path: Path) -> None:
    """Sampled answers, after which all users ask the same."""
    rules, asked = (
        "Be kind. " * 20,
        "And what else do you know about bicycles and their tubes? " * 4,
    )
    turns = [
        [("system", rules), ("user", "Hi"), ("assistant", f"I am number {n}."), ("user", asked)]
        for n in range(8)
    ]
    found = explained(tmp_path, chats(turns))
    assert MOVABLE not in found.tokens and found.groups == []
    turns = [[("system", f"Number {n}. {rules}"), ("user", asked)] for n in range(8)]
    assert explained(tmp_path, chats(turns)).groups


def test_the_longest_prefix_and_the_most_alike_may_be_two(tmp_path: Path) -> None:
    head, text = [7000 + n for n in range(60)], [8000 + n for n in range(200)]
    first, second = [*head, *range(9000, 9100)], [5, 6, *text]
    trace = record(tmp_path / "t", [(one, [], "") for one in (first, second, [*head, *text])])
    parting = Explainer(trace, Cache(None, "lru", 10)).partings()[2]
    assert (parting.known, parting.other, parting.like) == (60, 1, 2)


def test_later_places_are_not_promised_alone(tmp_path: Path) -> None:
    """Two things that differ: moving the second alone brings nothing."""
    texts = [f"Day {n}. {'Look. ' * 9}You are number {n * 7}. {'Ask me. ' * 40}" for n in range(9)]
    found = explained(tmp_path, [(list(map(ord, text)), [], "") for text in texts])
    (first, second) = sorted(found.groups, key=lambda group: -group.alone)
    assert first.alone == first.tokens > 0 and second.alone == 0 < second.tokens
    lines = [line for (line,) in sections(found)[-1].rows]
    assert lines[0].startswith("Move") and lines[1].startswith("Then move"), lines


def test_promises_name_the_room_they_need(tmp_path: Path) -> None:
    turns = [([n, *range(100 * n, 100 * n + 90)], [], "") for n in range(5)] * 2
    turns = [([m, *tokens], [], "") for m, (tokens, _, _) in enumerate(turns)]
    found = explained(tmp_path, turns, Cache(64, "lru", 16))
    assert any("room for 64 tokens" in line for (line,) in sections(found)[-1].rows)
    found = explained(tmp_path, turns, Cache(None, "lru", 16))
    assert not any("room" in line for (line,) in sections(found)[-1].rows)


def test_prompts_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    nasty = "\x1b]0;pwn\x07\x1b[2J\u202e"
    texts = [f"You are {nasty}{n}{nasty}. {'Be kind. ' * 20}" for n in range(5)]
    found = explained(tmp_path, [(list(map(ord, text)), [], "") for text in texts])
    cells = [cell for section in sections(found) for row in section.rows for cell in row]
    assert any("You are" in cell for cell in cells)
    assert not any(mark in cell for cell in cells for mark in "\x1b\x07\u202e")


def test_text_that_repeats_itself_is_looked_at_quickly(tmp_path: Path) -> None:
    """Tables and rules: one token again and again, so that every window is everywhere."""
    one = [[9] * 20 + [n + m] for n in range(60) for m in (1000,)]
    prompts = [
        [5, shift, *(token + shift % 3 for row in one for token in row)] for shift in range(20)
    ]
    trace = record(tmp_path / "t", [(tokens, [], "") for tokens in prompts])
    found = Explainer(trace, Cache(None, "lru", 16)).explain()
    assert sum(found.tokens.values()) == found.prompt_tokens
    assert found.tokens[MOVABLE] > 0


def test_hashes_do_not_say_that_nothing_could_be_moved(tmp_path: Path) -> None:
    turns = [([1, 2, 3, 4, n, *range(10, 80)], [], "") for n in range(5)]
    found = Explainer(record(tmp_path / "t", turns, block=2)).explain()
    told = " ".join(line for (line,) in sections(found)[-1].rows)
    assert "cannot be seen in hashes" in told and "Nothing recurs" not in told
    assert [(one.known, one.requests) for one in found.branches] == [(4, 4)]


def test_long_text_is_no_number() -> None:
    line = "Source [3]: the shop in Lyon opens at nine on most days, says the manual"
    ids = list(map(ord, line))
    assert differing(ids, 7, 40, letters, Roles([])).kinds == ("text",)
    assert differing(ids, 8, 1, letters, Roles([])).kinds == ("number",)


def test_a_tokenizer_without_a_template_is_told(log: Path) -> None:
    done = run(log, "--tokenizer", data("tokenizers/gpt2"))
    assert done.exit_code == 0 and "no chat template" in done.stderr
    assert "no chat template" not in run(log, "--tokenizer", "demo").stderr


def test_what_stands_in_front_can_be_text(tmp_path: Path) -> None:
    """Documents before instructions: these are to be put first."""
    rules = "Answer in one sentence, from the documents only, and name your source. " * 6
    choice = random.Random(0)
    documents = ["".join(choice.choices("abcdefghij ", k=200)) for _ in range(9)]
    turns = [[("user", f"{document}\n{rules}")] for document in documents]
    found = explained(tmp_path, chats(turns))
    told = " ".join(line for (line,) in sections(found)[-1].rows)
    assert 'Put "Answer in one sentence' in told and "line 1 of the user message" in told
