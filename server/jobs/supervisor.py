"""Runs jobs, one at a time in the order of creation, from `start` to `stop` on a thread.

All its state is in the job folders (`folder.py`). A new server therefore finds the jobs of the previous one, and a job
whose process was killed resumes from its checkpoint. If several servers share a folder, only the one that holds the
lock runs jobs.

A broken job does not stop the others: if a job's folder cannot be read or written, this server treats the job as ended.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from server.background_service import Service
from server.errors import Forbidden, PreludeError, UnknownJob
from server.jobs.check import as_failure
from server.jobs.failures import broken, failure_of
from server.jobs.folder import JobFolder
from server.jobs.job import Failure, Job, JobState, Status, now
from server.jobs.job_queue import JobQueue
from server.jobs.launcher import Child, end_child, end_left_behind, identify, start_child
from server.jobs.progress_log import count_steps
from server.jobs.publish import Withdrawn, publish_result
from server.keys.key import Scope
from server.registry.registry import Registry
from server.settings import Settings

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often to look for jobs that other servers have added or cancelled, and whether a process has ended."""
STOP_SECONDS = 5.0
BUG_SECONDS = 30.0
MOST_DEATHS = 3
"""A job fails once its process has been killed more than this many times in a row without progress."""
KEPT = 100
"""Number of ended jobs that are kept, the newest ones."""
PUBLISH_WAITS = (1.0, 5.0, 30.0)
"""Seconds between attempts to publish while the store refuses: a result may be hours of work."""


Start = Callable[[JobFolder, Settings], Child]


class _Running(NamedTuple):
    job: Job
    """As it was when its folder was last read."""
    child: Child


