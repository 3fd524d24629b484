"""From a request to a training job: JSON that names data files of the server, or a form that brings them along."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from server.api.auth import allow_task
from server.api.bodies import ORDERS, Body, misfit, parse_json, read_body
from server.api.generation import find_soft_prompt
from server.api.limits import MAX_DATA_BYTES
from server.api.training.schemas import JobRequest, parse_request
from server.data_dir import resolve_data
from server.errors import InvalidRequest, InvalidTrainingData, PayloadTooLarge
from server.jobs.job import DataNames, Job, JobSpec
from server.jobs.job_queue import JobBoard
from server.registry.registry import Registry
from server.soft_prompts.names import split_version
from server.soft_prompts.soft_prompt import SoftPrompt

CHUNK = 2**20
FILES = ("data", "validation")

Source = UploadFile | Path


@dataclass(frozen=True)
class AskedFor:
    """A job, and where its data is."""

    request: JobRequest
    data: UploadFile | None = None
    validation: UploadFile | None = None


@asynccontextmanager
async def read_job(request: Request) -> AsyncIterator[AskedFor]:
    """The job that a request asks for; what it uploads is there until the block ends.

    Raises:
        InvalidRequest, RequestValidationError: a field is missing, unknown, or not what it must be.
    """
    try:
        body = await read_body(request, FILES)
        if body.is_json:
            del body  # it is read again, as strict mode takes JSON's lists for tuples; one of both is enough in memory
            yield AskedFor(_parse(await request.body()))
        else:
            yield _from_form(body)
    finally:
        await request.close()


@dataclass(frozen=True)
class Start:
    """The soft prompt that a job begins with, and the version that it is."""

    name: str
    soft_prompt: SoftPrompt


async def find_start(request: Request, spec: JobSpec, registry: Registry, key_id: str | None) -> Start | None:
    """What a job is to begin with; the version that its name stands for now, whatever happens while the job waits.

    Raises:
        Forbidden: the request's key is not for that task.
        UnknownTask, InvalidTaskName, VersionUnavailable.
    """
    name = spec.config.init_from
    if name is None or spec.config.init != "soft_prompt":
        return None
    allow_task(request, split_version(name)[0])
    resolved, soft_prompt = await find_soft_prompt(registry, name, key_id or "")
    return Start(f"{resolved.task}@{resolved.version}", soft_prompt)


def submit(
    board: JobBoard,
    asked: AskedFor,
    data_dir: Path | None,
    by: str | None,
    start: Start | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Job:
    """Copy the data, check it, and queue the job; `go_on` is called on the way, and what it raises ends it.

    Raises:
        PreludeError: nothing is queued then.
    """
    spec = asked.request.spec
    board.check(spec)
    if start is not None:
        spec = replace(spec, config=replace(spec.config, init_from=start.name))
    data = _source("data", asked.data, asked.request.data, data_dir)
    validation = _source("validation", asked.validation, asked.request.validation, data_dir)
    if data is None:
        raise InvalidTrainingData(
            "There is no data to train on.", remedy="Upload a JSONL file as `data`, or name one of PRELUDE_DATA_DIR."
        )
    with board.draft() as draft:
        names = DataNames(_named(data, asked.request.data or "data"))
        room = MAX_DATA_BYTES - _copy(data, draft.data, MAX_DATA_BYTES)
        if validation is not None:
            names = DataNames(names.data, _named(validation, asked.request.validation or "validation"))
            _copy(validation, draft.validation, room)
        return board.submit(draft, spec, names, by, None if start is None else start.soft_prompt, go_on)


def _from_form(body: Body) -> AskedFor:
    if (spec := body.value.pop("spec", None)) is None:
        raise InvalidRequest(
            "The form has no field `spec` of text.", remedy='Send the job as JSON in it: {"task": "my_task"}.'
        )
    for name in body.value:
        if name in FILES:
            raise InvalidRequest(f"The form field {name} is no file.", remedy="Send it with a file name.")
        raise InvalidRequest(f"Unknown form field {name[:80]!r}.", remedy="Send spec, data and optionally validation.")
    parse_json(spec.encode(), ORDERS)  # refuses what may not be read
    return AskedFor(_parse(spec), body.files.get("data"), body.files.get("validation"))


def _parse(text: str | bytes) -> JobRequest:
    try:
        return parse_request(text)
    except ValidationError as exc:
        raise misfit(exc) from exc


def _source(field: str, uploaded: UploadFile | None, name: str | None, data_dir: Path | None) -> Source | None:
    if uploaded is not None and name is not None:
        raise InvalidRequest(f"{field} is uploaded, and named as well.", remedy="Do one of both.", param=field)
    return uploaded if name is None else resolve_data(name, data_dir)


def _named(source: Source, fallback: str) -> str:
    """What an error calls a file: by the name that it was sent with, without folders."""
    if isinstance(source, Path):
        return fallback
    name = PurePosixPath((source.filename or "").replace("\\", "/")).name[:100]
    return name if name.isprintable() and name else fallback


def _copy(source: Source, target: Path, room: int) -> int:
    """Copy a data file; answers its size."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _copy_bytes(file, target, room)
    return _copy_bytes(source.file, target, room)


def _copy_bytes(source: IO[bytes], target: Path, room: int) -> int:
    size = 0
    with target.open("wb") as file:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > room:
                raise PayloadTooLarge(
                    f"The data files have more than {MAX_DATA_BYTES:,} bytes.", remedy="Take a sample of the rows."
                )
            file.write(chunk)
    return size
