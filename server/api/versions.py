"""A task's versions over HTTP: list, activate, roll back, share traffic, download, delete."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Response
from pydantic import PositiveInt, StrictInt

from server.api.auth import GuardedRoute, Publishes, Reads
from server.api.conditions import ExpectedDep, set_etag
from server.api.deps import ExecutorsDep, KeyIdDep, RegistryDep, TaskName, known_query
from server.api.generation import find_soft_prompt
from server.api.prompts import CHANGE_ERRORS, ERRORS, shares
from server.api.schemas import ActivateBody, ErrorBody, VersionBody, VersionList
from server.registry.state import Version
from server.registry.views import Task
from server.soft_prompts.archive import zip_soft_prompt

UNAVAILABLE: dict[str, Any] = {"model": ErrorBody, "description": "The version cannot be read or served."}
ACTIVATE_ERRORS: dict[int | str, dict[str, Any]] = {**CHANGE_ERRORS, 503: UNAVAILABLE}
BODY_ERRORS: dict[int | str, dict[str, Any]] = {
    **ACTIVATE_ERRORS,
    400: {"model": ErrorBody, "description": "The body cannot be read as JSON text."},
    413: {"model": ErrorBody, "description": "The body is too large."},
}

router = APIRouter(
    prefix="/prompts/{task}", tags=["versions"], route_class=GuardedRoute, dependencies=[Depends(known_query)]
)

Number = Annotated[int, Path(ge=1, description="Number of a version.", examples=[1])]


@router.get(
    "/versions",
    response_model=VersionList,
    response_model_exclude_none=True,
    responses=ERRORS,
    dependencies=[Reads],
)
async def list_versions(task: TaskName, registry: RegistryDep, response: Response) -> VersionList:
    """All versions of a task, newest first."""
    return _versions(registry.task(task), response)


@router.post(
    "/activate",
    response_model=VersionList,
    response_model_exclude_none=True,
    responses=BODY_ERRORS,
    dependencies=[Publishes],
)
async def activate(
    task: TaskName,
    body: ActivateBody,
    registry: RegistryDep,
    executors: ExecutorsDep,
    expected: ExpectedDep,
    key_id: KeyIdDep,
    response: Response,
) -> VersionList:
    """Let one version answer, alone; ends a canary."""
    changed = await executors.changes.run(registry.activate, task, body.version, by=key_id, expected=expected)
    return _versions(changed, response)


@router.post(
    "/rollback",
    response_model=VersionList,
    response_model_exclude_none=True,
    responses={**ACTIVATE_ERRORS, 409: {"model": ErrorBody, "description": "Nothing answered before."}},
    dependencies=[Publishes],
)
async def roll_back(
    task: TaskName,
    registry: RegistryDep,
    executors: ExecutorsDep,
    expected: ExpectedDep,
    key_id: KeyIdDep,
    response: Response,
) -> VersionList:
    """Let what answered before answer again; twice in a row goes back twice."""
    return _versions(await executors.changes.run(registry.roll_back, task, by=key_id, expected=expected), response)


@router.put(
    "/traffic",
    response_model=VersionList,
    response_model_exclude_none=True,
    responses=BODY_ERRORS,
    dependencies=[Publishes],
)
async def set_traffic(
    task: TaskName,
    weights: Annotated[
        dict[PositiveInt, StrictInt],
        Body(description="Shares of 100 by version.", examples=[{"1": 90, "2": 10}], max_length=100),
    ],
    registry: RegistryDep,
    executors: ExecutorsDep,
    expected: ExpectedDep,
    key_id: KeyIdDep,
    response: Response,
) -> VersionList:
    """Let versions answer by weight, until one is activated: a canary. A request's `user` stays on one side."""
    return _versions(
        await executors.changes.run(registry.set_traffic, task, weights, by=key_id, expected=expected), response
    )


@router.get(
    "/versions/{version}/download",
    response_class=Response,
    responses={
        200: {"content": {"application/zip": {}}, "description": "A PEFT directory."},
        **ERRORS,
        429: CHANGE_ERRORS[429],
        503: UNAVAILABLE,
    },
    dependencies=[Publishes],
)
async def download(task: TaskName, version: Number, registry: RegistryDep, executors: ExecutorsDep) -> Response:
    """A version as a zip that `PeftModel.from_pretrained` loads once unpacked, and that PUT takes back."""
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
    manifest = found.content.parse_manifest().model_copy(update=about)
    data = await executors.changes.run(zip_soft_prompt, replace(soft_prompt, manifest=manifest), registry.model)
    headers = {"Content-Disposition": f'attachment; filename="{task}-{version}.zip"', "ETag": f'"{soft_prompt.digest}"'}
    return Response(data, media_type="application/zip", headers=headers)


@router.delete(
    "/versions/{version}",
    status_code=204,
    responses={**CHANGE_ERRORS, 409: {"model": ErrorBody, "description": "The version is live."}},
    dependencies=[Publishes],
)
async def delete_version(
    task: TaskName,
    version: Number,
    registry: RegistryDep,
    executors: ExecutorsDep,
    expected: ExpectedDep,
    key_id: KeyIdDep,
) -> None:
    """Delete a version that does not answer."""
    await executors.changes.run(registry.delete_version, task, version, by=key_id, expected=expected)


def _versions(task: Task, response: Response) -> VersionList:
    set_etag(response, task.etag)
    live = task.live
    return VersionList(
        task=task.name,
        live=None if live is None else live.number,
        traffic=shares(task),
        versions=[_version(version, task) for _, version in sorted(task.versions.items(), reverse=True)],
    )


def _version(version: Version, task: Task) -> VersionBody:
    content = version.content
    manifest = content.parse_manifest()
    return VersionBody(
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
        description=manifest.description,
        metrics=manifest.metrics,
    )
