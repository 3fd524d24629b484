from __future__ import annotations

import pytest

from tests.api.evaluations.support import MANIFEST
from tests.api.live import LiveServer


@pytest.fixture(scope="module")
def mood(server: LiveServer) -> str:
    server.publish_random("eval-mood", 1, MANIFEST)
    server.publish_random("eval-mood", 2, MANIFEST)
    return "eval-mood"
