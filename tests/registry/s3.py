"""An S3 service on loopback, whose replies a test can change: `s3` and `s3_store_url` are fixtures, see conftest.py.

It is moto's. Moto looks whether a key exists and then writes it, in two steps, so of several threads two may win a
conditional write (seen with a short switch interval). S3 lets one win, and so does this server: one request at a time.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BUCKET = "bucket"


class S3:
    """The service; `url` is its endpoint."""

    def __init__(self) -> None:
        self.url = ""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()

    def answer(self, environ: WSGIEnvironment) -> Response:
        """Moto's reply to a request; a test may put another function here."""
        return Response.from_app(self._app, environ, buffered=True)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with self._one_at_a_time:
            response = self.answer(environ)
        return response(environ, start_response)

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the service."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def new_store_url(self) -> str:
        """A prefix that nobody has used."""
        return f"s3://{BUCKET}/{secrets.token_hex(4)}/store"


class _Quiet(MotoRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextlib.contextmanager
def s3_service() -> Iterator[S3]:
    """Run the service, with an empty bucket, until the end of the block."""
    service = S3()
    server = make_server("127.0.0.1", 0, service, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    try:
        service.url = f"http://127.0.0.1:{server.server_port}"
        httpx.put(f"{service.url}/{BUCKET}", trust_env=False).raise_for_status()
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """The service, one for the whole run; it costs half a second."""
    with s3_service() as service:
        yield service


@pytest.fixture
def s3_store_url(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new, empty store, for this process and those that it starts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return s3.new_store_url()
