"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server.engine.kernels.library import Kernels, use_kernels
from server.settings import Settings


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
