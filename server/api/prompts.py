"""Soft prompts over HTTP: list, look at, publish, delete."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Query, Request, Response, UploadFile

from server.api.deps import RegistryDep, SettingsDep, known_query
from server.api.schemas import ErrorBody, PromptDetail, PromptList, PromptSummary, PublishReply, TaskVersion
from server.api.uploads import unpack_upload
from server.errors import InvalidRequest, InvalidSoftPrompt, StoreError, UnknownTask
from server.registry.registry import LiveTask, Published, Registry
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.names import check_task_name, unknown_task

ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No such task."},
    422: {"model": ErrorBody, "description": "The name or a parameter does not fit."},
}
PUBLISH_ERRORS: dict[int | str, dict[str, Any]] = {
    200: {"model": PublishReply, "description": "The content was live already; nothing changed."},
    400: {"model": ErrorBody, "description": "The body is not a multipart form."},
    409: {"model": ErrorBody, "description": "The soft prompt was trained on another frozen model."},
    413: {"model": ErrorBody, "description": "The upload is too large."},
    422: {"model": ErrorBody, "description": "The files are not a soft prompt for this model."},
    500: {"model": ErrorBody, "description": "The store could not be written."},
}

router = APIRouter(prefix="/prompts", tags=["soft prompts"], dependencies=[Depends(known_query)])


@router.get("", response_model=PromptList, response_model_exclude_none=True, responses={422: ERRORS[422]})
async def list_prompts(
    registry: RegistryDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Entries of a page.")] = 100,
    after: Annotated[str | None, Query(description="Start behind this task: `next` of the page before.")] = None,
) -> PromptList:
    """All tasks by name, with what is broken in the inbox."""
    live = {task.task: task for task in registry.tasks()}
    names = sorted(name for name in {*live, *registry.errors} if after is None or name > after)
    page = [_summary(name, live.get(name), registry.errors.get(name)) for name in names[:limit]]
    return PromptList(prompts=page, next=names[limit - 1] if len(names) > limit else None)


@router.get("/{task}", response_model=PromptDetail, response_model_exclude_none=True, responses=ERRORS)
async def get_prompt(task: str, registry: RegistryDep) -> PromptDetail:
    """One task: its live version, its versions, and the manifest."""
    tasks = {entry.task: entry for entry in registry.tasks()}
    live = tasks.get(check_task_name(task))
    if live is None:
        error = unknown_task(task, tasks)
        raise UnknownTask(error.message, remedy=registry.errors.get(task, error.remedy))
    return PromptDetail(
        **_summary(task, live, registry.errors.get(task)).model_dump(),
        versions=list(live.versions),
        manifest=live.soft_prompt.manifest.model_dump(mode="json", exclude_none=True),
    )


@router.put("/{task}", status_code=201, response_model=PublishReply, responses=PUBLISH_ERRORS)
async def put_prompt(
    task: str,
    files: Annotated[
        list[UploadFile],
        File(description="adapter_config.json, adapter_model.safetensors and optionally manifest.json; or one .zip."),
    ],
    request: Request,
    response: Response,
    registry: RegistryDep,
    settings: SettingsDep,
) -> PublishReply:
    """Publish a soft prompt under a task's name; the next request is served by it, those in flight finish on theirs."""
    unknown = sorted(set(await request.form()) - {"files"})
    if unknown:
        raise InvalidRequest(f"Unknown form field {unknown[0][:80]!r}.", remedy="Send the files in the field `files`.")
    published = await asyncio.to_thread(_publish, task, files, registry, settings)
    if not published.created:
        response.status_code = 200
    first = published.tasks[0]
    return PublishReply(
        task=first.task,
        version=first.version,
        digest=first.soft_prompt.digest,
        peft_type=first.soft_prompt.peft_type,
        num_virtual_tokens=first.soft_prompt.num_virtual_tokens,
        live=True,
        tasks=[TaskVersion(task=item.task, version=item.version) for item in published.tasks],
    )


@router.delete("/{task}", status_code=204, responses={**ERRORS, 500: PUBLISH_ERRORS[500]})
async def delete_prompt(task: str, registry: RegistryDep) -> None:
    """Retire a task and all its versions; requests in flight finish."""
    await asyncio.to_thread(registry.delete, task)


def _publish(task: str, files: list[UploadFile], registry: Registry, settings: Settings) -> Published:
    check_task_name(task)
    if not files:
        raise InvalidSoftPrompt("The form has no files.")
    try:
        with tempfile.TemporaryDirectory(prefix="prelude-upload-") as folder:
            directory = Path(folder)
            unpack_upload(files, directory, settings.max_upload_bytes)
            contents = load_soft_prompts(directory, registry.model, registry.max_virtual_tokens)
    except OSError as exc:
        raise StoreError(
            f"The upload cannot be kept: {exc.strerror or exc}.", remedy="Make room in the server's temporary folder."
        ) from exc
    return registry.publish(task, contents, "api")


def _summary(name: str, live: LiveTask | None, error: str | None) -> PromptSummary:
    if live is None:
        return PromptSummary(task=name, error=error)
    soft_prompt = live.soft_prompt
    return PromptSummary(
        task=name,
        version=live.live,
        digest=soft_prompt.digest,
        peft_type=soft_prompt.peft_type,
        num_virtual_tokens=soft_prompt.num_virtual_tokens,
        description=soft_prompt.manifest.description,
        error=error,
    )
