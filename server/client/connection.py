"""Connections to a server: sends requests with key and timeout, and raises failures as PreludeError."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter

from server import __version__
from server.errors import ConfigurationError, PreconditionFailed, PreludeError, Unauthorized

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
CHANGE_SECONDS = 600.0
"""Time limit of a change; a publish waits until the soft prompt's prefix is computed beside running requests."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

TLS_REMEDY = (
    "If it speaks plain HTTP, as `prelude serve` does without a proxy, write http://. SSL_CERT_FILE names the "
    "certificates of an authority of your own."
)

_HOST = re.compile(r"[\w.:-]+")
_PASSWORD = re.compile(r"//.*@")

Reply = TypeVar("Reply")

OnSent = Callable[[int], None]
"""Called with the number of bytes of an upload that were just sent."""


class ServerUnreachable(PreludeError, code="server_unreachable", status=503, family="overloaded"):
    """No server answers at the address, or the reply is not from a Prelude server."""

    default_remedy = "Start a server with `prelude serve`, or name another one with --url or PRELUDE_URL."


class Connection:
    """A connection to one server."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raise ConfigurationError or Unauthorized for an address or a key that no server can have."""
        address = _address(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        headers = {"User-Agent": f"prelude/{__version__}", "Accept": "application/json"}
        if key and key.strip():
            if address.userinfo:
                raise ConfigurationError(
                    f"For {self.url} there is a key, and a name or a password in the address.",
                    remedy="Give one of them: a request can carry only one.",
                )
            headers["Authorization"] = f"Bearer {_checked_key(key.strip())}"
        self._http = httpx.Client(
            base_url=address,
            headers=headers,
            trust_env=address.host not in LOOPBACK,  # a proxy cannot reach this machine's own loopback
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def body(self, response: httpx.Response, kind: TypeAdapter[Reply]) -> Reply:
        """A reply's JSON, checked against its schema; fields that a newer server has added are accepted."""
        response.read()
        try:
            body: Reply = response.json()
            kind.validate_python(body, strict=True)
        except (ValueError, RecursionError) as exc:
            raise ServerUnreachable(
                f"What answers at {self.url} is not a Prelude server, or one of another version."
            ) from exc
        return body

    def json(self, method: str, path: str, kind: TypeAdapter[Reply], **content: Any) -> Reply:
        """Send a request and return its reply's JSON; see `request` and `body`."""
        with self.request(method, path, **content) as response:
            return self.body(response, kind)

    @contextmanager
    def request(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """Context manager: send a request and yield the unread reply; failures become PreludeErrors."""
        seconds = READ_SECONDS if method == "GET" else CHANGE_SECONDS
        try:
            timeouts = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
            with self._http.stream(method, path.lstrip("/"), timeout=timeouts, **content) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                yield response
        except httpx.ConnectError as exc:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(exc)) or "no connection"
            if reason.startswith("[SSL"):
                raise ServerUnreachable(f"No TLS with {self.url}: {reason}.", remedy=TLS_REMEDY) from exc
            raise ServerUnreachable(f"No server answers at {self.url}: {reason}.") from exc
        except httpx.TimeoutException as exc:
            waited = CONNECT_SECONDS if isinstance(exc, httpx.ConnectTimeout) else seconds
            raise ServerUnreachable(f"The server at {self.url} has not answered within {waited:g} seconds.") from exc
        except (httpx.HTTPError, httpx.StreamError) as exc:
            raise ServerUnreachable(
                f"The connection to {self.url} broke off: {str(exc).rstrip('.') or type(exc).__name__}.",
                remedy="Send it again. If it was a large upload, see PRELUDE_MAX_UPLOAD_BYTES of the server; "
                "if the address is served by TLS, write https://.",
            ) from exc

    def _refusal(self, response: httpx.Response) -> PreludeError:
        """The server's error, as the class that the server raised."""
        try:
            body = response.json()
            message, code, remedy = str(body["error"]), str(body["code"]), str(body["remedy"])
        except (ValueError, KeyError, TypeError):
            moved = response.headers.get("Location")
            where = f" and points to {moved}" if moved else ""
            return ServerUnreachable(
                f"{self.url} answers {response.status_code} {response.reason_phrase}{where}, and not as Prelude does."
            )
        return _error_classes().get(code, PreludeError)(message, remedy=remedy)


class ReportingFile(io.FileIO):
    """A file that reports how much of it has been read."""

    def __init__(self, path: Path, on_read: OnSent | None) -> None:
        super().__init__(path)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like any file; the returned bytes count as sent."""
        data = super().read(size) or b""
        if self._on_read is not None:
            self._on_read(len(data))
        return data


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url.strip())
    except httpx.InvalidURL:
        address = httpx.URL("")
    port = address.port or 80
    if address.scheme not in ("http", "https") or not _HOST.fullmatch(address.host) or not port < 2**16:
        raise ConfigurationError(
            f"{_PASSWORD.sub('//…@', url)!r} is not the address of a server.",
            remedy="Write it in full, such as http://127.0.0.1:8000.",
        )
    return address


def _checked_key(key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Unauthorized(  # does not quote the key, because errors end up in logs
            "The API key has spaces or other characters that no key has.", remedy="Copy it again, as one line."
        )
    return key


def if_match(expect: str | None) -> dict[str, str]:
    """The If-Match header for an ETag, which may be written with or without quotes."""
    if expect is None:
        return {}
    tag = expect.strip().strip('"')
    if tag != "*" and not (tag.isascii() and tag.isdigit()):
        raise PreconditionFailed(f"{expect!r} is not an ETag.", remedy="Write its number, such as 42, or *.")
    return {"If-Match": "*" if tag == "*" else f'"{tag}"'}


def _error_classes() -> dict[str, type[PreludeError]]:
    found: dict[str, type[PreludeError]] = {}
    queue: list[type[PreludeError]] = [PreludeError]
    while queue:
        cls = queue.pop()
        found[cls.code] = cls
        queue += cls.__subclasses__()
    return found
