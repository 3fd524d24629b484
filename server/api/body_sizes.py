"""Limits on bodies, enforced while they arrive: pure ASGI, so streams pass through untouched.

Here it is the size alone, of one body and of all bodies together; `bodies.py` and `forms.py` limit what a body is made
of.
"""

import re
from collections import Counter
from collections.abc import Sequence

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Overloaded, PayloadTooLarge

MAX_JSON_BYTES = 4 * 2**20
"""Limit of JSON bodies, except those named by the constants below."""
MAX_ORDER_BYTES = 2**20
"""Limit of the JSON bodies that request a job."""
MULTIPART_OVERHEAD = 64 * 2**10
"""Boundaries and part headers around an upload's files."""
MAX_DATA_BYTES = 256 * 2**20
"""Limit of the forms that bring a job's files."""

FREE_BYTES = 2**16
"""The first this many bytes of each body do not count towards the limit on all bodies together, so ordinary requests
pass while large ones are in progress."""
FORM_BYTES = 2**20
"""The most bytes of a form that are kept in memory; its files are on disk."""

_EXPERIMENT = re.compile(r"POST /prompts/[^/]+/interpretation/?")
"""A job's request under the path of its task."""
_UPLOAD = re.compile(r"PUT /prompts/[^/]+/?")


class FormDisk:
    """The disk space that the files of all forms in flight use, in total and by API key.

    While n keys have forms in progress, each may use 1/(n+1) of the space, so some space is always left for another
    key. On a server without keys, one client may use all of it.
    """

    def __init__(self, most: int) -> None:
        """Nothing is under way; `most` is in bytes."""
        self._most = most
        self._taken: Counter[str | None] = Counter()

    def check(self, key: str | None, more: int, whole: int) -> None:
        """Refuse a form whose files would use too much of the disk.

        Args:
            key: the API key that sends the form.
            more: bytes that have just arrived; for a form that starts, all bytes that it declares.
            whole: bytes of the form up to and including these.

        Raises:
            PayloadTooLarge: the form would not fit even alone.
            Overloaded: it does not fit beside the others.
        """
        alone = self._most if key is None else self._most // 2
        if whole > alone:
            raise PayloadTooLarge(
                f"The files of one form may take {alone:,} bytes on the server's disk.",
                remedy="Send less, or raise PRELUDE_FORM_DISK.",
            )
        if self._taken.total() + more > self._most:
            raise Overloaded(f"The files of all forms in flight would take more than {self._most:,} bytes on disk.")
        share = self._most if key is None else self._most // (len({*self._taken, key}) + 1)
        if self._taken[key] + more > share:
            raise Overloaded(f"The files of this key's forms in flight would take more than {share:,} bytes on disk.")

    def take(self, key: str | None, more: int, whole: int) -> None:
        """Count more bytes of a form, after `check`."""
        if more > 0:
            self.check(key, more, whole)
            self._taken[key] += more

    def give_back(self, key: str | None, size: int) -> None:
        """Forget a form that has been answered."""
        if size:
            self._taken[key] -= size
            self._taken = +self._taken  # without keys that take nothing


class BodyLimit:
    """Refuses bodies over a limit with 413: at once if Content-Length exceeds it, else when the received bytes do.

    What the bodies of all requests under way hold in memory has a limit too, and what the files of forms take on disk;
    a body that would exceed one gets 429. The received bytes of a body count until its request has been answered.
    """

    def __init__(
        self, app: ASGIApp, max_upload_bytes: int, memory: int, disk: int, job_paths: Sequence[str] = ()
    ) -> None:
        """Wrap an app; `memory` and `disk` limit all bodies together; `job_paths` are those of all kinds of jobs."""
        self._app = app
        self._job_paths = job_paths
        self._max_upload_bytes = max_upload_bytes
        self._memory = memory
        self._held = 0
        self._disk = FormDisk(disk)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        target = f"{scope['method']} {scope['path']}"
        is_form = self._is_form(target, headers)
        limit, remedy = self._limit(target, is_form)
        length = headers.get("content-length", "0")
        declared = int(length[:20]) if length.isdecimal() else 0
        received = declared if declared > limit else 0
        held = on_disk = 0

        async def limited_receive() -> Message:
            nonlocal received, held, on_disk
            if received <= limit:
                if is_form and received == 0 < declared - FREE_BYTES:  # refused before it is sent
                    self._disk.check(_key_id(scope), declared - FREE_BYTES, declared)
                message = await receive()
                received += len(message.get("body", b""))
                if received <= limit:
                    more = max(0, min(received, FORM_BYTES if is_form else received) - FREE_BYTES) - held
                    self._hold(more)
                    held += more
                    if is_form:
                        more = max(0, received - FREE_BYTES) - on_disk
                        self._disk.take(_key_id(scope), more, received)
                        on_disk += more
                    return message
            raise PayloadTooLarge(f"The body has more than {limit:,} bytes.", remedy=remedy)

        try:
            await self._app(scope, limited_receive, send)
        finally:
            self._held -= held
            self._disk.give_back(_key_id(scope), on_disk)

    def _hold(self, more: int) -> None:
        """Count what has come of a body; refuse it if all of them would hold too much."""
        if more > 0 and self._held + more > self._memory:
            raise Overloaded(
                f"The bodies of all requests in flight would hold more than {self._memory:,} bytes.",
                remedy="Send the request again after the seconds in Retry-After, or in parts: bodies up to "
                f"{FREE_BYTES:,} bytes are always accepted.",
            )
        self._held += more

    def _is_form(self, target: str, headers: Headers) -> bool:
        """Whether a body is read as a form, with its files on disk; elsewhere one called a form is kept whole."""
        kind = parse_options_header(headers.get("content-type"))[0]
        return kind == b"multipart/form-data" and bool(_UPLOAD.fullmatch(target) or self._is_job(target))

    def _is_job(self, target: str) -> bool:
        return bool(_EXPERIMENT.fullmatch(target)) or target.rstrip("/") in [f"POST {path}" for path in self._job_paths]

    def _limit(self, target: str, is_form: bool) -> tuple[int, str]:
        """The size limit of a request's body, and the remedy that the error names."""
        if _UPLOAD.fullmatch(target):
            most = self._max_upload_bytes + MULTIPART_OVERHEAD
            return most, "Send a smaller soft prompt, or raise PRELUDE_MAX_UPLOAD_BYTES."
        if is_form:
            return MAX_DATA_BYTES, "Send a sample of the rows; training reads no more than its steps take."
        return json_limit(target, self._job_paths), "Send the text in several requests."


def json_limit(target: str, job_paths: Sequence[str]) -> int:
    """The largest JSON body that a route accepts, by method and path."""
    path = target.partition(" ")[2] + "/"
    is_job = path.startswith(tuple(f"{one}/" for one in job_paths)) or _EXPERIMENT.fullmatch(target)
    return MAX_ORDER_BYTES if is_job else MAX_JSON_BYTES


def _key_id(scope: Scope) -> str | None:
    """The key that `authorise` found, which it does before a body is read."""
    key_id: str | None = scope.get("state", {}).get("key_id")
    return key_id
