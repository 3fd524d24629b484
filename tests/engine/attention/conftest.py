from __future__ import annotations

import pytest

from tests.engine.attention.heads import ALL_HEADS
from tests.engine.pool import Heads


@pytest.fixture(params=ALL_HEADS, ids=lambda heads: "-".join(map(str, heads)).replace("torch.", ""))
def heads(request: pytest.FixtureRequest) -> Heads:
    found: Heads = request.param
    return found
