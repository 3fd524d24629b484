"""Invariant 5 across threads: every accepted request ends exactly once, whatever happens to it or to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from server.core import Delta
from server.engine.attention import Layout
from server.engine.model import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import GenerationFailed, InputTooLong, RequestAborted, ServerDraining
from tests.support import RecordingModel, make_engine, request


class FailingModel(RecordingModel):
    """A frozen model whose forward fails once, as a device that runs out of memory does."""

    def __init__(self, model: FrozenModel, fail_at: int) -> None:
        super().__init__(model)
        self.calls, self.fail_at = 0, fail_at

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("no memory left")
        return super().forward(inputs_embeds, position_ids, layout, keep)


@pytest.fixture
async def worker(tiny: FrozenModel) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    yield worker
    await worker.stop()


async def collect(worker: EngineWorker, request_id: str, new_tokens: int = 5) -> list[Delta]:
    asked = request(request_id, [1, 2, 3], max_new_tokens=new_tokens, ignore_eos=True)
    return [delta async for delta in worker.generate(asked, None)]


async def until_idle(worker: EngineWorker) -> None:
    for _ in range(500):
        if not worker._engine.has_work and not worker.num_in_flight:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine does not become idle")


async def test_requests_from_many_coroutines_all_end_once(worker: EngineWorker) -> None:
    answers = await asyncio.gather(*(collect(worker, str(i)) for i in range(50)))
    assert all([delta.finish_reason is not None for delta in answer].count(True) == 1 for answer in answers)
    assert all(len(answer) == 5 for answer in answers)
    assert worker.num_in_flight == 0


async def test_closing_a_stream_early_frees_the_sequence(worker: EngineWorker) -> None:
    deltas = worker.generate(request("r", [1], max_new_tokens=100, ignore_eos=True), None)
    await anext(deltas)
    await deltas.aclose()
    await until_idle(worker)
    assert not worker._engine.kv_cache.allocator.used


async def test_cancelling_whoever_waits_frees_the_sequence(worker: EngineWorker) -> None:
    tasks = [asyncio.create_task(collect(worker, str(i), new_tokens=100)) for i in range(20)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until_idle(worker)
    assert not worker._engine.kv_cache.allocator.used
    assert len(await collect(worker, "next")) == 5


async def test_what_can_never_fit_is_refused_before_it_is_accepted(worker: EngineWorker) -> None:
    with pytest.raises(InputTooLong, match=r"1003 positions.*context holds 128"):
        await collect(worker, "r", new_tokens=1000)
    assert worker.num_in_flight == 0


async def test_a_failed_step_ends_everybody_with_an_error_and_the_engine_goes_on(tiny: FrozenModel) -> None:
    worker = EngineWorker(make_engine(FailingModel(tiny, fail_at=3)))
    worker.start()
    results = await asyncio.gather(*(collect(worker, str(i)) for i in range(12)), return_exceptions=True)
    assert all(isinstance(result, GenerationFailed) for result in results), results
    assert len(await collect(worker, "after")) == 5
    assert worker.responsive
    await worker.stop()


async def test_a_failed_step_leaves_nothing_of_itself_behind(tiny: FrozenModel) -> None:
    expected = EngineWorker(make_engine(tiny))
    failing = EngineWorker(make_engine(FailingModel(tiny, fail_at=3)))
    answers = []
    for worker in (expected, failing):
        worker.start()
        if worker is failing:
            await asyncio.gather(*(collect(worker, str(i)) for i in range(8)), return_exceptions=True)
        answers.append([delta.token for delta in await collect(worker, "same")])
        await worker.stop()
    assert answers[0] == answers[1]


async def test_draining_finishes_what_runs_and_takes_nothing_new(worker: EngineWorker) -> None:
    running = asyncio.create_task(collect(worker, "running", new_tokens=40))
    await asyncio.sleep(0.02)
    draining = asyncio.create_task(worker.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(ServerDraining):
        await collect(worker, "new")
    assert len(await running) == 40
    await draining


async def test_a_drain_that_runs_out_of_time_aborts_the_rest(tiny: FrozenModel) -> None:
    class SlowModel(RecordingModel):
        def forward(
            self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
        ) -> torch.Tensor:
            import time

            time.sleep(0.05)
            return super().forward(inputs_embeds, position_ids, layout, keep)

    worker = EngineWorker(make_engine(SlowModel(tiny)))
    worker.start()
    running = asyncio.create_task(collect(worker, "running", new_tokens=100))
    await asyncio.sleep(0.1)
    await worker.drain(0.1)
    with pytest.raises(RequestAborted):
        await running
    await worker.stop()
    assert not worker.responsive
