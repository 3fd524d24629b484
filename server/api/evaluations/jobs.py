"""Evaluations under way and those that ended, in memory: one runs, the others wait their turn."""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from server.api.evaluations.preparation import Preparation
from server.engine.worker import EngineWorker
from server.errors import Forbidden, Overloaded, PreludeError, RequestAborted, ServerDraining, UnknownEvaluation
from server.evaluation.card import render_card
from server.evaluation.evaluation import Evaluation
from server.evaluation.in_server import rows_at_once, run_beside
from server.evaluation.report import Report
from server.executors import Executor
from server.keys.key import Scope
from server.keys.live import ApiKeys
from server.long_work import Lane
from server.settings import Settings

log = logging.getLogger(__name__)

MOST_WAITING = 8
"""Evaluations that may wait; each holds its rows."""
LOOK_SECONDS = 0.25
"""How often an evaluation looks whether the server shuts down."""
MOST_KEPT = 100
"""Evaluations that have ended and can still be asked for; of an older one nothing is left."""


class State(StrEnum):
    """How far an evaluation has come."""

    PREPARING = "preparing"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"


@dataclass
class EvaluationJob:
    """One evaluation, from its acceptance until it is forgotten.

    Attributes:
        preparation: what it is made of; None once it has ended.
        command: what measures the same from a shell, for the card.
        evaluation: what it is once it is prepared; None again once it has ended.
        rows: how many there are; 0 until they are read.
        total: rows times contestants.
        done: rows that were answered.
        prepared: done as soon as it is prepared, or refused.
    """

    preparation: Preparation | None
    key_id: str | None
    command: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.WAITING
    evaluation: Evaluation | None = None
    rows: int = 0
    total: int = 0
    done: int = 0
    prepared: asyncio.Event = field(default_factory=asyncio.Event)
    created_at: str = field(default_factory=lambda: _now())
    started_at: str | None = None
    ended_at: str | None = None
    report: Report | None = None
    card: str | None = None
    error: PreludeError | None = None

    def __post_init__(self) -> None:
        """Keep what is shown of it also after its end."""
        assert self.preparation is not None, "a job begins with it"
        resolved, _ = self.preparation.versions[0]
        self.task, self.version = resolved.task, resolved.version
        self.data = self.preparation.sources.files["data"].name
        self.contestants = self.preparation.contestants

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.ended_at is not None

    def end(self, state: State, error: PreludeError | None = None) -> None:
        """Nothing more comes of it, and its rows and files are let go."""
        self.state, self.error, self.ended_at = state, error, _now()
        if self.preparation is not None:
            self.preparation.sources.discard()
        self.preparation = self.evaluation = None


def limits_of(settings: Settings) -> tuple[int | None, ...]:
    """What may be in flight: in all, of a task and of a key; an evaluation takes a share of the least."""
    return settings.max_sequences + settings.max_queue, settings.max_per_task, settings.max_per_key


