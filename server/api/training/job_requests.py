"""Turns a request body into a queued training job."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import Request

from server.api.auth import allow_task
from server.api.bodies import ORDERS, Body, parse_json
from server.api.body_sizes import MAX_DATA_BYTES
from server.api.generation import find_soft_prompt
from server.api.jobs.job_bodies import Order, find_files
from server.api.training.schemas import JobRequest, parse_request
from server.errors import InvalidRequest, InvalidTrainingData
from server.jobs.job import DataNames, Job, JobSpec
from server.jobs.job_queue import JobQueue
from server.registry.registry import Registry
from server.soft_prompts.names import split_version
from server.soft_prompts.soft_prompt import SoftPrompt

FILES = ("data", "validation")


def parse_body(body: Body) -> JobRequest:
    """Parse the job from a JSON body, or from a form's field `spec`; raises ValidationError or InvalidRequest."""
    if body.is_json:
        return parse_request(body.value)
    if (spec := body.value.pop("spec", None)) is None:
        raise InvalidRequest(
            "The form has no field `spec` of text.", remedy='Send the job as JSON in it: {"task": "my_task"}.'
        )
    for name in body.value:
        if name in FILES:
            raise InvalidRequest(f"The form field {name} is no file.", remedy="Send it with a file name.")
        raise InvalidRequest(f"Unknown form field {name[:80]!r}.", remedy="Send spec, data and optionally validation.")
    return parse_request(parse_json(spec.encode(), ORDERS))


@dataclass(frozen=True)
class StartVersion:
    """The soft prompt that a job is initialised from, and its task@version."""

    name: str
    soft_prompt: SoftPrompt


async def find_start(request: Request, spec: JobSpec, registry: Registry, key_id: str | None) -> StartVersion | None:
    """The soft prompt that a job is initialised from, if any, unless the request's key may not use that task.

    The name is resolved to a version now; later changes do not affect a queued job.
    """
    name = spec.config.init_from
    if name is None or spec.config.init != "soft_prompt":
        return None
    allow_task(request, split_version(name)[0])
    resolved, soft_prompt = await find_soft_prompt(registry, name, key_id or "")
    return StartVersion(f"{resolved.task}@{resolved.version}", soft_prompt)


def submit(
    job_queue: JobQueue,
    order: Order[JobRequest],
    data_dir: Path | None,
    by: str | None,
    start: StartVersion | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Job:
    """Copy and check the data, and queue the job; `check_cancelled` is called between pieces and may raise to stop."""
    spec = order.fields.spec
    job_queue.check(spec)
    if start is not None:
        spec = replace(spec, config=replace(spec.config, init_from=start.name))
    files = find_files(order, FILES, data_dir)
    data, validation = files.get("data"), files.get("validation")
    if data is None:
        raise InvalidTrainingData(
            "There is no data to train on.", remedy="Upload a JSONL file as `data`, or name one of PRELUDE_DATA_DIR."
        )
    with job_queue.files.draft() as draft:
        room = MAX_DATA_BYTES - data.copy(draft.data)
        if validation is not None:
            validation.copy(draft.validation, room)
        names = DataNames(data.name, None if validation is None else validation.name)
        return job_queue.submit(draft, spec, names, by, None if start is None else start.soft_prompt, check_cancelled)
