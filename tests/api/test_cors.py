"""Pages of origins that the settings name may use the server from a browser, and no other page may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, assert_error, live_server

APP = "https://app.example"
BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}


@pytest.fixture(scope="module")
def open_to_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without keys that lets pages of one origin in."""
    with live_server(tmp_path_factory.mktemp("cors"), cors_origins=f"{APP}, http://localhost:3000") as live:
        yield live


def page(origin: str) -> dict[str, str]:
    """What a browser sends for a page of an origin."""
    return {"Origin": origin, "Sec-Fetch-Site": "cross-site"}


def preflight(server: LiveServer, origin: str, method: str = "PUT", headers: str = "if-match") -> httpx.Response:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return server.client.options("/prompts/mood", headers={**page(origin), **asked})


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_a_page_of_a_named_origin_may_do_what_our_own_may(open_to_app: LiveServer, origin: str) -> None:
    client = open_to_app.client
    replies = [
        client.post("/generate", json=BODY, headers=page(origin)),
        client.get("/prompts", headers=page(origin)),
        client.delete("/prompts/nobody", headers=page(origin)),
        client.post("/generate", json={}, headers=page(origin)),
    ]
    assert [reply.status_code for reply in replies] == [200, 200, 404, 422]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == origin
        assert "Origin" in reply.headers["vary"]
        assert {"ETag", "X-Request-Id", "Prelude-Task"} <= set(
            reply.headers["access-control-expose-headers"].split(", ")
        )
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    ("method", "headers"), [("PUT", "if-match"), ("DELETE", "authorization"), ("POST", "content-type,x-request-id")]
)
def test_its_browser_is_told_so_before_it_asks(open_to_app: LiveServer, method: str, headers: str) -> None:
    reply = preflight(open_to_app, APP, method, headers)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == APP
    assert method in reply.headers["access-control-allow-methods"]
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://app.example", f"{APP}:444", f"{APP}.evil.example", "null"]
)
def test_pages_of_others_stay_out(open_to_app: LiveServer, origin: str) -> None:
    assert_error(open_to_app.client.post("/generate", json=BODY, headers=page(origin)), 403, "forbidden")
    for reply in (open_to_app.client.get("/prompts", headers=page(origin)), preflight(open_to_app, origin)):
        assert "access-control-allow-origin" not in reply.headers
    assert preflight(open_to_app, origin).status_code == 400


def test_a_named_origin_does_not_help_a_name_that_was_made_to_point_here(open_to_app: LiveServer) -> None:
    headers = {**page(APP), "Host": "evil.example"}
    assert_error(open_to_app.client.post("/generate", json=BODY, headers=headers), 403, "forbidden")


def test_without_the_setting_no_page_is_told_anything(server: LiveServer) -> None:
    assert "access-control-allow-origin" not in server.client.get("/prompts", headers=page(APP)).headers
    assert preflight(server, APP).status_code == 405
    assert_error(server.client.post("/generate", json=BODY, headers=page(APP)), 403, "forbidden", "other sites' pages")


def test_an_error_that_nobody_expected_can_be_read_by_the_page(
    open_to_app: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_to_app.registry, "resolve", None)
    with httpx.Client(base_url=open_to_app.url) as client:  # uvicorn closes the connection after it
        reply = client.post("/generate?task=mood", json=BODY, headers=page(APP))
    assert_error(reply, 500, "internal_error")
    assert reply.headers["access-control-allow-origin"] == APP


def test_any_page_where_everybody_is_let_in(tmp_path: Path) -> None:
    with live_server(tmp_path, cors_origins="*", allow_anonymous=True) as live:
        for origin in (APP, "https://other.example", "null"):
            reply = live.client.post("/generate", json=BODY, headers=page(origin))
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


def test_with_keys_a_page_needs_one_and_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add_key(path, "ci", [Scope.GENERATE], None)[1]
    with live_server(tmp_path, api_keys_file=path, cors_origins=APP) as live:
        assert preflight(live, APP, "POST", "authorization").status_code == 200, "it never carries a key"
        refused = live.client.post("/generate", json=BODY, headers=page(APP))
        assert_error(refused, 401, "unauthorized")
        assert refused.headers["access-control-allow-origin"] == APP
        allowed = {**page(APP), "Authorization": f"Bearer {text}"}
        assert live.client.post("/generate", json=BODY, headers=allowed).status_code == 200
