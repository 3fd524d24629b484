"""Soft prompts over HTTP: list, look at, publish, delete. Their versions are in `versions.py`."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Query, Request, Response, UploadFile

from server.api.auth import GuardedRoute, Publishes, Reads, allow_task, may_see
from server.api.deps import ExecutorsDep, KeyIdDep, RegistryDep, SettingsDep, TaskName, known_query
from server.api.prompts.changes import CHANGE_SECONDS, PUBLISH_SECONDS, in_time
from server.api.prompts.preconditions import ExpectedDep, set_etag
from server.api.prompts.uploads import unpacked_upload
from server.api.schemas import ErrorBody
from server.errors import InvalidRequest, InvalidSoftPrompt
from server.registry.registry import Registry
from server.registry.snapshot_views import Task
from server.replies import PromptDetail, PromptList, PromptSummary, PublishReply, TaskVersion, reply
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.names import check_task_name, names_of
from server.soft_prompts.soft_prompt import SoftPrompt

ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No such task."},
    422: {"model": ErrorBody, "description": "The name or a parameter does not fit."},
}
CHANGE_ERRORS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    412: {"model": ErrorBody, "description": "The task is not what If-Match or If-None-Match expects."},
    429: {"model": ErrorBody, "description": "Too many changes are waiting; Retry-After says when to come back."},
    500: {"model": ErrorBody, "description": "The store could not be written."},
    503: {"model": ErrorBody, "description": "The store does not answer in time, or a version cannot be served."},
    507: {"model": ErrorBody, "description": "The store has no space left."},
}
PUBLISH_ERRORS: dict[int | str, dict[str, Any]] = {
    200: {"model": PublishReply, "description": "The content was live already, or it was a dry run; nothing changed."},
    400: {"model": ErrorBody, "description": "The body is not a multipart form."},
    409: {"model": ErrorBody, "description": "The soft prompt was trained on another frozen model."},
    412: CHANGE_ERRORS[412],
    413: {"model": ErrorBody, "description": "The upload is too large."},
    422: {"model": ErrorBody, "description": "The files are not a soft prompt for this model."},
    429: CHANGE_ERRORS[429],
    500: CHANGE_ERRORS[500],
    503: CHANGE_ERRORS[503],
    507: CHANGE_ERRORS[507],
}

router = APIRouter(
    prefix="/prompts", tags=["soft prompts"], route_class=GuardedRoute, dependencies=[Depends(known_query)]
)


@router.get(
    "",
    response_model=PromptList,
    response_model_exclude_none=True,
    responses={422: ERRORS[422]},
    dependencies=[Reads],
)
async def list_prompts(
    request: Request,
    registry: RegistryDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Entries of a page.")] = 100,
    after: Annotated[str | None, Query(description="Start after this task: `next` of the previous page.")] = None,
) -> PromptList:
    """All tasks by name, with what is broken in the inbox."""
    tasks = {task.name: task for task in registry.tasks()}
    errors = registry.errors
    names = sorted(name for name in {*tasks, *errors} if (after is None or name > after) and may_see(request, name))
    page = [_summary(name, tasks.get(name), errors.get(name)) for name in names[:limit]]
    return reply(PromptList, prompts=page, next=names[limit - 1] if len(names) > limit else None)


@router.get(
    "/{task}",
    response_model=PromptDetail,
    response_model_exclude_none=True,
    responses=ERRORS,
    dependencies=[Reads],
)
async def get_prompt(task: TaskName, registry: RegistryDep, response: Response) -> PromptDetail:
    """One task: who answers, its versions, and the manifest. The ETag is what If-Match of a change takes."""
    found = registry.task(task)
    set_etag(response, found.etag)
    shown = found.live or found.versions[max(found.versions)]
    return reply(
        PromptDetail,
        **_summary(task, found, registry.errors.get(task)),
        versions=sorted(found.versions),
        manifest={"generation": {}, **json.loads(shown.content.manifest)},
    )


@router.put(
    "/{task}",
    status_code=201,
    response_model=PublishReply,
    response_model_exclude_none=True,
    responses=PUBLISH_ERRORS,
    dependencies=[Publishes],
)
async def put_prompt(
    task: TaskName,
    files: Annotated[
        list[UploadFile],
        File(description="adapter_config.json, adapter_model.safetensors and optionally manifest.json; or one .zip."),
    ],
    request: Request,
    response: Response,
    registry: RegistryDep,
    executors: ExecutorsDep,
    settings: SettingsDep,
    expected: ExpectedDep,
    key_id: KeyIdDep,
    activate: Annotated[bool, Query(description="false stages it: only requests for task@version reach it.")] = True,
    dry_run: Annotated[bool, Query(description="true validates it as a publish would, and changes nothing.")] = False,
) -> PublishReply:
    """Publish a soft prompt under a task's name; the next request is served by it, those in flight finish on theirs."""
    unknown = sorted(set(await request.form()) - {"files"})
    if unknown:
        raise InvalidRequest(f"Unknown form field {unknown[0][:80]!r}.", remedy="Send the files in the field `files`.")
    soft_prompts, ignored = await in_time(PUBLISH_SECONDS, executors, _validate, task, files, registry, settings)
    for name in names_of(task, soft_prompts):
        allow_task(request, name)  # the key is for `task`; the rows of a multitask soft prompt have names of their own
    published = await in_time(
        PUBLISH_SECONDS,
        executors,
        registry.publish,
        task,
        soft_prompts,
        "api",
        by=key_id,
        activate=activate,
        expected=expected,
        dry_run=dry_run,
    )
    if not published.created:
        response.status_code = 200
    if published.etag:
        set_etag(response, published.etag)
    first = published.tasks[0]
    return reply(
        PublishReply,
        task=first.task,
        version=first.version,
        digest=first.content.digest,
        peft_type=first.content.peft_type,
        num_virtual_tokens=first.content.num_virtual_tokens,
        live=published.live,
        tasks=[TaskVersion(task=item.task, version=item.version) for item in published.tasks],
        warnings=list(soft_prompts[0].notes) or None,
        ignored=ignored or None,
    )


