"""Objects in a bucket: what goes wrong is said in a sentence; test_objects.py has what a bucket and a folder share."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
from obstore.store import from_url
from werkzeug.wrappers import Response

from server.errors import StoreError, StoreFull
from server.registry import bucket
from server.registry.bucket import RemoteObjects
from server.registry.bucket_errors import LONGEST, refusal
from tests.registry.s3 import BUCKET, S3

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

EVENT = "events/000000000001.json"

Answer = Callable[["WSGIEnvironment"], Response]
Refuse = Callable[[str, int, str], None]


@pytest.fixture
def objects(s3_store_url: str) -> RemoteObjects:
    return RemoteObjects(s3_store_url)


@pytest.fixture
def refuse(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Lets the service answer requests of one method with an error."""

    def refuse(method: str, status: int, code: str) -> None:
        answer = s3.answer

        def refusing(environ: WSGIEnvironment) -> Response:
            if environ["REQUEST_METHOD"] != method:
                return answer(environ)
            body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>Sorry about that</Message></Error>'
            return Response(body, status)

        monkeypatch.setattr(s3, "answer", refusing)

    return refuse


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)


def check_readable(error: StoreError, url: str) -> None:
    """One sentence of ordinary length, that names the store and shows no dump."""
    assert url in error.message
    assert len(error.message) < len(url) + LONGEST + 60
    for noise in ("Debug", "RetryError", "{", "<", "\n", "Error performing"):
        assert noise not in error.message
    assert "{" not in error.remedy


# Opening


def test_a_bucket_that_does_not_exist_is_named(s3_store_url: str) -> None:
    url = s3_store_url.replace(BUCKET, "nobodys")
    with pytest.raises(StoreError, match="cannot be opened: the bucket does not exist") as caught:
        RemoteObjects(url)
    check_readable(caught.value, url)
    assert "Create the bucket" in caught.value.remedy


