"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from server.engine.kernels.library import Kernels, use_kernels
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.settings import Settings
from tests.support import (
    make_engine,
    tiny_model,
)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The compiled kernels; their machine code is kept where a server keeps it, so a second run begins at once."""
    return use_kernels(Settings.load().cache_dir / "kernels")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny products: a second thread's waking takes longer than they do, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lfm2() -> FrozenModel:
    return tiny_model("lfm2")


@pytest.fixture
async def worker(tiny: FrozenModel) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    yield worker
    await worker.stop()
