"""A client of a running server, for the soft prompts that it serves: a method per route, replies as plain JSON.

    with PreludeClient("http://127.0.0.1:8000") as client:
        client.publish("sms_spam", [Path("sms_spam/adapter_config.json"), Path("sms_spam/adapter_model.safetensors")])
        client.roll_back("sms_spam")

What the server refuses is raised as the class of `server.errors` that it was refused with, in the server's own words.
Neither torch nor the engine is imported, so a command that asks a server answers at once.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NotRequired, Self, TypeVar

import httpx
from pydantic import TypeAdapter

from server import __version__
from server.errors import ConfigurationError, PreconditionFailed, PreludeError, Unauthorized
from server.soft_prompts.names import check_task_name

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # pydantic reads only these there
    from typing_extensions import TypedDict

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
CHANGE_SECONDS = 600.0
"""A publish waits until the soft prompt's prefix is computed, behind the requests that are running."""
PAGE = 1000
LOOPBACK = ("localhost", "127.0.0.1", "::1")

TLS_REMEDY = (
    "If it speaks plain HTTP, as `prelude serve` does without a proxy, write http://. SSL_CERT_FILE names the "
    "certificates of an authority of your own."
)

_HOST = re.compile(r"[\w.:-]+")
_PASSWORD = re.compile(r"//.*@")

Reply = TypeVar("Reply")

OnSent = Callable[[int], None]
"""Told how many more bytes of an upload have been sent."""


class ServerUnreachable(PreludeError):
    """No server answers at the address, or what answers is not one."""

    status = 503
    code = "server_unreachable"
    family = "overloaded"
    default_remedy = "Start a server with `prelude serve`, or name another one with --url or PRELUDE_URL."


class PromptEntry(TypedDict):
    """One task of the list; a broken one has an `error`."""

    task: str
    version: NotRequired[int]
    traffic: NotRequired[dict[str, int]]
    digest: NotRequired[str]
    peft_type: NotRequired[str]
    num_virtual_tokens: NotRequired[int]
    description: NotRequired[str]
    error: NotRequired[str]


class PromptPage(TypedDict):
    """A page of the list; `next` is behind which task the following one starts."""

    prompts: list[PromptEntry]
    next: NotRequired[str]


class Version(TypedDict):
    """One version of a task."""

    version: int
    live: bool
    digest: str
    prefix_hash: str
    peft_type: str
    num_virtual_tokens: int
    bytes: int
    created_at: str
    source: str
    by: NotRequired[str]
    description: NotRequired[str]
    metrics: NotRequired[dict[str, Any]]


class VersionList(TypedDict):
    """The versions of a task, newest first, and what is live. `etag` is what `expect` of the next change takes."""

    task: str
    versions: list[Version]
    live: NotRequired[int | None]
    traffic: NotRequired[dict[str, int]]
    etag: NotRequired[str]


class TaskVersion(TypedDict):
    """A task and one of its versions."""

    task: str
    version: int


class Pushed(TypedDict):
    """What a publish made; `created` is False where nothing had to change."""

    task: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    live: bool
    tasks: list[TaskVersion]
    created: NotRequired[bool]


_PROMPT_PAGE = TypeAdapter(PromptPage)
_VERSION_LIST = TypeAdapter(VersionList)
_PUSHED = TypeAdapter(Pushed)


