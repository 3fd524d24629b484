"""Errors under /v1 leave in OpenAI's form, with the statuses that its libraries make classes of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.completion_create_params import CompletionCreateParamsBase as LegacyParams

from server.api.app import create_app
from server.api.openai.errors import OPENAI_ERRORS, openai_error
from server.api.openai.schemas import ChatBody, CompletionBody
from server.errors import InputTooLong, Overloaded, PreludeError
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import MAX_MODEL_LEN, LiveServer, as_form, assert_openai_error, live_server
from tests.api.openai.support import CHAT, COMPLETIONS, FROZEN, Body, post, user
from tests.api.test_errors import _tree
from tests.support import random_soft_prompt

ROUTES = (COMPLETIONS, CHAT)
NO_SCHEMAS: list[Any] = [False, True, 3, 1.5, [], [{}]]


@pytest.mark.parametrize("cls", list(_tree()), ids=lambda cls: cls.__name__)
async def test_every_error_of_the_tree_is_rendered_by_the_one_handler(
    server: LiveServer, cls: type[PreludeError]
) -> None:
    app = create_app(server.settings, server.worker, server.registry)

    @app.get("/v1/fails")
    async def fails() -> None:
        raise cls("It went wrong.", remedy="Do better.", param="n")

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get("/v1/fails")
    is_validation = issubclass(cls, tuple(c for c in _tree() if c.code == "invalid_request"))
    error = assert_openai_error(response, 400 if is_validation else cls.status, cls.code)
    opening = "n is too large. " if cls is InputTooLong else ""
    assert error["message"] == f"{opening}It went wrong. Do better."
    assert error["param"] == "n"
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    default = "server_error" if cls.status >= 500 else "invalid_request_error"
    assert error["type"] == kinds.get(cls.status, default)
    assert response.headers.get("retry-after") == (str(Overloaded.retry_after) if cls is Overloaded else None)


@pytest.mark.parametrize("path", ROUTES)
def test_an_unknown_field_is_refused_by_name_with_the_nearest(server: LiveServer, path: str) -> None:
    error = assert_openai_error(post(server, path, max_token=3), 400, "invalid_request", "max_token", "max_tokens?")
    assert (error["param"], error["type"]) == ("max_token", "invalid_request_error")
    assert_openai_error(post(server, path, zzzzz=1), 400, "invalid_request", "unknown field zzzzz.")
    assert "did you mean" not in post(server, COMPLETIONS, messages=[]).json()["error"]["message"], "a chat's field"


@pytest.mark.parametrize("path", ROUTES)
def test_null_counts_as_left_out_whatever_the_field_is_called(chatty: LiveServer, path: str) -> None:
    model = ChatBody if path == CHAT else CompletionBody
    required = {"model", "messages", "prompt"}
    nulls: Body = dict.fromkeys([*model.offered(), "tools", "suffix", "adapter_source", "zzzzz"])
    body = {name: value for name, value in nulls.items() if name not in required}
    reply = post(chatty, path, **body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == post(chatty, path).json()["choices"]
    for field in ("logit_bias", "metadata"):
        assert post(chatty, path, **{field: {"5": None}}).json()["choices"] == reply.json()["choices"]
    for field, inner in (("stream_options", {"zzzzz": None}), ("structured_outputs", {"regex": "ab", "zzzzz": None})):
        assert post(chatty, path, stream=True, **{field: inner}).status_code == 200
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
    response = post(chatty, path, **body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == post(chatty, path).json()["choices"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_streams_obfuscation_can_be_asked_for_or_not(chatty: LiveServer, path: str) -> None:
    for wanted in (True, False, None):
        options = {"include_usage": True, "include_obfuscation": wanted}
        assert post(chatty, path, stream=True, stream_options=options).status_code == 200


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


@pytest.mark.parametrize("path", ROUTES)
def test_min_tokens_beyond_max_tokens_are_refused(chatty: LiveServer, path: str) -> None:
    chatty.publish_random("openai-brief", 1, {"generation": {"max_new_tokens": 6}})
    wrong: list[tuple[Body, str]] = [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, but max_tokens is 4. Lower min_tokens, or raise"),
        ({"min_tokens": 129}, "max_tokens is 128 where it is left out. Lower min_tokens, or send a higher max_tokens."),
        ({"min_tokens": 7, "model": "openai-brief"}, "min_tokens is 7, but max_tokens is 6 where it is left out."),
    ]
    if path == CHAT:
        wrong.append(({"min_tokens": 5, "max_completion_tokens": 4}, "but max_completion_tokens is 4."))
    for fields, message in wrong:
        for streamed in (False, True):
            response = post(chatty, path, stream=streamed, **fields)
            assert assert_openai_error(response, 400, "invalid_request", message)["param"] == "min_tokens"


def test_min_tokens_beyond_the_room_that_is_left_are_refused(server: LiveServer) -> None:
    text = "a" * (MAX_MODEL_LEN - 10)
    error = assert_openai_error(
        post(server, COMPLETIONS, prompt=text, min_tokens=11),
        400,
        "input_too_long",
        "min_tokens is too large. min_tokens is 11, but after the input the context has room for 10 new tokens.",
    )
    assert error["param"] == "min_tokens"
    assert post(server, COMPLETIONS, prompt=text, min_tokens=10).json()["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("path", ROUTES)
def test_whether_the_input_or_max_tokens_is_too_large_is_told_apart(chatty: LiveServer, path: str) -> None:
    opening = "Input tokens exceed the configured limit. "  # clients look for it, and shorten what they send
    for fields in ({"max_tokens": MAX_MODEL_LEN}, {"max_tokens": 10**9}):
        error = assert_openai_error(post(chatty, path, **fields), 400, "input_too_long", f"holds {MAX_MODEL_LEN}.")
        assert error["param"] == "max_tokens"
        assert error["message"].startswith("max_tokens is too large. ")
        assert re.search(r"Ask for at most \d+ new tokens, or shorten the input\.$", error["message"])
    field = "messages" if path == CHAT else "prompt"
    for text in ("a" * MAX_MODEL_LEN, "a" * 3_000_000):
        body: Body = {field: user(text) if path == CHAT else text}
        for tokens in ({}, {"max_tokens": 1}, {"max_tokens": MAX_MODEL_LEN}):
            error = assert_openai_error(post(chatty, path, **body, **tokens), 400, "input_too_long", opening)
            assert error["param"] is None
            assert "Ask for at most" not in error["message"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("model", ["nobody", "GPT 4", "", "org/model", "nobody@3", "x@latest", "\N{SNOWMAN}"])
def test_a_model_that_there_is_not_is_not_found(server: LiveServer, path: str, model: str) -> None:
    told = f"The model `{model}` does not exist. GET /v1/models lists the models."
    for response in (post(server, path, model=model), server.client.get(f"/v1/models/{model}") if model else None):
        if response is not None:
            error = assert_openai_error(response, 404, "unknown_task")
            assert error == {
                "message": told,
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }


def test_a_version_that_there_is_not_is_told_with_those_that_there_are(server: LiveServer) -> None:
    server.publish_random("openai-twice", 1)
    told = "The model `openai-twice@9` does not exist. Task 'openai-twice' has no version 9. Its versions are 1. GET"
    assert_openai_error(post(server, COMPLETIONS, model="openai-twice@9"), 404, "unknown_task", told)
    files = as_form(server.files(random_soft_prompt(server.model.spec)))
    assert server.client.put("/prompts/openai-staged?activate=false", files=files).is_success
    told = "The model `openai-staged` does not exist. No version of 'openai-staged' is live. Activate a version, or ask"
    assert_openai_error(post(server, COMPLETIONS, model="openai-staged"), 404, "unknown_task", told)


def test_a_misspelt_model_is_told_the_nearest(server: LiveServer) -> None:
    server.publish_random("openai-sentiment", 1)
    assert_openai_error(
        post(server, COMPLETIONS, model="openai-sentimnet"), 404, "unknown_task", "Did you mean openai-sentiment"
    )


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"model": 3}', b'{"model": "x"}'])
def test_a_body_that_is_not_a_request_is_refused(server: LiveServer, path: str, content: bytes) -> None:
    response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert_openai_error(response, 400, "invalid_request")


@pytest.mark.parametrize("content", [b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 100_000, b'{"n": 1' + b"0" * 5000])
def test_a_body_that_no_parser_takes_is_refused(server: LiveServer, content: bytes) -> None:
    response = server.client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert_openai_error(response, 400, "invalid_request")


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(server: LiveServer) -> None:
    half = '"\\ud800"'
    bodies = {
        COMPLETIONS: [
            f'"prompt": {half}',
            f'"prompt": "a", "model": {half}',
            f'"prompt": ["a", {half}]',
            f'"prompt": "a", "stop": {half}',
            f'"prompt": "a", {half}: 1',
            f'"prompt": "a", "structured_outputs": {{"choice": [{half}]}}',
            f'"prompt": "a", "structured_outputs": {{"regex": {half}}}',
        ],
        CHAT: [
            f'"messages": [{{"role": "user", "content": {half}}}]',
            f'"messages": [{{"role": "user", "content": [{{"type": "text", "text": {half}}}]}}]',
            f'"messages": [{{"role": "user", "content": "a", "name": {half}}}]',
        ],
    }
    for path, fields in bodies.items():
        for field in fields:
            content = f'{{"model": "{FROZEN}", {field}}}'
            response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert_openai_error(response, 400, "invalid_request")


def test_very_many_wrong_items_are_refused_briefly(server: LiveServer) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": ["a", *range(300_000)]}),
        (COMPLETIONS, {"prompt": [1, *["a"] * 300_000]}),
        (CHAT, {"messages": list(range(300_000))}),
        (COMPLETIONS, {f"temperatur{i}": 1 for i in range(20_000)}),
    ):
        response = post(server, path, **body)
        assert_openai_error(response, 400, "invalid_request")
        assert len(response.content) < 2000


def test_a_body_over_the_limit_is_413(server: LiveServer) -> None:
    assert_openai_error(post(server, COMPLETIONS, prompt="a" * 5 * 2**20), 413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_what_there_is_not_under_v1_is_told_in_the_same_form(
    server: LiveServer, method: str, path: str, status: int
) -> None:
    response = server.client.request(method, path)
    assert_openai_error(response, status, "invalid_request", f"There is no {method} {path}.")
    assert ("allow" in response.headers) == (status == 405)


def test_an_unknown_query_parameter_is_refused(server: LiveServer) -> None:
    response = server.client.post(f"{COMPLETIONS}?task=x", json={"model": FROZEN, "prompt": "a"})
    assert_openai_error(response, 400, "invalid_request", "'task'")


def test_only_v1_itself_is_openais() -> None:
    assert [
        OPENAI_ERRORS.is_for(path) for path in ("/v1", "/v1/", "/v1/models", "/v10", "/v1x/y", "/", "/prompts/v1")
    ] == [
        *[True] * 3,
        *[False] * 4,
    ]


def test_an_error_that_quotes_half_a_character_can_still_be_sent() -> None:
    assert json.dumps(openai_error(PreludeError("a\ud800b")), ensure_ascii=False).encode()


def test_a_foreign_page_is_refused_in_the_same_form(server: LiveServer) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    response = server.client.post(COMPLETIONS, headers=headers, json={"model": FROZEN, "prompt": "a"})
    assert_openai_error(response, 403, "forbidden", "other sites' pages")


def test_keys_are_asked_for_and_hold_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = {
        "publish": add_key(path, "publish", [Scope.PUBLISH], None)[1],
        "team": add_key(path, "team", [Scope.GENERATE], ["team-a-*"])[1],
    }
    with live_server(tmp_path, api_keys_file=path) as live:
        assert_openai_error(post(live, COMPLETIONS), 401, "unauthorized")
        live.client.headers["Authorization"] = f"Bearer {keys['publish']}"
        live.publish_random("team-a-mood", 1)
        live.publish_random("team-b-mood", 1)
        assert_openai_error(post(live, COMPLETIONS), 403, "forbidden", "scope generate")
        live.client.headers["Authorization"] = f"Bearer {keys['team']}"
        assert post(live, COMPLETIONS, model="team-a-mood", max_tokens=2).status_code == 200
        assert post(live, COMPLETIONS, model="team-a-mood@1", max_tokens=2).status_code == 200
        for model in ("team-b-mood", FROZEN, "nobody"):
            for route in ROUTES:
                assert_openai_error(post(live, route, model=model), 403, "forbidden", "team-a-*")
        told = "The model `team-a-moot` does not exist. GET /v1/models lists the models."
        assert post(live, COMPLETIONS, model="team-a-moot").json()["error"]["message"] == told, "no names of others"


def test_the_librarys_classes_are_the_ones_that_fit(own_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{own_server.url}/v1", api_key="none", max_retries=0) as client:

        def complete(**body: Any) -> None:
            client.completions.create(**{"model": FROZEN, "prompt": "hello", **body})

        with pytest.raises(openai.BadRequestError) as refused:
            complete(max_tokens=MAX_MODEL_LEN)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as missing:
            complete(model="nobody")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="unknown field tools"):
            complete(extra_body={"tools": []})
        own_server.model.fail_after = 0
        with pytest.raises(openai.InternalServerError) as failed:
            complete()
        assert failed.value.code == "generation_failed"
        own_server.worker.draining = True
        with pytest.raises(openai.InternalServerError) as draining:
            complete()
        assert draining.value.status_code == 503
        own_server.worker.draining = False
