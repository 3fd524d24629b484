"""GET /: a browser gets the page with its policy, and every other client what it gets without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from server.api import playground
from tests.api.live import LiveServer, assert_error, live_server

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "svelte-trusted-html",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder like the one that a build makes."""
    assets = tmp_path / playground.ASSETS
    assets.mkdir()
    (tmp_path / "index.html").write_text("<title>Prelude</title>")
    (tmp_path / "secret.txt").write_text("not an asset")
    for name, content in {"a-1.js": "plain", "a-1.js.br": "br", "a-1.js.gz": "gz", "b-2.css": "plain"}.items():
        (assets / name).write_text(content)
    return tmp_path


@pytest.fixture
def client(bundle: Path) -> TestClient:
    return TestClient(Starlette(routes=playground.routes(bundle)), headers={"Accept-Encoding": "identity"})


def test_a_browser_gets_the_page_with_a_policy_that_lets_nothing_else_in(client: TestClient) -> None:
    page = client.get("/", headers=BROWSER)
    assert (page.status_code, page.text) == (200, "<title>Prelude</title>")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")) == POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cross-origin-opener-policy"] == "same-origin"


def test_the_page_is_checked_at_each_load_and_sent_only_once_it_has_changed(client: TestClient, bundle: Path) -> None:
    first = client.get("/", headers=BROWSER)
    assert first.headers["cache-control"] == "no-cache"
    known = {**BROWSER, "If-None-Match": first.headers["etag"]}
    again = client.get("/", headers=known)
    assert (again.status_code, again.content) == (304, b"")
    (bundle / "index.html").write_text("<title>New</title>")
    assert client.get("/", headers=known).text == "<title>New</title>"


def test_hashed_files_are_kept_for_ever_in_the_smallest_form_that_is_accepted(client: TestClient) -> None:
    for accepted, encoding, content in (
        ("gzip, deflate, br", "br", "br"),
        ("gzip, br;q=0", "gzip", "gz"),
        ("identity", None, "plain"),
        ("*", None, "plain"),
    ):
        with client.stream("GET", "/playground/a-1.js", headers={"Accept-Encoding": accepted}) as reply:
            assert reply.status_code == 200
            assert b"".join(reply.iter_raw()).decode() == content
            assert reply.headers.get("content-encoding") == encoding
            assert reply.headers["content-type"].startswith("text/javascript")
            assert reply.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert reply.headers["vary"] == "Accept-Encoding"
    assert client.get("/playground/b-2.css", headers={"Accept-Encoding": "br"}).text == "plain"


@pytest.mark.parametrize(
    "name", ["x.js", "a-1.js.br", "a-1.js.gz", "..%2Fsecret.txt", "..", "%00", "a-1.js%00", ".", "a/../../secret.txt"]
)
def test_nothing_else_of_the_disk_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404


def test_a_page_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    page = TestClient(Starlette(routes=playground.routes(tmp_path))).get("/", headers=BROWSER)
    assert page.status_code == 200
    assert "npm run build" in page.text
    assert page.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html;q=0, */*", ""])
def test_other_clients_get_what_they_get_without_the_page(server: LiveServer, accept: str) -> None:
    reply = server.client.get("/", headers={"Accept": accept})
    assert_error(reply, 405, "invalid_request", "There is no GET /")
    assert reply.headers["allow"] == "POST"


def test_the_route_of_clients_stays_theirs(server: LiveServer) -> None:
    reply = server.client.post("/", json={"inputs": "hello"}, headers=BROWSER)
    assert reply.status_code == 200
    assert reply.json()[0]["generated_text"] is not None


def test_the_page_can_be_switched_off(tmp_path: Path) -> None:
    with live_server(tmp_path, ui=False) as live:
        assert_error(live.client.get("/", headers=BROWSER), 405, "invalid_request")
        assert_error(live.client.get("/playground/a.js"), 404, "invalid_request")