class PreludeClient:
    """A connection to one server; `expect` of a change is an ETag, such as "42", or "*" for any state of the task."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Connect with the first request.

        Raises:
            ConfigurationError: the address is not one, or it has a password beside the key.
            Unauthorized: the key has characters that no key has.
        """
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def prompts(self) -> Iterator[PromptEntry]:
        """All tasks by name, page after page."""
        after: dict[str, str] = {}
        while True:
            with self._request("GET", "/prompts", params={"limit": PAGE, **after}) as response:
                page = self._body(response, _PROMPT_PAGE)
            yield from page["prompts"]
            if "next" not in page:
                return
            after = {"after": page["next"]}

    def versions(self, task: str) -> VersionList:
        """The versions of a task, newest first."""
        return self._versions("GET", f"{_path(task)}/versions")

    def publish(
        self,
        task: str,
        files: Sequence[Path],
        *,
        activate: bool = True,
        dry_run: bool = False,
        expect: str | None = None,
        on_sent: OnSent | None = None,
    ) -> Pushed:
        """Upload the files of a soft prompt, or one zip of them.

        Args:
            task: the name to publish under.
            files: sent under their own names.
            activate: let the version answer requests; otherwise it is only kept.
            dry_run: only validate.
            expect: the ETag of the state that this change is meant for.
            on_sent: told of every piece that has been sent.
        """
        params = {"activate": activate, "dry_run": dry_run}
        path = _path(task)
        with ExitStack() as stack:
            form = [("files", (file.name, stack.enter_context(_ReportingFile(file, on_sent)))) for file in files]
            with self._request("PUT", path, params=params, files=form, headers=_if_match(expect)) as response:
                pushed = self._body(response, _PUSHED)
                pushed["created"] = response.status_code == httpx.codes.CREATED
                return pushed

    def activate(self, task: str, version: int, *, expect: str | None = None) -> VersionList:
        """Let a version answer the task's requests."""
        return self._versions("POST", f"{_path(task)}/activate", expect, json={"version": version})

    def roll_back(self, task: str, *, expect: str | None = None) -> VersionList:
        """Return to what was live before."""
        return self._versions("POST", f"{_path(task)}/rollback", expect)

    def set_traffic(self, task: str, weights: Mapping[int, int], *, expect: str | None = None) -> VersionList:
        """Let versions share the task's requests, by percentages that sum to 100."""
        body = {str(version): weight for version, weight in weights.items()}
        return self._versions("PUT", f"{_path(task)}/traffic", expect, json=body)

    def delete(self, task: str, *, expect: str | None = None) -> None:
        """Delete a task and all its versions."""
        self._no_content(_path(task), expect)

    def delete_version(self, task: str, version: int, *, expect: str | None = None) -> None:
        """Delete a version that is not live."""
        self._no_content(f"{_path(task)}/versions/{version}", expect)

    def download(self, task: str, version: int, archive: Path) -> None:
        """Write a version's zip of PEFT files to a new file."""
        with (
            self._request("GET", f"{_path(task)}/versions/{version}/download") as response,
            archive.open("xb") as file,
        ):
            for chunk in response.iter_bytes():
                file.write(chunk)

    def _versions(self, method: str, path: str, expect: str | None = None, **content: Any) -> VersionList:
        with self._request(method, path, headers=_if_match(expect), **content) as response:
            listed = self._body(response, _VERSION_LIST)
            if "ETag" in response.headers:
                listed["etag"] = response.headers["ETag"].removeprefix("W/").strip('"')
            return listed

    def _no_content(self, path: str, expect: str | None) -> None:
        with self._request("DELETE", path, headers=_if_match(expect)):
            pass

    def _body(self, response: httpx.Response, kind: TypeAdapter[Reply]) -> Reply:
        """What a reply holds, with fields that a newer server may have added, if it is what ours would answer."""
        response.read()
        try:
            body: Reply = response.json()
            kind.validate_python(body, strict=True)
        except (ValueError, RecursionError) as exc:
            raise ServerUnreachable(
                f"What answers at {self.url} is not a Prelude server, or one of another version."
            ) from exc
        return body

    @contextmanager
    def _request(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """Send a request and hand out the reply with its body still to be read; failures become our errors."""
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
                f"The connection to {self.url} broke off: {exc or type(exc).__name__}.",
                remedy="Send it again. If it was a large upload, see PRELUDE_MAX_UPLOAD_BYTES of the server; "
                "if the address is served by TLS, write https://.",
            ) from exc

    def _refusal(self, response: httpx.Response) -> PreludeError:
        """The server's error as the class that it was raised as there."""
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


class _ReportingFile(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, on_read: OnSent | None) -> None:
        super().__init__(path)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
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
        raise Unauthorized(  # without the key: errors end up in logs
            "The API key has spaces or other characters that no key has.", remedy="Copy it again, as one line."
        )
    return key


def _path(task: str) -> str:
    return f"/prompts/{check_task_name(task)}"


def _if_match(expect: str | None) -> dict[str, str]:
    """The header for an ETag, which people write with or without its quotes."""
    if expect is None:
        return {}
    tag = expect.strip().strip('"')
    if tag != "*" and not (tag.isascii() and tag.isdigit()):
        raise PreconditionFailed(f"{expect!r} is not an ETag.", remedy="Write its number, such as 42, or *.")
    return {"If-Match": "*" if tag == "*" else f'"{tag}"'}


def _error_classes() -> dict[str, type[PreludeError]]:
    """Every class of the error tree by its code."""
    found: dict[str, type[PreludeError]] = {}
    queue: list[type[PreludeError]] = [PreludeError]
    while queue:
        cls = queue.pop()
        found[cls.code] = cls
        queue += cls.__subclasses__()
    return found
