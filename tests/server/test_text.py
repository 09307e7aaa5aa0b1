"""Incremental text: complete, never torn inside a character, never a part of a stop string."""

from __future__ import annotations

import doctest
import random

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chunkcache.demo import model_path
from chunkcache.engine import text
from chunkcache.engine.jobs import Sampling
from chunkcache.engine.text import Detokenizer, Row, StopScanner

TOKENIZER = AutoTokenizer.from_pretrained(model_path())
END = TOKENIZER.eos_token_id


def pieces_of(ids: list[int]) -> list[str]:
    words = Detokenizer(TOKENIZER)
    return [*(words.push(token) for token in ids), words.finish()]


@given(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}")
    )
)
def test_characters_are_never_torn(wanted: str) -> None:
    pieces = pieces_of(TOKENIZER(wanted, add_special_tokens=False).input_ids)
    assert "".join(pieces) == wanted
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_any_ids_give_the_text_of_them_all() -> None:
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(len(TOKENIZER)) for _ in range(rng.randrange(40))]
        whole = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces_of(ids)) == whole


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings_wherever_the_text_is_cut(
    said: str, stops: list[str], cuts: list[int]
) -> None:
    found = [(said.index(stop) + len(stop), said.index(stop)) for stop in stops if stop in said]
    wanted = said[: min(found)[1]] if found else said
    scanner, shown, at = StopScanner(stops), "", 0
    for cut in cuts:
        shown += scanner.push(said[at : at + cut])
        assert wanted.startswith(shown)
        at += cut
    assert shown + scanner.finish() == wanted
    assert scanner.stopped == bool(found)


def test_a_row_ends_once_and_for_a_reason() -> None:
    ids = TOKENIZER("one two three", add_special_tokens=False).input_ids

    def run(stops: tuple[str, ...], tokens: list[int]) -> tuple[str, str | None, int]:
        row = Row(TOKENIZER, stops, (END,))
        for token in tokens:
            if row.finish_reason is None:
                row.push(token)
        if row.finish_reason is None:
            row.finish("length")
        return row.text, row.finish_reason, row.tokens

    assert run((), [*ids, END, 7]) == ("one two three", "stop", len(ids) + 1)
    assert run((), ids) == ("one two three", "length", len(ids))
    text, reason, _ = run((" two",), ids)
    assert (text, reason) == ("one", "stop")
    assert run(("three!",), ids) == ("one two three", "length", len(ids))


def test_sampling_arguments() -> None:
    assert Sampling(5).arguments(None) == {"max_new_tokens": 5}
    assert Sampling(5, temperature=0, top_k=3).arguments(20) == {
        "max_new_tokens": 5,
        "do_sample": False,
    }
    warm = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5}
    assert Sampling(5, temperature=0.5).arguments(None) == warm | {"top_k": 0}
    assert Sampling(5, temperature=0.5).arguments(20) == warm | {"top_k": 20}
    assert Sampling(5, temperature=0.5, top_k=3).arguments(20) == warm | {"top_k": 3}
    assert Sampling(5, top_p=0.9).arguments(None)["do_sample"] is True
    assert Sampling(5, ignore_eos=True).arguments(None)["min_new_tokens"] == 5


def test_doctests() -> None:
    assert doctest.testmod(text).failed == 0
