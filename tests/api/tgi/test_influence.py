"""`influence`: the heat map of an answer agrees with its details, for both kinds of soft prompt, within limits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.api.generation import Prepared
from server.api.tgi import influence
from server.contracts import GenerationRequest
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest
from tests.api.live import LiveServer, assert_error, live_server, wait_until
from tests.support import make_engine, random_kv_prompt, random_soft_prompt, tiny_model


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_each_virtual_token_is_measured_on_each_output_token(server: LiveServer, kind: str) -> None:
    task = f"influence-{kind[:6].lower()}"
    soft_prompt = (random_kv_prompt if kind == "PREFIX_TUNING" else random_soft_prompt)(server.model.spec, 3)
    server.publish(task, soft_prompt)
    details = server.generate("hello", task, details=True, influence=True, max_new_tokens=6).json()["details"]
    found, tokens = details["influence"], details["tokens"]
    assert found["logprobs"] == pytest.approx([token["logprob"] for token in tokens], abs=1e-4)
    assert [len(row) for row in found["influence"]] == [len(tokens)] * 3
    assert any(abs(value) > 1e-6 for row in found["influence"] for value in row)
    assert server.is_idle


def test_what_has_no_heat_map_is_refused_before_anything_runs(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.publish_random("influence-refused")
    steps = server.engine.steps
    ask: dict[str, Any] = {"details": True, "influence": True}
    refused = "influence-refused"
    assert_error(server.generate("a", refused, influence=True), 422, "invalid_request", "details")
    assert_error(server.generate("a", None, **ask), 422, "invalid_request", "no virtual tokens")
    assert_error(server.generate("a", refused, route="/generate_stream", **ask), 422, "invalid_request", "streamed")
    assert_error(server.generate("a", refused, best_of=2, do_sample=True, **ask), 422, "invalid_request", "one answer")
    assert_error(server.generate("a", refused, influence=True, choices=["x", "y"]), 422, "invalid_request", "choices")
    many = {"inputs": "a", "targets": [{"task": refused}], "parameters": ask}
    assert_error(server.client.post("/generate_many", json=many), 422, "invalid_request", "influence")
    monkeypatch.setattr(influence, "MOST_CELLS", 20)
    assert_error(server.generate("a", refused, max_new_tokens=5, **ask), 422, "invalid_request", "25 numbers")
    monkeypatch.setattr(influence, "MOST_CELLS", 1000)
    monkeypatch.setattr(influence, "MOST_BYTES", 20)
    assert_error(server.generate("a", refused, max_new_tokens=5, **ask), 422, "invalid_request", "bytes")
    assert server.engine.steps == steps


def test_a_model_with_a_recurrent_state_is_refused_before_anything_runs() -> None:
    model = tiny_model("qwen3_5_text")
    prepared = Prepared(GenerationRequest("a", (65,)), None, random_soft_prompt(model.spec))
    with pytest.raises(InvalidRequest, match="keeps a recurrent state"):
        influence.check_influence(EngineWorker(make_engine(model)), prepared)


def test_an_answer_and_its_heat_map_are_one_request_to_every_limit(tmp_path: Path) -> None:
    """Otherwise the scorings would be refused after the answer has been generated, and others between the two."""
    with live_server(tmp_path, max_per_task=1, max_queue=0, max_sequences=2) as live, ThreadPoolExecutor(1) as threads:
        live.publish_random("one")
        live.model.delay = 0.02
        running = threads.submit(live.generate, "hello", "one", details=True, influence=True, max_new_tokens=3)
        wait_until(lambda: live.in_flight > 0)
        others = []
        while not running.done():
            others.append(live.generate("hello", "one", max_new_tokens=1).status_code)
        assert running.result().status_code == 200, running.result().text
        assert set(others[:-1]) == {429}, "nothing else of the task runs before the heat map is there"
        assert live.generate("hello", "one", max_new_tokens=1).status_code == 200
        wait_until(lambda: live.is_idle)
