"""A server whose model has a chat template, and the certainty that no client asks anybody but it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from tests.api.live import LiveServer, SteeredModel, live_server
from tests.api.openai.support import TEMPLATE

# Read when these are imported, which is after this file: litellm would fetch prices and read a .env, datasets look for
# a hub.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_MODE"] = "PRODUCTION"
os.environ["HF_DATASETS_OFFLINE"] = "1"

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that keeps running; tests use task names of their own."""
    model = SteeredModel()
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("chats"), model=model) as live:
        yield live


@pytest.fixture(autouse=True)
def _asks_nobody_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prices, tokenizers and traces are no reason to leave this machine."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it asks a list of who may be asking
    asked: list[object] = []
    original = socket.getaddrinfo

    def loopback_only(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOOPBACK:
            asked.append(name)
            raise socket.gaierror(f"{name} is not this machine")
        return original(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", loopback_only)
    yield
    assert asked == []
