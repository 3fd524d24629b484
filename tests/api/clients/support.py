"""What the tests of all clients say to a server, and what it must answer."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from server.cli.main import imports_kept
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


class Lazily:
    """A library that is imported when it is first used: of several processes of tests, only one uses it.

    pytest asks everything that a module of tests holds for private attributes; those import nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        if self._name not in sys.modules:
            with imports_kept():
                import_module(self._name)
        return getattr(sys.modules[self._name], attribute)


def rendered(text: str) -> str:
    """A conversation of one message as the test model's template writes it."""
    return f"<user>{text}\n<assistant>"


def chat_answer(server: LiveServer, text: str, task: str | None = None, **parameters: Any) -> str:
    """The answer to a conversation of one message, by the native route, which knows no template."""
    return server.text(rendered(text), task, **parameters)