@router.delete("/{task}", status_code=204, responses=CHANGE_ERRORS, dependencies=[Publishes])
async def delete_prompt(
    task: TaskName, registry: RegistryDep, executors: ExecutorsDep, expected: ExpectedDep, key_id: KeyIdDep
) -> None:
    """Delete a task and all its versions; requests in flight finish, then nothing of it is left."""
    await in_time(CHANGE_SECONDS, executors, registry.delete, task, by=key_id, expected=expected)


def _validate(
    task: str, files: list[UploadFile], registry: Registry, settings: Settings
) -> tuple[list[SoftPrompt], list[str]]:
    """From the form's files to soft prompts, and the names of files that were not taken; all are gone afterwards."""
    check_task_name(task)
    if not files:
        raise InvalidSoftPrompt("The form has no files.")
    with unpacked_upload(files, settings.max_upload_bytes) as upload:
        soft_prompts = load_soft_prompts(upload.directory, registry.model, registry.max_virtual_tokens)
        return soft_prompts, upload.ignored


def _summary(name: str, task: Task | None, error: str | None) -> PromptSummary:
    if task is None or (live := task.live) is None:
        return reply(PromptSummary, task=name, error=error)
    return reply(
        PromptSummary,
        task=name,
        version=live.number,
        traffic=shares(task),
        digest=live.content.digest,
        peft_type=live.content.peft_type,
        num_virtual_tokens=live.content.num_virtual_tokens,
        description=live.content.about.description,
        error=error,
    )


def shares(task: Task) -> dict[str, int] | None:
    """Who answers by weight, in a canary; None where it is one version, or none."""
    return {str(version): share for version, share in task.traffic} if len(task.traffic) > 1 else None
