"""A task's versions over HTTP: list, activate, roll back, divide traffic, download, delete."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Response
from pydantic import BeforeValidator, PositiveInt, StrictInt

from server.api.auth import GuardedRoute, Publishes, Reads
from server.api.deps import ExecutorsDep, RegistryDep, TaskName
from server.api.generation import find_soft_prompt
from server.api.prompts.change_threads import CHANGE_SECONDS, ChangeDep, in_time
from server.api.prompts.preconditions import set_etag
from server.api.prompts.routes import CHANGE_ERRORS, ERRORS, shares
from server.api.schemas import ActivateBody, responses
from server.contracts import ModelSpec
from server.errors import VersionUnavailable
from server.registry.events import VersionContent, seconds_of
from server.registry.registry import Registry
from server.registry.state import StoredVersion
from server.registry.task_views import Task
from server.replies import VersionBody, VersionList, reply
from server.soft_prompts.download_zip import zip_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from server.validation import without_nulls

UNAVAILABLE = responses(on_503="The version cannot be read or served.")
ACTIVATE_ERRORS = CHANGE_ERRORS | UNAVAILABLE
BODY_ERRORS = ACTIVATE_ERRORS | responses(400, 413)

router = APIRouter(prefix="/prompts/{task}", tags=["versions"], route_class=GuardedRoute)

PAGE = 100
"""Maximum number of versions on a page."""

Number = Annotated[int, Path(ge=1, description="Number of a version.", examples=[1])]


@router.get("/versions", responses=ERRORS, dependencies=[Reads])
async def list_versions(
    task: TaskName,
    registry: RegistryDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=PAGE, description="Entries of a page.")] = PAGE,
    before: Annotated[
        int | None, Query(ge=1, description="Only versions older than this one: `next` of the previous page.")
    ] = None,
) -> VersionList:
    """A task's versions, newest first, a page of them."""
    return _versions(registry, registry.task(task), response, limit, before)


@router.post("/activate", responses=BODY_ERRORS, dependencies=[Publishes])
async def activate(task: TaskName, body: ActivateBody, change: ChangeDep, response: Response) -> VersionList:
    """Make one version the only live version; ends a canary."""
    return _versions(change.registry, await change.make(change.registry.activate, task, body.version), response)


@router.post(
    "/rollback", responses=ACTIVATE_ERRORS | responses(on_409="Nothing answered before."), dependencies=[Publishes]
)
async def roll_back(task: TaskName, change: ChangeDep, response: Response) -> VersionList:
    """Restore the previously live version or canary; a second rollback goes back one more."""
    return _versions(change.registry, await change.make(change.registry.roll_back, task), response)


@router.put("/traffic", responses=BODY_ERRORS, dependencies=[Publishes])
async def set_traffic(
    task: TaskName,
    weights: Annotated[
        dict[PositiveInt, StrictInt],
        BeforeValidator(without_nulls, json_schema_input_type=dict[PositiveInt, StrictInt | None]),
        Body(description="Shares of 100 by version.", examples=[{"1": 90, "2": 10}], max_length=100),
    ],
    change: ChangeDep,
    response: Response,
) -> VersionList:
    """Divide the traffic between versions by weight, until one is activated: a canary.

    A `user` stays with one version.
    """
    return _versions(change.registry, await change.make(change.registry.set_traffic, task, weights), response)


@router.get(
    "/versions/{version}/download",
    response_class=Response,
    responses={
        200: {"content": {"application/zip": {}}, "description": "A PEFT directory."},
        **ERRORS,
        429: CHANGE_ERRORS[429],
        **UNAVAILABLE,
    },
    dependencies=[Publishes],
)
async def download(task: TaskName, version: Number, registry: RegistryDep, executors: ExecutorsDep) -> Response:
    """A version as a zip that PUT accepts; `PeftModel.from_pretrained` loads the unpacked zip."""
    found, soft_prompt = await find_soft_prompt(registry, f"{task}@{version}", "")
    about = {
        "task": task,
        "created_at": found.at,
        "digest": soft_prompt.digest,
        "prefix_hash": soft_prompt.prefix_hash,
        "peft_type": soft_prompt.peft_type,
        "num_virtual_tokens": soft_prompt.num_virtual_tokens,
        "hidden_size": registry.model.hidden_size,
    }
    # Another version with the same tensor may be in memory, so reading it did not fail.
    if found.content.about.problem is not None:
        raise VersionUnavailable(f"This server cannot read the version: {found.content.about.problem}")
    data = await in_time(CHANGE_SECONDS, executors, _zip, found.content, soft_prompt, about, registry.model)
    headers = {"Content-Disposition": f'attachment; filename="{task}-{version}.zip"', "ETag": f'"{soft_prompt.digest}"'}
    return Response(data, media_type="application/zip", headers=headers)


@router.delete(
    "/versions/{version}",
    status_code=204,
    responses=CHANGE_ERRORS | responses(on_409="The version is live."),
    dependencies=[Publishes],
)
async def delete_version(task: TaskName, version: Number, change: ChangeDep) -> None:
    """Delete a version that is not live."""
    await change.make(change.registry.delete_version, task, version)


def _zip(content: VersionContent, soft_prompt: SoftPrompt, about: dict[str, Any], model: ModelSpec) -> bytes:
    """A version's zip, with the version's own manifest: versions with the same digest may have different manifests."""
    manifest = content.parse_manifest().model_copy(update=about)
    return zip_soft_prompt(replace(soft_prompt, manifest=manifest), model)


def _versions(
    registry: Registry, task: Task, response: Response, limit: int = PAGE, before: int | None = None
) -> VersionList:
    set_etag(response, task.etag)
    live = task.live
    numbers = sorted((n for n in task.versions if before is None or n < before), reverse=True)
    return reply(
        VersionList,
        task=task.name,
        live=None if live is None else live.number,
        traffic=shares(task),
        versions=[_version(registry, task.versions[number], task) for number in numbers[:limit]],
        next=numbers[limit - 1] if len(numbers) > limit else None,
    )


def _version(registry: Registry, version: StoredVersion, task: Task) -> VersionBody:
    content = version.content
    return reply(
        VersionBody,
        version=version.number,
        live=version.number in dict(task.traffic),
        digest=content.digest,
        prefix_hash=content.prefix_hash,
        peft_type=content.peft_type,
        num_virtual_tokens=content.num_virtual_tokens,
        bytes=content.num_bytes,
        created_at=version.at,
        source=version.source,
        by=version.by,
        description=content.about.description,
        metrics=content.manifest.metrics,
        error=registry.why_broken(version) or _wrong_time(version.at),
    )


def _wrong_time(at: str) -> str | None:
    return None if seconds_of(at) is not None else f"Its event's time, {at[:64]!r}, is not one."
