"""Runs an evaluation on the serving engine without delaying live requests: `POST /evaluations`.

Rows wait in a queue of their own, so live tasks still get their turns. Only a few rows are in flight at a time, so an
evaluation uses up little of the limits beyond which requests are refused (`engine/admission_control.py`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial

from server.engine.worker import EngineWorker
from server.errors import Overloaded
from server.evaluation.evaluation import Evaluation
from server.evaluation.questions import Answer, RowRequest
from server.evaluation.report import Report
from server.evaluation.systems import System
from server.executors import Executor
from server.long_work import run_long, running
from server.train.rows import Row

ROWS_AT_ONCE = 32
LABELS_AT_ONCE = 64
SHARE = 4
"""An evaluation uses at most 1/SHARE of each in-flight limit (server, task, key)."""
AGAIN_SECONDS = 0.5
"""Seconds after which a row that was refused, because too many requests wait, is sent again."""


def rows_at_once(choices_per_row: int, *limits: int | None) -> int:
    """The number of rows to run at once, derived from the server's limits on requests in flight."""
    least = min((limit for limit in limits if limit is not None), default=None)
    return ROWS_AT_ONCE if least is None else max(1, min(ROWS_AT_ONCE, least // SHARE // choices_per_row))


def labels_at_once(*limits: int | None) -> int:
    """The number of labels that one request may score, derived from the server's limits on requests in flight."""
    least = min((limit for limit in limits if limit is not None), default=None)
    return LABELS_AT_ONCE if least is None else max(1, min(LABELS_AT_ONCE, least // SHARE))


async def run_beside(
    worker: EngineWorker,
    evaluation: Evaluation,
    threads: Executor,
    at_once: int,
    on_row: Callable[[], None],
    key_id: str | None = None,
) -> Report:
    """Run all systems, one after the other, and report; raises what `EngineWorker.generate` raises.

    Cancelling it frees everything that it uses in the engine.
    """
    answers, seconds = await ask_all_beside(worker, evaluation, threads, at_once, on_row, key_id)
    return await run_long(threads, lambda check_cancelled: evaluation.report(answers, seconds, check_cancelled))


async def ask_all_beside(
    worker: EngineWorker,
    evaluation: Evaluation,
    threads: Executor,
    at_once: int,
    on_row: Callable[[], None],
    key_id: str | None = None,
) -> tuple[dict[str, list[Answer]], dict[str, float]]:
    """Answers of all systems, in the order of the rows, and the seconds that each took; see `run_beside`."""

    async def answer(system: System, row: Row) -> Answer:
        requests = await threads.run(evaluation.questions.ask, system, row, key_id, is_background=True)
        for request in requests:
            await _finish(worker, request)
        on_row()
        return evaluation.questions.answer(*requests)

    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    for system in evaluation.systems:
        started = time.perf_counter()
        answers[system.name] = await _answer_all(evaluation.rows, partial(answer, system), at_once)
        seconds[system.name] = time.perf_counter() - started
    return answers, seconds


async def _answer_all(rows: Sequence[Row], answer: Callable[[Row], Awaitable[Answer]], at_once: int) -> list[Answer]:
    waiting = iter(enumerate(rows))
    answers: dict[int, Answer] = {}

    async def answer_in_turn() -> None:
        for index, row in waiting:
            answers[index] = await answer(row)

    # The first failure, or a cancellation of this coroutine, cancels the others.
    async with running(*(answer_in_turn() for _ in range(min(at_once, len(rows))))) as answering:
        await asyncio.gather(*answering)
    return [answers[index] for index in range(len(rows))]


async def _finish(worker: EngineWorker, asking: RowRequest) -> None:
    """Run one request to its end; while the server is overloaded, wait and send it again."""
    while True:
        try:
            async with aclosing(worker.generate(asking.request, asking.soft_prompt)) as deltas:
                async for delta in deltas:
                    asking.take(delta)
            return
        except Overloaded:  # nothing was started
            await asyncio.sleep(AGAIN_SECONDS)
