"""Whatever happens to the engine: all end once, in fair order, with the answer they get alone, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from server.engine.kernels.library import Kernels
from server.engine.model.frozen import FrozenModel
from tests.engine.engine_life import EngineLife
from tests.engine.lives import World
from tests.engine.optimised import ALL, optimised
from tests.soak import Soak
from tests.support import tiny_model


@pytest.fixture(params=["plain", "optimised", "hybrid"])
def model(request: pytest.FixtureRequest, kernels: Kernels) -> FrozenModel:
    """As transformers wrote it, in float64; or with all that makes it faster, which has no float64; or a hybrid."""
    if request.param == "optimised":
        return optimised("llama", ALL, kernels, dtype=torch.float32)
    return tiny_model("lfm2" if request.param == "hybrid" else "llama")


@pytest.mark.soak
@pytest.mark.timeout(600)  # hypothesis looks for the shortest life that fails for up to five minutes
@pytest.mark.usefixtures("one_thread")
def test_whatever_happens_all_end_once_in_fair_order_with_the_answer_they_get_alone(
    model: FrozenModel, soak: Soak, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patience in ("STEP_SECONDS", "IDLE_SECONDS", "SLOW_SECONDS"):  # what happens must not depend on the clock
        monkeypatch.setattr(f"server.engine.grammars.walks.{patience}", 60.0)
    world = World(model)
    lives: type[EngineLife] = type("Lives", (EngineLife,), {"world": world})
    for _ in soak.rounds(short=1, full=100, desc="lives of an engine, by the forty"):
        run_state_machine_as_test(
            seed(soak.random.randrange(2**32))(lives),
            settings=settings(max_examples=soak.count(12, 40), stateful_step_count=30, deadline=None, database=None),
        )
    world.grammars.close()
