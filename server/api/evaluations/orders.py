"""From a body to an evaluation that is ready to run; its files came with it, or lie in PRELUDE_DATA_DIR."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import Request, UploadFile
from pydantic import ValidationError
from starlette.datastructures import UploadFile as FormFile

from server.api.bodies import FORM, JSON, media_type, misfit
from server.api.evaluations.bodies import FILES, Order
from server.api.evaluations.jobs import EvaluationJob
from server.api.generation import find_soft_prompt
from server.api.uploads import not_kept
from server.data_dir import resolve_data
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest
from server.evaluation.contestants import TeacherText, Wanted
from server.evaluation.data import EvaluationData, read_evaluation_data, read_rows
from server.evaluation.evaluation import prepare
from server.executors import Executor
from server.registry.registry import Registry
from server.registry.views import Resolved
from server.soft_prompts.names import split_version
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile

TRAINING = "train.jsonl"


@dataclass(frozen=True)
class Source:
    """A data file: where it lies, and what the client calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Body:
    """A body that was read: its fields, and the files that came with it."""

    order: Order
    files: Mapping[str, UploadFile | FormFile]


async def read_body(request: Request) -> Body:
    """A form or JSON; the form's files stay open until the request is over.

    Raises:
        RequestValidationError: fields do not fit.
        InvalidRequest: it is neither; a field comes twice, or the data is missing.
        HTTPException: (400) a form that cannot be read.
    """
    kind = media_type(request)
    if kind == FORM:
        form = await request.form(max_files=len(FILES), max_fields=16)
        items = form.multi_items()
        fields: dict[str, Any] = {name: value for name, value in items if not isinstance(value, FormFile)}
        files = {name: value for name, value in items if isinstance(value, FormFile)}
        if len(fields) + len(files) < len(items) or fields.keys() & files.keys():
            raise InvalidRequest("A field of the form comes twice.", remedy="Send each field once.")
        if strange := sorted(files.keys() - set(FILES)):
            raise InvalidRequest(
                f"{strange[0][:80]!r} is no file of an evaluation.", remedy=f"Files are {', '.join(FILES)}."
            )
        for name in ("baselines", "compare"):
            if name in fields:
                fields[name] = [part.strip() for part in fields[name].split(",") if part.strip()]
    elif kind == JSON:
        fields, files = await _read_json(request), {}
    else:
        raise InvalidRequest("The body is neither a multipart form nor JSON.", remedy="Send one with its Content-Type.")
    try:
        order = Order.model_validate(fields, strict=kind == JSON)
    except ValidationError as exc:
        raise misfit(exc) from exc
    if order.data is None and "data" not in files:
        raise InvalidRequest(
            "There is no `data`.", remedy="Send the rows as a file of a form, or their name.", param="data"
        )
    return Body(order, files)


async def _read_json(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("The body is not valid JSON.", remedy="Send a JSON object, in UTF-8.") from exc


async def make_job(
    body: Body,
    worker: EngineWorker,
    registry: Registry,
    threads: Executor,
    data_dir: Path | None,
    key_id: str | None,
) -> EvaluationJob:
    """Find the soft prompts, read and check the data, put the evaluation together; nothing runs yet.

    Raises:
        UnknownTask, InvalidTaskName, VersionUnavailable.
        InvalidRequest, InvalidTrainingData, ConfigurationError: what `prepare` raises.
        StoreError: the server has no place for the files.
    """
    order = body.order
    wanted = Wanted.parse(order.baselines or ())
    task, version = split_version(order.task)
    others = list(wanted.versions)
    if order.compare is not None:
        if version is not None:
            raise InvalidRequest(f"{order.task} names a version, and so does `compare`.", remedy=f"Name {task}.")
        version = order.compare[1]
        others.insert(0, order.compare[0])
    resolved, soft_prompt = await find_soft_prompt(
        registry, task if version is None else f"{task}@{version}", key_id or ""
    )
    numbers = [number for number in dict.fromkeys(others) if number != resolved.version]
    against = [await find_soft_prompt(registry, f"{task}@{number}", "") for number in numbers]

    def prepared() -> EvaluationJob:
        with _sources(body, data_dir) as sources:
            data, shots = _read(order, sources, data_dir, wanted)
        evaluation = prepare(
            worker,
            data,
            _named(resolved, soft_prompt),
            others=[_named(*one) for one in against],
            wanted=wanted,
            instruction=order.instruction,
            shots=shots,
            version=resolved.version,
            teacher=None if order.teacher is None else TeacherText(order.teacher, bool(order.teacher_chat)),
        )
        return EvaluationJob.of(evaluation, soft_prompt, key_id, _command(order, data.name))

    return await threads.run(prepared)


def _named(resolved: Resolved, soft_prompt: SoftPrompt) -> tuple[str, SoftPrompt]:
    return f"{resolved.task}@{resolved.version}", soft_prompt


@contextmanager
def _sources(body: Body, data_dir: Path | None) -> Iterator[dict[str, Source]]:
    """Every file of an order, by its field; what was uploaded is gone afterwards."""
    try:
        with tempfile.TemporaryDirectory(prefix="prelude-evaluation-") as folder:
            found: dict[str, Source] = {}
            for field, file in body.files.items():
                path = Path(folder) / f"{field}.jsonl"
                with path.open("wb") as target:
                    while chunk := file.file.read(2**16):
                        target.write(chunk)
                found[field] = Source(path, PurePosixPath(file.filename or "").name[:100] or f"{field}.jsonl")
            for field in FILES:
                name = getattr(body.order, field)
                if name is not None:
                    found[field] = Source(resolve_data(name, data_dir), name)
            yield found
    except OSError as exc:
        raise not_kept(exc) from exc


def _read(
    order: Order, sources: Mapping[str, Source], data_dir: Path | None, wanted: Wanted
) -> tuple[EvaluationData, DataFile | None]:
    """The rows, and the training data if examples are wanted: by default train.jsonl in the folder of a named file."""
    source, references = sources["data"], sources.get("references")
    data = read_evaluation_data(
        source.path,
        references=None if references is None else references.path,
        references_name=None if references is None else references.name,
        limit=order.limit,
        name=source.name,
        inside=data_dir if order.data is not None else source.path.parent,
    )
    shots = sources.get("shots")
    if shots is None and wanted.shots and order.data is not None:
        beside = str(PurePosixPath(order.data).with_name(TRAINING))
        shots = Source(resolve_data(beside, data_dir), beside)
    return data, None if shots is None or not wanted.shots else read_rows(shots.path, shots.name)


def _command(order: Order, data: str) -> str:
    """What measures the same from a shell, for the card."""
    parts = ["prelude", "eval", order.task, "--data", data]
    options = {
        "--baselines": ",".join(order.baselines or ()),
        "--instruction": order.instruction,
        "--limit": order.limit,
    }
    for option, value in options.items():
        parts += [option, str(value)] if value else []
    if order.teacher is not None:
        parts += ["--teacher", "teacher.txt", *(["--teacher-chat"] if order.teacher_chat else [])]
    if order.compare is not None:
        parts += ["--compare", *map(str, order.compare)]
    return shlex.join(parts)
