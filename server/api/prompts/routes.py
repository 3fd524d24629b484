"""Soft prompts over HTTP: list, show, publish, delete. Their versions are in `versions.py`."""

import json
from heapq import merge
from typing import Annotated, Any

from fastapi import APIRouter, File, Query, Request, Response, UploadFile

from server.api.auth import GuardedRoute, Publishes, Reads, allow_task, visible
from server.api.deps import RegistryDep, SettingsDep, TaskName
from server.api.prompts.change_threads import PUBLISH_SECONDS, ChangeDep, in_time
from server.api.prompts.preconditions import set_etag
from server.api.prompts.uploads import unpacked_upload
from server.api.schemas import Responses, responses
from server.errors import InvalidRequest, InvalidSoftPrompt, UnknownTask
from server.registry.events import VersionContent
from server.registry.registry import Registry
from server.registry.task_views import Task
from server.replies import PromptDetail, PromptList, PromptSummary, PublishReply, TaskVersion, reply
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.names import check_task_name, names_of
from server.soft_prompts.soft_prompt import SoftPrompt

ERRORS = responses(on_404="No such task.", on_422="The name or a parameter does not fit.")
CHANGE_ERRORS = ERRORS | responses(
    on_412="The task is not what If-Match or If-None-Match expects.",
    on_429="Too many changes are waiting; Retry-After says when to come back.",
    on_500="The store could not be written.",
    on_503="The store does not answer in time, or a version cannot be served.",
    on_507="The store has no space left.",
)
PUBLISH_ERRORS: Responses = {
    **{status: CHANGE_ERRORS[status] for status in (412, 429, 500, 503, 507)},
    200: {"model": PublishReply, "description": "The content was live already, or it was a dry run; nothing changed."},
    **responses(
        on_400="The body is not a multipart form.",
        on_409="The soft prompt was trained on another frozen model.",
        on_413="The upload is too large.",
        on_422="The files are not a soft prompt for this model.",
    ),
}

router = APIRouter(prefix="/prompts", tags=["soft prompts"], route_class=GuardedRoute)


@router.get("", responses={422: ERRORS[422]}, dependencies=[Reads])
async def list_prompts(
    request: Request,
    registry: RegistryDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Entries of a page.")] = 100,
    after: Annotated[str | None, Query(description="Start after this task: `next` of the previous page.")] = None,
) -> PromptList:
    """All tasks by name, including entries of the inbox that are broken."""
    names: list[str] = []
    async for name in visible(request, merge(registry.names_after(after), registry.entries_after(after))):
        if not names or name != names[-1]:
            names.append(name)
        if len(names) > limit:
            break
    found = [(name, registry.find(name), registry.error_of(name)) for name in names[:limit]]
    page = [_summary(name, task, error) for name, task, error in found if task is not None or error is not None]
    return reply(PromptList, prompts=page, next=names[limit - 1] if len(names) > limit else None)


@router.get("/{task}", responses=ERRORS, dependencies=[Reads])
async def get_prompt(
    task: TaskName,
    registry: RegistryDep,
    response: Response,
    version: Annotated[int | None, Query(ge=1, description="Whose manifest to show. Default: the live one.")] = None,
) -> PromptDetail:
    """One task: its live version, all versions, and a manifest. A change accepts the ETag as If-Match."""
    found = registry.task(task)
    set_etag(response, found.etag)
    if version is None:
        shown = found.live or found.versions[max(found.versions)]
    elif version in found.versions:
        shown = found.versions[version]
    else:
        raise UnknownTask(f"The task {task} has no version {version}.")
    return reply(
        PromptDetail,
        **_summary(task, found, registry.error_of(task)),
        versions=sorted(found.versions),
        manifest=_manifest(shown.content),
    )


@router.put("/{task}", status_code=201, responses=PUBLISH_ERRORS, dependencies=[Publishes])
async def put_prompt(
    task: TaskName,
    files: Annotated[
        list[UploadFile],
        File(description="adapter_config.json, adapter_model.safetensors and optionally manifest.json; or one .zip."),
    ],
    request: Request,
    response: Response,
    change: ChangeDep,
    settings: SettingsDep,
    activate: Annotated[bool, Query(description="false stages it: only requests for task@version reach it.")] = True,
    dry_run: Annotated[bool, Query(description="true validates it as a publish would, and changes nothing.")] = False,
) -> PublishReply:
    """Publish a soft prompt for a task.

    The next request uses it; requests in flight finish with the previous version.
    """
    unknown = sorted(set(await request.form()) - {"files"})
    if unknown:
        raise InvalidRequest(f"Unknown form field {unknown[0][:80]!r}.", remedy="Send the files in the field `files`.")
    registry = change.registry
    soft_prompts, ignored = await in_time(PUBLISH_SECONDS, change.executors, _validate, task, files, registry, settings)
    for name in names_of(task, soft_prompts):
        # The route has checked the key for `task` only; a multitask soft prompt has one task name for each row.
        allow_task(request, name)
    published = await change.make(
        registry.publish, task, soft_prompts, "api", activate=activate, dry_run=dry_run, seconds=PUBLISH_SECONDS
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
        manifest=_manifest(first.content) if dry_run else None,
        prefix_hash=first.content.prefix_hash if dry_run else None,
    )


@router.delete("/{task}", status_code=204, responses=CHANGE_ERRORS, dependencies=[Publishes])
async def delete_prompt(task: TaskName, change: ChangeDep) -> None:
    """Delete a task and all its versions. Requests in flight finish first, then nothing of the task remains."""
    await change.make(change.registry.delete, task)


def _validate(
    task: str, files: list[UploadFile], registry: Registry, settings: Settings
) -> tuple[list[SoftPrompt], list[str]]:
    """The soft prompts in the form's files, and the names of ignored files. Temporary copies are removed."""
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
    """The traffic share of each version in a canary; None if at most one version is live."""
    return {str(version): share for version, share in task.traffic} if len(task.traffic) > 1 else None


def _manifest(content: VersionContent) -> dict[str, Any]:
    """A version's manifest as replies show it."""
    return {"generation": {}, **json.loads(content.manifest.text)}
