"""Live servers: one that the tests of this folder share, and one per test for those that stop, hold or break it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.live import LiveServer, SteeredModel, live_server
from tests.api.openai.support import TEMPLATE


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that keeps running; tests use task names of their own."""
    with live_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server of the test's own."""
    with live_server(tmp_path) as live:
        yield live


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose model has a chat template, and that keeps running; tests use task names of their own."""
    model = SteeredModel()
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("chatty"), model=model) as live:
        yield live
