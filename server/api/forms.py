"""Reads multipart forms on threads: files go to disk as they arrive, and everything else is bounded.

Starlette's own reader parses on the event loop, hops to a thread for each piece of a file between two line breaks, and
treats a truncated body as complete, so a soft prompt could go live without its manifest.
"""

import re
from tempfile import SpooledTemporaryFile
from typing import IO, Any, cast

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException

from server.api.files import upload_not_stored
from server.errors import InvalidRequest, PayloadTooLarge

MAX_FORM_PARTS = 16
"""Fields and files of a form."""
MAX_FIELD_BYTES = 2**20
"""Of all fields of a form that are no files: they are kept in memory."""
MAX_NAME_BYTES = 1024
"""Of a field's name, and of a file's."""
SPOOLED_BYTES = 2**16
"""Of a file, up to which it waits in memory."""

_EXTENDED_NAME = re.compile(rb";\s*filename\*", re.IGNORECASE)


async def read_form(request: Request) -> FormData:
    """A request's form; closing it closes its files. It has no fields if the body is not a multipart form.

    Raises:
        InvalidRequest, PayloadTooLarge: it has too many parts, too long names or too long fields.
        HTTPException: (400) it cannot be read, or is incomplete.
        StoreError: its files cannot be stored.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return FormData()
    boundary = options.get(b"boundary")
    if not boundary:
        raise HTTPException(400, "The form's Content-Type has no boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, cast(Any, parts.callbacks))
        async for piece in request.stream():
            if piece and not parts.has_ended:  # what comes after the last boundary is no part
                await run_in_threadpool(parser.write, piece)
        if not parts.has_ended:
            raise HTTPException(400, "The form is cut off: the body ends before its closing boundary")
        await run_in_threadpool(parts.rewind)
    except BaseException as exc:
        parts.close()
        if isinstance(exc, FormParserError):
            raise HTTPException(400, f"The form cannot be read: {str(exc)[:200].rstrip('.')}") from exc
        if isinstance(exc, OSError):
            raise upload_not_stored(exc) from exc
        raise
    return FormData(parts.items)


class _Parts:
    def __init__(self) -> None:
        self.items: list[tuple[str, str | UploadFile]] = []
        self.has_ended = False
        self._headers: list[tuple[bytes, bytes]] = []
        self._header, self._value, self._field = bytearray(), bytearray(), bytearray()
        self._name = ""
        self._file: IO[bytes] | None = None
        self._num_parts = self._num_field_bytes = 0

    @property
    def callbacks(self) -> dict[str, Any]:
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def rewind(self) -> None:
        """Have every file read from its first byte."""
        for _, item in self.items:
            if isinstance(item, UploadFile):
                item.file.seek(0)

    def close(self) -> None:
        """Remove all files."""
        for _, item in self.items:
            if isinstance(item, UploadFile):
                item.file.close()

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FORM_PARTS:
            raise InvalidRequest(
                f"The form has more than {MAX_FORM_PARTS} parts.", remedy="Send each file and field once."
            )
        self._headers, self._field, self._file = [], bytearray(), None

    def _end_header(self) -> None:
        self._headers.append((bytes(self._header).lower(), bytes(self._value)))
        self._header, self._value = bytearray(), bytearray()

    def _open(self) -> None:
        headers = dict(self._headers)
        disposition = headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        if b"filename" not in options and _EXTENDED_NAME.search(disposition):
            raise InvalidRequest(
                "The form gives a file's name as filename*, which RFC 7578 does not allow in forms.",
                remedy='Send it as filename="…", in UTF-8.',
            )
        if b"name" not in options:
            raise HTTPException(400, "A part of the form has no name")
        if max(map(len, options.values())) > MAX_NAME_BYTES:
            raise InvalidRequest(
                f"The form has a name of more than {MAX_NAME_BYTES:,} bytes.", remedy="Send a shorter one."
            )
        self._name = _text(options[b"name"])
        if b"filename" in options:
            self._file = cast(IO[bytes], SpooledTemporaryFile(max_size=SPOOLED_BYTES))  # noqa: SIM115 (closed by close)
            upload = UploadFile(
                cast(Any, self._file), filename=_text(options[b"filename"]), headers=Headers(raw=self._headers)
            )
            self.items.append((self._name, upload))

    def _write(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._num_field_bytes += end - start
        if self._num_field_bytes > MAX_FIELD_BYTES:
            raise PayloadTooLarge(
                f"The form's fields have more than {MAX_FIELD_BYTES:,} bytes.",
                remedy="Send as a file, with a file name, what is one.",
            )
        self._field += data[start:end]

    def _end(self) -> None:
        if self._file is None:
            self.items.append((self._name, _text(self._field)))

    def _end_all(self) -> None:
        self.has_ended = True


def _text(raw: bytes | bytearray) -> str:
    """Decode as UTF-8, else as Latin-1, which old browsers sent."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
