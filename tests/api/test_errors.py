"""Every error leaves in one shape, with its own status; the OpenAPI document says which ones a route can give."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server import api, errors
from server.api.app import create_app
from server.api.jobs.routes import common_routes
from server.api.jobs.table import KINDS
from server.api.schemas import error_body
from server.errors import PreludeError, StoreError
from tests.api.live import LiveServer, assert_error

FAMILIES = {"generation", "validation", "overloaded", "incomplete_generation"}  # what huggingface_hub knows


def _tree(cls: type[PreludeError] = PreludeError) -> Iterator[type[PreludeError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _tree(child)


def _app(server: LiveServer) -> FastAPI:
    return create_app(server.settings, server.worker, server.registry)


async def _get(app: FastAPI, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


@pytest.fixture(scope="module")
def failing(server: LiveServer) -> FastAPI:
    """The app with a route per error that raises it."""
    app = _app(server)
    classes = {cls.__name__: cls for cls in _tree()}

    @app.get("/fails/{name}")
    async def fails(name: str) -> None:
        raise classes[name]("It went wrong.", remedy="Do better.")

    return app


@pytest.mark.parametrize("cls", list(_tree()), ids=lambda cls: cls.__name__)
async def test_every_error_of_the_tree_leaves_with_its_status_and_remedy(
    failing: FastAPI, cls: type[PreludeError]
) -> None:
    body = assert_error(await _get(failing, f"/fails/{cls.__name__}"), cls.status, cls.code, "It went wrong.")
    assert body["remedy"] == "Do better."
    assert body["error_type"] in FAMILIES
    assert error_body(cls("x"))["remedy"] == cls.default_remedy


def test_codes_are_unique_and_client_errors_are_4xx() -> None:
    tree = list(_tree())
    assert len({cls.code for cls in tree}) == len(tree)
    for cls in tree:
        if cls.family == "validation":
            assert 400 <= cls.status < 500


async def test_an_unexpected_error_is_a_500_that_tells_nothing_of_the_insides(server: LiveServer) -> None:
    app = _app(server)

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError("secret")

    response = await _get(app, "/fails")
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text


async def test_an_error_that_quotes_half_a_character_can_still_be_sent(server: LiveServer) -> None:
    app = _app(server)

    @app.get("/fails")
    async def fails() -> None:
        raise errors.InvalidRequest("a\ud800b")

    assert_error(await _get(app, "/fails"), 422, "invalid_request", r"a\ud800b")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"inputs": "\xff"}', "it is not UTF-8 at byte 12"),
        (b'{"inputs": ' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"inputs": 1' + b"0" * 5000 + b"}", "a number has more than 1,000 digits"),
    ],
    ids=["bytes", "nesting", "digits"],
)
def test_a_body_that_cannot_be_read_is_told_why(server: LiveServer, content: bytes, why: str) -> None:
    reply = server.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert_error(reply, 400, "invalid_request", why)


async def test_a_store_that_fails_is_told_to_the_operator_too(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    app = _app(server)

    @app.get("/stores")
    async def stores() -> None:
        raise StoreError("The disk is gone.")

    await _get(app, "/stores")
    assert "GET /stores: The disk is gone." in caplog.text


@pytest.mark.parametrize("path", ["/nowhere", "/generate/x", "/prompts/a/b", "/v1/nothing", "/v10/nothing"])
def test_a_path_that_does_not_exist_is_404_in_the_same_shape(server: LiveServer, path: str) -> None:
    assert_error(server.client.get(path), 404, "invalid_request", f"There is no GET {path}.")


def test_a_method_that_a_route_does_not_have_is_405_and_says_which_it_has(server: LiveServer) -> None:
    response = server.client.get("/generate")
    assert_error(response, 405, "invalid_request", "There is no GET /generate.")
    assert response.headers["allow"] == "POST"
    assert_error(server.client.post("/prompts/x"), 405, "invalid_request")


def _operations(server: LiveServer) -> dict[tuple[str, str], dict[str, Any]]:
    document = server.client.get("/openapi.json").json()
    return {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def test_the_openapi_document_lists_every_route(server: LiveServer) -> None:
    found = pkgutil.walk_packages(api.__path__, "server.api.")
    modules = [importlib.import_module(module.name) for module in found]
    routers = [module.router for module in modules if hasattr(module, "router")]
    routers += [common_routes(kind) for kind in KINDS]
    routes = {
        (method, route.path_format)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert set(_operations(server)) == routes
    assert {
        ("POST", "/generate"),
        ("POST", "/generate_stream"),
        ("POST", "/"),
        ("GET", "/prompts"),
        ("GET", "/prompts/{task}"),
        ("PUT", "/prompts/{task}"),
        ("DELETE", "/prompts/{task}"),
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/info"),
    } <= routes


def test_an_app_makes_no_route_anew(server: LiveServer) -> None:
    """It would parse the source of the schemas again, which Python 3.11 cannot do in two threads at once."""
    one, other = ([route for route in _app(server).routes if isinstance(route, APIRoute)] for _ in range(2))
    assert len(one) > 30
    assert all(first is second for first, second in zip(one, other, strict=True))


def test_every_documented_error_has_the_one_shape(server: LiveServer) -> None:
    for operation, details in _operations(server).items():
        for status, response in details["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                body = "OpenAIErrorBody" if operation[1].startswith("/v1/") else "ErrorBody"
                assert schema == {"$ref": f"#/components/schemas/{body}"}, (operation, status)
                assert response["description"]
    document = server.client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_each_route_documents_the_errors_that_it_gives(server: LiveServer) -> None:
    operations = _operations(server)
    expected = {
        ("POST", "/generate"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/generate_stream"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/generate_many"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/invocations"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/tokenize"): {400, 413, 422, 429},
        ("POST", "/v1/completions"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("POST", "/v1/chat/completions"): {400, 404, 413, 422, 429, 500, 503, 504},
        ("GET", "/v1/models"): {400, 422},
        ("GET", "/v1/models/{model}"): {400, 404, 422},
        ("GET", "/prompts"): {422},
        ("GET", "/prompts/{task}"): {404, 422},
        ("PUT", "/prompts/{task}"): {400, 409, 412, 413, 422, 429, 500, 503, 507},
        ("DELETE", "/prompts/{task}"): {404, 412, 422, 429, 500, 503, 507},
        ("GET", "/prompts/{task}/versions"): {404, 422},
        ("POST", "/prompts/{task}/activate"): {400, 404, 412, 413, 422, 429, 500, 503, 507},
        ("POST", "/prompts/{task}/rollback"): {404, 409, 412, 422, 429, 500, 503, 507},
        ("PUT", "/prompts/{task}/traffic"): {400, 404, 412, 413, 422, 429, 500, 503, 507},
        ("GET", "/prompts/{task}/versions/{version}/download"): {404, 422, 429, 503},
        ("GET", "/prompts/{task}/interpretation"): {404, 422, 429, 503},
        ("DELETE", "/prompts/{task}/versions/{version}"): {404, 409, 412, 422, 429, 500, 503, 507},
        ("GET", "/ready"): {500, 503},
    }
    for operation, statuses in expected.items():
        documented = {int(status) for status in operations[operation]["responses"]}
        refused = {401, 403}  # test_auth.py knows where
        assert {status for status in documented if status >= 400} - refused == statuses, operation
        assert operations[operation].get("summary")
        assert operations[operation].get("description")


def test_the_documentation_page_is_served(server: LiveServer) -> None:
    response = server.client.get("/docs")
    assert response.status_code == 200
    assert "/openapi.json" in response.text


def test_a_body_with_very_many_unknown_fields_is_refused_briefly(server: LiveServer) -> None:
    parameters = {f"temperatur{i}": 1 for i in range(8_000)}
    response = server.client.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert response.status_code == 422
    assert "and 7,995 more" in response.json()["error"]
    assert len(response.content) < 2000
