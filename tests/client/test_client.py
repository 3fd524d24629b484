from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from server.client import PreludeClient, ServerUnreachable, connection
from server.client import client as routes
from server.errors import (
    BaseModelMismatch,
    ConfigurationError,
    InvalidSoftPrompt,
    InvalidTaskName,
    NothingToRollBackTo,
    PayloadTooLarge,
    PreconditionFailed,
    PreludeError,
    Unauthorized,
    UnknownTask,
    VersionInUse,
)
from server.soft_prompts import declared, formats
from tests.api.live import MAX_UPLOAD_BYTES, LiveServer, live_server, zip_of
from tests.strangers import answering, reply
from tests.support import random_soft_prompt

FORMATS = (declared.CONFIG_FILE, formats.TENSOR_FILE, formats.MANIFEST_FILE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[PreludeClient]:
    with PreludeClient(server.url) as connected:
        yield connected


def files(server: LiveServer, directory: Path, seed: int = 0) -> list[Path]:
    """A random soft prompt as files."""
    directory.mkdir(parents=True, exist_ok=True)
    content = server.files(random_soft_prompt(server.model.spec, seed=seed))
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in content]


def test_what_is_published_is_live_and_listed(server: LiveServer, client: PreludeClient, tmp_path: Path) -> None:
    first = client.publish("published", files(server, tmp_path))
    assert (first["task"], first["version"], first["live"], first["created"]) == ("published", 1, True, True)
    assert client.publish("published", files(server, tmp_path))["created"] is False
    assert next(entry for entry in client.prompts() if entry["task"] == "published")["version"] == 1
    listed = client.versions("published")
    assert (listed["task"], listed["live"], len(listed["versions"])) == ("published", 1, 1)
    assert listed["versions"][0]["digest"] == first["digest"]


def test_a_zip_is_published_as_well(server: LiveServer, client: PreludeClient, tmp_path: Path) -> None:
    archive = tmp_path / "some.zip"
    archive.write_bytes(zip_of({path.name: path.read_bytes() for path in files(server, tmp_path / "x")}))
    assert client.publish("zipped", [archive])["version"] == 1


def test_what_is_staged_or_only_tried_is_not_live(server: LiveServer, client: PreludeClient, tmp_path: Path) -> None:
    client.publish("staging", files(server, tmp_path))
    tried = client.publish("staging", files(server, tmp_path, seed=1), dry_run=True)
    assert (tried["version"], tried["live"], tried["created"]) == (2, False, False)
    assert len(client.versions("staging")["versions"]) == 1
    staged = client.publish("staging", files(server, tmp_path, seed=1), activate=False)
    assert (staged["version"], staged["live"], staged["created"]) == (2, False, True)
    assert client.versions("staging")["live"] == 1


def test_versions_are_activated_rolled_back_shared_and_deleted(server: LiveServer, client: PreludeClient) -> None:
    for seed in range(3):
        server.publish_random("changing", seed=seed)
    assert client.activate("changing", 1)["live"] == 1
    assert client.roll_back("changing")["live"] == 3
    shared = client.set_traffic("changing", {2: 90, 3: 10})
    assert shared["traffic"] == {"2": 90, "3": 10}
    client.delete_version("changing", 1)
    assert [version["version"] for version in client.versions("changing")["versions"]] == [3, 2]
    client.delete("changing")
    with pytest.raises(UnknownTask):
        client.versions("changing")


