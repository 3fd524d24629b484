"""The routes as methods: soft prompts and their versions, and training jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NotRequired

import httpx
from pydantic import TypeAdapter

from server import replies
from server.client.connection import Connection, OnSent, ReportingFile, if_match
from server.errors import UnknownJob
from server.replies import JobBody, JobList, PromptList, PromptSummary
from server.soft_prompts.names import check_task_name

PAGE = 1000
JOBS = "/training/jobs"

_JOB_ID = re.compile(r"[0-9a-z-]{1,80}")

_PROMPT_PAGE = TypeAdapter(PromptList)
_JOB = TypeAdapter(JobBody)
_OBJECT = TypeAdapter(dict[str, Any])
_JOB_LIST = TypeAdapter(JobList)


class TaskVersions(replies.VersionList):
    """The versions of a task, newest first, and the live version. Pass `etag` as `expect` of the next change."""

    etag: NotRequired[str]


class Pushed(replies.PublishReply):
    """The result of a publish; `created` is False if nothing had to change."""

    created: NotRequired[bool]


_VERSION_LIST = TypeAdapter(TaskVersions)
_PUSHED = TypeAdapter(Pushed)


class PreludeClient(Connection):
    """A connection to one server. `expect` of a change is an ETag such as "42", or "*" for any state of the task."""

    def prompts(self) -> Iterator[PromptSummary]:
        """All tasks by name, page after page."""
        after: dict[str, str] = {}
        while True:
            page = self.json("GET", "/prompts", _PROMPT_PAGE, params={"limit": PAGE, **after})
            yield from page["prompts"]
            if "next" not in page:
                return
            after = {"after": page["next"]}

    def versions(self, task: str) -> TaskVersions:
        """The versions of a task, newest first, page after page."""
        path = f"{_path(task)}/versions"
        listed = page = self._versions("GET", path)
        while "next" in page:
            page = self._versions("GET", path, params={"before": page["next"]})
            listed["versions"] += page["versions"]
        return listed

    def publish(
        self,
        task: str,
        files: Sequence[Path],
        *,
        activate: bool = True,
        dry_run: bool = False,
        expect: str | None = None,
        on_sent: OnSent | None = None,
    ) -> Pushed:
        """Upload the files of a soft prompt, or one zip of them; without `activate`, the version is only staged."""
        params = {"activate": activate, "dry_run": dry_run}
        path = _path(task)
        with ExitStack() as stack:
            form = [("files", (file.name, stack.enter_context(ReportingFile(file, on_sent)))) for file in files]
            with self.request("PUT", path, params=params, files=form, headers=if_match(expect)) as response:
                pushed = self.body(response, _PUSHED)
                pushed["created"] = response.status_code == httpx.codes.CREATED
                return pushed

    def activate(self, task: str, version: int, *, expect: str | None = None) -> TaskVersions:
        """Make a version the only live version of the task."""
        return self._versions("POST", f"{_path(task)}/activate", expect, json={"version": version})

    def roll_back(self, task: str, *, expect: str | None = None) -> TaskVersions:
        """Restore the previously live version or canary."""
        return self._versions("POST", f"{_path(task)}/rollback", expect)

    def set_traffic(self, task: str, weights: Mapping[int, int], *, expect: str | None = None) -> TaskVersions:
        """Divide the task's requests between versions, by percentages that sum to 100."""
        body = {str(version): weight for version, weight in weights.items()}
        return self._versions("PUT", f"{_path(task)}/traffic", expect, json=body)

    def delete(self, task: str, *, expect: str | None = None) -> None:
        """Delete a task and all its versions."""
        self._no_content(_path(task), expect)

    def delete_version(self, task: str, version: int, *, expect: str | None = None) -> None:
        """Delete a version that is not live."""
        self._no_content(f"{_path(task)}/versions/{version}", expect)

    def download(self, task: str, version: int, archive: Path) -> None:
        """Write a version's zip of PEFT files to a new file."""
        with self.request("GET", f"{_path(task)}/versions/{version}/download") as response, archive.open("xb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)

    def interpretation(self, task: str, version: int | None = None, top: int | None = None) -> dict[str, Any]:
        """What a soft prompt means, without data: the reply of `GET /prompts/{task}/interpretation`."""
        params = {name: value for name, value in (("version", version), ("top", top)) if value is not None}
        return self.json("GET", f"{_path(task)}/interpretation", _OBJECT, params=params)

    def train(
        self, spec: Mapping[str, Any], data: Path, validation: Path | None = None, *, on_sent: OnSent | None = None
    ) -> JobBody:
        """Queue a training job, whose result becomes a version of its task.

        `spec` is the body of `POST /training/jobs`; data and validation are JSONL files.
        """
        named = {"data": data} | ({} if validation is None else {"validation": validation})
        with ExitStack() as stack:
            form = {
                name: (file.name, stack.enter_context(ReportingFile(file, on_sent))) for name, file in named.items()
            }
            return self.json("POST", JOBS, _JOB, data={"spec": json.dumps(spec)}, files=form)

    def jobs(self) -> list[JobBody]:
        """All training jobs, newest first."""
        return self.json("GET", JOBS, _JOB_LIST)["jobs"]

    def job(self, job_id: str) -> JobBody:
        """One training job as it is now."""
        return self.json("GET", _job_path(job_id), _JOB)

    def job_log(self, job_id: str) -> str:
        """The last part of the output of a job's process."""
        with self.request("GET", f"{_job_path(job_id)}/log") as response:
            response.read()
            return response.text

    def cancel_job(self, job_id: str) -> JobBody:
        """Cancel a job; nothing is published. A finished job does not change."""
        return self.json("POST", f"{_job_path(job_id)}/cancel", _JOB)

    def delete_job(self, job_id: str) -> None:
        """Delete a finished job."""
        self._no_content(_job_path(job_id))

    def _versions(self, method: str, path: str, expect: str | None = None, **content: Any) -> TaskVersions:
        with self.request(method, path, headers=if_match(expect), **content) as response:
            listed = self.body(response, _VERSION_LIST)
            if "ETag" in response.headers:
                listed["etag"] = response.headers["ETag"].removeprefix("W/").strip('"')
            return listed

    def _no_content(self, path: str, expect: str | None = None) -> None:
        with self.request("DELETE", path, headers=if_match(expect)):
            pass


def _path(task: str) -> str:
    return f"/prompts/{check_task_name(task)}"


def _job_path(job_id: str) -> str:
    """The path of a job; UnknownJob for an invalid id, because an id with a slash must not become another path."""
    if not _JOB_ID.fullmatch(job_id):
        raise UnknownJob(f"There is no training job {job_id[:80]!r}.")
    return f"{JOBS}/{job_id}"