@pytest.mark.usefixtures("impatient")
def test_a_refused_connection_names_the_endpoint(s3_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        with pytest.raises(StoreError, match="connection is refused") as caught:
            RemoteObjects(s3_store_url)
    check_readable(caught.value, s3_store_url)
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


@pytest.mark.usefixtures("impatient")
def test_missing_credentials_are_named(s3_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        # Where the machine's role is asked for.
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        with pytest.raises(StoreError, match="no usable credentials") as caught:
            RemoteObjects(s3_store_url)
    check_readable(caught.value, s3_store_url)
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_refused_credentials_are_named(code: str, refuse: Refuse, s3_store_url: str) -> None:
    refuse("GET", HTTPStatus.FORBIDDEN, code)
    with pytest.raises(StoreError, match="credentials are wrong") as caught:
        RemoteObjects(s3_store_url)
    check_readable(caught.value, s3_store_url)
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy


@pytest.mark.usefixtures("impatient")
def test_https_where_http_is_spoken_is_named(s3: S3, s3_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url.replace("http:", "https:"))
    with pytest.raises(StoreError, match="does not speak https") as caught:
        RemoteObjects(s3_store_url)
    check_readable(caught.value, s3_store_url)
    assert "http://" in caught.value.remedy


@pytest.mark.parametrize("endpoint", ["localhost:9000", ""])
def test_an_endpoint_that_is_no_url_is_an_error_and_no_panic(
    endpoint: str, s3_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match="endpoint is not a URL") as caught:
        RemoteObjects(s3_store_url)
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


def test_http_is_allowed_only_if_the_endpoint_is_http(
    s3: S3, s3_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []

    def noting(url: str, *, client_options: dict[str, bool | timedelta], **options: object) -> object:
        allowed.append(bool(client_options["allow_http"]))
        return from_url(url, client_options=client_options, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(bucket, "from_url", noting)
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    RemoteObjects(s3_store_url)
    assert allowed == [False, True]
    allowed.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url.replace("http:", "https:"))
    with pytest.raises(StoreError):
        RemoteObjects(s3_store_url)
    assert allowed == [False]


@pytest.mark.parametrize(
    "url", ["s3:", "s3://", "s3:///prefix", "s3://key:secret@bucket/p", "s3://bucket/p?sig=secret"]
)
def test_a_url_holds_a_bucket_and_a_prefix_and_no_secret(url: str) -> None:
    with pytest.raises(StoreError, match="PRELUDE_STORE is not") as caught:
        RemoteObjects(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("url", "name"), [("gs://bucket/p", "GOOGLE_"), ("az://container/p", "AZURE_STORAGE_ACCOUNT")])
def test_other_clouds_name_their_own_credentials(url: str, name: str) -> None:
    error = refusal(url, "be opened", ValueError("Generic error: Account must be specified\n\nDebug source: x"))
    assert name in error.remedy


def test_a_bucket_that_ignores_the_condition_of_a_write_is_refused(
    s3: S3, s3_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = s3.answer

    def overwriting(environ: WSGIEnvironment) -> Response:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return answer(environ)

    monkeypatch.setattr(s3, "answer", overwriting)
    with pytest.raises(StoreError, match="overwrites") as caught:
        RemoteObjects(s3_store_url)
    assert "conditional writes" in caught.value.remedy
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(StoreError, match="AWS_CONDITIONAL_PUT"):
        RemoteObjects(s3_store_url)


def test_a_bucket_that_may_only_be_read_is_opened_and_read(
    objects: RemoteObjects, refuse: Refuse, s3_store_url: str
) -> None:
    objects.create(EVENT, b"{}")
    refuse("PUT", HTTPStatus.FORBIDDEN, "AccessDenied")
    reader = RemoteObjects(s3_store_url)
    assert reader.list("events") == ["000000000001.json"]
    assert reader.get(EVENT) == b"{}"
    with pytest.raises(StoreError, match="credentials") as caught:
        reader.create("events/000000000002.json", b"{}")
    check_readable(caught.value, s3_store_url)


# Using


def test_a_write_that_is_sent_again_after_a_lost_reply_finds_its_own_object(
    objects: RemoteObjects, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, puts = s3.answer, 0

    def losing_the_first(environ: WSGIEnvironment) -> Response:
        nonlocal puts
        response = answer(environ)
        puts += environ["REQUEST_METHOD"] == "PUT"
        return Response("lost", HTTPStatus.INTERNAL_SERVER_ERROR) if puts == 1 else response

    monkeypatch.setattr(s3, "answer", losing_the_first)
    assert objects.create(EVENT, b"own") is False
    assert puts == 2
    assert objects.get(EVENT) == b"own"


def test_a_service_that_stumbles_is_asked_again(
    objects: RemoteObjects, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.create(EVENT, b"{}")
    answer, asked = s3.answer, Counter[str]()

    def stumbling(environ: WSGIEnvironment) -> Response:
        method = environ["REQUEST_METHOD"]
        asked[method] += 1
        return Response(status=HTTPStatus.SERVICE_UNAVAILABLE) if asked[method] == 1 else answer(environ)

    monkeypatch.setattr(s3, "answer", stumbling)
    assert objects.get(EVENT) == b"{}"
    assert objects.create("events/000000000002.json", b"{}")
    assert objects.age(EVENT) is not None
    assert set(asked.values()) == {2}


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("GET", lambda objects: objects.get(EVENT)),
        ("GET", lambda objects: objects.list("events")),
        ("PUT", lambda objects: objects.create(EVENT, b"{}")),
        ("HEAD", lambda objects: objects.age(EVENT)),
        ("POST", lambda objects: objects.delete(EVENT)),
    ],
    ids=["get", "list", "create", "age", "delete"],
)
@pytest.mark.usefixtures("impatient")
def test_every_refusal_is_a_store_error(
    method: str, use: Callable[[RemoteObjects], object], s3_store_url: str, refuse: Refuse
) -> None:
    objects = RemoteObjects(s3_store_url)
    refuse(method, HTTPStatus.SERVICE_UNAVAILABLE, "SlowDown")
    with pytest.raises(StoreError) as caught:
        use(objects)
    check_readable(caught.value, s3_store_url)
    assert "503" in caught.value.message
    if method != "HEAD":
        assert "SlowDown Sorry about that" in caught.value.message


@pytest.mark.parametrize(("status", "code"), [(507, "Sorry"), (500, "XMinioStorageFull"), (403, "QuotaExceeded")])
@pytest.mark.usefixtures("impatient")
def test_a_bucket_without_space_is_full(status: int, code: str, s3_store_url: str, refuse: Refuse) -> None:
    objects = RemoteObjects(s3_store_url)
    refuse("PUT", status, code)
    with pytest.raises(StoreFull, match="no space left") as caught:
        objects.create(EVENT, b"{}")
    check_readable(caught.value, s3_store_url)


def test_a_bucket_that_goes_away_is_not_an_empty_store(objects: RemoteObjects, refuse: Refuse) -> None:
    refuse("GET", HTTPStatus.NOT_FOUND, "NoSuchBucket")
    with pytest.raises(StoreError, match="bucket does not exist"):
        objects.get(EVENT)
    with pytest.raises(StoreError, match="bucket does not exist"):
        objects.list("events")
    refuse("PUT", HTTPStatus.NOT_FOUND, "NoSuchBucket")
    with pytest.raises(StoreError, match="bucket does not exist"):
        objects.create(EVENT, b"{}")


@pytest.mark.usefixtures("impatient")
def test_a_service_that_does_not_answer_is_given_up(s3_store_url: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(bucket, "REQUEST_SECONDS", 0.2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreError, match="does not answer in time") as caught:
            RemoteObjects(s3_store_url)
    assert time.monotonic() - started < 10
    check_readable(caught.value, s3_store_url)


def test_an_unknown_text_is_repeated_in_short() -> None:
    exc = ValueError("Generic S3 error: something\n new " + "x" * 500 + "\n\nDebug source:\n" + "y" * 5000)
    error = refusal("s3://bucket/p", "read x", exc)
    assert "something new xxx" in error.message
    assert "y" not in error.message.replace("s3://bucket/p", "")
    check_readable(error, "s3://bucket/p")
