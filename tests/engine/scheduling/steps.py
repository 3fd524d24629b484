"""Engines, step by step."""

from __future__ import annotations

from server.contracts import Delta
from server.engine.engine import Engine


def tokens_per_step(engine: Engine) -> list[int]:
    """Tokens that each step computed, until the engine is idle."""
    counts = []
    while engine.has_work:
        batch = engine.scheduler.schedule()
        counts.append(sum(span.count for _, span in batch))
        engine._commit(batch, engine.run(batch))
    return counts


def run(engine: Engine) -> list[Delta]:
    """Everything that an engine answers until it is idle."""
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    return deltas
