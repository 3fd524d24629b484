from __future__ import annotations

from typing import Any

import pytest

from server.engine.model.frozen import FrozenModel
from tests.api.live import LiveServer, assert_openai_error, engine_answer
from tests.api.openai.support import (
    CHAT,
    FROZEN,
    RENDERED,
    Body,
    ask,
    joined,
    post,
    reasons,
    stream,
    texts,
    user,
)
from tests.support import EOS


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_has_two_names(chatty: LiveServer, name: str) -> None:
    reply = ask(chatty, CHAT, ignore_eos=True, **{name: 3})
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"
    assert ask(chatty, CHAT, max_tokens=3, max_completion_tokens=3)["choices"]
    response = post(chatty, CHAT, max_tokens=3, max_completion_tokens=4)
    assert assert_openai_error(response, 400, "invalid_request")["param"] == "max_tokens"


def test_several_answers_are_drawn_apart(chatty: LiveServer) -> None:
    reply = ask(chatty, CHAT, n=3, temperature=1, seed=4, max_tokens=15)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len(set(texts(reply))) == 3
    assert reply["usage"]["prompt_tokens"] == len(RENDERED)


def test_logprobs_have_bytes_and_the_most_likely_tokens(chatty: LiveServer) -> None:
    reply = ask(chatty, CHAT, logprobs=True, top_logprobs=4, max_tokens=8, ignore_eos=True)
    [choice] = reply["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(token["top_logprobs"]) == 4
        best = token["top_logprobs"][0]
        assert (best["logprob"], best["bytes"]) == (token["logprob"], token["bytes"]), "greedy"
        assert [other["logprob"] for other in token["top_logprobs"]] == sorted(
            (other["logprob"] for other in token["top_logprobs"]), reverse=True
        )
    said = bytes(byte for token in content for byte in token["bytes"]).decode("utf-8", "ignore")
    assert said.startswith(choice["message"]["content"].split("\ufffd")[0])
    plain = ask(chatty, CHAT, logprobs=True, max_tokens=2)["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in plain)
    assert ask(chatty, CHAT, max_tokens=2)["choices"][0]["logprobs"] is None
    assert_openai_error(post(chatty, CHAT, top_logprobs=2), 400, "invalid_request", "logprobs")
    assert ask(chatty, CHAT, top_logprobs=0, max_tokens=1)["choices"][0]["logprobs"] is None, "it asks for nothing"
    assert_openai_error(post(chatty, CHAT, logprobs=True, top_logprobs=21), 400, "invalid_request")


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(chatty: LiveServer) -> None:
    whole = ask(chatty, CHAT, max_tokens=20)
    chunks = stream(chatty, CHAT, max_tokens=20)
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, whole["choices"][0]["finish_reason"])
    assert joined(chunks) == {0: texts(whole)[0]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_a_stream_of_several_answers_keeps_them_apart_and_counts_at_the_end(chatty: LiveServer) -> None:
    body: Body = {"n": 3, "temperature": 1, "seed": 4, "max_tokens": 15}
    whole = ask(chatty, CHAT, **body)
    chunks = stream(chatty, CHAT, **body, stream_options={"include_usage": True})
    assert joined(chunks) == dict(enumerate(texts(whole)))
    assert sorted(index for index, _ in reasons(chunks)) == [0, 1, 2]
    *others, last = chunks
    assert all(chunk["usage"] is None for chunk in others)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for index in range(3):
        choices = [c for chunk in others for c in chunk["choices"] if c["index"] == index]
        assert [("role" in choice["delta"]) for choice in choices] == [True] + [False] * (len(choices) - 1)


def test_a_streams_logprobs_are_those_of_the_whole(chatty: LiveServer) -> None:
    body: Body = {"logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    [whole] = ask(chatty, CHAT, **body)["choices"]
    streamed: list[Any] = []
    for chunk in stream(chatty, CHAT, **body):
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == whole["logprobs"]["content"]


def test_an_end_token_ends_the_answer(chatty: LiveServer) -> None:
    body: Body = {"logit_bias": {str(EOS): 100}, "max_tokens": 9}
    reply = ask(chatty, CHAT, **body)
    assert (texts(reply), reply["choices"][0]["finish_reason"]) == ([""], "stop")
    assert [chunk["choices"][0]["delta"] for chunk in stream(chatty, CHAT, **body)] == [
        {"role": "assistant", "content": ""},
        {},
    ]


PREFILLED: list[Body] = [*user("hello"), {"role": "assistant", "content": "well, "}]


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({"continue_final_message": True}, "<user>hello\n<assistant>well, "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<user>hello\n<assistant>well, "),
        ({"continue_final_message": False, "add_generation_prompt": True}, "<user>hello\n<assistant>well, \n<start>"),
        ({"add_generation_prompt": False}, "<user>hello\n<assistant>well, \n"),
    ],
)
def test_the_last_message_is_continued_or_answered_as_the_request_says(
    own_server: LiveServer, tiny: FrozenModel, fields: Body, rendered: str
) -> None:
    own_server.model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<start>{% endif %}"
    )
    expected = engine_answer(tiny, None, rendered, max_new_tokens=12).text
    assert texts(ask(own_server, CHAT, messages=PREFILLED, max_tokens=12, **fields)) == [expected]
    assert joined(stream(own_server, CHAT, messages=PREFILLED, max_tokens=12, **fields)) == {0: expected}


def test_a_message_is_not_continued_where_there_is_none_to_continue(chatty: LiveServer) -> None:
    both: Body = {"continue_final_message": True, "add_generation_prompt": True}
    assert_openai_error(post(chatty, CHAT, **both), 400, "invalid_request", "excludes add_generation_prompt")
    for content in ("", " \n"):
        messages = [*user("hello"), {"role": "assistant", "content": content}]
        assert_openai_error(post(chatty, CHAT, messages=messages, continue_final_message=True), 400, "empty_input")
    chatty.publish_random("chat-templated", 9, {"input_template": "{input}!"})
    for field, value in (("continue_final_message", True), ("add_generation_prompt", False)):
        error = assert_openai_error(
            post(chatty, CHAT, model="chat-templated", **{field: value}), 400, "invalid_request", "input_template"
        )
        assert error["param"] == field
    assert texts(ask(chatty, CHAT, model="chat-templated", add_generation_prompt=True, max_tokens=1))


def test_the_log_probabilities_of_a_chats_input_are_told_by_token(chatty: LiveServer) -> None:
    chatty.publish_random("chat-scored", 8)
    words = chatty.worker.text
    for model in (FROZEN, "chat-scored"):
        body: Body = {"model": model, "max_tokens": 2}
        told = ask(chatty, CHAT, prompt_logprobs=3, **body)["prompt_logprobs"]
        echoed = ask(chatty, model=model, prompt=RENDERED, echo=True, logprobs=3, max_tokens=0)["choices"][0][
            "logprobs"
        ]
        assert told[0] is None
        assert len(told) == len(words.encode(RENDERED)) == len(echoed["token_logprobs"])
        for token_id, places, logprob in zip(words.encode(RENDERED), told, echoed["token_logprobs"], strict=True):
            if places is None:
                continue
            own = places[str(token_id)]
            assert (own["logprob"], own["decoded_token"]) == (logprob, words.tokens.text_of(token_id))
            ranked = sorted(places.values(), key=lambda place: place["rank"])
            assert [place["rank"] for place in ranked[:3]] == [1, 2, 3]
            assert [place["logprob"] for place in ranked] == sorted((p["logprob"] for p in ranked), reverse=True)
            assert len(places) in (3, 4)
        only = ask(chatty, CHAT, prompt_logprobs=0, **body)["prompt_logprobs"]
        assert only == [
            None if places is None else {str(token_id): places[str(token_id)]}
            for token_id, places in zip(words.encode(RENDERED), told, strict=True)
        ]
        [choice] = ask(chatty, prompt=RENDERED, prompt_logprobs=3, **body)["choices"]
        assert choice["prompt_logprobs"] == told
        assert choice["logprobs"] is None
    assert "prompt_logprobs" not in ask(chatty, CHAT, max_tokens=1)
    both = ask(chatty, prompt=RENDERED, prompt_logprobs=1, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    assert all(len(places) <= 2 for places in both["prompt_logprobs"][1:])
    assert any(len(top) == 3 for top in both["logprobs"]["top_logprobs"][1:])


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_log_probabilities_of_an_input_are_bounded_and_not_streamed(chatty: LiveServer, path: str) -> None:
    for value in (-1, 21, "1"):
        assert_openai_error(post(chatty, path, prompt_logprobs=value), 400, "invalid_request", "prompt_logprobs")
    assert_openai_error(post(chatty, path, prompt_logprobs=1, stream=True), 400, "invalid_request", "stream")
