"""A server whose model has a chat template."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.live import LiveServer, SteeredModel, live_server
from tests.api.openai.support import TEMPLATE


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that keeps running; tests use task names of their own."""
    model = SteeredModel()
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("chatty"), model=model) as live:
        yield live
