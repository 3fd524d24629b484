"""Amazon SageMaker's contract: POST /invocations takes every kind of body that generates, GET /ping is the probe."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.live import LiveServer, assert_error, parse_events
from tests.api.openai.support import FROZEN, events, user

INVOCATIONS = "/invocations"
NAME = "sagemaker-task"


def invoke(server: LiveServer, **body: Any) -> httpx.Response:
    return server.client.post(INVOCATIONS, json=body)


def test_a_body_is_answered_as_on_the_route_of_its_kind(chatty: LiveServer) -> None:
    chatty.publish_random(NAME, 1)
    bodies: list[tuple[str, str | None, dict[str, Any]]] = [
        ("/", NAME, {"inputs": "hello", "parameters": {"adapter_id": NAME, "max_new_tokens": 5}}),
        ("/", None, {"inputs": ["hello", "what"], "parameters": {"choices": ["a", "b"]}}),
        ("/v1/chat/completions", NAME, {"model": NAME, "messages": user("hello"), "max_tokens": 5}),
        ("/v1/completions", NAME, {"model": f"{NAME}@1", "prompt": ["hello", "what"], "max_tokens": 5}),
    ]
    for route, task, body in bodies:
        replies = [chatty.client.post(path, json=body) for path in (route, INVOCATIONS)]
        assert [reply.status_code for reply in replies] == [200, 200], replies[1].text
        # The model computes in float64, where a text's last bits depend on the texts that share its steps.
        there, here = (reply.json(parse_float=lambda digits: round(float(digits), 9)) for reply in replies)
        if isinstance(there, dict):
            assert here.pop("id") != there.pop("id")
            assert abs(here.pop("created") - there.pop("created")) < 60
        assert here == there
        assert [reply.headers.get("prelude-task") for reply in replies] == [task, task]


def test_a_null_does_not_say_of_which_kind_a_body_is(chatty: LiveServer) -> None:
    for field, value in (("messages", user("hello")), ("prompt", "hello")):
        nulls = dict.fromkeys(["inputs", "messages", "prompt", "parameters"])
        reply = invoke(chatty, **nulls | {"model": FROZEN, "max_tokens": 2, field: value})
        assert reply.status_code == 200, reply.text
    assert_error(invoke(chatty, inputs=None), 422, "invalid_request")


def test_a_stream_is_that_of_its_kind(chatty: LiveServer) -> None:
    streamed = invoke(chatty, inputs="hello", stream=True, parameters={"max_new_tokens": 5})
    assert parse_events(streamed.content) == chatty.events("hello", max_new_tokens=5)
    body = {"model": FROZEN, "stream": True, "max_tokens": 5}
    for field, value in (("messages", user("hello")), ("prompt", "hello")):
        *chunks, last = events(invoke(chatty, **body, **{field: value}))
        assert last == "[DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "status", "parts"),
    [
        ({}, 422, ["must be an object with inputs, messages or prompt"]),
        ({"input": "hello"}, 422, ["inputs, messages or prompt"]),
        ({"inputs": "hello", "messages": []}, 422, ["unknown field messages"]),
        ({"inputs": "hello", "parameters": {"max_tokens": 5}}, 422, ["unknown field parameters.max_tokens"]),
        ({"inputs": ["hello", 3]}, 422, ["inputs.1: "]),
        ({"inputs": "hello", "parameters": {"adapter_id": "nobody"}}, 404, ["no task 'nobody'"]),
        ({"model": FROZEN, "messages": [{"role": "robot", "content": "x"}]}, 422, ["messages.0.role: "]),
        ({"messages": [{"role": "user", "content": "x"}]}, 422, ["model: "]),
        ({"model": "nobody", "prompt": "hello"}, 404, ["The model `nobody` does not exist."]),
        ({"model": FROZEN, "prompt": "hello", "max_tokens": 10_000}, 422, ["tokens"]),
    ],
)
def test_what_does_not_fit_is_told_in_the_native_form(
    chatty: LiveServer, body: dict[str, Any], status: int, parts: list[str]
) -> None:
    response = invoke(chatty, **body)
    code = {404: "unknown_task", 422: response.json()["code"]}[status]
    assert_error(response, status, code, *parts)
    assert code in ("unknown_task", "invalid_request", "input_too_long")


def test_a_body_that_is_no_object_is_refused(chatty: LiveServer) -> None:
    for content, status in ((b"[]", 422), (b'"inputs"', 422), (b"null", 422), (b"", 422), (b"{", 422)):
        response = chatty.client.post(INVOCATIONS, content=content, headers={"Content-Type": "application/json"})
        assert_error(response, status, "invalid_request")
    assert_error(chatty.client.post(f"{INVOCATIONS}?task=x", json={"inputs": "a"}), 422, "invalid_request", "'task'")
