"""Runs an evaluation on an engine of its own: `prelude eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from server.engine.engine import Engine
from server.errors import GenerationFailed
from server.evaluation.evaluation import Evaluation
from server.evaluation.questions import Answer, RowRequest
from server.evaluation.report import Report
from server.evaluation.systems import System
from server.train.rows import Row

ROWS_AT_ONCE = 256
"""Number of rows in the engine at a time: more than can run at once, so that the engine always has work."""

OnRow = Callable[[str], object]
"""Called with the system's name whenever it has answered a row."""


class OwnEngine:
    """Adapts an `Engine` to the `Host` protocol."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model, self.text = engine.model.spec, engine.model.text
        self.embeddings_of, self.check = engine.model.embeddings_of, engine.check


def run(engine: Engine, evaluation: Evaluation, on_row: OnRow = lambda name: None) -> Report:
    """Run all systems, one after the other, and report; GenerationFailed names file and line."""
    return evaluation.report(*ask_all(engine, evaluation, on_row))


def ask_all(
    engine: Engine, evaluation: Evaluation, on_row: OnRow = lambda name: None
) -> tuple[dict[str, list[Answer]], dict[str, float]]:
    """Answers of all systems, in the order of the rows, and the seconds that each took; see `run`."""
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    for system in evaluation.systems:
        started = time.perf_counter()
        answered = dict(_answers(engine, evaluation, system, on_row))
        answers[system.name] = [answered[row.line] for row in evaluation.rows]
        seconds[system.name] = time.perf_counter() - started
    return answers, seconds


def _answers(engine: Engine, evaluation: Evaluation, system: System, on_row: OnRow) -> Iterator[tuple[int, Answer]]:
    """Yield line and answer of each row, in the order of their ends."""
    waiting = iter(evaluation.rows)
    running: dict[str, RowRequest] = {}  # by request id
    pairs: dict[int, tuple[RowRequest, ...]] = {}  # by line

    def submit(row: Row) -> None:
        pairs[row.line] = evaluation.questions.ask(system, row)
        for asking in pairs[row.line]:
            running[asking.request.request_id] = asking
            engine.add(asking.request, asking.soft_prompt)

    while True:
        while len(pairs) < ROWS_AT_ONCE and (row := next(waiting, None)) is not None:
            submit(row)
        if not engine.has_work:
            return
        for delta in engine.step():
            asking = running[delta.request_id]
            try:
                if not asking.take(delta):
                    continue
            except GenerationFailed as exc:
                raise GenerationFailed(f"{evaluation.questions.data.name}: {exc.message}") from exc
            del running[delta.request_id]
            line = asking.row.line
            if not any(one.request.request_id in running for one in pairs[line]):
                yield line, evaluation.questions.answer(*pairs.pop(line))
                on_row(system.name)
