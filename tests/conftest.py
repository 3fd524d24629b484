"""Fixtures that tests of several parts share; models are loaded once per run."""

from __future__ import annotations

import pytest
import torch

from server.engine.model import FrozenModel
from server.settings import Settings
from tests.support import tiny_model


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tiny models are slower on many threads than on one."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny() -> FrozenModel:
    """A tiny llama in float64, in which batching changes nothing that a test could see."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny32() -> FrozenModel:
    """A tiny llama in float32."""
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2() -> FrozenModel:
    """The embedded model in float32, the dtype in which answers are exact."""
    return FrozenModel.load(Settings.load(dtype="float32"))
