"""What the server says about reuse, and that it is so."""

from __future__ import annotations

import json
from pathlib import Path

from chunkcache.demo.facts import Shop
from chunkcache.lab.traces.trace import Trace
from tests.server.conftest import CHUNK, MODEL, Running, chat, ids_of


def create(server: Running, messages, **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return server.openai.chat.completions.create(model=MODEL, messages=messages, **options)


def cached_tokens(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def test_the_second_user_pays_only_his_own_tokens(server: Running, shop: Shop) -> None:
    first, second = (chat(shop, shop.questions[number].question) for number in (0, 1))
    assert cached_tokens(create(server, first)) == 0
    answer = create(server, second)
    ids = [ids_of(server.cached, messages) for messages in (first, second)]
    shared = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert shared - CHUNK < cached_tokens(answer) <= shared
    assert answer.chunkcache["cached_tokens"] == cached_tokens(answer)
    assert answer.chunkcache["tiers"] == {"device": cached_tokens(answer)}
    assert answer.chunkcache["divergence"] <= shared
    assert answer.chunkcache["reason"]


def test_a_dialogue_reuses_its_history_and_the_answers(server: Running, shop: Shop) -> None:
    messages = chat(shop, shop.questions[0].question)
    for number in (1, 2, 3):
        answer = create(server, messages)
        known = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
        messages = [
            *messages,
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": shop.questions[number].question},
        ]
        following = create(server, messages, max_tokens=1)
        assert cached_tokens(following) >= known - known % CHUNK


def test_the_header_says_it_too(server: Running, shop: Shop) -> None:
    body = {"messages": chat(shop, "Hello!"), "max_tokens": 2}
    for _ in range(2):
        answer = server.http.post("/v1/chat/completions", json=body)
        usage = answer.json()["usage"]["prompt_tokens_details"]
        assert answer.headers["x-chunkcache-hit-tokens"] == str(usage["cached_tokens"])
    assert usage["cached_tokens"] > 0


def test_several_prompts_have_a_record_each(server: Running, shop: Shop) -> None:
    prompt = shop.system_prompt[:200]
    body = {"prompt": [prompt, prompt + " And"], "max_tokens": 2, "n": 2}
    record = server.http.post("/v1/completions", json=body).json()["chunkcache"]
    assert len(record["prompts"]) == 2
    assert record["cached_tokens"] == sum(row["cached_tokens"] for row in record["prompts"])


def test_reset_drops_everything(server: Running, shop: Shop) -> None:
    messages = chat(shop, shop.questions[0].question)
    create(server, messages)
    stored = server.stats()["chunks"]
    assert stored > 0
    assert server.http.post("/reset_prefix_cache").json() == {"dropped_chunks": stored}
    assert server.stats()["chunks"] == 0
    assert server.http.get("/tree").json() == []
    assert cached_tokens(create(server, messages)) == 0


def test_the_tree_shows_what_is_stored(server: Running, shop: Shop) -> None:
    create(server, chat(shop, shop.questions[0].question))
    rows = server.http.get("/tree").json()
    assert rows[0]["depth"] == 0
    assert shop.system_prompt[:20] in rows[0]["text"]
    assert sum(row["tokens"] for row in rows) == server.stats()["chunks"] * CHUNK


def test_the_history_has_no_text(server: Running, shop: Shop, tmp_path: Path) -> None:
    """Lines of a trace: what was asked last, as hashes."""
    before = server.http.get("/history").text.splitlines()
    question = shop.questions[1].question
    answer = create(server, chat(shop, question))
    found = server.http.get("/history")
    assert found.headers["content-type"] == "application/jsonl"
    assert len(found.text.splitlines()) == len(before) + 1
    (tmp_path / "trace").write_text(found.text)
    trace = Trace(tmp_path / "trace")
    last = list(trace)[-1]
    assert last.tokens == answer.usage.prompt_tokens
    assert last.reuse is not None and last.reuse["cached_tokens"] == cached_tokens(answer)
    assert (trace.form.block, trace.cache["chunk_size"]) == (CHUNK, CHUNK)
    assert "tokens" not in json.loads(found.text.splitlines()[-1])
    assert question.split()[-1] not in found.text


def test_metrics_count_tokens(server: Running, shop: Shop) -> None:
    names = {
        "query": ("chunkcache_prefix_query_tokens_total", {}),
        "hit": ("chunkcache_prefix_hit_tokens_total", {"tier": "device"}),
        "ok": ("chunkcache_requests_total", {"outcome": "ok"}),
        "first": ("chunkcache_time_to_first_token_seconds_count", {}),
    }
    before = {key: server.metric(name, **labels) for key, (name, labels) in names.items()}
    answers = [create(server, chat(shop, qa.question)) for qa in shop.questions[:3]]
    grown = {
        key: server.metric(name, **labels) - before[key] for key, (name, labels) in names.items()
    }
    assert grown == {
        "query": sum(answer.usage.prompt_tokens for answer in answers),
        "hit": sum(map(cached_tokens, answers)),
        "ok": 3,
        "first": 3,
    }
    assert server.metric("chunkcache_bytes", place="device") == server.stats()["bytes"]
    assert server.metric("chunkcache_capacity_bytes") == server.stats()["capacity_bytes"]
