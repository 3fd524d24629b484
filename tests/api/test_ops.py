"""Operations: alive, ready, what it is; and a drain that ends every request exactly once."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import torch

from server import __version__
from server.api import ops
from server.contracts import Delta
from server.engine import worker as worker_module
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import GenerationFailed, InputTooLong, PreludeError, ServerDraining
from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_error, live_server, parse_events, wait_until
from tests.support import make_engine, request

PROBES: dict[str, dict[str, Any]] = {
    "/health": {"status": "ok"},
    "/ready": {"status": "ready"},
    "/ping": {"status": "ready"},
    "/v2/health/live": {"live": True},
    "/v2/health/ready": {"ready": True},
}
"""What each answers while all is well."""


def test_the_process_tells_that_it_is_alive_and_ready(server: LiveServer) -> None:
    for path, body in PROBES.items():
        response = server.client.get(path)
        assert (response.status_code, response.json()) == (200, body)


def test_probes_tell_a_server_that_drains_or_hangs_from_one_that_is_gone(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statuses() -> dict[str, int]:
        return {path: own_server.client.get(path).status_code for path in PROBES}

    monkeypatch.setattr(EngineWorker, "responsive", False)
    assert statuses() == {path: 500 if "ready" in str(PROBES[path]) else 200 for path in PROBES}
    own_server.worker.draining = True
    assert statuses() == {path: 503 if "ready" in str(PROBES[path]) else 200 for path in PROBES}


def test_info_tells_the_frozen_model_and_the_limits(own_server: LiveServer) -> None:
    own_server.publish_random("one", 1)
    spec = own_server.model.spec
    assert own_server.client.get("/info").json() == {
        "model": "tiny-llama",
        "fingerprint": spec.fingerprint,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 260,
        "max_model_len": MAX_MODEL_LEN,
        "max_virtual_tokens": 512,
        "dtype": "float64",
        "device": "cpu",
        "version": __version__,
        "tasks": 1,
        "in_flight": 0,
        "prefixes": {"hits": 0, "misses": 1, "budget_bytes": own_server.engine.prefixes.budget_bytes},
        "model_id": "tiny-llama",
        "model_sha": None,
        "model_dtype": "torch.float64",
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 8 + 4096,
        "max_best_of": 64,
        "max_stop_sequences": 16,
        "max_input_tokens": MAX_MODEL_LEN - 1,
        "max_total_tokens": MAX_MODEL_LEN,
        "validation_workers": own_server.worker.threads.most_threads,
        "max_client_batch_size": 128,
        "router": "prelude",
        "sha": None,
        "docker_label": None,
    }


def test_the_limits_that_info_tells_are_those_that_hold(own_server: LiveServer) -> None:
    info = own_server.client.get("/info").json()
    text, most = "a" * info["max_input_tokens"], info["max_client_batch_size"]
    limits: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"inputs": text, "parameters": {"max_new_tokens": 1}}, {"inputs": f"{text}a"}),
        ({"inputs": ["a"] * most, "parameters": {"max_new_tokens": 1}}, {"inputs": ["a"] * (most + 1)}),
        (
            {"parameters": {"do_sample": True, "max_new_tokens": 1, "best_of": info["max_best_of"]}},
            {"parameters": {"do_sample": True, "max_new_tokens": 1, "best_of": info["max_best_of"] + 1}},
        ),
        (
            {"parameters": {"max_new_tokens": 1, "stop": ["zzzz"] * info["max_stop_sequences"]}},
            {"parameters": {"stop": ["zzzz"] * (info["max_stop_sequences"] + 1)}},
        ),
    ]
    for fits, does_not in limits:
        assert own_server.client.post("/generate", json={"inputs": "hello", **fits}).status_code == 200
        assert own_server.client.post("/generate", json={"inputs": "hello", **does_not}).status_code == 422


def test_info_tells_how_many_requests_found_their_prefix(own_server: LiveServer) -> None:
    own_server.publish_random("one", 1)  # a publish computes the prefix: a miss
    for task in ("one", "one", None):
        assert own_server.generate("hello", task, max_new_tokens=1).status_code == 200
    prefixes = own_server.client.get("/info").json()["prefixes"]
    assert (prefixes["hits"], prefixes["misses"]) == (2, 1), "without a task there is no prefix to find"


def test_a_models_name_that_is_not_ascii_can_be_told_in_a_header(own_server: LiveServer) -> None:
    object.__setattr__(own_server.model.spec, "name", "модель\r\nx: y")
    response = own_server.generate(max_new_tokens=1)
    assert response.status_code == 200
    assert response.headers["prelude-model"].startswith("%D0%BC")
    assert "x" not in response.headers


def test_requests_in_flight_are_counted(own_server: LiveServer) -> None:
    own_server.model.allow(0)
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(own_server.generate, max_new_tokens=3) for _ in range(12)]
        wait_until(lambda: own_server.in_flight == 12)
        assert own_server.client.get("/ready").status_code == 200
        own_server.model.allow(None)
        assert {future.result().status_code for future in futures} == {200}
    wait_until(lambda: own_server.is_idle, 1)


def test_a_drain_refuses_what_is_new_and_finishes_what_runs(own_server: LiveServer) -> None:
    expected = own_server.text("hello", max_new_tokens=40)
    own_server.model.allow(5)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(own_server.generate, "hello", None, "/generate_stream", max_new_tokens=40)
        waiting = pool.submit(own_server.generate, "hello", max_new_tokens=40)
        wait_until(lambda: own_server.in_flight == 2)
        drain = asyncio.run_coroutine_threadsafe(own_server.worker.drain(20), own_server.loop)
        wait_until(lambda: own_server.client.get("/ready").status_code == 503)
        assert_error(own_server.client.get("/ready"), 503, "server_draining")
        for route in ("/generate", "/generate_stream", "/"):
            body = assert_error(own_server.generate(route=route), 503, "server_draining")
            assert body["error_type"] == "overloaded"
        assert own_server.client.get("/health").status_code == 200
        assert not drain.done()
        own_server.model.allow(None)
        assert parse_events(stream.result().content)[-1]["generated_text"] == expected
        assert waiting.result().json()["generated_text"] == expected
    drain.result(5)


def test_a_drain_whose_time_is_up_ends_what_still_runs_with_an_error(own_server: LiveServer) -> None:
    own_server.model.delay = 0.02
    with ThreadPoolExecutor(2) as pool:
        parameters: dict[str, Any] = {"max_new_tokens": 150, "ignore_eos_token": True}
        stream = pool.submit(own_server.generate, "hello", None, "/generate_stream", **parameters)
        waiting = pool.submit(own_server.generate, "hello", **parameters)
        wait_until(lambda: len(own_server.engine.kv_cache.allocator.used) == 2)
        started = time.monotonic()
        asyncio.run_coroutine_threadsafe(own_server.worker.drain(0.3), own_server.loop).result(5)
        assert 0.3 <= time.monotonic() - started < 1.5
        *_, last = parse_events(stream.result().content)
        assert (last["code"], last["error_type"]) == ("request_aborted", "incomplete_generation")
        assert_error(waiting.result(), 503, "request_aborted")
    assert own_server.is_idle


def test_a_drain_of_an_idle_server_is_done_at_once(own_server: LiveServer) -> None:
    started = time.monotonic()
    asyncio.run_coroutine_threadsafe(own_server.worker.drain(20), own_server.loop).result(5)
    assert time.monotonic() - started < 1


async def test_a_reader_that_reads_nothing_does_not_hold_up_the_drain(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "READ_SECONDS", 0.1)
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    stalled = worker.generate(request("stalled", [1, 2, 3], max_new_tokens=50, ignore_eos=True), None)
    assert (await anext(stalled)).token is not None
    await asyncio.wait_for(worker.drain(0.1), 2)
    await asyncio.wait_for(worker.stop(), 2)
    await stalled.aclose()
    assert worker.num_in_flight == 0


async def test_a_worker_refuses_what_it_cannot_run_and_forgets_it(tiny: FrozenModel) -> None:
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    with pytest.raises(InputTooLong):
        await anext(worker.generate(request("long", [1] * 200), None))
    await worker.drain(0)
    with pytest.raises(ServerDraining):
        await anext(worker.generate(request("late", [1]), None))
    assert worker.num_in_flight == 0
    await worker.stop()


async def test_a_request_that_waits_when_the_engine_stops_gets_its_end(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    worker = EngineWorker(engine)
    worker.start()
    leaked = engine.kv_cache.allocator.allocate(10)
    first = worker.generate(request("first", [1, 2], max_new_tokens=1), None)
    assert (await anext(first)).finish_reason is not None
    await first.aclose()
    with pytest.raises(GenerationFailed, match="engine has stopped"):  # whether it came before or after
        async for _ in worker.generate(request("second", [1, 2], max_new_tokens=1), None):
            pass
    assert not worker.responsive
    assert leaked is not None
    await asyncio.wait_for(worker.stop(), 2)


class LostMemory:
    """Stands in for a tensor on a device whose context is lost: everything that touches it raises, and always will."""

    def __getattr__(self, name: str) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    def __getitem__(self, index: object) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("step", [1, 2, 7])
async def test_a_device_that_is_lost_ends_every_stream_and_fails_the_probes_within_a_second(
    step: int, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a slot can be zeroed then, so the engine ends while it ends everybody."""
    engine = make_engine(tiny)
    worker = EngineWorker(engine)
    take_step = engine.step
    lost_at: list[float] = []

    def lose_the_device() -> list[Delta]:
        if engine.steps == step and not lost_at:
            lost_at.append(time.monotonic())
            monkeypatch.setattr(engine.kv_cache, "states", LostMemory())
        return take_step()

    monkeypatch.setattr(engine, "step", lose_the_device)
    worker.start()

    async def ask(number: int) -> None:
        async for _ in worker.generate(request(f"r{number}", [1, 2, 3], max_new_tokens=60, ignore_eos=True), None):
            pass

    ends = await asyncio.wait_for(asyncio.gather(*map(ask, range(12)), return_exceptions=True), 10)
    assert time.monotonic() - lost_at[0] < 1
    assert [type(end) for end in ends] == [GenerationFailed] * 12, ends
    assert worker.has_failed, "which ends the process: see DrainingServer.on_tick"
    for probe in (ops.health, ops.ready, ops.ping):
        with pytest.raises(PreludeError) as caught:
            await probe(worker)
        assert caught.value.status == 500
    await asyncio.wait_for(worker.stop(), 5)


def test_a_server_that_stops_ends_what_is_in_flight(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with live_server(tmp_path) as live:
            live.model.delay = 0.01
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 40}}
            future = pool.submit(httpx.post, f"{live.url}/generate_stream", json=body)
            wait_until(lambda: live.in_flight == 1)
            live.model.delay = 0
        *_, last = parse_events(future.result().content)
    assert last["generated_text"] is not None
