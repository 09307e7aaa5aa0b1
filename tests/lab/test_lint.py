"""Every way in which a template rewrites history is found, and a template that does not is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner
from transformers import AutoTokenizer

from chunkcache.demo import model_path
from chunkcache.errors import ConfigError
from chunkcache.lab.analysis.lint import Finding, Linter, Sample, samples
from tests.lab.traces import data

START = "{% for m in messages %}<|{{ m.role }}|>"
END = "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
GOOD = f"{START}{{{{ m.content }}}}{END}"
STRIPPED = f"{START}{{{{ m.content | trim }}}}{END}"
DATED = "{{ strftime_now('%d %B %Y') }}\n" + GOOD
FORGETFUL = f"{START}{{{{ m.content.split('</think>')[-1] }}}}{END}"
OPENED = GOOD.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")
NUMBERED = f"{{{{ messages | length }}}} messages\n{GOOD}"
SYSTEMLESS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GOOD
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


def found(tokenizer, template: str | None) -> list[Finding]:
    return Linter(tokenizer, template).lint(samples()).findings


@pytest.mark.parametrize("template", [None, GOOD])
def test_what_extends_is_left_alone(tokenizer, template: str | None) -> None:
    lint = Linter(tokenizer, template).lint(samples())
    assert (lint.findings, lint.refused, lint.turns) == ([], {}, 12)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (STRIPPED, "spaces around the answer are left out"),
        (DATED, "the date is in the prompt"),
        (FORGETFUL, "thinking is left out of history"),
        (OPENED, "the prompt opens thinking that history does not have"),
        (NUMBERED, "what was said before is rendered otherwise"),
    ],
)
def test_what_does_not_is_told(tokenizer, template: str, why: str) -> None:
    findings = found(tokenizer, template)
    others = {"thinking is left out of history"} if template == OPENED else set()  # opened twice
    assert {one.why for one in findings} == {why} | others
    for one in findings:
        assert one.lost > 0 and one.stored != one.rendered
        assert (one.turn == 0) == (template == DATED)


def test_an_answer_may_be_cut_into_other_tokens(tokenizer) -> None:
    """The same text, but a model generated it in two pieces that the tokenizer never makes."""

    chat = [{"role": role, "content": "Bye"} for role in ("user", "assistant") * 2]
    whole = tokenizer("Bye", add_special_tokens=False)["input_ids"]
    cut = [
        one for letter in "Bye" for one in tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    assert whole != cut
    linter = Linter(tokenizer, GOOD)
    linter._answer = lambda sample, end, prompt: cut
    (finding,) = linter.lint([Sample("bye", chat)]).findings
    assert finding.why == "the answer is cut into other tokens"


def test_thinking_beside_the_answer_may_be_left_out_of_history(tokenizer) -> None:
    """Where it is kept, nothing is found."""
    think = "<think>{{ m.reasoning_content }}</think>"
    only_last = START + "{% if loop.last and m.reasoning_content %}" + think
    kept = START + "{% if m.reasoning_content %}" + think
    rest = "{% endif %}{{ m.content }}" + END
    assert not found(tokenizer, kept + rest)
    findings = found(tokenizer, only_last + rest)
    assert {one.sample for one in findings} == {"thinking beside the answer"}
    assert {one.why for one in findings} == {"thinking is left out of history"}


def test_a_call_may_be_rewritten(tokenizer) -> None:
    call = "{% if m.tool_calls %}{% if loop.last %}CALL{% else %}OMITTED{% endif %}{% endif %}"
    findings = found(tokenizer, START + call + "{{ m.content }}" + END)
    assert {one.sample for one in findings} == {"tools"}


def test_tokenizers_that_cut_beginnings_otherwise() -> None:
    """SentencePiece puts a space before a text that stands alone, and none behind a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(data("stories260K"))
    text = GOOD.replace("<|", "[").replace("|>", "]\n")
    assert not found(tokenizer, text)


def test_what_is_no_template_is_told(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        Linter(tokenizer, "{% if x %}").lint(samples())
    single = [Sample("one", [{"role": "user", "content": "Hi"}])]
    lint = Linter(tokenizer, GOOD).lint(single)
    assert (lint.turns, lint.findings, lint.refused) == (0, [], {})
    log, good, binary = tmp_path / "log.json", tmp_path / "good", tmp_path / "binary"
    log.write_text(json.dumps(single[0].messages))
    good.write_text(GOOD)
    binary.write_bytes(b"\xff\xfe")
    for arguments in ([good, "--log", log], [binary]):
        done = CliRunner().invoke(main, ["lint-template", *map(str, arguments)])
        assert done.exit_code == 1 and not isinstance(done.exception, UnicodeError)


def test_a_template_may_refuse_a_dialogue(tokenizer) -> None:
    lint = Linter(tokenizer, SYSTEMLESS).lint(samples())
    assert lint.refused.keys() == {
        "with a system prompt", "thinking in the answer", "thinking beside the answer", "tools",
    }  # fmt: skip
    assert set(lint.refused.values()) == {"no system"} and not lint.findings


def test_the_command(tmp_path: Path) -> None:
    good, bad, log = tmp_path / "good.jinja", tmp_path / "bad.jinja", tmp_path / "log.json"
    good.write_text(GOOD)
    bad.write_text(STRIPPED)
    texts = ["Hi", " Yes. ", "Really?", " Yes."]
    roles = ("user", "assistant") * 2
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    log.write_text(json.dumps(chat))

    def run(*arguments: object):
        return CliRunner().invoke(main, ["lint-template", *map(str, arguments)])

    assert run("demo").exit_code == run(good).exit_code == 0
    done = run(bad, "--log", log, "--json")
    assert done.exit_code == 1, done.output
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["sample"], finding["turn"]) == ("dialogue 1", 2)
    text = run(bad, "--log", log)
    assert text.exit_code == 1 and "spaces around the answer are left out" in text.stdout
    assert run(tmp_path / "none").exit_code == 1
    lines = log.with_suffix(".jsonl")
    lines.write_text(f"{json.dumps(chat)}\nnothing\n")
    told = run(bad, "--log", lines)
    assert "line 2 is left out" in told.stderr and "spaces around" in told.stdout
