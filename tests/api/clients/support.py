"""What the tests of all clients say to a server, and what it must answer."""

from __future__ import annotations

import sys
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType
from typing import Any

from tests.api.live import LiveServer

KEY = "none"
"""Most of OpenAI's clients do not begin without a key; a server without keys does not look at it."""

SCHEMA: dict[str, Any] = {
    "title": "Review",
    "description": "What somebody thought of a film.",
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["good", "bad"]},
        "stars": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
"""A form that even a random model fills in within a few tokens."""


def lazily(name: str) -> ModuleType:
    """A library that is imported when it is first used: of several processes of tests, only one uses it."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rendered(text: str) -> str:
    """A conversation of one message as the test model's template writes it."""
    return f"<user>{text}\n<assistant>"


def chat_answer(server: LiveServer, text: str, task: str | None = None, **parameters: Any) -> str:
    """The answer to a conversation of one message, by the native route, which knows no template."""
    return server.text(rendered(text), task, **parameters)
