"""Interpretation and generation share a frozen model, in several threads, and change nothing of each other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from server.contracts import GenerationRequest
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.evaluation.beside_traffic import ask_all_beside
from server.executors import Executors
from server.interpret.causal import SUFFICIENCY, conclude, plan
from server.interpret.results import CausalInterpretation
from server.interpret.static import Interpreter
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.evaluation.support import data_of
from tests.interpret.support import begun_at, token_states, untrained
from tests.support import make_engine, random_kv_prompt, request, weights_hash
from tests.train.rows import MOODS

START = (40, 41, 42)
DATA = replace(data_of(MOODS), labels=None)


async def test_interpretation_beside_generation_gives_what_each_gives_alone(tiny32: FrozenModel) -> None:
    before = weights_hash(tiny32.module)
    moved = untrained(tiny32, START, 0)
    change = 0.1 * random_kv_prompt(tiny32.spec, 3).tensor
    prefix = SoftPrompt("PREFIX_TUNING", token_states(tiny32, START) + change, begun_at(START, ("no", "yes")))
    prompts, executors = {"moved": moved, "prefix": prefix}, Executors()

    async def generate(worker: EngineWorker, asked: GenerationRequest) -> list[int]:
        answer = worker.generate(asked, prompts[asked.task or ""])
        return [delta.token.id async for delta in answer if delta.token is not None]

    async def generations(worker: EngineWorker) -> list[list[int]]:
        asked = [
            request(str(i), range(1 + i, 5 + 2 * i), list(prompts)[i % 2], max_new_tokens=24, ignore_eos=True)
            for i in range(12)
        ]
        return list(await asyncio.gather(*(generate(worker, one) for one in asked)))

    async def static() -> list[dict[str, Any]]:
        """In a thread of its own, as in the server; nulls are drawn again each time."""
        found = [await executors.interpretation.run(Interpreter(tiny32).interpret, *one) for one in prompts.items()]
        return [one.model_dump() for one in found]

    async def causal(worker: EngineWorker) -> CausalInterpretation:
        interpreter, subject = Interpreter(tiny32), ("moved", moved)
        planning = executors.interpretation.run(plan, interpreter, worker, DATA, subject, measures=(SUFFICIENCY,))
        experiments = await planning
        pool = executors.in_server
        answers, _ = await ask_all_beside(worker, experiments.evaluation, pool, 4, lambda: None)
        return conclude(experiments, answers)

    worker = EngineWorker(make_engine(tiny32))
    worker.start()
    alone = await static(), await causal(worker), await generations(worker)
    beside = await asyncio.gather(static(), causal(worker), generations(worker))
    await worker.stop()
    assert beside[0] == alone[0]
    assert beside[2] == alone[2]
    assert figures(beside[1]) == pytest.approx(figures(alone[1]), abs=1e-4)
    assert weights_hash(tiny32.module) == before


def figures(found: CausalInterpretation) -> dict[str, float]:
    assert found.sufficiency is not None
    steps = {step.name: step.quality.value for step in found.sufficiency.steps}
    return {**steps, "learned": found.sufficiency.learned.value, "none": found.sufficiency.none.value}
