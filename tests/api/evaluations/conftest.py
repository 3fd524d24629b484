from __future__ import annotations

import pytest

from tests.api.evaluations.support import MANIFEST
from tests.api.live import LiveServer


@pytest.fixture(scope="session")
def mood(server: LiveServer) -> str:
    """For as long as the server: a module that published again would make versions 3 and 4."""
    server.publish_random("eval-mood", 1, MANIFEST)
    server.publish_random("eval-mood", 2, MANIFEST)
    return "eval-mood"
