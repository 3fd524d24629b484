"""A page of somebody else reaches a server without keys through its user's browser; nothing of that gets through."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.browsers import is_loopback, is_this_machine
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, assert_error, live_server

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
CHANGES = [
    ("POST", "/generate"),
    ("POST", "/"),
    ("POST", "/prompts/x/rollback"),
    ("PUT", "/prompts/x"),
    ("DELETE", "/prompts/x"),
]


@pytest.fixture(scope="module")
def anonymous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that lets everybody in, by whatever name."""
    with live_server(tmp_path_factory.mktemp("anonymous"), allow_anonymous=True) as live:
        yield live


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost:{port}"},
        {"Origin": "http://127.0.0.1:{port}.evil.example"},
        {"Origin": "null"},
        {"Origin": "chrome-extension://abcdef"},
    ],
    ids=str,
)
def test_a_foreign_page_cannot_change_or_ask_anything(
    server: LiveServer, anonymous: LiveServer, method: str, path: str, headers: dict[str, str]
) -> None:
    for live in (server, anonymous):
        sent = {name: value.format(port=live.port) for name, value in headers.items()}
        body = assert_error(live.client.request(method, path, headers=sent), 403, "forbidden", "other sites' pages")
        assert "PRELUDE_API_KEYS_FILE" in body["remedy"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}", "Host": "localhost:{port}"},
        {"Origin": "http://LOCALHOST:{port}", "Host": "localhost:{port}"},
        {"Origin": "http://localhost:{port}", "Host": "LocalHost:{port}"},
        {"Origin": "http://localhost", "Host": "localhost:80"},
        {"Origin": "https://localhost", "Host": "localhost"},
        {"Origin": "https://localhost:443", "Host": "localhost"},
        {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"},
    ],
    ids=str,
)
def test_programs_and_the_servers_own_pages_are_not_troubled(server: LiveServer, headers: dict[str, str]) -> None:
    sent = {name: value.format(port=server.port) for name, value in headers.items()}
    assert server.client.post("/generate", json=BODY, headers=sent).status_code == 200
    assert server.client.get("/docs", headers=sent).status_code == 200


def test_a_link_on_a_foreign_page_may_lead_to_what_only_reads(server: LiveServer) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert server.client.get("/docs", headers=headers).status_code == 200
    assert server.client.options("/generate", headers=headers).status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "["])
def test_a_name_that_was_made_to_point_here_is_refused_for_reading_too(server: LiveServer, host: str) -> None:
    for path in ("/prompts", "/health", "/docs"):
        body = assert_error(server.client.get(path, headers={"Host": host}), 403, "forbidden", "127.0.0.1")
        assert "PRELUDE_ALLOW_ANONYMOUS=1" in body["remedy"]


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "localhost.", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"])
def test_this_machines_own_names_are_answered(server: LiveServer, host: str) -> None:
    assert server.client.get("/prompts", headers={"Host": host}).status_code == 200


def test_a_client_without_a_host_is_no_browser_and_is_answered(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"200"


def test_one_good_host_does_not_hide_a_bad_one(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(4096).split()[1] in (b"400", b"403")


def test_whoever_lets_everybody_in_is_reached_by_any_name(anonymous: LiveServer) -> None:
    assert anonymous.client.get("/prompts", headers={"Host": "gpu-box:8000"}).status_code == 200


def test_a_server_that_lets_everybody_in_may_be_told_its_names(tmp_path: Path) -> None:
    with live_server(tmp_path, allow_anonymous=True, allowed_hosts="GPU-box,10.0.0.1,fe80::1") as live:
        for host in ("gpu-box", "gpu-box:8000", "GPU-BOX.", "10.0.0.1:80", "[fe80::1]:8000", "localhost", "127.0.0.1"):
            assert live.client.get("/prompts", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "gpu-box.evil.example", "10.0.0.2", "fe80::1"):
            body = assert_error(live.client.get("/prompts", headers={"Host": host}), 403, "forbidden")
            assert "PRELUDE_ALLOWED_HOSTS" in body["remedy"]
        assert_error(
            live.client.post("/generate", json=BODY, headers={"Sec-Fetch-Site": "cross-site"}), 403, "forbidden"
        )


def test_a_proxy_may_be_given_a_name_of_its_own_in_front_of_a_server_on_loopback(tmp_path: Path) -> None:
    with live_server(tmp_path, allowed_hosts="prelude.example") as live:
        assert live.client.get("/prompts", headers={"Host": "prelude.example"}).status_code == 200
        assert live.client.get("/prompts", headers={"Host": "evil.example"}).status_code == 403


def test_names_count_for_a_server_with_keys_too_where_they_are_set(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(path, 'ci', [Scope.GENERATE], None)[1]}"}
    with live_server(tmp_path, api_keys_file=path, allowed_hosts="gpu-box") as live:
        for host, status in (("gpu-box", 200), ("evil.example", 403)):
            sent = {**headers, "Host": host, "Sec-Fetch-Site": "cross-site"}
            assert live.client.post("/generate", json=BODY, headers=sent).status_code == status


def test_with_keys_only_the_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add_key(path, "ci", [Scope.GENERATE], None)[1]
    with live_server(tmp_path, api_keys_file=path) as live:
        foreign = {"Host": "prelude.example", "Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
        assert live.client.post("/generate", json=BODY, headers=foreign).status_code == 401
        allowed = {**foreign, "Authorization": f"Bearer {text}"}
        assert live.client.post("/generate", json=BODY, headers=allowed).status_code == 200


def test_every_reply_tells_browsers_to_keep_to_its_type_and_out_of_frames(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError

    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/generate", {"json": BODY}),
        ("POST", "/generate_stream", {"json": BODY}),
        ("POST", "/generate", {"content": b"{"}),
        ("PATCH", "/prompts", {}),
        ("GET", "/prompts", {"headers": {"Host": "evil.example"}}),
    ]
    pages = (
        "/docs",
        "/docs/start.js",
        "/openapi.json",
        "/health",
        "/info",
        "/metrics",
        "/v1/models",
        "/nope",
        "/v1/nope",
    )
    requests += [("GET", path, {}) for path in pages]
    for method, path, options in requests:
        response = server.client.request(method, path, **options)
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers.get_list("content-security-policy") == [headers["content-security-policy"]]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
    monkeypatch.setattr(type(server.registry), "names_after", failing)
    response = server.client.get("/v1/models")
    assert (response.status_code, response.headers["x-content-type-options"]) == (500, "nosniff")


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("128.0.0.1", False),
        ("localhost", False),
    ],
)
def test_loopback_is_told_from_the_address_alone(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_a_host_is_taken_apart_strictly() -> None:
    assert not any(
        map(is_this_machine, ["localhost@evil.example", "evil.example#localhost", "localhost:x", "::1", " "])
    )
