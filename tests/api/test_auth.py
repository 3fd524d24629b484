"""Keys over a real socket: who gets in, to what, and that a stranger costs the server nothing."""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient, close_session
from huggingface_hub.errors import ValidationError

from server.api import forms
from server.keys import live as live_keys
from server.keys.file import add_key, revoke_key
from server.keys.key import ApiKey, Scope
from tests.api.live import Files, LiveServer, as_form, assert_error, live_server
from tests.peft_files import peft_directory
from tests.support import random_soft_prompt

ROOT = Path(__file__).parents[2]
OPEN = ["GET /health", "GET /ready", "GET /ping", "GET /v2/health/live", "GET /v2/health/ready"]
JOB = "20261125t101500123-9f3a1c2b7d10"
HUGE = 60 * 2**20
BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
FORM = "Content-Type: multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="files"; filename="f.zip"\r\n\r\n'

KINDS: dict[str, tuple[list[Scope], list[str] | None]] = {
    "admin": ([Scope.ADMIN], None),
    "generate": ([Scope.GENERATE], None),
    "publish": ([Scope.PUBLISH], None),
    "team-a": ([Scope.GENERATE, Scope.PUBLISH], ["team-a-*", "rows"]),
}


@dataclass(frozen=True)
class Guarded:
    """A server with a key of each kind."""

    live: LiveServer
    path: Path
    texts: dict[str, str]
    keys: dict[str, ApiKey]

    def send(self, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        """A request with the key of this name."""
        return self.live.client.request(method, path, headers=self.headers(key), **options)

    def put(self, key: str | None, task: str, files: Files) -> httpx.Response:
        """An upload with the key of this name."""
        return self.send(key, "PUT", f"/prompts/{task}", files=as_form(files))

    def headers(self, key: str | None) -> dict[str, str]:
        """What a client with this key sends."""
        return {} if key is None else {"Authorization": f"Bearer {self.texts[key]}"}

    def files(self, seed: int = 1, **options: Any) -> Files:
        """An upload that fits."""
        return self.live.files(random_soft_prompt(self.live.model.spec, seed=seed, **options))

    def operations(self) -> dict[str, list[str] | None]:
        """Method and path -> scopes that OpenAPI names; None where it names no key."""
        paths = self.live.client.get("/openapi.json").json()["paths"]
        return {
            f"{method.upper()} {path}": operation["security"][0]["API key"] if "security" in operation else None
            for path, methods in paths.items()
            for method, operation in methods.items()
        }


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One server for the tests of this file, with a task of team-a and one of team-b."""
    directory = tmp_path_factory.mktemp("guarded")
    path = directory / "keys.json"
    made = {kind: add_key(path, kind, scopes, tasks) for kind, (scopes, tasks) in KINDS.items()}
    with live_server(directory, api_keys_file=path) as live:
        texts = {kind: text for kind, (_, text) in made.items()}
        server = Guarded(live, path, texts, {kind: key for kind, (key, _) in made.items()})
        for task in ("team-a-mood", "team-b-mood"):
            assert server.put("admin", task, server.files()).status_code == 201
        yield server


@pytest.fixture
def spooled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every file that the part of a form is spooled to, from now on."""
    files: list[object] = []
    original = tempfile.SpooledTemporaryFile

    def counted(*arguments: Any, **options: Any) -> Any:
        files.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(forms, "SpooledTemporaryFile", counted)
    return files


def concrete(operation: str) -> tuple[str, str]:
    """A request for an operation, with names in the place of its parameters."""
    method, path = operation.split()
    return method, re.sub("{(task|model)}", "team-a-mood", path).replace("{version}", "1").replace("{job}", JOB)


def test_every_route_asks_for_a_key_but_those_that_a_probe_needs(guarded: Guarded) -> None:
    operations = guarded.operations()
    assert [operation for operation, scopes in operations.items() if scopes is None] == OPEN
    for operation in operations:
        response = guarded.send(None, *concrete(operation))
        if operation in OPEN:
            assert response.status_code == 200
        else:
            assert_error(response, 401, "unauthorized", "carries none")
            assert response.headers["www-authenticate"] == "Bearer"


def test_openapi_tells_of_the_refusals_wherever_a_key_is_asked_for(guarded: Guarded) -> None:
    for path, methods in guarded.live.client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            told = {"401", "403"} & set(operation["responses"])
            assert told == ({"401", "403"} if "security" in operation else set()), f"{method} {path}"


def test_every_operation_asks_for_exactly_the_scope_that_it_is_documented_with(guarded: Guarded) -> None:
    for operation, scopes in guarded.operations().items():
        for kind in ("generate", "publish", "admin"):
            response = guarded.send(kind, *concrete(operation), content=b"")
            if not scopes or kind in (*scopes, "admin"):
                assert response.status_code not in (401, 403), f"{operation} with {kind}: {response.text}"
            else:
                assert_error(response, 403, "forbidden", f"lacks the scope {scopes[0]}", guarded.keys[kind].id)
        guarded.put("admin", "team-a-mood", guarded.files())  # DELETE was one of them


def test_the_page_on_security_says_what_each_scope_may_do(guarded: Guarded) -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    documented = {key.strip("`"): set(re.findall(r"`([A-Z]+ [^`]+)`", routes)) for key, routes in rows}
    expected: dict[str, set[str]] = {kind: set() for kind in ("no key", "any key", "generate", "publish", "metrics")}
    for operation, scopes in guarded.operations().items():
        key = "no key" if scopes is None else "any key" if not scopes else scopes[0]
        expected[key].add(operation)
    assert {key: documented[key] for key in expected} == expected
    assert set(documented) >= {str(scope) for scope in Scope}


@pytest.mark.parametrize(
    "value",
    [
        "Bearer",
        "Bearer hf_abcdefgh",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {key} {key}",
        "Bearer prelude_{id}_" + "0" * 64,
        "Bearer prelude_00000000_{secret}",
    ],
)
def test_a_wrong_key_is_refused_and_not_repeated(guarded: Guarded, value: str) -> None:
    text = guarded.texts["admin"]
    _, key_id, secret = text.split("_")
    sent = value.format(key=text, id=key_id, secret=secret)
    response = guarded.live.client.get("/prompts", headers={"Authorization": sent})
    assert_error(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    for hidden in (secret, "hf_abcdefgh", "0" * 64):
        assert hidden not in response.text


def test_two_keys_at_once_are_refused(guarded: Guarded) -> None:
    both = [("Authorization", f"Bearer {guarded.texts[kind]}") for kind in ("admin", "generate")]
    assert_error(guarded.live.client.get("/prompts", headers=both), 401, "unauthorized")


def test_the_scheme_is_read_in_any_case_as_http_wants_it(guarded: Guarded) -> None:
    headers = {"Authorization": f"bearer {guarded.texts['generate']}"}
    assert guarded.live.client.get("/info", headers=headers).status_code == 200


def test_a_client_library_that_is_given_a_key_is_let_in(guarded: Guarded) -> None:
    try:
        client = InferenceClient(guarded.live.url, token=guarded.texts["generate"])
        assert client.text_generation("hello", max_new_tokens=2)
        with pytest.raises(ValidationError, match="not one of this server's"):
            InferenceClient(guarded.live.url, token="hf_wrong").text_generation("hello")
    finally:
        close_session()


def test_a_revoked_key_is_refused_within_a_second_or_two(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    key, text = add_key(guarded.path, "guest", [Scope.GENERATE], None)
    headers = {"Authorization": f"Bearer {text}"}
    monkeypatch.setattr(live_keys, "LOOK_SECONDS", 0.0)
    assert guarded.live.client.post("/generate", json=BODY, headers=headers).status_code == 200
    revoke_key(guarded.path, key.id)
    assert_error(guarded.live.client.post("/generate", json=BODY, headers=headers), 401, "unauthorized", "revoked")


def test_who_changed_a_task_is_on_record(guarded: Guarded) -> None:
    assert guarded.put("publish", "recorded", guarded.files()).status_code == 201
    [version] = guarded.send("publish", "GET", "/prompts/recorded/versions").json()["versions"]
    assert version["by"] == guarded.keys["publish"].id


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
def test_a_key_with_patterns_generates_for_its_tasks_alone(guarded: Guarded, route: str) -> None:
    def generate(query: str, **parameters: Any) -> httpx.Response:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 2, **parameters}}
        return guarded.send("team-a", "POST", route + query, json=body)

    assert generate("?task=team-a-mood").status_code == 200
    version = guarded.send("team-a", "GET", "/prompts/team-a-mood").json()["version"]
    assert generate(f"?task=team-a-mood@{version}").status_code == 200
    assert generate("", adapter_id="team-a-mood").status_code == 200
    assert_error(generate("?task=rows@1"), 404, "unknown_task")  # allowed, the version is no part of the name
    for response in (generate("?task=team-b-mood"), generate("?task=team-b-mood@1"), generate("?task=nobody")):
        assert_error(response, 403, "forbidden", "tasks named team-a-*, rows", "not for '")
    assert_error(generate("", adapter_id="team-b-mood"), 403, "forbidden", "'team-b-mood'")
    assert_error(generate(""), 403, "forbidden", "not for the frozen model alone")


def test_a_key_with_patterns_changes_and_sees_its_tasks_alone(guarded: Guarded) -> None:
    files = guarded.files(seed=7)
    assert guarded.put("team-a", "team-a-new", files).status_code == 201
    assert_error(guarded.put("team-a", "team-b-mood", files), 403, "forbidden", "'team-b-mood'")
    for operation in guarded.operations():
        method, path = concrete(operation)
        if "team-a-mood" in path:
            response = guarded.send("team-a", method, path.replace("team-a-mood", "team-b-mood"))
            assert_error(response, 403, "forbidden", "'team-b-mood'")
    listed = [entry["task"] for entry in guarded.send("team-a", "GET", "/prompts").json()["prompts"]]
    assert listed == ["team-a-mood", "team-a-new"]
    page = guarded.send("team-a", "GET", "/prompts?limit=1").json()
    assert (len(page["prompts"]), page["next"]) == (1, "team-a-mood")
    assert guarded.send("team-a", "GET", "/info").json()["tasks"] == 2
    everything = [entry["task"] for entry in guarded.send("generate", "GET", "/prompts").json()["prompts"]]
    assert "team-b-mood" in everything
    assert guarded.send("generate", "GET", "/info").json()["tasks"] == len(everything)
    assert guarded.send("team-a", "DELETE", "/prompts/team-a-new").status_code == 204


def test_rows_of_a_multitask_soft_prompt_must_all_be_covered(guarded: Guarded, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING").iterdir()}
    files.pop("README.md", None)
    assert_error(guarded.put("team-a", "rows", files), 403, "forbidden", "'rows-0'")
    assert guarded.put("team-a", "team-a-rows", files).status_code == 201
    assert guarded.send("admin", "GET", "/prompts/rows-0").status_code == 404


def test_a_404_tells_a_key_with_patterns_no_names_of_others(guarded: Guarded) -> None:
    guarded.put("admin", "team-a-x-secret", guarded.files())
    for kind, told in (("generate", True), ("team-a", False)):
        response = guarded.send(kind, "POST", "/generate?task=team-a-mod", json=BODY)
        body = assert_error(response, 404, "unknown_task")
        assert ("team-b-mood" in body["error"]) == told
    for path in ("/prompts/team-a-mod", "/prompts/team-a-mod/versions", "/prompts/team-a-mod/versions/1/download"):
        assert_error(guarded.send("publish", "GET", path), 404, "unknown_task", "team-b-mood")
        assert "team-b" not in assert_error(guarded.send("team-a", "GET", path), 404, "unknown_task")["error"]


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("generate", 403), ("team-a", 403)])
def test_an_upload_that_is_not_allowed_is_refused_before_its_body_comes(
    guarded: Guarded, key: str | None, status: int, spooled: list[object]
) -> None:
    lines = [f"{name}: {value}" for name, value in guarded.headers(key).items()]
    head = ["PUT /prompts/team-b-mood HTTP/1.1", "Host: localhost", FORM, f"Content-Length: {2**19}", *lines]
    with socket.create_connection(("127.0.0.1", guarded.live.port), timeout=5) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        assert connection.recv(4096).split()[1] == str(status).encode()
    assert spooled == []


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("generate", 403), ("team-a", 403)])
def test_60_mb_from_a_stranger_are_not_spooled(
    tmp_path: Path, key: str | None, status: int, spooled: list[object]
) -> None:
    path = tmp_path / "keys.json"
    made = {kind: add_key(path, kind, scopes, tasks)[1] for kind, (scopes, tasks) in KINDS.items()}

    def body() -> Iterator[bytes]:
        yield PART
        for _ in range(HUGE // 2**16):
            yield bytes(2**16)
        yield b"\r\n--x--\r\n"

    with live_server(tmp_path, api_keys_file=path, max_upload_bytes=2 * HUGE) as live:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        if key is not None:
            headers["Authorization"] = f"Bearer {made[key]}"
        response = live.client.put("/prompts/team-b-mood", content=body(), headers=headers)
        assert response.status_code == status
        assert spooled == []
        headers["Authorization"] = f"Bearer {made['publish']}"
        assert live.client.put("/prompts/team-b-mood", content=body(), headers=headers).status_code == 422
        assert len(spooled) == 1, "the test would not see a spooled file"


def test_a_key_that_is_revoked_during_its_upload_changes_nothing(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_keys, "LOOK_SECONDS", 0.0)
    key, text = add_key(guarded.path, "guest", [Scope.PUBLISH], None)
    request = guarded.live.client.build_request("PUT", "/prompts/late", files=as_form(guarded.files()))
    content = request.read()

    def body() -> Iterator[bytes]:
        yield content[:100]
        revoke_key(guarded.path, key.id)
        yield content[100:]

    headers = {"Content-Type": request.headers["content-type"], "Authorization": f"Bearer {text}"}
    response = guarded.live.client.put("/prompts/late", content=body(), headers=headers)
    assert_error(response, 401, "unauthorized")
    assert guarded.send("admin", "GET", "/prompts/late").status_code == 404