def test_a_download_is_the_zip_of_that_version(server: LiveServer, client: PreludeClient, tmp_path: Path) -> None:
    first = server.files(server.publish_random("fetched", seed=0))
    server.publish_random("fetched", seed=1)
    client.download("fetched", 1, tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert sorted(archive.namelist()) == sorted(FORMATS)
        assert archive.read(formats.TENSOR_FILE) == first[formats.TENSOR_FILE]


def test_the_list_goes_on_through_all_pages(
    server: LiveServer, client: PreludeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for letter in "abcde":
        server.publish_random(f"page-{letter}")
    monkeypatch.setattr(routes, "PAGE", 2)
    names = [entry["task"] for entry in client.prompts()]
    assert [name for name in names if name.startswith("page-")] == [f"page-{letter}" for letter in "abcde"]
    assert names == sorted(set(names))


def test_a_change_is_refused_if_the_task_is_not_as_expected(server: LiveServer, client: PreludeClient) -> None:
    server.publish_random("guarded", seed=0)
    before = client.versions("guarded")["etag"]
    server.publish_random("guarded", seed=1)
    after = client.versions("guarded")["etag"]
    assert int(after) > int(before)
    for change in (
        lambda: client.activate("guarded", 1, expect=before),
        lambda: client.roll_back("guarded", expect=before),
        lambda: client.set_traffic("guarded", {1: 50, 2: 50}, expect=before),
        lambda: client.delete_version("guarded", 1, expect=before),
        lambda: client.delete("guarded", expect=before),
    ):
        with pytest.raises(PreconditionFailed):
            change()
    assert client.versions("guarded")["etag"] == after
    assert client.activate("guarded", 1, expect=f'"{after}"')["live"] == 1
    assert client.roll_back("guarded", expect="*")["live"] == 2


def test_a_publish_is_refused_if_the_task_is_not_as_expected(
    server: LiveServer, client: PreludeClient, tmp_path: Path
) -> None:
    server.publish_random("guarded-too", seed=0)
    etag = client.versions("guarded-too")["etag"]
    server.publish_random("guarded-too", seed=1)
    with pytest.raises(PreconditionFailed):
        client.publish("guarded-too", files(server, tmp_path, seed=2), expect=etag)


@pytest.mark.parametrize("expect", ["soon", "", "-1", "١"])
def test_what_is_no_etag_is_not_sent(client: PreludeClient, expect: str) -> None:
    with pytest.raises(PreconditionFailed, match="is not an ETag"):
        client.roll_back("whatever", expect=expect)


def test_refusals_are_raised_as_what_they_are_in_the_server_s_words(
    server: LiveServer, client: PreludeClient, tmp_path: Path
) -> None:
    server.publish_random("refusing")
    with pytest.raises(UnknownTask, match=r"There is no task 'refusin'\. Did you mean refusing\?"):
        client.versions("refusin")
    with pytest.raises(VersionInUse):
        client.delete_version("refusing", 1)
    with pytest.raises(NothingToRollBackTo):
        client.roll_back("refusing")
    sent = files(server, tmp_path)
    with pytest.raises(InvalidSoftPrompt, match=r"adapter_model.safetensors is missing"):
        client.publish("refusing", sent[:1])
    manifest = tmp_path / formats.MANIFEST_FILE
    manifest.write_text('{"base_model": {"name": "Other", "fingerprint": "ab"}}')
    with pytest.raises(BaseModelMismatch, match="Other") as caught:
        client.publish("refusing", [*sent[:2], manifest])
    assert caught.value.remedy == BaseModelMismatch.default_remedy


def test_an_upload_that_is_too_large_is_refused_and_not_broken_off(
    server: LiveServer, client: PreludeClient, tmp_path: Path
) -> None:
    config, tensors, *_ = files(server, tmp_path)
    tensors.write_bytes(bytes(8 * MAX_UPLOAD_BYTES))
    with pytest.raises(PayloadTooLarge, match="more than"):
        client.publish("large", [config, tensors])


def test_an_upload_tells_how_much_of_it_is_sent(server: LiveServer, client: PreludeClient, tmp_path: Path) -> None:
    sent: list[int] = []
    paths = files(server, tmp_path)
    client.publish("telling", paths, on_sent=sent.append)
    assert sum(sent) == sum(path.stat().st_size for path in paths)


def test_a_task_s_name_cannot_lead_to_another_route(client: PreludeClient) -> None:
    for name in ("../info", "a/versions/1", "a?b", "A", ""):
        with pytest.raises(InvalidTaskName):
            client.delete(name)


def test_where_nobody_listens_the_remedy_is_to_start_a_server() -> None:
    with PreludeClient("http://127.0.0.1:9") as nobody, pytest.raises(ServerUnreachable) as caught:
        nobody.versions("task")
    assert caught.value.message == "No server answers at http://127.0.0.1:9: Connection refused."
    assert "`prelude serve`" in caught.value.remedy
    assert "--url" in caught.value.remedy


@pytest.mark.parametrize(
    "url", ["localhost:8000", "127.0.0.1:8000", "", "ftp://x", "http://", "http://[", "http://a b", "http://x:99999"]
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the address of a server") as caught:
        PreludeClient(url)
    assert "http://127.0.0.1:8000" in caught.value.remedy


@pytest.mark.parametrize(
    ("app", "told"),
    [
        (reply(200, b"<html>hello</html>"), "is not a Prelude server"),
        (reply(200, b"[" * 10**5), "is not a Prelude server"),
        (reply(200, b'{"versions": 3}'), "is not a Prelude server"),
        (reply(200, b'{"task": "task", "versions": [{"version": 1}]}'), "is not a Prelude server"),
        (reply(200, b'{"task": "task", "versions": [], "traffic": {"1": "all"}}'), "is not a Prelude server"),
        (reply(400, b'["error"]'), "answers 400 Bad Request"),
        (reply(404, b'{"detail": "Not Found"}'), "answers 404 Not Found"),
        (reply(302, b"", location="https://elsewhere/"), "answers 302 Found and points to https://elsewhere/"),
        (reply(502, b"\xff\xfe"), "answers 502 Bad Gateway"),
    ],
)
def test_what_is_not_our_server_is_told_as_such(app: ASGIApp, told: str) -> None:
    with answering(app) as stranger, pytest.raises(ServerUnreachable) as caught:
        stranger.versions("task")
    assert told in caught.value.message
    assert stranger.url in caught.value.message


def test_an_error_of_a_newer_server_keeps_its_words() -> None:
    body = b'{"error": "Too new.", "error_type": "validation", "code": "unheard_of", "remedy": "Update."}'
    with answering(reply(418, body)) as newer, pytest.raises(PreludeError) as caught:
        newer.versions("task")
    assert (caught.value.message, caught.value.remedy) == ("Too new.", "Update.")


def test_fields_of_a_newer_server_are_kept() -> None:
    body = {"prompts": [{"task": "x", "version": 1, "colour": "blue"}], "more": 1}
    with answering(reply(200, json.dumps(body).encode())) as newer:
        assert list(newer.prompts()) == body["prompts"]


def test_a_list_that_is_none_is_told_as_such() -> None:
    with answering(reply(200, b'{"prompts": [{"version": 1}]}')) as stranger, pytest.raises(ServerUnreachable):
        list(stranger.prompts())


def test_a_code_that_is_no_word_is_no_crash() -> None:
    body = b'{"error": "a", "code": [], "remedy": {}}'
    with answering(reply(400, body)) as odd, pytest.raises(PreludeError, match=r"^a "):
        odd.versions("task")


def test_tls_where_there_is_none_says_so() -> None:
    with answering(reply(200, b"{}")) as plain:
        url = plain.url.replace("http:", "https:")
        with PreludeClient(url) as client, pytest.raises(ServerUnreachable, match=r"^No TLS with") as caught:
            client.versions("task")
    assert "write http://" in caught.value.remedy


def test_a_connection_that_breaks_off_is_a_sentence() -> None:
    with answering(reply(200, b"{", **{"content-length": "100"})) as broken, pytest.raises(ServerUnreachable) as caught:
        broken.versions("task")
    assert "broke off" in caught.value.message


def test_a_server_that_does_not_answer_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass

    monkeypatch.setattr(connection, "READ_SECONDS", 0.2)
    with answering(silent) as waiting, pytest.raises(ServerUnreachable, match=r"not answered within 0\.2 seconds"):
        waiting.versions("task")


@pytest.mark.parametrize(("key", "sent"), [("abc", "Bearer abc"), (" abc\n", "Bearer abc"), (None, None), ("", None)])
def test_the_key_is_sent_as_a_bearer_token(key: str | None, sent: str | None) -> None:
    seen: list[str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(httpx.Headers(scope["headers"]).get("authorization"))
        await reply(200, b'{"task": "x", "versions": []}')(scope, receive, send)

    with answering(app) as stranger, PreludeClient(stranger.url, key) as keyed:
        keyed.versions("task")
    assert seen == [sent]


@pytest.mark.parametrize("key", ["pre lude", "prelude\nx", "prélude", "prelude\x00"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        PreludeClient("http://127.0.0.1:9", key)
    assert "pre" not in str(caught.value)
    assert "pré" not in str(caught.value)


def test_a_password_in_the_address_is_not_shown() -> None:
    with PreludeClient("http://me:secret@127.0.0.1:9/") as nobody, pytest.raises(ServerUnreachable) as caught:
        nobody.versions("task")
    assert "secret" not in str(caught.value)
    assert nobody.url == "http://127.0.0.1:9"


@pytest.mark.parametrize("url", ["http://me:secret@x:99999", "ftp://me:secret@x", "http://me:se/cret@x@y z"])
def test_a_password_in_an_address_that_is_none_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PreludeClient(url)
    assert "cret" not in str(caught.value)


def test_a_password_and_a_key_exclude_each_other_because_one_would_not_be_sent() -> None:
    with pytest.raises(ConfigurationError, match="only one") as caught:
        PreludeClient("http://me:secret@127.0.0.1:9", "key")
    assert "secret" not in str(caught.value)


def test_a_path_before_the_routes_is_kept() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await reply(200, b'{"task": "x", "versions": []}')(scope, receive, send)

    with answering(app) as stranger, PreludeClient(f"{stranger.url}/models/small/") as below:
        below.versions("task")
    assert seen == ["/models/small/prompts/task/versions"]


def test_a_proxy_is_not_asked_for_this_machine_itself(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with PreludeClient(server.url) as direct:
        list(direct.prompts())


def test_neither_the_client_nor_the_commands_load_torch() -> None:
    code = "import sys, server.client, server.cli.prompts, server.cli.tables, server.cli.diff, server.cli.files\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
