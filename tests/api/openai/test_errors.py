"""Errors under /v1 leave in OpenAI's form, with the statuses that its libraries make classes of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from server.api.app import create_app
from server.api.openai.errors import OPENAI_ERRORS, openai_error
from server.errors import InputTooLong, Overloaded, PreludeError
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import MAX_MODEL_LEN, LiveServer, as_form, assert_openai_error, live_server
from tests.api.openai.support import CHAT, COMPLETIONS, FROZEN, ROUTES, Body, post, user
from tests.api.test_errors import _tree
from tests.support import random_soft_prompt


@pytest.fixture(scope="module")
def failing(server: LiveServer) -> FastAPI:
    """The app with a route per error that raises it."""
    app = create_app(server.settings, server.worker, server.registry)
    classes = {cls.__name__: cls for cls in _tree()}

    @app.get("/v1/fails/{name}")
    async def fails(name: str) -> None:
        raise classes[name]("It went wrong.", remedy="Do better.", param="n")

    return app


@pytest.mark.parametrize("cls", list(_tree()), ids=lambda cls: cls.__name__)
async def test_every_error_of_the_tree_is_rendered_by_the_one_handler(
    failing: FastAPI, cls: type[PreludeError]
) -> None:
    transport = httpx.ASGITransport(app=failing, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get(f"/v1/fails/{cls.__name__}")
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
