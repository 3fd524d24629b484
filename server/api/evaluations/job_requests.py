"""From a body to an evaluation that can be prepared; its files came with it, or lie in PRELUDE_DATA_DIR."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from server.api.bodies import misfit, read_body
from server.api.evaluations.jobs import EvaluationJob, limits_of
from server.api.evaluations.preparation import Preparation, find_sources
from server.api.evaluations.schemas import FILES, Order
from server.api.generation import find_soft_prompt
from server.errors import InvalidRequest
from server.evaluation.bounds import Bounds
from server.evaluation.in_server import labels_at_once
from server.evaluation.systems import Wanted
from server.executors import Executor
from server.registry.registry import Registry
from server.settings import Settings
from server.soft_prompts.names import split_version


@dataclass(frozen=True)
class Asked:
    """A body that was read: its fields, and the files that came with it."""

    order: Order
    files: Mapping[str, UploadFile]


async def read_order(request: Request) -> Asked:
    """A form or JSON; the form's files stay open until the request is over.

    Raises:
        RequestValidationError: fields do not fit.
        InvalidRequest: it is neither; a field comes twice, or the data is missing.
        HTTPException, PayloadTooLarge: it cannot be read.
    """
    body = await read_body(request, FILES)
    fields = body.value
    if not body.is_json:
        for name in ("baselines", "compare"):
            if name in fields:
                fields[name] = [part.strip() for part in fields[name].split(",") if part.strip()]
    try:
        order = Order.model_validate(fields, strict=body.is_json)
    except ValidationError as exc:
        raise misfit(exc) from exc
    if order.data is None and "data" not in body.files:
        raise InvalidRequest(
            "There is no `data`.", remedy="Send the rows as a file of a form, or their name.", param="data"
        )
    return Asked(order, body.files)


async def make_job(
    body: Asked,
    registry: Registry,
    threads: Executor,
    settings: Settings,
    key_id: str | None,
) -> EvaluationJob:
    """Find the soft prompts and the files; what takes longer belongs to the evaluation itself.

    Raises:
        UnknownTask, InvalidTaskName, VersionUnavailable.
        InvalidRequest: versions or baselines are not what they must be, or there is no such data file.
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
    subject = await find_soft_prompt(registry, task if version is None else f"{task}@{version}", key_id or "")
    numbers = [number for number in dict.fromkeys(others) if number != subject[0].version]
    against = [await find_soft_prompt(registry, f"{task}@{number}", "") for number in numbers]
    data_dir = settings.data_dir
    sources = await threads.run(find_sources, order, body.files, data_dir)
    bounds = Bounds(labels_at_once=labels_at_once(*limits_of(settings)))
    preparation = Preparation(order, wanted, sources, data_dir, (subject, *against), bounds)
    return EvaluationJob(preparation, key_id, _command(order, sources.files["data"].name))


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
