from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.engine.attention.heads import ALL_HEADS
from tests.engine.pool import Heads


@pytest.fixture(params=ALL_HEADS, ids=lambda heads: "-".join(map(str, heads)).replace("torch.", ""))
def heads(request: pytest.FixtureRequest) -> Heads:
    found: Heads = request.param
    return found


@pytest.fixture(scope="module", autouse=True)
def _freeze_what_stays() -> Iterator[None]:
    """Look once through what numba keeps of all that it compiled: each later collection would read it again."""
    yield
    gc.collect()
    gc.freeze()
