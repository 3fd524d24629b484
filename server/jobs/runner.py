"""Runs jobs, one at a time in the order of their making, from `start` to `stop` on a thread.

What it knows is in the folders (`folder.py`): a server that starts finds the jobs of the one before, and one whose
process was killed goes on from its checkpoint. Of servers that share a folder the one that holds its lock runs jobs.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import IO

from server.errors import PreludeError, UnknownJob
from server.jobs.board import JobBoard
from server.jobs.check import as_told
from server.jobs.child import end_child, end_left_behind, identify, start_child
from server.jobs.folder import JobFolder
from server.jobs.job import Failure, Job, JobState, now
from server.jobs.process import REFUSED
from server.jobs.publish import publish_result
from server.jobs.record import count_steps
from server.registry.registry import Registry
from server.settings import Settings

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often to look for jobs that other servers have added or cancelled, and whether a process has ended."""
STOP_SECONDS = 5.0
BUG_SECONDS = 30.0
MOST_DEATHS = 3
"""How often in a row a process may be killed without coming further than the one before."""
KEPT = 100
"""Jobs that are over, of which the newest are kept."""
PUBLISH_WAITS = (1.0, 5.0, 30.0)
"""Seconds between attempts to publish while the store refuses: a result may be hours of work."""


Start = Callable[[JobFolder, Settings], subprocess.Popen[bytes]]


