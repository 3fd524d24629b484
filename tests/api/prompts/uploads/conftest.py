from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.live import (
    Files,
    LiveServer,
)
from tests.api.prompts.uploads.support import LIVE, state_of
from tests.support import random_soft_prompt


@pytest.fixture(scope="module")
def good(server: LiveServer) -> Files:
    """Files that would be taken."""
    return server.files(random_soft_prompt(server.model.spec, seed=1))


@pytest.fixture(autouse=True)
def _no_temporary_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def states(server: LiveServer, good: Files) -> list[object]:
    """The last state of the server that a test left, and so that of the next test."""
    server.put(LIVE, good)
    return [state_of(server)]


@pytest.fixture(autouse=True)
def _nothing_changes(server: LiveServer, states: list[object], _no_temporary_file_stays: None) -> Iterator[None]:
    """Whatever a test uploads: the tasks, the answers and the store are the same before and after."""
    yield
    before, states[0] = states[0], state_of(server)
    assert states[0] == before
