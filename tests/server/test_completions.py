"""Answers: the same as the model's own, whole or in pieces, by the OpenAI SDK."""

from __future__ import annotations

import threading

import pytest
import torch

from chunkcache.demo.facts import Shop
from tests.server.conftest import MODEL, Running, chat, ids_of, plain_answer


def ask(server: Running, shop: Shop, number: int = 0, **options):
    """One chat about one of the shop's facts."""
    messages = chat(shop, shop.questions[number].question)
    options = {"temperature": 0, "max_tokens": 24} | options
    return server.openai.chat.completions.create(model=MODEL, messages=messages, **options)


def pieces(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_chat_answers_as_the_model_does(server: Running, shop: Shop) -> None:
    answer = ask(server, shop)
    ids = ids_of(server.cached, chat(shop, shop.questions[0].question))
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == plain_answer(server.cached, ids)
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.object == "chat.completion"
    assert answer.model == MODEL


def test_length_is_told_from_stop(server: Running, shop: Shop) -> None:
    whole = ask(server, shop)
    tokens = whole.usage.completion_tokens  # the last one is the end mark
    assert ask(server, shop, max_tokens=tokens).choices[0].finish_reason == "stop"
    cut = ask(server, shop, max_completion_tokens=tokens - 2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == tokens - 2
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)


def test_stream_is_the_answer_in_pieces(server: Running, shop: Shop) -> None:
    whole = ask(server, shop)
    chunks = list(ask(server, shop, stream=True))
    assert pieces(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len(chunks) > 4
    assert all(chunk.usage is None for chunk in chunks)


def test_include_usage_adds_a_last_chunk(server: Running, shop: Shop) -> None:
    whole = ask(server, shop)
    *chunks, last = ask(server, shop, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0
    assert last.chunkcache["reason"]
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_ends_with_done(server: Running, shop: Shop) -> None:
    body = {"messages": chat(shop, "Hello!"), "stream": True, "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [1, 2, 3])
def test_stop_strings_end_and_never_show(
    server: Running, shop: Shop, stream: bool, words: int
) -> None:
    whole = ask(server, shop).choices[0].message.content
    stop = " " + " ".join(whole.split()[2 : 2 + words])
    answer = ask(server, shop, stop=[stop, "never said"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = pieces(chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_stop_string_that_only_begins_is_shown(server: Running, shop: Shop) -> None:
    whole = ask(server, shop).choices[0].message.content
    almost = whole[4:12] + "\N{SNOWMAN}"
    assert pieces(ask(server, shop, stop=almost, stream=True)) == whole
    ending = whole[-3:] + "\N{SNOWMAN}"
    assert pieces(ask(server, shop, stop=ending, stream=True)) == whole


def test_a_seed_reproduces_and_disturbs_nobody(server: Running, shop: Shop) -> None:
    def sample(seed: int) -> str:
        answer = ask(server, shop, temperature=2.0, seed=seed, max_tokens=20)
        return answer.choices[0].message.content

    before = torch.get_rng_state()
    samples = [sample(seed) for seed in range(5)]
    assert len(set(samples)) > 1
    assert [sample(seed) for seed in range(5)] == samples
    assert torch.equal(torch.get_rng_state(), before)


def test_n_answers_count_the_prompt_once(server: Running, shop: Shop) -> None:
    answer = ask(server, shop, n=3, temperature=1.5, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    ids = ids_of(server.cached, chat(shop, shop.questions[0].question))
    assert answer.usage.prompt_tokens == len(ids)
    streamed = ask(server, shop, n=3, temperature=1.5, seed=4, stream=True)
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_content_parts_and_developer_role(server: Running, shop: Shop) -> None:
    question = shop.questions[0].question
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": shop.system_prompt}]},
        {"role": "user", "content": [{"type": "text", "text": question}]},
    ]
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content == ask(server, shop).choices[0].message.content


def test_completions_take_text_ids_and_lists(server: Running, shop: Shop) -> None:
    texts = [shop.system_prompt[:150], shop.system_prompt[:60]]
    ids = [server.cached.tokenizer(text).input_ids for text in texts]
    wanted = [plain_answer(server.cached, row, 8) for row in ids]

    def complete(prompt):
        answer = server.openai.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=8
        )
        return [choice.text for choice in answer.choices], answer.usage.prompt_tokens

    assert complete(texts[0]) == (wanted[:1], len(ids[0]))
    assert complete(ids[0]) == (wanted[:1], len(ids[0]))
    assert complete(texts) == (wanted, len(ids[0]) + len(ids[1]))
    assert complete(ids) == (wanted, len(ids[0]) + len(ids[1]))
    assert complete(ids * 6) == (wanted * 6, 6 * (len(ids[0]) + len(ids[1])))


def test_completions_stream(server: Running, shop: Shop) -> None:
    prompt = shop.system_prompt[:150]
    options = {"model": MODEL, "prompt": [prompt, prompt[:70]], "temperature": 0, "max_tokens": 8}
    whole = server.openai.completions.create(**options)
    texts = ["", ""]
    for chunk in server.openai.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_ignore_eos_goes_on(server: Running, shop: Shop) -> None:
    answer = ask(server, shop, max_tokens=30, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 30
    assert answer.choices[0].finish_reason == "length"


def test_concurrent_clients_get_their_own_answers(server: Running, shop: Shop) -> None:
    answers: dict[int, str] = {}

    def client(number: int) -> None:
        if number % 2:
            answers[number] = pieces(ask(server, shop, number, stream=True))
        else:
            answers[number] = ask(server, shop, number).choices[0].message.content

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        ids = ids_of(server.cached, chat(shop, shop.questions[number].question))
        assert answers[number] == plain_answer(server.cached, ids), number
