"""Wrong requests: the right status, OpenAI's error body, and nothing ignored that matters."""

from __future__ import annotations

import logging
from typing import Any

import openai
import pytest

from chunkcache.demo.facts import Shop
from tests.server.conftest import MODEL, Running, chat, running

HELLO = [{"role": "user", "content": "Hello!"}]


def error_of(answer) -> dict[str, Any]:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 3),
        ("logit_bias", {"7": 1}),
        ("frequency_penalty", 0.5),
        ("modalities", ["text", "audio"]),
        ("cache_salt", "mine"),
        ("echo", True),
        ("best_of", 4),
    ],
)
def test_unsupported_values_are_refused(server: Running, field: str, value: Any) -> None:
    body = {"messages": HELLO, field: value}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == (field, "unsupported_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 0),
        ("max_tokens", 0),
        ("max_completion_tokens", 1.5),
        ("stop", ""),
        ("stop", [1]),
        ("seed", "x"),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "Hello!"),
    ],
)
def test_wrong_values_name_the_field(server: Running, field: str, value: Any) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": HELLO} | {field: value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == field


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        "Hello!",
    ],
)
def test_messages_that_are_not_text(server: Running, message: Any) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": [*HELLO, message]})
    assert answer.status_code == 400
    assert error_of(answer)["param"].startswith("messages[1]")


def test_harmless_fields_are_ignored(server: Running) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 1,
        "user": "u",
        "prompt_cache_key": "k",
        "nobody_knows": 1,
        "tools": None,
        "response_format": {"type": "text"},
        "presence_penalty": 0,
    }
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_bad_json(server: Running, raw: bytes) -> None:
    answer = server.http.post("/v1/completions", content=raw)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("prompt", [None, [], "", [[]], [[1], "a"], [1.5], [True], {"a": 1}])
def test_bad_prompts(server: Running, prompt: Any) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_ids_outside_the_vocabulary(server: Running, stream: bool) -> None:
    body = {"prompt": [5, 10**6], "stream": stream}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_prompt"


def test_other_models_are_not_here(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-9")
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL


def test_unknown_paths_and_methods(server: Running) -> None:
    assert error_of(server.http.get("/v1/nothing"))["code"] == "not_found"
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")


def test_too_long_for_the_model(server: Running) -> None:
    limit = server.cached.config.max_position_embeddings
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model=MODEL, prompt=[5] * limit)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model=MODEL, prompt=[5] * 10, max_tokens=limit)
    assert caught.value.code == "context_length_exceeded"


def test_keys(server: Running) -> None:
    with running(server.cached, api_keys=["one", "two"]) as guarded:
        assert guarded.http.get("/health").json() == {"status": "ok"}
        for path in ("/stats", "/tree", "/history", "/metrics", "/v1/models"):
            answer = guarded.http.get(path)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        for wrong in ("Bearer three", "Bearer", "Basic one", "one"):
            answer = guarded.http.get("/stats", headers={"Authorization": wrong})
            assert answer.status_code == 401
        assert guarded.openai.models.list().data[0].id == MODEL
        with pytest.raises(openai.AuthenticationError):
            guarded.openai.with_options(api_key="three").models.list()
        assert guarded.openai.with_options(api_key="two").models.list().data


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_logged_and_survived(
    server: Running,
    shop: Shop,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret detail")

    body = {"messages": chat(shop, "Hello!"), "max_tokens": 2, "stream": stream}
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(server.cached, "generate", broken)
        answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert "secret" not in error_of(answer)["message"]
    assert "secret detail" in caplog.text
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_failure_in_the_middle_of_a_stream(
    server: Running, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = server.cached.tokenizer.decode, []

    def breaks_later(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("broken")
        return decode(*args, **kwargs)

    monkeypatch.setattr(server.cached.tokenizer, "decode", breaks_later)
    body = {"prompt": shop.system_prompt[:200], "stream": True, "max_tokens": 20}
    answer = server.http.post("/v1/completions", json=body | {"ignore_eos": True})
    assert answer.status_code == 200
    assert '"type":"server_error"' in answer.text
    assert "[DONE]" not in answer.text
    assert server.stats()["leased_chunks"] == 0


def test_the_page_is_there(server: Running) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "chunkcache" in page.text
    assert "http://" not in page.text.replace(server.url, "")  # it loads nothing from elsewhere
    assert server.http.get("/health").json() == {"status": "ok"}


def test_tokenize_and_back(server: Running, shop: Shop) -> None:
    answer = server.http.post("/tokenize", json={"prompt": "How much is it? \N{SNOWMAN}"}).json()
    assert answer["count"] == len(answer["tokens"])
    back = server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "How much is it? \N{SNOWMAN}"}
    messages = chat(shop, "Hello!")
    answer = server.http.post("/tokenize", json={"messages": messages}).json()
    assert answer["tokens"][0] == server.cached.tokenizer.bos_token_id
    for tokens in (None, "x", [1.5], [-1], [10**6]):
        assert server.http.post("/detokenize", json={"tokens": tokens}).status_code == 400
    assert server.http.post("/tokenize", json={}).status_code == 400
