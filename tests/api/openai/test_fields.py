from __future__ import annotations

import re
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.completion_create_params import CompletionCreateParamsBase as LegacyParams

from server.api.openai.schemas import ChatBody, CompletionBody
from tests.api.live import LiveServer, assert_openai_error
from tests.api.openai.support import CHAT, COMPLETIONS, ROUTES, Body, post

NO_SCHEMAS: list[Any] = [False, True, 3, 1.5, [], [{}]]
BRIEF: Body = {"max_tokens": 16}
"""Enough to see a difference; the default is eight times as many."""


@pytest.mark.parametrize("path", ROUTES)
def test_an_unknown_field_is_refused_by_name_with_the_nearest(server: LiveServer, path: str) -> None:
    error = assert_openai_error(post(server, path, max_token=3), 400, "invalid_request", "max_token", "max_tokens?")
    assert (error["param"], error["type"]) == ("max_token", "invalid_request_error")
    assert_openai_error(post(server, path, zzzzz=1), 400, "invalid_request", "unknown field zzzzz.")
    assert "did you mean" not in post(server, COMPLETIONS, messages=[]).json()["error"]["message"], "a chat's field"


@pytest.mark.parametrize("path", ROUTES)
def test_null_counts_as_left_out_whatever_the_field_is_called(chatty: LiveServer, path: str) -> None:
    model = ChatBody if path == CHAT else CompletionBody
    kept = {"model", "messages", "prompt", *BRIEF}
    nulls: Body = dict.fromkeys([*model.offered(), "tools", "suffix", "adapter_source", "zzzzz"])
    body = BRIEF | {name: value for name, value in nulls.items() if name not in kept}
    reply = post(chatty, path, **body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == post(chatty, path, **BRIEF).json()["choices"]
    assert post(chatty, path, max_tokens=None).json()["usage"]["completion_tokens"] == 128
    for field in ("logit_bias", "metadata"):
        assert post(chatty, path, **BRIEF, **{field: {"5": None}}).json()["choices"] == reply.json()["choices"]
    for field, inner in (("stream_options", {"zzzzz": None}), ("structured_outputs", {"regex": "ab", "zzzzz": None})):
        assert post(chatty, path, stream=True, **BRIEF, **{field: inner}).status_code == 200
    assert_openai_error(post(chatty, path, **body, zzzz=1), 400, "invalid_request", "unknown field zzzz.")


NOTHING: list[tuple[str, Body]] = [
    (CHAT, {"tools": []}),
    (CHAT, {"functions": []}),
    *((CHAT, {"tool_choice": choice}) for choice in ("none", "auto")),
    *((CHAT, {"function_call": choice}) for choice in ("none", "auto")),
    (CHAT, {"parallel_tool_calls": True}),
    (CHAT, {"parallel_tool_calls": False}),
    (CHAT, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}),
    (CHAT, {"modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none"}),
    (CHAT, {"response_format": {"type": "text"}}),
    (COMPLETIONS, {"suffix": ""}),
    *((path, {"prompt_cache_retention": "24h"}) for path in ROUTES),
    *((path, {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}) for path in ROUTES),
    *((path, {"prompt_cache_key": "a", "safety_identifier": "b", "service_tier": "auto"}) for path in ROUTES),
    *((path, {"store": False, "metadata": {}, "logit_bias": {}, "stop": []}) for path in ROUTES),
]


