"""`chunkcache plan` as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

from tests.hf.plan_configs import LLAMA_2_13B, LLAMA_3_8B, SMALL


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def write(folder: Path, fields: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


def answer(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from chunkcache.cli.main import main\n"
        "main(['plan', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no weights are read" in " ".join(done.stdout.split())


def test_llama_2_13b_as_json(tmp_path: Path) -> None:
    found = answer(write(tmp_path, LLAMA_2_13B))
    assert found["token_bytes"] == 819_200
    assert [length["bytes"] for length in found["contexts"]] == [
        8_192_000_000,
        81_920_000_000,
        409_600_000_000,
        819_200_000_000,
    ]
    assert (found["method"], found["attention"], found["factor"]) == ("observed", "MHA", 1)
    assert (found["dtype"], found["dtype_source"]) == ("float16", "configuration")
    sessions = found["sessions"]
    assert sessions["budget"] == 16 * 2**30
    assert sessions["alone"] == 16 * 2**30 // (3000 * 819_200) == 6
    assert sessions["sharing"] == (16 * 2**30 - 2000 * 819_200) // (1000 * 819_200) == 18
    assert sessions["factor"] == 3


def test_llama_2_13b_for_people(tmp_path: Path) -> None:
    result = run(write(tmp_path, LLAMA_2_13B))
    assert result.exit_code == 0, result.output
    for wanted in ("819,200 B", "8.19 GB", "81.9 GB", "409.6 GB", "819.2 GB", "3.0x"):
        assert wanted in result.stdout, wanted
    assert not result.stderr


def test_options(tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--context", "8192, 128k,1M", "--budget", "1GB"]
    more = ["--shared", "500", "--private", "100"]
    found = answer(write(tmp_path, LLAMA_3_8B), *options, *more)
    assert [length["tokens"] for length in found["contexts"]] == [8192, 128_000, 1_000_000]
    assert found["contexts"][0]["bytes"] == 8192 * 262_144
    assert (found["dtype"], found["dtype_source"]) == ("float32", "asked for")
    assert found["sessions"]["budget"] == 10**9
    assert found["sessions"]["own_bytes"] == 100 * 262_144


def test_a_folder_and_the_demo(tmp_path: Path) -> None:
    write(tmp_path, LLAMA_3_8B)
    assert answer(str(tmp_path))["token_bytes"] == 131_072
    assert answer("demo")["token_bytes"] == 4 * 2 * 3 * 32 * 2


def test_encoder_tokens(tmp_path: Path) -> None:
    source = write(tmp_path, SMALL["t5"] | {"model_type": "t5"})
    found = answer(source, "--encoder-tokens", "100", "--context", "10")
    assert found["contexts"][0]["bytes"] == 110 * found["token_bytes"]
    wrong = run("demo", "--encoder-tokens", "100")
    assert wrong.exit_code == 2
    assert "has no encoder" in wrong.stderr


def test_types_that_transformers_does_not_know(tmp_path: Path) -> None:
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    new = {"model_type": "tomorrows-model", "torch_dtype": "float16"} | fields
    found = answer(write(tmp_path, new))
    assert (found["token_bytes"], found["method"]) == (2 * 2 * 64 * 2, "configuration")
    wrapped = {"model_type": "seeing-model", "llm_config": fields}
    assert answer(write(tmp_path, wrapped))["token_bytes"] == 2 * 2 * 64 * 2


def one_line(result: Result, text: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_model(tmp_path: Path) -> None:
    one_line(run(str(tmp_path / "nothing")), "no such file or folder")
    one_line(run(str(tmp_path)), "no config.json in that folder")
    one_line(run("nobody/has-this-model"), "cannot load 'nobody/has-this-model'")
    one_line(run("no model has spaces"), "cannot load ")


@pytest.mark.parametrize(
    "fields", [[1], {}, {"a": 1}, 7, {"model_type": "llama", "hidden_size": "x"}]
)
def test_no_configuration(fields: Any, tmp_path: Path) -> None:
    one_line(run(write(tmp_path, fields)), "cannot load ")


def test_no_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{oops\xff")
    one_line(run(str(path)), "cannot load ")


def test_a_model_without_kv(tmp_path: Path) -> None:
    fields = {"model_type": "openai-gpt", "n_embd": 48, "n_layer": 2, "n_head": 6}
    one_line(run(write(tmp_path, fields)), "keeps nothing between tokens")


@pytest.mark.parametrize(
    "options",
    [
        ["--context", "many"],
        ["--context", "10k,,20k"],
        ["--context", "0"],
        ["--budget", "much"],
        ["--shared", "-1"],
        ["--private", "0"],
        ["--dtype", "int3"],
        ["--encoder-tokens", "-1"],
    ],
)
def test_wrong_usage_is_2(options: list[str]) -> None:
    result = run("demo", *options)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
