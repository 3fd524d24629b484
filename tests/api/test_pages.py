"""/docs works offline: the page, its script and its styles come from the server, and the browser is told so."""

from __future__ import annotations

import re

import pytest

from tests.api.live import LiveServer, assert_error


def test_the_page_loads_nothing_from_elsewhere(server: LiveServer) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(addresses) == 5
    for address in addresses:
        assert ":" not in address or address == "data:,"
        if address != "data:,":
            response = server.client.get(f"/{address}")
            assert response.status_code == 200
            kind = {"js": "text/javascript", "css": "text/css", "json": "application/json"}[address.rpartition(".")[2]]
            assert response.headers["content-type"].startswith(kind)
            assert response.content
    assert not re.search(r"<script(?! src=)|<style| on\w+=| style=", page.text), "the policy forbids it"


def test_the_browser_is_told_that_nothing_comes_from_elsewhere(server: LiveServer) -> None:
    policy = dict(
        directive.split(" ", 1)
        for directive in server.client.get("/docs").headers["content-security-policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect", "/docs/redoc.standalone.js", "/docs/x"])
def test_there_are_no_other_pages(server: LiveServer, path: str) -> None:
    assert_error(server.client.get(path), 404, "invalid_request", f"There is no GET {path}")
