"""`influence`: the heat map of an answer agrees with its details, for both kinds of soft prompt, within limits."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.tgi import influence
from tests.api.live import LiveServer, assert_error
from tests.support import random_kv_prompt, random_soft_prompt


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