class JobRunner(Service):
    """Runs the jobs of a `JobQueue`."""

    def __init__(self, settings: Settings, registry: Registry, job_queue: JobQueue, start: Start = start_child) -> None:
        """Nothing runs yet. `registry` gets the results; `job_queue.keys` decides whether a key may still run a job."""
        super().__init__("jobs", STOP_SECONDS)
        self._start_child = start
        self._settings = settings
        self._registry = registry
        self._job_queue = job_queue
        self._files, self._changed = job_queue.files, job_queue.changed
        self._running: _Running | None = None
        self._unwritten: dict[str, Status] = {}
        """Final statuses that could not be written to the job's folder; the write is retried at each turn."""
        self._left_alone: dict[str, float] = {}
        """Jobs that raised an error, with the time until which they are skipped."""
        self._lock: IO[bytes] | None = None

    def stop(self) -> None:
        """Stop running jobs. The process of a job is ended; the next server resumes it from its checkpoint."""
        self._stop.set()
        self._changed.set()
        super().stop()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._holds_lock() or self._adopt():
                    self._turn()
            except Exception:
                log.exception("training jobs cannot be managed")
                self._stop.wait(BUG_SECONDS)
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
        self._interrupt()
        if self._lock is not None:
            self._lock.close()

    def _holds_lock(self) -> bool:
        """Whether this server runs the jobs of the folder; not if somebody has removed the folder under it."""
        if self._lock is None:
            return False
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock.fileno()), Path(self._lock.name).stat()):
                return True
        if self._running is not None:  # its folder may be gone as well
            self._look_at(self._running)
        self._interrupt()
        self._lock.close()
        self._lock = None
        return False

    def _adopt(self) -> bool:
        """Lock the folder, once it exists and no other server has locked it; queue jobs that were running again."""
        if not self._files.root.is_dir():  # nobody has ever asked for a job
            return False
        self._lock = self._files.lock()
        if self._lock is None:
            return False
        self._files.tidy(KEPT)
        for job_id, state in self._files.states().items():
            if state == JobState.RUNNING:
                with self._apart(job_id):
                    job = self._files.job(job_id)
                    end_left_behind(job.status)
                    self._files.folder(job_id).write_status(replace(job.status, state=JobState.QUEUED, pid=None))
                    log.info("training job %s resumes from its checkpoint", job_id)
        return True

    def _turn(self) -> None:
        """End jobs that must end, then start the oldest waiting job."""
        self._write_down()
        if self._running is not None:
            self._look_at(self._running)
        for job_id, state in self._files.states().items():
            if self._stop.is_set():
                return
            if not state.is_over and self._is_to_be_looked_at(job_id):
                with self._apart(job_id):
                    self._take(self._files.job(job_id))

    def _is_to_be_looked_at(self, job_id: str) -> bool:
        if job_id in self._unwritten or self._left_alone.get(job_id, 0.0) > time.monotonic():
            return False
        if self._running is None:
            return True
        return job_id != self._running.job.id and (self._files.root / job_id / "cancel").exists()

    @contextlib.contextmanager
    def _apart(self, job_id: str) -> Iterator[None]:
        """Contain errors of one job: log them, and skip the job for a while."""
        try:
            yield
        except UnknownJob:  # deleted a moment ago, or broken, which is logged
            self._left_alone[job_id] = time.monotonic() + BUG_SECONDS
        except Exception as exc:
            if not isinstance(exc, OSError):
                log.exception("training job %s cannot be managed", job_id)
            else:
                log.warning("training job %s has to wait, its folder cannot be written: %s", job_id, exc)
            self._left_alone[job_id] = time.monotonic() + BUG_SECONDS

    def _take(self, job: Job) -> None:
        """Start a waiting job, or end it if it was cancelled or may not run."""
        if job.is_cancelling:
            self._end(job, JobState.CANCELLED)
        elif (refused := self._refused(job)) is not None:
            self._end(job, JobState.FAILED, error=refused)
        elif self._running is None:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        folder, status = self._files.folder(job.id), job.status
        restarts = status.restarts + (status.started_at is not None)
        status = replace(status, state=JobState.RUNNING, started_at=status.started_at or now(), restarts=restarts)
        folder.write_status(status)
        job = replace(job, status=status)
        if folder.has_result:  # the server was killed before it could publish
            self._publish(job)
            return
        try:
            child = self._start_child(folder, self._settings)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            self._end(job, JobState.FAILED, error=broken(f"Its process cannot be started: {exc}."))
            return
        job = replace(job, status=replace(status, pid=child.pid, created=identify(child)))
        self._running = _Running(job, child)
        folder.write_status(job.status)

    def _look_at(self, running: _Running) -> None:
        """Check whether the process has ended or must end; an error here does not keep the next job from running."""
        try:
            self._follow(running)
        except Exception as exc:
            if not isinstance(exc, UnknownJob):
                log.exception("training job %s cannot be managed", running.job.id)
            why = (
                "Its folder is gone or cannot be read" if isinstance(exc, UnknownJob) else f"The server failed: {exc!r}"
            )
            end_child(running.child)
            self._running = None
            self._end(running.job, JobState.FAILED, error=broken(f"{why}, so its process was ended."))

    def _follow(self, running: _Running) -> None:
        job = self._files.job(running.job.id)
        self._running = running._replace(job=job)
        code, refused = running.child.poll(), self._refused(job)
        if code is None and not job.is_cancelling and refused is None:
            return
        if code is None:
            end_child(running.child)
        self._running = None
        if job.is_cancelling:
            self._end(job, JobState.CANCELLED)
        elif refused is not None:
            self._end(job, JobState.FAILED, error=refused)
        elif code == 0:
            self._publish(job)
        elif code is not None and code < 0:
            self._was_killed(job, self._files.folder(job.id), -code)
        else:
            self._end(job, JobState.FAILED, error=failure_of(self._files.folder(job.id), code))

    def _refused(self, job: Job) -> Failure | None:
        """Why a job must stop, or None.

        A job has the permissions of the API key that created it, so it must stop when the key loses them.
        """
        error = self._forbidden(job)
        return None if error is None else Failure(error.message, error.code, error.remedy)

    def _forbidden(self, job: Job) -> Forbidden | None:
        keys = self._job_queue.keys
        why = None if keys is None or job.by is None else keys.why_not(job.by, [Scope.PUBLISH], [job.spec.task])
        if why is None:
            return None
        remedy = "Send the job again with a key that may publish this task."
        return Forbidden(f"{why} The job used this key, so nothing is published.", remedy=remedy)

    def _was_killed(self, job: Job, folder: JobFolder, signal: int) -> None:
        """Queue the job again at its old place, unless it makes no progress."""
        recorded = count_steps(folder.record)
        deaths = 1 if recorded > job.status.recorded else job.status.deaths + 1
        log.warning("the process of training job %s was killed by signal %d", job.id, signal)
        if deaths > MOST_DEATHS:
            error = f"Its process was killed {deaths} times by signal {signal} without coming further."
            self._end(job, JobState.FAILED, error=broken(error))
            return
        status = replace(job.status, state=JobState.QUEUED, pid=None, recorded=recorded, deaths=deaths)
        folder.write_status(status)
        self._changed.set()

    def _publish(self, job: Job) -> None:
        """Publish the result; retry a few times if the store fails."""
        folder = self._files.folder(job.id)

        def check() -> None:
            if (error := self._forbidden(job)) is not None:
                raise error

        for wait in (*PUBLISH_WAITS, None):
            try:
                outcome = publish_result(self._registry, folder, job, check)
            except Withdrawn:
                self._end(job, JobState.CANCELLED)
                return
            except PreludeError as exc:
                if exc.status >= 500 and wait is not None:
                    log.warning("the result of training job %s cannot be published yet: %s", job.id, exc)
                    if self._stop.wait(wait):
                        return  # the server is stopping; the next one publishes the result
                    continue
                self._end(job, JobState.FAILED, error=as_failure(exc, folder, job.names))
                return
            except Exception as exc:
                log.exception("the result of training job %s cannot be published", job.id)
                self._end(job, JobState.FAILED, error=broken(f"Its result cannot be published: {exc!r}."))
                return
            log.info("training job %s: %s@%d, live: %s", job.id, job.spec.task, outcome.version, outcome.live)
            ended = replace(job.status, version=outcome.version, live=outcome.live, metrics=outcome.metrics)
            self._end(replace(job, status=ended), JobState.SUCCEEDED)
            return

    def _end(self, job: Job, state: JobState, *, error: Failure | None = None) -> None:
        """Record that a job has ended.

        Its data files are deleted first, so that the status can be written even on a full disk.
        """
        if error is not None:
            log.warning("training job %s failed: %s", job.id, error.error)
        folder = JobFolder(self._files.root / job.id)
        for file in (folder.data, folder.validation):  # nobody needs them any more, and they may be large, or private
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        shutil.rmtree(folder.checkpoint, ignore_errors=True)
        self._unwritten[job.id] = replace(job.status, state=state, ended_at=now(), pid=None, error=error)
        self._write_down()
        self._files.tidy(KEPT)
        self._changed.set()

    def _write_down(self) -> None:
        """Write the final statuses that could not be written before.

        If a job's folder no longer exists, discard its status.
        """
        for job_id, status in list(self._unwritten.items()):
            folder = JobFolder(self._files.root / job_id)
            try:
                folder.write_status(status)
                folder.publishing.unlink(missing_ok=True)
            except OSError as exc:
                if folder.path.is_dir():
                    if self._left_alone.get(job_id, 0.0) < time.monotonic():
                        log.warning("the end of training job %s cannot be recorded yet: %s", job_id, exc)
                        self._left_alone[job_id] = time.monotonic() + BUG_SECONDS
                    continue
            self._unwritten.pop(job_id)
            self._left_alone.pop(job_id, None)

    def _interrupt(self) -> None:
        """End the process, and let its job wait for the next server."""
        self._write_down()
        if self._running is None:
            return
        job, child = self._running
        self._running = None
        end_child(child)
        with self._apart(job.id):
            self._files.folder(job.id).write_status(replace(job.status, state=JobState.QUEUED, pid=None))
