"""Jobs as folders, which hold everything about them, so a server that was killed finds them again.

    PRELUDE_JOBS_DIR/
      20261125t101500123-9f3a1c2b7d10/
        spec.json                    what was asked for, by whom; written once
        data.jsonl  validation.jsonl copies, so that later changes of the originals do not affect the run
        start/                       the soft prompt to initialise from, if any (also a copy)
        candidates/TASK/             those to choose from, if training starts from the nearest task (copies)
        status.json                  replaced whole, by the server that runs jobs
        cancel                       exists if a client has cancelled the job
        publishing                   exists once the result is being published; the job can then not be cancelled
        order.json                   settings for its process, written whenever one is started
        record.jsonl  log.txt        the run's progress; the output of its process
        checkpoint/  result/         what a restarted process resumes from; the resulting PEFT directory
        failure.json                 why its process gave up
      .lock                          held by the server that runs the jobs of this folder

A job's folder is created under a temporary name and then renamed, so it is either complete or absent. Any server may
look, add and cancel; only the one that holds the lock runs, so servers that share a folder run one job at a time
between them.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from server.durable import not_stored, replace_file, sync
from server.errors import UnknownJob
from server.jobs.job import JOB_ID, DataNames, Job, JobSpec, JobState, Status, new_job_id, now
from server.jobs.progress_log import read_progress
from server.jobs.states import STATUS, States, job_ids

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 24 * 3600.0
"""Age after which a draft is removed as abandoned."""

job_not_kept = partial(not_stored, what="The training job", where="the folder PRELUDE_JOBS_DIR")
"""The error for a job that the server has no place for."""

_SPEC = TypeAdapter(JobSpec)
_STATUS = TypeAdapter(Status)


class JobFolder:
    """The files of one job, by the names that they have above.

    A publish creates `publishing` before it checks for `cancel`; a cancellation creates `cancel` before it checks for
    `publishing`. If both happen at once, at least one sees the other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data, self.validation = path / "data.jsonl", path / "validation.jsonl"
        self.start, self.checkpoint, self.result = path / "start", path / "checkpoint", path / "result"
        self.candidates = path / "candidates"
        self.order, self.failure = path / "order.json", path / "failure.json"
        self.record, self.log = path / "record.jsonl", path / "log.txt"
        self.cancel, self.publishing = path / "cancel", path / "publishing"

    @property
    def has_result(self) -> bool:
        """Whether training is over; the tensor is what is written last."""
        return (self.result / "adapter_model.safetensors").is_file()

    def write_status(self, status: Status) -> None:
        """Replace it, durably."""
        write_json(self.path / STATUS, _STATUS.dump_python(status, mode="json"))

    def read(self) -> Job:
        """The job as it is now; raises OSError, ValueError, TypeError or KeyError if the folder is not whole."""
        said = json.loads((self.path / "spec.json").read_bytes())
        status = _STATUS.validate_json((self.path / STATUS).read_bytes())
        return Job(
            id=self.path.name,
            spec=_SPEC.validate_python(said["spec"]),
            names=DataNames(**said["names"]),
            by=said["by"],
            created_at=said["created_at"],
            status=status,
            progress=read_progress(self.record),
            is_cancelling=not status.state.is_over and self.cancel.exists() and not self.publishing.exists(),
        )


class JobsFolder:
    """All jobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._states = States(root)
        self._unreadable: set[str] = set()

    @contextmanager
    def draft(self) -> Iterator[JobFolder]:
        """A folder for a job's data, removed unless it became a job; raises StoreError if it cannot be written."""
        path = self.root / f".new-{new_job_id()}"
        try:
            path.mkdir(parents=True)
            yield JobFolder(path)
        except OSError as exc:
            raise job_not_kept(exc) from exc
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def add(self, draft: JobFolder, spec: JobSpec, names: DataNames, by: str | None) -> Job:
        """Make a draft a job, durably; raises OSError if it cannot be written."""
        copies = [
            draft.data,
            draft.validation,
            draft.start,
            *draft.start.glob("*"),
            draft.candidates,
            *draft.candidates.rglob("*"),
        ]
        for copy in copies:
            if copy.exists():
                sync(copy)
        said = {"spec": _SPEC.dump_python(spec, mode="json"), "names": asdict(names), "by": by, "created_at": now()}
        write_json(draft.path / "spec.json", said)
        draft.write_status(Status())
        target = self.root / new_job_id()
        os.rename(draft.path, target)
        sync(self.root)
        return JobFolder(target).read()

    def ids(self) -> list[str]:
        """Of all jobs, oldest first."""
        return job_ids(self.root)

    def states(self) -> dict[str, JobState]:
        """The state of every job whose status can be read, oldest first; cheap, as only what has changed is read."""
        return self._states.all()

    def folder(self, job_id: str) -> JobFolder:
        """The files of a job; raises UnknownJob if no job has that id."""
        if not JOB_ID.fullmatch(job_id) or not (self.root / job_id).is_dir():
            raise UnknownJob(f"There is no training job {job_id[:80]!r}.")
        return JobFolder(self.root / job_id)

    def job(self, job_id: str) -> Job:
        """A job as it is now; raises UnknownJob if no job has that id, or its folder cannot be read."""
        folder = self.folder(job_id)
        try:
            return folder.read()
        except (OSError, ValueError, TypeError, KeyError, ValidationError) as exc:
            if job_id not in self._unreadable:
                self._unreadable.add(job_id)
                log.warning("the training job in %s cannot be read: %s", folder.path, exc)
            raise UnknownJob(f"The training job {job_id} cannot be read.") from exc

    def jobs(self) -> list[Job]:
        """All that can be read, oldest first."""
        found = []
        for job_id in self.ids():
            with contextlib.suppress(UnknownJob):
                found.append(self.job(job_id))
        return found

    def remove(self, job_id: str) -> None:
        """Delete a job: rename its folder first, so that it is no longer listed, then remove the files."""
        gone = self.root / f".gone-{job_id}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.root / job_id, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def tidy(self, kept: int) -> None:
        """Remove what nobody needs: all but the newest jobs that are over, and drafts of long ago."""
        over = [job_id for job_id, state in self.states().items() if state.is_over]
        for job_id in over[: max(0, len(over) - kept)]:
            self.remove(job_id)
        for path in self.root.glob(".*-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def lock(self) -> IO[bytes] | None:
        """Hold the lock until the file is closed, or the process ends; None if another server holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / ".lock").open("ab")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows, where servers that share a folder are not protected from each other
            return file
        except OSError as exc:
            file.close()
            if exc.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        return file


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file, durably; raises OSError if it cannot be written."""
    replace_file(path, json.dumps(value, indent=2).encode())
