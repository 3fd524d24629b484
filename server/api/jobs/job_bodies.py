"""Reads the request for a job: its fields, and its files, which are uploaded or in PRELUDE_DATA_DIR."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from fastapi import Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from server.api.auth import allow_task, authorise
from server.api.bodies import Body, misfit, read_body
from server.api.body_sizes import MAX_DATA_BYTES
from server.api.files import copy_within, upload_not_stored
from server.api.schemas import RequestBody, Text
from server.data_dir import resolve_data
from server.errors import InvalidRequest, PayloadTooLarge
from server.keys.key import Scope

MAX_FILE_NAME = 100
"""Number of characters of an uploaded file's name that errors and results show."""

FILE = {"type": "string", "format": "binary"}
"""The OpenAPI schema of a file in a form."""


def both_bodies(schema: Mapping[str, Any], form: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI description of a body that is JSON with this schema, or a form with these fields."""
    whole = {"type": "object", "required": required, "additionalProperties": False, "properties": form}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": whole}}
    return {"requestBody": {"required": True, "content": content}}


NAMED = "a name inside PRELUDE_DATA_DIR; in a form also the file itself."


class DataRequest(RequestBody):
    """The fields of a job about a task's answers to rows, as JSON or as a form."""

    files: ClassVar[tuple[str, ...]] = ("data",)
    """Fields that are a file of the form, or the name of a file in PRELUDE_DATA_DIR."""
    lists: ClassVar[tuple[str, ...]] = ()
    """Fields whose items a form separates by commas."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"task": "sms_spam", "data": "sms_spam/test.jsonl", "limit": 100}]}
    )

    task: Text = Field(description="The task, or task@version.", max_length=128)
    data: Text | None = Field(None, description=f"The rows, JSONL: {NAMED}", max_length=1000)
    limit: int | None = Field(None, description="Use only this many rows from the beginning.", ge=1)

    @classmethod
    def parse(cls, body: Body) -> Self:
        """Parse a body; raises ValidationError, or InvalidRequest if there is no `data`."""
        fields = body.value
        for name in cls.lists:
            if not body.is_json and name in fields:
                fields[name] = [part.strip() for part in fields[name].split(",") if part.strip()]
        request = cls.model_validate(fields, strict=body.is_json)
        if request.data is None and "data" not in body.files:
            raise InvalidRequest(
                "There is no `data`.", remedy="Send the rows as a file of a form, or their name.", param="data"
            )
        return request

    @classmethod
    def both_bodies(cls, required: Sequence[str] = ("task", "data")) -> dict[str, Any]:
        """The OpenAPI description of both bodies; JSON may name the task elsewhere if a form may."""
        schema = cls.model_json_schema()
        if "task" not in required:
            schema["required"] = []
            schema["examples"] = [{"data": "sms_spam/test.jsonl", "limit": 100}]
        own = {name: {"type": "string"} for name in cls.lists} | dict.fromkeys(cls.files, FILE)
        form = {
            name: {**own[name], "description": field["description"]} if name in own else field
            for name, field in schema["properties"].items()
        }
        return both_bodies(schema, form, required)


class _Fields(Protocol):
    """Fields that every kind of job has."""

    @property
    def task(self) -> str:
        """The task, or task@version."""


F = TypeVar("F", bound=_Fields)


@dataclass(frozen=True)
class Order(Generic[F]):
    """The fields of a request for a job, and the uploaded files."""

    fields: F
    uploads: Mapping[str, UploadFile]


@asynccontextmanager
async def read_order(request: Request, files: Sequence[str], parse: Callable[[Body], F]) -> AsyncIterator[Order[F]]:
    """Context manager: read a job that the request's key may request; uploads stay open until the block ends.

    Args:
        files: fields that may be files.
        parse: parses the fields of a body; it may raise pydantic's ValidationError.

    Raises:
        InvalidRequest, RequestValidationError: a field is missing, unknown or invalid.
        HTTPException, PayloadTooLarge: the body cannot be read.
        Unauthorized, Forbidden: the key may not use this task, or was revoked during the upload.
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
    """A data file of a job.

    Attributes:
        source: the upload, or the path in PRELUDE_DATA_DIR.
        name: the file's name in errors and results.
    """

    source: UploadFile | Path
    name: str

    @property
    def path(self) -> Path:
        """The file's path; only for a file that is not an upload."""
        assert isinstance(self.source, Path), "an upload is kept first"
        return self.source

    def copy(self, target: Path, room: int = MAX_DATA_BYTES) -> int:
        """Write the content to `target` and return its size in bytes.

        Raises:
            PayloadTooLarge: the content exceeds `room` bytes.
            OSError: the file cannot be read or written.
        """
        too_large = PayloadTooLarge(
            f"The data files have more than {MAX_DATA_BYTES:,} bytes.", remedy="Take a sample of the rows."
        )
        if isinstance(self.source, UploadFile):
            return copy_within(self.source.file, target, room, too_large)
        with self.source.open("rb") as file:
            return copy_within(file, target, room, too_large)


def find_files(order: Order[F], names: Sequence[str], data_dir: Path | None) -> dict[str, GivenFile]:
    """The files of an order by field; `names` lists the fields that may be files.

    Raises InvalidRequest for a file that is both uploaded and named, or that is not in PRELUDE_DATA_DIR.
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
    """Copy uploads to a temporary folder; returns the files, each with a path, and the folder, which the job removes.

    Raises:
        StoreError: the server cannot store the files.
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
    """The name of an uploaded file, without folders."""
    name = PurePosixPath((upload.filename or "").replace("\\", "/")).name[:MAX_FILE_NAME]
    return name if name and name.isprintable() else f"{field}.jsonl"
