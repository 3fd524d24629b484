from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.live import LiveServer, live_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(autouse=True)
def workplace(server: LiveServer, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, and an environment that names the server."""
    monkeypatch.setenv("PRELUDE_URL", server.url)
    return workplace
