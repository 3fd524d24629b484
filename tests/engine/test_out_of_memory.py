"""A step that a device has no memory for costs time, or the one request that is too large; never its neighbours."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from server.contracts import FinishReason, GenerationRequest
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.engine.runner import Runner
from server.engine.sampling.logit_rows import Batch
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import HYBRIDS, make_engine, random_soft_prompt, request, run_engine, tiny_model

Work = list[tuple[GenerationRequest, SoftPrompt | None]]


class SmallRunner(Runner):
    """A runner whose device runs out of memory when a step prefills more than `room` tokens."""

    room = 10
    failures = 0

    def forward(self, batch: Batch, kept_rows: np.ndarray) -> torch.Tensor:
        logits = super().forward(batch, kept_rows)  # what it has written is written again
        if sum(span.count for _, span in batch if span.count > 1) > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits


def small(engine: Engine, room: int) -> tuple[Engine, SmallRunner]:
    runner = engine.runner = SmallRunner(engine.model, engine.kv_cache)
    runner.room = room
    return engine, runner


def work(model: FrozenModel) -> Work:
    rng = random.Random(0)
    prompt = random_soft_prompt(model.spec, 5)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.3, "logprobs": True},
        {"input_logprobs": True},
        {"labels": [(3, 4), (7,)]},
        {"n": 3, "temperature": 1.5},
    ]
    return [
        (
            request(f"r{i}", [rng.randrange(256) for _ in range(9)], max_new_tokens=7, seed=i, **kinds[i % len(kinds)]),
            prompt if i % 2 else None,
        )
        for i in range(18)
    ]


@pytest.mark.parametrize("architecture", ["llama", *HYBRIDS])
def test_a_step_without_memory_runs_again_with_half_the_prefills_and_nobody_sees_it(architecture: str) -> None:
    tiny = tiny_model(architecture)
    expected = run_engine(make_engine(tiny, max_batch_tokens=32), work(tiny))
    engine, runner = small(make_engine(tiny, max_batch_tokens=32), room=16)
    outcomes = run_engine(engine, work(tiny))
    assert runner.failures > 0
    assert outcomes.keys() == expected.keys()
    for name, outcome in outcomes.items():
        one = expected[name]
        assert (outcome.token_ids, outcome.finish_reason, outcome.ends) == (one.token_ids, one.finish_reason, one.ends)
    engine.check_integrity()


def test_a_prefill_that_fits_in_no_way_fails_alone(tiny: FrozenModel) -> None:
    engine, _ = small(make_engine(tiny, max_batch_tokens=64), room=8)
    large = request("large", range(60), max_new_tokens=4)
    others: Work = [(request(f"r{i}", (i, 2, 3), max_new_tokens=6), None) for i in range(4)]
    outcomes = run_engine(engine, [*others, (large, None)])
    assert outcomes["large"].finish_reason is FinishReason.FAILED
    assert "memory" in str(outcomes["large"].error)
    alone = run_engine(make_engine(tiny), others)
    assert {name: outcomes[name].token_ids for name in alone} == {name: one.token_ids for name, one in alone.items()}
    assert [outcome.ends for outcome in outcomes.values()] == [1] * 5
    engine.check_integrity()


def test_decodes_that_do_not_fit_raise_so_that_everybody_is_told(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny)
    for i in range(3):
        engine.add(request(f"r{i}", (i, 2, 3), max_new_tokens=6), None)
    engine.step()

    def forward(batch: Batch, kept_rows: np.ndarray) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.runner, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert {delta.request_id for delta in engine.fail_all("no memory")} == {"r0", "r1", "r2"}
    engine.check_integrity()