class JobRunner:
    """Looks after the jobs of a board."""

    def __init__(self, settings: Settings, registry: Registry, board: JobBoard, start: Start = start_child) -> None:
        """Nothing runs yet.

        Args:
            settings: of the server, and so of the frozen model.
            registry: where results are published.
            board: the jobs.
            start: starts a job's process.
        """
        self._start_child = start
        self._settings = settings
        self._registry = registry
        self._files, self._changed = board.files, board.changed
        self._over: set[str] = set()  # jobs that need not be looked at again
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None
        self._lock: IO[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Run jobs from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Run no more. The process of a job is ended, and goes on from its checkpoint when a server starts again."""
        self._stop.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._lock is not None or self._adopt():
                    self._turn()
            except Exception:
                log.exception("training jobs cannot be looked after")
                self._stop.wait(BUG_SECONDS)
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
        self._interrupt()
        if self._lock is not None:
            self._lock.close()

    def _adopt(self) -> bool:
        """Take over the folder, once it is there and no other server has it; what ran in it is queued again."""
        if not self._files.root.is_dir():  # nobody has ever asked for a job
            return False
        self._lock = self._files.lock()
        if self._lock is None:
            return False
        self._files.tidy(KEPT)
        for job in self._files.jobs():
            if job.status.state == JobState.RUNNING:
                end_left_behind(job.status)
                self._files.folder(job.id).write_status(replace(job.status, state=JobState.QUEUED, pid=None))
                log.info("training job %s goes on where it was", job.id)
        return True

    def _turn(self) -> None:
        """End what is to end, then run the oldest one that waits."""
        if self._running is not None:
            self._look_at(*self._running)
        for job_id in self._files.ids():
            if job_id in self._over or (self._running is not None and self._running[0] == job_id):
                continue
            try:
                job = self._files.job(job_id)
            except UnknownJob:  # deleted a moment ago, or broken, which is logged
                self._over.add(job_id)
                continue
            if job.status.state.is_over:
                self._over.add(job_id)
            elif job.is_cancelling:
                self._end(job, JobState.CANCELLED)
            elif self._running is None and not self._stop.is_set():
                self._begin(job)

    def _begin(self, job: Job) -> None:
        folder, status = self._files.folder(job.id), job.status
        restarts = status.restarts + (status.started_at is not None)
        status = replace(status, state=JobState.RUNNING, started_at=status.started_at or now(), restarts=restarts)
        folder.write_status(status)
        if folder.has_result:  # the server was killed before it could publish
            self._publish(replace(job, status=status))
            return
        try:
            child = self._start_child(folder, self._settings)
        except OSError as exc:
            self._end(job, JobState.FAILED, error=_broken(f"Its process cannot be started: {exc}."))
            return
        self._running = job.id, child
        folder.write_status(replace(status, pid=child.pid, created=identify(child)))

    def _look_at(self, job_id: str, child: subprocess.Popen[bytes]) -> None:
        """See whether the process has ended, or is to end."""
        job, folder = self._files.job(job_id), self._files.folder(job_id)
        code = child.poll()
        if code is None and not job.is_cancelling:
            return
        if code is None:
            end_child(child)
        self._running = None
        if code == 0:
            self._publish(job)
        elif job.is_cancelling:
            self._end(job, JobState.CANCELLED)
        elif code == REFUSED and folder.failure.exists():
            self._end(job, JobState.FAILED, error=Failure(**json.loads(folder.failure.read_bytes())))
        elif code is not None and code < 0:
            self._was_killed(job, folder, -code)
        else:
            self._end(job, JobState.FAILED, error=_broken(f"Its process ended with {code}."))

    def _was_killed(self, job: Job, folder: JobFolder, signal: int) -> None:
        """Queue it again, at its old place, unless it never comes any further."""
        recorded = count_steps(folder.record)
        deaths = 1 if recorded > job.status.recorded else job.status.deaths + 1
        log.warning("the process of training job %s was killed by signal %d", job.id, signal)
        if deaths > MOST_DEATHS:
            error = f"Its process was killed {deaths} times by signal {signal} without coming further."
            self._end(job, JobState.FAILED, error=_broken(error))
            return
        status = replace(job.status, state=JobState.QUEUED, pid=None, recorded=recorded, deaths=deaths)
        folder.write_status(status)
        self._changed.set()

    def _publish(self, job: Job) -> None:
        """Publish what was learned; a store that refuses is asked again a few times."""
        folder = self._files.folder(job.id)
        for wait in (*PUBLISH_WAITS, None):
            try:
                outcome = publish_result(self._registry, folder, job)
            except PreludeError as exc:
                if exc.status >= 500 and wait is not None:
                    log.warning("the result of training job %s cannot be published yet: %s", job.id, exc)
                    if self._stop.wait(wait):
                        return  # the next server does it
                    continue
                self._end(job, JobState.FAILED, error=Failure(**as_told(exc, folder, job.names)))
                return
            except Exception as exc:
                log.exception("the result of training job %s cannot be published", job.id)
                self._end(job, JobState.FAILED, error=_broken(f"Its result cannot be published: {exc!r}."))
                return
            log.info("training job %s: %s@%d, live: %s", job.id, job.spec.task, outcome.version, outcome.live)
            ended = replace(job.status, version=outcome.version, live=outcome.live, metrics=outcome.metrics)
            self._end(replace(job, status=ended), JobState.SUCCEEDED)
            return

    def _end(self, job: Job, state: JobState, *, error: Failure | None = None) -> None:
        if error is not None:
            log.warning("training job %s failed: %s", job.id, error.error)
        folder = self._files.folder(job.id)
        folder.write_status(replace(job.status, state=state, ended_at=now(), pid=None, error=error))
        for file in (folder.data, folder.validation):  # nobody needs them any more, and they may be large, or private
            file.unlink(missing_ok=True)
        shutil.rmtree(folder.checkpoint, ignore_errors=True)
        self._over.add(job.id)
        self._files.tidy(KEPT)
        self._changed.set()

    def _interrupt(self) -> None:
        """End the process, and let its job wait for the next server."""
        if self._running is None:
            return
        job_id, child = self._running
        end_child(child)
        job = self._files.job(job_id)
        self._files.folder(job_id).write_status(replace(job.status, state=JobState.QUEUED, pid=None))


def _broken(message: str) -> Failure:
    return Failure(
        message,
        PreludeError.code,
        "Its log (`prelude jobs log`, GET /training/jobs/{job}/log) tells more.",
    )
