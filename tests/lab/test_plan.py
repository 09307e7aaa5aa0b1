"""The arithmetic of plans and their tables, without any model."""

from __future__ import annotations

import doctest
import io
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from chunkcache.lab import plan as plans
from chunkcache.lab.plan import Piece, Plan, merge
from chunkcache.lab.views import plan as view

FULL = Piece("full", 3, "float16", row_bytes=100, kv_heads=2, head_width=8)
SLIDING = Piece("sliding", 5, "float16", row_bytes=100, limit=7, kv_heads=2, head_width=8)
STATE = Piece("state", 4, "float16, float32", fixed_bytes=1000)
CROSS = Piece("cross", 3, "float16", row_bytes=20, kv_heads=2, head_width=8)
GROUPED = Piece("compressed", 2, "float16", row_bytes=10, stride=4, fixed_bytes=30)


def make(*pieces: Piece, **fields: object) -> Plan:
    values = {
        "model_type": "made-up",
        "method": "observed",
        "reason": "",
        "dtype": "float16",
        "dtype_source": "configuration",
        "pieces": merge(pieces),
        "heads": 4,
        "mha_token_bytes": 1600,
        "positions": None,
    }
    return Plan(**values | fields)


def shown(plan: Plan, width: int = 80, encoder: int = 0, name: str = "some/model") -> str:
    out = io.StringIO()
    sessions = plan.sessions(2**20, 20, 10, encoder)
    report = view.plan_report(name, plan, [10, 100_000], encoder, sessions)
    Console(file=out, width=width).print(report)
    return out.getvalue()


def test_bytes_at() -> None:
    plan = make(FULL, SLIDING, STATE)
    assert plan.token_bytes == 800
    assert plan.late_token_bytes == 300
    assert plan.state_bytes == 4000
    assert plan.bytes_at(0) == 4000
    assert plan.bytes_at(7) == 4000 + 7 * 800
    assert plan.bytes_at(1007) == 4000 + 7 * 800 + 1000 * 300


def test_rows_of_several_tokens() -> None:
    assert GROUPED.token_bytes == 5
    assert [GROUPED.bytes_at(tokens) for tokens in (0, 3, 4, 9)] == [60, 60, 80, 100]
    assert Piece("compressed", 1, "", row_bytes=10, stride=4).token_bytes == 2.5


def test_encoder_tokens() -> None:
    plan = make(FULL, CROSS)
    assert (plan.token_bytes, plan.encoder_token_bytes) == (300, 60)
    assert plan.bytes_at(10, 4) == 3000 + 240
    assert plan.mha_bytes_at(10, 4) == 16_000 + 240
    assert plan.traits == ("encoder-decoder",)


def test_sessions_with_full_attention() -> None:
    found = make(FULL).sessions(budget=300 * 100, shared=20, private=10)
    assert (found.alone_bytes, found.common_bytes, found.own_bytes) == (9000, 6000, 3000)
    assert (found.alone, found.sharing) == (3, 8)
    assert found.factor == pytest.approx(8 / 3)


def test_sessions_with_states_have_one_each() -> None:
    found = make(FULL, STATE).sessions(budget=50_000, shared=20, private=10)
    assert (found.common_bytes, found.own_bytes) == (10_000, 7000)
    assert found.sharing == 40_000 // 7000


def test_sessions_share_what_the_encoder_gave() -> None:
    found = make(FULL, CROSS).sessions(budget=10**6, shared=20, private=10, encoder_tokens=50)
    assert found.common_bytes == 6000 + 3000
    assert found.own_bytes == 3000


def test_sessions_that_share_nothing() -> None:
    found = make(FULL, STATE).sessions(budget=10**6, shared=0, private=10)
    assert (found.alone, found.factor) == (found.sharing, 1)


def test_sessions_that_do_not_fit() -> None:
    found = make(FULL).sessions(budget=5000, shared=20, private=10)
    assert (found.alone, found.sharing, found.factor) == (0, 0, None)


@pytest.mark.parametrize("numbers", [(-1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_sessions_of_wrong_numbers(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        make(FULL).sessions(*numbers)


@pytest.mark.parametrize(
    ("pieces", "name"),
    [
        ([replace(FULL, kv_heads=4)], "MHA"),
        ([FULL], "GQA"),
        ([replace(FULL, kv_heads=1)], "MQA"),
        ([FULL, replace(SLIDING, kv_heads=1)], "GQA"),
        ([Piece("latent", 1, "float16", row_bytes=10)], "MLA"),
        ([STATE], "recurrent"),
        ([Piece("unknown", 1, "")], "unknown"),
    ],
)
def test_attention(pieces: list[Piece], name: str) -> None:
    assert make(*pieces).attention == name


def test_traits() -> None:
    shared = Piece("shared", 2, "")
    assert make(FULL, SLIDING, shared).traits == ("sliding windows", "shared layers")
    assert make(FULL, STATE).traits == ("hybrid",)
    assert make(STATE).traits == ()


def test_merge_adds_layers_and_sorts() -> None:
    one = replace(SLIDING, layers=1)
    assert merge([one, FULL, one]) == (FULL, replace(SLIDING, layers=2))


def test_to_dict() -> None:
    found = make(FULL, SLIDING).to_dict()
    assert found["token_bytes"] == 800
    assert found["factor"] == 2
    assert [kind["name"] for kind in found["kinds"]] == ["full attention", "sliding window"]
    assert found["kinds"][1]["limit"] == 7


def test_tables() -> None:
    text = shown(make(FULL, SLIDING, STATE, positions=5000))
    for wanted in (
        "KV of some/model",
        "4 heads share the keys and values of 2",
        "800 B, 2.0 times less than plain multi-head attention",
        "beyond all windows  300 B",
        "4,000 B a sequence",
        "observed on a run without weights",
        "last 7",
        "100,000 *",
        "* beyond the model's 5,000 positions",
        "Sessions of 30 tokens in 1.0 MiB",
        "first 20 tokens stored once",
    ):
        assert wanted in text, wanted
    assert "\n    10  " not in text
    assert "encoder" not in text


def test_tables_of_what_is_not_known() -> None:
    unknown = Piece("unknown", 2, "")
    text = shown(make(FULL, unknown, method="configuration", reason="it raised", heads=0))
    assert "calculated from the configuration (it raised)" in text
    assert "lower bounds" in text
    assert "?" in text


def test_tables_without_heads() -> None:
    text = shown(make(STATE, heads=0, mha_token_bytes=0))
    assert "none: a state of constant size" in text
    assert "multi-head" not in text


def test_encoder_lines() -> None:
    text = shown(make(FULL, CROSS), encoder=50)
    assert "one encoder token" in text
    assert "One sequence with 50 encoder tokens" in text


def test_names_are_not_markup() -> None:
    assert "KV of [bold]x" in shown(make(FULL), name="[bold]x")


@pytest.mark.parametrize("width", [80, 120])
def test_fits_a_terminal(width: int) -> None:
    every = make(FULL, SLIDING, STATE, CROSS, GROUPED, positions=131_072, reason="long " * 40)
    assert max(map(len, shown(every, width).splitlines())) <= width


def test_imports_no_torch() -> None:
    code = "import sys, chunkcache.lab.views.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_doctests() -> None:
    assert doctest.testmod(plans).failed == 0
    assert doctest.testmod(view).failed == 0
