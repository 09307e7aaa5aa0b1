"""Chat logs of all shapes become what a server would have been asked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chunkcache.demo import model_path
from chunkcache.errors import TraceError
from chunkcache.lab.traces.dialogues import Asker, Turn, interleave, messages_of, read_dialogues
from tests.lab.traces import data

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize(
    "entry",
    [
        CHAT,
        {"messages": CHAT},
        {"traj": CHAT, "task": 3},
        {"conversations": [{"from": one["role"], "value": one["content"]} for one in CHAT]},
        [one | {"content": [{"type": "text", "text": one["content"]}]} for one in CHAT],
    ],
    ids=["list", "messages", "traj", "from and value", "parts"],
)
def test_shapes_of_logs(entry, tmp_path: Path) -> None:
    assert messages_of(entry) == CHAT
    lines, whole = tmp_path / "log.jsonl", tmp_path / "log.json"
    lines.write_text(f"{json.dumps(entry)}\n\n{json.dumps(entry)}\n")
    whole.write_text(json.dumps([entry, entry], indent=1))
    assert list(read_dialogues(lines)) == list(read_dialogues(whole)) == [CHAT, CHAT]
    whole.write_text(json.dumps(entry))
    assert list(read_dialogues(whole)) == [CHAT]


def test_other_shapes() -> None:
    asked = [{"role": "user", "content": "Hi"}]
    assert messages_of({"prompt": "Hi"}) == messages_of({"turns": ["Hi"]}) == asked
    (called,) = messages_of([{"role": "assistant", "content": None, "tool_calls": [1]}])
    assert called == {"role": "assistant", "content": "", "tool_calls": [1]}


@pytest.mark.parametrize(
    "line", ["{", "3", "[]", '{"a": 1}', '[{"content": "x"}]', '{"messages": 1}']
)
def test_what_is_no_dialogue_is_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n{line}\n")
    with pytest.raises(TraceError, match="line 2: "):
        list(read_dialogues(path))
    told = []
    assert list(read_dialogues(path, told.append)) == [CHAT]
    assert [one.number for one in told] == [2]
    (tmp_path / "number.json").write_text("5")
    with pytest.raises(TraceError, match="has neither a list"):
        list(read_dialogues(tmp_path / "number.json"))
    with pytest.raises(TraceError, match="cannot be read"):
        list(read_dialogues(tmp_path / "none.json"))


def test_a_turn_is_what_the_template_makes_of_it(tokenizer) -> None:
    first, second = Asker(tokenizer).turns(CHAT)

    def ids(messages):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    assert first == Turn(ids(CHAT[:2]), tokenizer("Hello.", add_special_tokens=False)["input_ids"])
    assert second == Turn(ids(CHAT), [])
    assert [turn.prompt for turn in Asker(tokenizer).turns(CHAT[:2])] == [ids(CHAT[:2])]


def test_without_a_template_turns_extend_each_other() -> None:
    """Roles in lines of their own."""
    tokenizer = AutoTokenizer.from_pretrained(data("tokenizers/gpt2"))
    first, second = Asker(tokenizer).turns(CHAT)
    text = tokenizer.decode(first.prompt)
    assert text == "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"
    whole = first.prompt + first.answer
    assert second.prompt[: len(whole)] == whole


def test_dialogues_in_turns() -> None:
    def dialogue(number: int, turns: int):
        return iter([Turn([number, turn], []) for turn in range(turns)])

    found = interleave([dialogue(0, 3), dialogue(1, 1), dialogue(2, 2)], together=2)
    assert [turn.prompt for turn in found] == [[0, 0], [1, 0], [0, 1], [2, 0], [0, 2], [2, 1]]
    assert list(interleave([], 3)) == []


def test_tools_are_part_of_the_prompt() -> None:
    """Where the template shows them, and where a plain one takes its place."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    entry = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    assert messages_of(entry).tools == [tool] and messages_of(entry["messages"]).tools is None
    tokenizer = AutoTokenizer.from_pretrained(data("tokenizers/gpt2"))
    asker = Asker(tokenizer)
    assert asker.plain
    (turn,) = asker.turns(messages_of(entry))
    assert "weather" in tokenizer.decode(turn.prompt)
    (turn,) = asker.turns(messages_of(entry["messages"]))
    assert "weather" not in tokenizer.decode(turn.prompt)


def test_compressed_logs_are_read(tmp_path: Path) -> None:
    text = (json.dumps(CHAT) + "\n").encode() * 2
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(text))
    assert list(read_dialogues(path)) == [CHAT, CHAT]
    (tmp_path / "log.json.gz").write_bytes(gzip.compress(json.dumps([CHAT]).encode()))
    assert list(read_dialogues(tmp_path / "log.json.gz")) == [CHAT]
    path.write_bytes(gzip.compress(text)[:-12])
    with pytest.raises(TraceError, match="cannot be read"):
        list(read_dialogues(path))


def test_bad_lines_say_where(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"messages": [}\n')
    with pytest.raises(TraceError, match=r"line 1: no JSON: .*, column 15"):
        list(read_dialogues(tmp_path / "log.jsonl"))
