"""Turns a request body into a queued training job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastapi import Request

from server.api.auth import allow_task, may_see
from server.api.bodies import ORDERS, Body, parse_json
from server.api.body_sizes import MAX_DATA_BYTES
from server.api.generation import find_soft_prompt
from server.api.jobs.job_bodies import Order, find_files
from server.api.training.schemas import JobRequest, parse_request
from server.errors import InvalidRequest, InvalidTrainingData, PreludeError
from server.executors import Executors
from server.jobs.job import DataNames, Job, JobSpec
from server.jobs.job_queue import JobQueue
from server.registry.registry import Registry
from server.registry.task_views import Task
from server.soft_prompts.names import split_version
from server.soft_prompts.soft_prompt import EMBEDDING_TYPES, KV_TYPES, SoftPrompt
from server.train.config import NEAREST_TASK, TrainingConfig

FILES = ("data", "validation")
MOST_CANDIDATES = 16
MOST_CANDIDATE_BYTES = 64 * 2**20
"""Of the copies that a job keeps of soft prompts that it may start from."""


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


async def find_candidates(request: Request, spec: JobSpec, registry: Registry) -> dict[str, SoftPrompt]:
    """With `init=nearest-task`: live soft prompts of the same kind and length that the request's key may see.

    Only the newest `MOST_CANDIDATES` count, and of these the ones that fit `MOST_CANDIDATE_BYTES`.
    """
    config = spec.config
    if config.init != NEAREST_TASK:
        return {}
    executors: Executors = request.app.state.executors
    names = await executors.in_server.run(_fitting, registry.tasks, config, spec.task, partial(may_see, request))
    found: dict[str, SoftPrompt] = {}
    size = 0
    for name in names:
        try:
            resolved, soft_prompt = await find_soft_prompt(registry, name, "")
        except PreludeError:  # deleted or broken meanwhile
            continue
        size += soft_prompt.num_bytes
        if size > MOST_CANDIDATE_BYTES:
            break
        found[f"{resolved.task}@{resolved.version}"] = soft_prompt
    return found


def _fitting(
    tasks: Callable[[], Sequence[Task]], config: TrainingConfig, but: str, may: Callable[[str], bool]
) -> list[str]:
    """References of live versions that training can start from, newest first; for any thread."""
    kinds = KV_TYPES if config.method == "prefix_tuning" else EMBEDDING_TYPES
    fitting = [
        (task.live.at, f"{task.name}@{task.live.number}")
        for task in tasks()
        if task.live is not None and task.name != but and may(task.name)
        if task.live.content.peft_type in kinds and task.live.content.num_virtual_tokens == config.num_virtual_tokens
    ]
    return [name for _, name in sorted(fitting, reverse=True)[:MOST_CANDIDATES]]


def submit(
    job_queue: JobQueue,
    order: Order[JobRequest],
    data_dir: Path | None,
    by: str | None,
    start: StartVersion | None = None,
    candidates: Mapping[str, SoftPrompt] | None = None,
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
        begins = None if start is None else start.soft_prompt
        return job_queue.submit(draft, spec, names, by, begins, candidates, check_cancelled)
