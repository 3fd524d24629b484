"""Evaluations under way and those that ended, in memory: one runs, the others wait their turn."""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from server.engine.worker import EngineWorker
from server.errors import Overloaded, PreludeError, RequestAborted, ServerDraining, UnknownEvaluation
from server.evaluation.beside import rows_at_once, run_beside
from server.evaluation.card import render_card
from server.evaluation.evaluation import Evaluation
from server.evaluation.report import About, Report
from server.executors import Executor
from server.settings import Settings
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

MOST_WAITING = 8
"""Evaluations that may wait; each holds its rows."""
MOST_KEPT = 100
"""Evaluations that have ended and can still be asked for; of an older one nothing is left."""


class State(StrEnum):
    """How far an evaluation has come."""

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
        about: what is evaluated.
        contestants: names of all who are asked.
        total: rows times contestants.
        work: the evaluation itself and the soft prompt that it is about; None once it has ended.
        done: rows that were answered.
        command: what measures the same from a shell, for the card.
    """

    about: About
    contestants: tuple[str, ...]
    total: int
    work: tuple[Evaluation, SoftPrompt] | None
    key_id: str | None
    command: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.WAITING
    done: int = 0
    created_at: str = field(default_factory=lambda: _now())
    started_at: str | None = None
    ended_at: str | None = None
    report: Report | None = None
    card: str | None = None
    error: PreludeError | None = None

    @classmethod
    def of(cls, evaluation: Evaluation, soft_prompt: SoftPrompt, key_id: str | None, command: str) -> EvaluationJob:
        """A job for an evaluation that was checked."""
        names = tuple(one.name for one in evaluation.contestants)
        return cls(evaluation.about, names, evaluation.num_questions, (evaluation, soft_prompt), key_id, command)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.ended_at is not None

    def end(self, state: State, error: PreludeError | None = None) -> None:
        """Nothing more comes of it, and its rows are let go."""
        self.state, self.error, self.ended_at, self.work = state, error, _now(), None


class Evaluations:
    """All of them. Only for the event loop's thread."""

    def __init__(self, worker: EngineWorker, settings: Settings, threads: Executor) -> None:
        """None yet."""
        self._worker = worker
        self._settings = settings
        self._threads = threads
        self._jobs: dict[str, EvaluationJob] = {}  # oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._is_stopping = False

    def check_room(self) -> None:
        """Refuse another one, before its body is read.

        Raises:
            ServerDraining: the server is shutting down.
            Overloaded: too many wait already.
        """
        if self._worker.draining or self._is_stopping:
            raise ServerDraining("The server is shutting down.")
        if len(self._tasks) > MOST_WAITING:
            raise Overloaded(
                f"{MOST_WAITING} evaluations wait already.", remedy="Come back when one has ended, or cancel one."
            )

    def add(self, job: EvaluationJob) -> None:
        """Let a job run when it is its turn.

        Raises:
            ServerDraining, Overloaded: as `check_room`.
        """
        self.check_room()
        self._jobs[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job))

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
        try:
            async with self._turn:
                await self._evaluate(job)
        except asyncio.CancelledError:
            if self._is_stopping:
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

    async def _evaluate(self, job: EvaluationJob) -> None:
        assert job.work is not None, "a job runs once"
        evaluation, soft_prompt = job.work
        job.state, job.started_at = State.RUNNING, _now()

        def count() -> None:
            job.done += 1

        settings = self._settings
        in_flight = settings.max_sequences + settings.max_queue
        at_once = rows_at_once(
            evaluation.questions.choices_per_row - 1, in_flight, settings.max_per_task, settings.max_per_key
        )
        job.report = await run_beside(self._worker, evaluation, self._threads, at_once, count, job.key_id)
        job.card = render_card(job.report, soft_prompt, job.command)
        self._end(job, State.DONE)

    def _end(self, job: EvaluationJob, state: State, error: PreludeError | None = None) -> None:
        job.end(state, error)
        self._tasks.pop(job.id, None)
        ended = [other for other in self._jobs.values() if other.has_ended]
        for old in ended[: max(0, len(ended) - MOST_KEPT)]:
            del self._jobs[old.id]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
