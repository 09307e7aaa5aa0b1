"""`chunkcache tree`: a table, JSON or a picture of what a real server has stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from xml.etree.ElementTree import fromstring

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

from chunkcache.demo.facts import make_shop
from tests.cli.serving import KEY, SHOP, ask, cached_tokens, serving

OTHER = make_shop(2_000_000_007, fact_tokens=100)


def run(url: str, *more: str) -> Result:
    return CliRunner().invoke(main, ["tree", "--url", url, "--api-key", KEY, *more])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With two named prompts, one of which three users asked."""
    prompts = tmp_path_factory.mktemp("tree") / "prompts.toml"
    prompts.write_text(
        "".join(
            f'[[prompt]]\nname = "{name}"\npin = {pin}\n'
            f'messages = [{{role = "system", content = {json.dumps(shop.system_prompt)}}}]\n'
            for name, pin, shop in (("support-bot", "true", SHOP), ("<idle>", "false", OTHER))
        )
    )
    with serving("--preload", str(prompts), "--no-store") as (url, _):
        assert all(cached_tokens(ask(url, number)) > 150 for number in range(3))
        yield url


def test_the_table_and_json_tell_the_same(server: str) -> None:
    rows = json.loads(run(server, "--json").stdout)
    named = {name: row for row in rows for name in row["names"]}
    bot = named["support-bot"]
    assert (bot["pinned"], named["<idle>"]["pinned"]) == (True, False)
    assert bot["hits"] == 3 and bot["hit_tokens"] == 3 * bot["tokens"]
    tails = [row for row in rows if row["start"] == bot["start"] + bot["tokens"]]
    assert len({row["text"] for row in tails}) == len(tails) > 1, "siblings are told apart"
    text = run(server).stdout
    assert text.startswith(f"{len(rows)} stored prefixes, ")
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if "support-bot" in line]
    assert f"{bot['hit_tokens']:,}" in line and "device, pinned" in line


def test_top_bounds_the_table_only(server: str) -> None:
    rows = json.loads(run(server, "--json", "--top", "1").stdout)
    text = run(server, "--top", "1").stdout
    assert "support-bot" in text and "<idle>" not in text
    assert f"{len(rows)} stored prefixes" in text and "left out" in text
    assert "left out" not in run(server, "--top", "0").stdout
    assert run(server, "--top", "-1").exit_code == 2


def test_a_picture_in_a_file(server: str, tmp_path: Path) -> None:
    path = tmp_path / "tree.svg"
    result = run(server, "--svg", str(path))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote {path}\n")
    picture = path.read_text(encoding="utf-8")
    assert "stored prefixes" in fromstring(picture).attrib["aria-label"]
    assert "support-bot" in picture and "&lt;idle&gt;" in picture
    both = run(server, "--svg", str(path), "--json", "--top", "1")
    assert {name for row in json.loads(both.stdout) for name in row["names"]} >= {"<idle>"}


def test_a_picture_on_standard_output(server: str) -> None:
    result = run(server, "--svg", "-")
    assert fromstring(result.stdout).tag == "{http://www.w3.org/2000/svg}svg"
    assert result.stderr == ""
    refused = run(server, "--svg", "-", "--json")
    assert refused.exit_code == 2 and "standard output" in refused.stderr


@pytest.mark.parametrize("name", ["no-such-folder/tree.svg", ".", "zero\0byte.svg"])
def test_a_picture_that_cannot_be_written_is_1_and_one_line(
    server: str, tmp_path: Path, name: str
) -> None:
    result = run(server, "--svg", f"{tmp_path}/{name}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot write {tmp_path}/")
    assert result.stderr.count("\n") == 1


class _Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"detail": "hello"}')

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_another_kind_of_server_is_1_and_one_line() -> None:
    with HTTPServer(("127.0.0.1", 0), _Elsewhere) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        try:
            result = run(f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "is it a chunkcache server?" in result.stderr
