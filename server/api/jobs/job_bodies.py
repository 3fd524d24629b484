"""Reads the request for a job: fields, and files of a form or in PRELUDE_DATA_DIR."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from server.api.auth import allow_task, authorise
from server.api.bodies import Body, misfit, read_body
from server.api.body_sizes import MAX_DATA_BYTES
from server.api.files import copy_within, upload_not_stored
from server.data_dir import resolve_data
from server.errors import InvalidRequest, PayloadTooLarge
from server.keys.key import Scope

MAX_FILE_NAME = 100
"""Characters of an uploaded file's name that errors and results show."""


FILE = {"type": "string", "format": "binary"}
"""The schema of a form's file."""


def both_bodies(schema: Mapping[str, Any], form: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """For OpenAPI: a body that is JSON of this schema, or a form of these fields."""
    whole = {"type": "object", "required": required, "additionalProperties": False, "properties": form}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": whole}}
    return {"requestBody": {"required": True, "content": content}}


class _Fields(Protocol):
    """The fields of every kind of job."""

    @property
    def task(self) -> str:
        """The task, or task@version."""


F = TypeVar("F", bound=_Fields)


@dataclass(frozen=True)
class Order(Generic[F]):
    """A body: its fields, and the files that came with it."""

    fields: F
    uploads: Mapping[str, UploadFile]


@asynccontextmanager
async def read_order(request: Request, files: Sequence[str], parse: Callable[[Body], F]) -> AsyncIterator[Order[F]]:
    """A job that the request's key may ask for; uploaded files stay open until the block ends.

    Args:
        request: one whose body was not read yet.
        files: fields that may be files.
        parse: makes the fields of a body; it may raise pydantic's ValidationError.

    Raises:
        InvalidRequest, RequestValidationError: a field is missing, unknown, or does not fit.
        HTTPException, PayloadTooLarge: the body cannot be read.
        Unauthorized, Forbidden: the key is not for this task, or was revoked during the upload.
    """
    try:
        body = await read_body(request, files)
        try:
            fields = parse(body)
        except ValidationError as exc:
            raise misfit(exc) from exc
        authorise(request, Scope.PUBLISH)
        allow_task(request, fields.task)
        yield Order(fields, body.files)
    finally:
        await request.close()


@dataclass(frozen=True)
class GivenFile:
    """A file of a job.

    Attributes:
        source: the upload, or the path in PRELUDE_DATA_DIR.
        name: what errors and results call it.
    """

    source: UploadFile | Path
    name: str

    @property
    def path(self) -> Path:
        """Where it lies, if it is no upload."""
        assert isinstance(self.source, Path), "an upload is kept first"
        return self.source

    def copy(self, target: Path, room: int = MAX_DATA_BYTES) -> int:
        """Write the content to `target`; returns its number of bytes.

        Raises:
            PayloadTooLarge: it has more than `room` bytes.
            OSError: it cannot be read or written.
        """
        too_large = PayloadTooLarge(
            f"The data files have more than {MAX_DATA_BYTES:,} bytes.", remedy="Take a sample of the rows."
        )
        if isinstance(self.source, UploadFile):
            return copy_within(self.source.file, target, room, too_large)
        with self.source.open("rb") as file:
            return copy_within(file, target, room, too_large)


def find_files(order: Order[F], names: Sequence[str], data_dir: Path | None) -> dict[str, GivenFile]:
    """The files of an order by their fields; `names` lists the fields that may be files.

    Raises:
        InvalidRequest: a file is both uploaded and named, or there is no such file in PRELUDE_DATA_DIR.
    """
    found = {}
    for field in names:
        name, upload = getattr(order.fields, field), order.uploads.get(field)
        if name is not None and upload is not None:
            raise InvalidRequest(f"{field} is both uploaded and named.", remedy="Do only one of them.", param=field)
        if name is not None:
            found[field] = GivenFile(resolve_data(name, data_dir), name)
        elif upload is not None:
            found[field] = GivenFile(upload, _shown_name(upload, field))
    return found


def keep_uploads(files: Mapping[str, GivenFile]) -> tuple[dict[str, GivenFile], TemporaryDirectory[str]]:
    """The same files with a path each, and the folder that uploads were copied to; the job removes it in the end.

    Raises:
        StoreError: the server has no place for the files.
        PayloadTooLarge: a file is too large.
    """
    with ExitStack() as undo:
        try:
            folder = TemporaryDirectory(prefix="prelude-job-", ignore_cleanup_errors=True)
            undo.callback(folder.cleanup)
            kept = dict(files)
            for field, file in files.items():
                if isinstance(file.source, UploadFile):
                    kept[field] = GivenFile(Path(folder.name) / f"{field}.jsonl", file.name)
                    file.copy(kept[field].path)
        except OSError as exc:
            raise upload_not_stored(exc) from exc
        undo.pop_all()
    return kept, folder


def _shown_name(upload: UploadFile, field: str) -> str:
    """The name that a file was sent with, without folders."""
    name = PurePosixPath((upload.filename or "").replace("\\", "/")).name[:MAX_FILE_NAME]
    return name if name and name.isprintable() else f"{field}.jsonl"