@pytest.mark.parametrize(("path", "body"), NOTHING)
def test_a_value_that_asks_for_nothing_changes_nothing(chatty: LiveServer, path: str, body: Body) -> None:
    response = post(chatty, path, **BRIEF, **body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == post(chatty, path, **BRIEF).json()["choices"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_streams_obfuscation_can_be_asked_for_or_not(chatty: LiveServer, path: str) -> None:
    for wanted in (True, False, None):
        options = {"include_usage": True, "include_obfuscation": wanted}
        assert post(chatty, path, stream=True, stream_options=options, **BRIEF).status_code == 200


NOT_OFFERED: dict[str, list[Any]] = {
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, [], True],
    "function_call": [{"name": "f"}, "f"],
    "tools": [[{"type": "function"}], {}, "none", False, 0],
    "functions": [[{"name": "f"}], ""],
    "reasoning_effort": ["minimal", "low", "high", "None"],
    "verbosity": ["low", "high"],
    "modalities": [["text", "audio"], ["audio"], [], "text"],
    "audio": [{"voice": "ash", "format": "wav"}],
    "moderation": [{"model": "omni-moderation-latest"}],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "parallel_tool_calls": ["yes"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in NOT_OFFERED.items() for value in values]
)
def test_a_value_that_asks_for_what_is_not_offered_is_refused(chatty: LiveServer, field: str, value: Any) -> None:
    error = assert_openai_error(post(chatty, CHAT, **{field: value}), 400, "invalid_request", f"{field}: ")
    assert error["param"] == field
    assert error["message"].count(";") <= 1, "one problem, and what to do about it"


def test_every_field_of_openais_is_either_taken_or_refused_on_purpose() -> None:
    chats = CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    assert chats <= ChatBody.model_fields.keys()
    completions = LegacyParams.__annotations__.keys() | {"stream"}
    assert completions <= CompletionBody.model_fields.keys()


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("field", ["tools", "functions", "suffix", "tool_choice", "reasoning_effort"])
def test_what_is_not_offered_is_refused_and_not_ignored(server: LiveServer, path: str, field: str) -> None:
    error = assert_openai_error(post(server, path, **{field: [{"type": "function"}]}), 400, "invalid_request", field)
    assert error["param"] == field


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((path, "temperature", value) for path in ROUTES for value in (-1, 101, "1", True)),
        *((path, "top_p", value) for path in ROUTES for value in (0, 1.1)),
        *((path, "n", value) for path in ROUTES for value in (0, 129, 1.5)),
        *((path, "stop", value) for path in ROUTES for value in ("", [""], ["x"] * 17, "x" * 257, 3)),
        *((path, "logit_bias", value) for path in ROUTES for value in ({"x": 1}, {"1": 101}, {"-1": 1}, [1])),
        *((path, "presence_penalty", value) for path in ROUTES for value in (2.1, -2.1)),
        *((path, "stream_options", value) for path in ROUTES for value in ({"include_usage": True}, {"usage": True})),
        *((path, "seed", value) for path in ROUTES for value in (2**64, 0.5)),
        *((path, "structured_outputs", value) for path in ROUTES for value in ({}, {"regex": "a", "choice": ["b"]})),
        (COMPLETIONS, "logprobs", 21),
        (COMPLETIONS, "logprobs", True),
        (COMPLETIONS, "max_tokens", -1),
        (COMPLETIONS, "prompt", None),
        (COMPLETIONS, "prompt", 3),
        (COMPLETIONS, "prompt", ["a", 1]),
        (COMPLETIONS, "prompt", [1, "a"]),
        (COMPLETIONS, "prompt", [-1]),
        (COMPLETIONS, "prompt", [True]),
        (CHAT, "logprobs", 3),
        (CHAT, "max_tokens", 0),
        (CHAT, "messages", "hello"),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "response_format", {"type": "xml"}),
        (CHAT, "response_format", {"type": "json_schema"}),
        (CHAT, "response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ],
)
def test_a_field_that_does_not_fit_is_named(server: LiveServer, path: str, field: str, value: Any) -> None:
    error = assert_openai_error(post(server, path, **{field: value}), 400, "invalid_request", field)
    assert error["param"] == field


@pytest.mark.parametrize(
    ("path", "fields", "problem"),
    [
        *(
            (
                path,
                {"structured_outputs": {"json": value}},
                "structured_outputs.json: must be a JSON schema, as an object",
            )
            for path in ROUTES
            for value in NO_SCHEMAS
        ),
        (CHAT, {"structured_outputs": False}, "structured_outputs: must be a JSON object"),
        (CHAT, {"response_format": "json"}, "response_format: must be a JSON object"),
        (CHAT, {"response_format": {"type": "json", "value": False}}, "response_format.value: must be a JSON object"),
        (COMPLETIONS, {"logit_bias": [1]}, "logit_bias: must be a JSON object"),
    ],
)
def test_what_should_be_an_object_is_told_in_one_sentence(
    server: LiveServer, path: str, fields: Body, problem: str
) -> None:
    message = assert_openai_error(post(server, path, **fields), 400, "invalid_request")["message"]
    assert message.startswith(problem)
    assert message.count(";") == 0
    assert not re.search(r"dict|function|instance|Input should", message)
