"""Invariant 5 across threads: every accepted request ends exactly once, whatever happens to it or to the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import torch

from server.contracts import Delta, GenerationRequest
from server.engine.attention.interface import Layout
from server.engine.grammars.walks import Walk
from server.engine.model.frozen import FrozenModel
from server.engine.scheduling.sequence import Sequence
from server.engine.text.detokenizer import Detokenizer
from server.engine.worker import EngineWorker
from server.errors import (
    GenerationFailed,
    InputTooLong,
    InvalidRequest,
    PreludeError,
    RequestAborted,
    ServerDraining,
)
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.engine.workers import begin, collect
from tests.support import RecordingModel, make_engine, request


class Panic(BaseException):
    """What a panic in a library of Rust is to Python: no Exception."""


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
    running = [begin(worker, str(i)) for i in range(12)]
    await asyncio.sleep(0)  # all are with the engine before its first step, on a slow machine too
    worker.start()
    results = await asyncio.gather(*running, return_exceptions=True)
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


async def assert_fails_alone(worker: EngineWorker, make: Callable[[], asyncio.Task[list[Delta]]], why: str) -> None:
    """A request fails at once; one that runs beside it does not notice."""
    bystander = begin(worker, "bystander", 100)
    await asyncio.sleep(0.02)
    with pytest.raises(PreludeError, match=why):
        await asyncio.wait_for(make(), 10)
    assert len(await bystander) == 100
    await until_idle(worker)
    worker._engine.check_integrity()
    assert worker.responsive


@pytest.mark.parametrize("error", [RuntimeError("a bug"), InvalidRequest("It cannot be."), Panic("in Rust")])
async def test_a_request_whose_acceptance_raises_fails_alone_and_at_once(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    add = worker._engine.add

    def adding(asked: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        add(asked, soft_prompt)
        if asked.request_id == "bad":
            raise error

    monkeypatch.setattr(worker._engine, "add", adding)
    why = "It cannot be" if isinstance(error, InvalidRequest) else "failed on this request"
    await assert_fails_alone(worker, lambda: begin(worker, "bad", n=3), why)


async def test_an_abort_that_raises_ends_nobody_else(worker: EngineWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(request_id: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(worker._engine, "abort", abort)
    bystander = begin(worker, "bystander", 100)
    left = worker.generate(request("left", [1], max_new_tokens=100, ignore_eos=True), None)
    await anext(left)
    await left.aclose()
    assert len(await bystander) == 100
    await until_idle(worker)
    assert not worker._engine.kv_cache.allocator.used


async def test_prefixes_that_cannot_be_dropped_end_nobody(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(prefix_hashes: object) -> None:
        raise RuntimeError("a bug")

    bystander = begin(worker, "bystander", 100)
    with monkeypatch.context() as patched:
        patched.setattr(worker._engine.scheduler, "drop_unused", drop)
        worker.drop_unused(["x"])
        assert len(await bystander) == 100


@pytest.mark.parametrize("place", ["rules", "detokenizer", "append"])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_request_whose_own_token_cannot_be_taken_fails_alone(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch, place: str, n: int
) -> None:
    def fail(*_: object) -> NoReturn:
        raise RuntimeError("a bug")

    class Failing(Sequence):
        def __post_init__(self) -> None:
            super().__post_init__()
            if self.request_id == "bad" and self.index == n - 1:
                if place == "rules":
                    self.walk = cast(Walk, SimpleNamespace(allowed=fail, is_waiting=False))
                elif place == "detokenizer":
                    self.detokenizer = cast(Detokenizer, SimpleNamespace(push=fail))
                else:
                    self.append = fail  # type: ignore[method-assign, assignment]

    monkeypatch.setattr("server.engine.engine.Sequence", Failing)
    await assert_fails_alone(worker, lambda: begin(worker, "bad", n=n, temperature=1.0), "failed on this request")


async def test_an_engine_that_can_take_no_step_any_more_has_failed_for_good_and_tells_everybody(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(RecordingModel):
        def forward(self, *_: object) -> NoReturn:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("server.engine.engine_thread.RETRY_SECONDS", (0.01, 0.01))
    worker = EngineWorker(make_engine(Poisoned(tiny)))
    worker.start()
    results = await asyncio.wait_for(
        asyncio.gather(*(begin(worker, str(i)) for i in range(12)), return_exceptions=True), 10
    )
    assert all(isinstance(result, GenerationFailed) for result in results), results
    await asyncio.wait_for(worker._ended.wait(), 10)
    assert worker.has_failed
    assert not worker.responsive
    with pytest.raises(GenerationFailed, match="has stopped"):
        await collect(worker, "late")
    await asyncio.wait_for(worker.stop(), 5)


async def test_a_thread_that_is_killed_leaves_nobody_waiting(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [begin(worker, str(i), 100) for i in range(12)]
    await asyncio.sleep(0.02)

    def die() -> NoReturn:
        raise SystemExit

    monkeypatch.setattr(worker._engine, "step", die)
    results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 10)
    assert all(isinstance(result, GenerationFailed) for result in results), results
    assert worker.has_failed
    assert not worker.responsive


def test_a_shutdown_lets_the_parts_of_an_accepted_request_run(tiny: FrozenModel) -> None:
    """Between two parts nothing is in the engine, and yet the request has not ended."""

    async def serve() -> None:
        worker = EngineWorker(make_engine(tiny))
        worker.start()
        accepted = request("whole", [1, 2, 3], max_new_tokens=2, ignore_eos=True)
        with worker.holding(accepted):
            draining = asyncio.ensure_future(worker.drain(20))
            await asyncio.sleep(0.01)
            assert not draining.done()
            part = replace(accepted, request_id="part", is_part=True)
            assert len([delta async for delta in worker.generate(part, None)]) == 2
            with pytest.raises(ServerDraining):
                await collect(worker, "another")
        await asyncio.wait_for(draining, 5)
        await worker.stop()

    asyncio.run(serve())
