"""Commands as a shell sees them: exit codes, JSON, one line for an error, no torch for help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from chunkcache.cli.preloads import Preload, read_preloads
from click.testing import CliRunner, Result

from chunkcache.errors import ConfigError

COMMANDS = ("serve", "warm", "demo", "report", "tree", "verify", "plan")
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from chunkcache.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'rich', 'starlette'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_help_names_every_command() -> None:
    text = run("--help").output
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "..." not in text.partition("Commands:")[2]


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "chunkcache", "--version"], capture_output=True)
    assert done.returncode == 0
    assert done.stdout.startswith(b"chunkcache, version ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["serve"],
        ["serve", "demo", "--mode", "magic"],
        ["serve", "demo", "--port", "99999"],
        ["serve", "demo", "--preload", "no-such-file.toml"],
        ["serve", "demo", "--store", "disk:somewhere", "--no-store"],
        ["warm", "demo"],
        ["warm", "demo", "--prompts", "no-such-file.toml"],
        ["warm", "demo", "--prompts", __file__, "--store", "memory:1GiB"],
        ["warm", "demo", "--prompts", __file__, "--piece", "0"],
        ["demo", "--users", "0"],
        ["verify"],
        ["verify", "demo", "--dtype", "int3"],
        ["report", "--what"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


@pytest.mark.parametrize("command", ["report", "tree"])
def test_no_server_is_1_and_one_line(command: str) -> None:
    result = run(command, "--url", NOWHERE)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot read {NOWHERE}/")
    assert result.stderr.count("\n") == 1
    assert run(command, "--url", "not a url").exit_code == 1


def test_no_model_is_1_and_one_line(tmp_path: Path) -> None:
    result = run("verify", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: cannot load ")
    assert result.stderr.count("\n") == 1


def test_verify_the_demo() -> None:
    result = run("verify", "demo", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model_type"] == "llama"
    assert report["tier"] == "A"
    assert report["max_logit_error"] < 1e-3


def test_verify_refuses_with_1(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OpenAIGPTConfig, OpenAIGPTLMHeadModel

    from chunkcache.demo import model_path

    config = OpenAIGPTConfig(vocab_size=128, n_embd=32, n_layer=1, n_head=2)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path)
    result = run("verify", str(tmp_path))
    assert result.exit_code == 1, result.output
    assert "openai-gpt" in result.stdout and "takes none of past_key_values" in result.stdout


def test_verify_an_encoder_decoder(tmp_path: Path) -> None:
    from tests.zoo import zoo_model

    zoo_model("t5").save_pretrained(tmp_path)
    result = run("verify", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tier"] == "E"


def test_verify_shows_what_a_snapshot_takes(tmp_path: Path) -> None:
    from tests.zoo import zoo_model

    zoo_model("mamba2").save_pretrained(tmp_path)
    result = run("verify", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "a snapshot takes" in result.stdout


def write(folder: Path, text: str) -> Path:
    path = folder / "prompts.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_preload_file(tmp_path: Path) -> None:
    text = """
    [[prompt]]
    name = "bot"
    messages = [{role = "system", content = "You help."}]
    ttl = 60

    [[prompt]]
    name = "raw"
    text = "Once upon a time"
    pin = false
    """
    assert read_preloads(write(tmp_path, text)) == [
        Preload("bot", [{"role": "system", "content": "You help."}], True, 60),
        Preload("raw", "Once upon a time", False, None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[[prompt",
        "[prompt]\nname = 'a'",
        "[[prompt]]\nname = 'a'",
        "[[prompt]]\ntext = 'a'",
        "[[prompt]]\nname = 'a'\ntext = ''",
        "[[prompt]]\nname = 'a'\ntext = 'b'\nmessages = []",
        "[[prompt]]\nname = 'a'\nmessages = []",
        "[[prompt]]\nname = 'a'\nmessages = [{role = 'user'}]",
        "[[prompt]]\nname = 'a'\ntext = 'b'\nttl = 0",
        "[[prompt]]\nname = 'a'\ntext = 'b'\npin = 1",
        "[[prompt]]\nname = 'a'\ntext = 'b'\nother = 1",
    ],
)
def test_bad_preload_files(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"prompts\.toml"):
        read_preloads(path)
    result = run("serve", "demo", "--preload", str(path))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
