from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from server.engine.admission_control import Limits
from server.engine.attention.interface import Layout
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import (
    GenerationFailed,
    RequestAborted,
    RequestTimedOut,
)
from tests.api.live import wait_until
from tests.engine.workers import begin, collect
from tests.support import RecordingModel, make_engine, request


class HeldModel(RecordingModel):
    """A frozen model whose forward waits until the test releases it."""

    def __init__(self, model: FrozenModel) -> None:
        super().__init__(model)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        assert self.goes_on.wait(30)
        return super().forward(inputs_embeds, position_ids, layout, keep)


async def test_it_is_the_step_that_tells_whether_the_engine_hangs_and_not_how_long_nothing_was_asked(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.worker.STUCK_SECONDS", 0.2)
    model = HeldModel(tiny)
    worker = EngineWorker(make_engine(model))
    worker.start()
    unread = worker.generate(request("unread", [1], max_new_tokens=2, ignore_eos=True), None)
    await anext(unread)
    await asyncio.sleep(0.4)  # idle for long, with a stream that nobody reads
    assert worker.responsive
    begun = begin(worker, "next", 2)
    for _ in range(3):
        await asyncio.sleep(0)
        assert worker.responsive, "it flickers when the first request comes"
    assert len(await begun) == 2
    model.goes_on.clear()
    held = begin(worker, "held", 2)
    await asyncio.sleep(0.5)
    assert not worker.responsive
    assert not worker.has_failed
    monkeypatch.setattr("server.engine.worker.LOST_SECONDS", 0.2)
    assert worker.has_failed
    with pytest.raises(GenerationFailed, match="has stopped"):
        await asyncio.wait_for(held, 5)
    model.goes_on.set()
    await unread.aclose()
    await worker.stop()


async def test_a_request_leaves_its_place_with_its_last_token_also_if_nobody_reads_it(tiny: FrozenModel) -> None:
    worker = EngineWorker(make_engine(tiny), Limits(in_flight=1, request_timeout=30))
    worker.start()
    unread = worker.generate(request("unread", [1], max_new_tokens=5, ignore_eos=True), None)
    await anext(unread)
    for i in range(3):
        await until_engine_is_idle(worker)
        assert len(await collect(worker, str(i))) == 5
    assert len([delta async for delta in unread]) == 4, "what was not read is there"
    assert not worker._admission._in_flight
    await worker.stop()


async def test_a_request_that_takes_too_long_leaves_its_place_also_if_nobody_reads_it(tiny: FrozenModel) -> None:
    model = HeldModel(tiny)
    worker = EngineWorker(make_engine(model), Limits(in_flight=1, request_timeout=0.3))
    worker.start()
    unread = worker.generate(request("unread", [1], max_new_tokens=100, ignore_eos=True), None)
    await anext(unread)
    model.goes_on.clear()
    await asyncio.sleep(0.5)
    assert not worker._admission._in_flight
    model.goes_on.set()
    assert len(await collect(worker, "next")) == 5
    with pytest.raises(RequestTimedOut):
        await anext(unread)
    await worker.stop()


async def test_what_waits_to_be_read_is_bounded_and_who_lets_most_wait_is_dropped(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.unread_deltas.MOST_UNREAD", 300)
    asked = [
        request("modest", [1], max_new_tokens=40, ignore_eos=True),
        request("greedy", [1], max_new_tokens=90, ignore_eos=True, n=4, temperature=1.0, logprobs=True, top_logprobs=2),
    ]
    unread = [worker.generate(one, None) for one in asked]
    for stream in unread:
        await anext(stream)
    await until_engine_is_idle(worker)
    with pytest.raises(RequestAborted, match="reads more slowly"):
        await anext(unread[1])
    assert len([delta async for delta in unread[0]]) == 39
    assert len(await collect(worker, "read")) == 5
    assert worker._streams.unread == 0


async def until_engine_is_idle(worker: EngineWorker) -> None:
    for _ in range(1000):
        await asyncio.sleep(0.01)
        if not worker._engine.has_work:
            await asyncio.sleep(0.01)
            return
    raise AssertionError("the engine does not become idle")


async def test_time_in_which_the_whole_process_is_stopped_is_not_held_against_a_step(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HeldModel(tiny)
    worker = EngineWorker(make_engine(model))
    worker.start()
    model.goes_on.clear()
    held = begin(worker, "held", 2)
    await asyncio.to_thread(wait_until, lambda: worker._thread.turn_seconds > 0)
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now + 1000)
        assert worker.responsive
        assert not worker.has_failed
        for _ in range(400):  # while it runs, time counts
            now += 1
            worker._thread.clock.tick()
        assert not worker.responsive
        assert worker.has_failed
    with pytest.raises(GenerationFailed):
        await asyncio.wait_for(held, 5)
    model.goes_on.set()
    await worker.stop()