class Evaluations:
    """All of them. Only for the event loop's thread."""

    def __init__(
        self, worker: EngineWorker, settings: Settings, threads: Executor, keys: ApiKeys | None = None
    ) -> None:
        """None yet.

        Args:
            worker: the engine.
            settings: what may be in flight.
            threads: for what would hold up the event loop.
            keys: an evaluation ends with the key that asked for it; None where no keys are asked for.
        """
        self._keys = keys
        self._worker = worker
        self._settings = settings
        self._threads = threads
        self._jobs: dict[str, EvaluationJob] = {}  # oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._arriving = 0
        self._preparing = Lane(threads, "evaluations", MOST_KEPT)  # how many wait is counted here
        self._turn = asyncio.Lock()
        self._is_stopping = False

    def check_room(self) -> None:
        """Refuse another one. Those count that wait, are being prepared, or whose bodies are being read.

        Raises:
            ServerDraining: the server is shutting down.
            Overloaded: too many wait already.
        """
        if self._worker.draining or self._is_stopping:
            raise ServerDraining("The server is shutting down.")
        if len(self._tasks) + self._arriving > MOST_WAITING:
            raise Overloaded(
                f"{MOST_WAITING} evaluations wait already.", remedy="Come back when one has ended, or cancel one."
            )

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Count one more while its body is read.

        Raises:
            ServerDraining, Overloaded: as `check_room`.
        """
        self.check_room()
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def add(self, job: EvaluationJob) -> None:
        """Let a job that was counted as arriving be prepared, and run when it is its turn."""
        self._jobs[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job))

    def forget(self, job: EvaluationJob) -> None:
        """Leave nothing of a job that has ended."""
        assert job.has_ended, "it would run on unseen"
        self._jobs.pop(job.id, None)

    def get(self, job_id: str) -> EvaluationJob:
        """One of them.

        Raises:
            UnknownEvaluation: there is none of this id, or it was forgotten.
        """
        if job_id not in self._jobs:
            raise UnknownEvaluation("There is no evaluation of that id.")
        return self._jobs[job_id]

    def all(self) -> list[EvaluationJob]:
        """All of them, newest first."""
        return list(reversed(self._jobs.values()))

    async def cancel(self, job: EvaluationJob) -> None:
        """End a job, and wait until all that it holds of the engine is free; forget one that has ended."""
        task = self._tasks.get(job.id)
        if task is None:
            self._jobs.pop(job.id, None)
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not job.has_ended:  # it had not begun, so it could not end itself
            self._end(job, State.CANCELLED)

    async def stop(self) -> None:
        """Abort what is left; for the server's end."""
        self._is_stopping = True
        for job in [job for job in self._jobs.values() if not job.has_ended]:
            await self.cancel(job)

    async def _run(self, job: EvaluationJob) -> None:
        running = asyncio.current_task()
        assert running is not None, "it is a task"
        draining = asyncio.get_running_loop().create_task(self._cancel_once_draining(running))
        try:
            await self._prepare(job)
            async with self._turn:
                await self._evaluate(job)
        except asyncio.CancelledError:
            if self._is_stopping or self._worker.draining:
                self._end(job, State.ABORTED, ServerDraining("The server was shut down before the evaluation's end."))
            else:
                self._end(job, State.CANCELLED)
        except (ServerDraining, RequestAborted) as exc:
            self._end(job, State.ABORTED, exc)
        except PreludeError as exc:
            self._end(job, State.FAILED, exc)
        except Exception:
            log.exception("an evaluation failed")
            self._end(job, State.FAILED, PreludeError("The server failed on this evaluation."))
        finally:
            draining.cancel()

    async def _cancel_once_draining(self, running: asyncio.Task[None]) -> None:
        """A server that ends waits for its clients' requests, not for an evaluation's."""
        while True:
            if self._worker.draining:
                running.cancel()
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _prepare(self, job: EvaluationJob) -> None:
        assert job.preparation is not None, "a job is prepared once"
        preparation = job.preparation

        def prepare(go_on: Callable[[], None]) -> Evaluation:
            job.state = State.PREPARING
            return preparation.run(self._worker, go_on)

        job.evaluation = await self._preparing.run(prepare)
        preparation.sources.discard()
        job.rows, job.total, job.state = len(job.evaluation.rows), job.evaluation.num_questions, State.WAITING
        job.prepared.set()

    async def _evaluate(self, job: EvaluationJob) -> None:
        assert job.evaluation is not None, "a job is prepared before it runs"
        assert job.preparation is not None, "a job runs once"
        evaluation, (_, soft_prompt) = job.evaluation, job.preparation.versions[0]
        self._check_key(job)
        job.state, job.started_at = State.RUNNING, _now()

        def count() -> None:
            job.done += 1
            self._check_key(job)

        at_once = rows_at_once(evaluation.questions.choices_per_row - 1, *limits_of(self._settings))
        job.report = await run_beside(self._worker, evaluation, self._threads, at_once, count, job.key_id)
        job.card = render_card(job.report, soft_prompt, job.command)
        self._end(job, State.DONE)

    def _check_key(self, job: EvaluationJob) -> None:
        """Refuse to go on for a key that may not ask for this any more."""
        if self._keys is None or job.key_id is None:
            return
        if (why := self._keys.why_not(job.key_id, [Scope.PUBLISH], [job.task])) is not None:
            raise Forbidden(f"{why} It asked for this evaluation, so it has ended.")

    def _end(self, job: EvaluationJob, state: State, error: PreludeError | None = None) -> None:
        job.end(state, error)
        job.prepared.set()
        self._tasks.pop(job.id, None)
        ended = [other for other in self._jobs.values() if other.has_ended]
        for old in ended[: max(0, len(ended) - MOST_KEPT)]:
            del self._jobs[old.id]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
