"""The log as people and as machines read it; in neither form does it show what variables hold."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars

from server.cli.logs import Form, formatter

FORMS: tuple[Form, ...] = ("console", "json")


def entry(message: str, *arguments: Any, exc_info: Any = None, **extra: Any) -> logging.LogRecord:
    """What a module's logger makes of a call."""
    logger = logging.getLogger("server.somewhere")
    return logger.makeRecord(logger.name, logging.WARNING, "x.py", 1, message, arguments, exc_info, extra=extra or None)


def test_an_entry_for_machines_is_one_object_on_one_line() -> None:
    text = formatter("json").format(entry("%d of\n%s", 3, "é\u2028", route="/x", seconds=0.5))
    assert len(text.splitlines()) == 1
    found = json.loads(text)
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "event": "3 of\né\u2028",
        "level": "warning",
        "logger": "server.somewhere",
        "route": "/x",
        "seconds": 0.5,
    }


def test_an_entry_for_people_is_a_sentence_and_its_fields() -> None:
    text = formatter("console").format(entry("ready on http://127.0.0.1:8000 in 3.2 s", route="/x"))
    _, _, rest = text.partition(" ")
    assert rest == "[warning  ] ready on http://127.0.0.1:8000 in 3.2 s route=/x"


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_bound_to_a_request_is_on_its_entries(form: Form) -> None:
    with bound_contextvars(request_id="abc"):
        assert "abc" in formatter(form).format(entry("x"))
    assert "abc" not in formatter(form).format(entry("x"))


@pytest.mark.parametrize("form", FORMS)
def test_a_traceback_is_there_and_shows_no_variables(form: Form) -> None:
    secret = "".join(["prelude", "_", "key"])  # the source line does not hold it
    try:
        raise ValueError(f"of {len(secret)} characters")
    except ValueError as exc:
        text = formatter(form).format(entry("failed", exc_info=(type(exc), exc, exc.__traceback__)))
    assert "Traceback (most recent call last)" in text
    assert "ValueError: of 11 characters" in text
    assert secret not in text


@pytest.mark.parametrize("form", FORMS)
def test_a_message_comes_once(form: Form) -> None:
    record = entry("Started", color_message="\x1b[36mStarted\x1b[0m")
    logging.Formatter("%(asctime)s").format(record)  # as the handler of another would
    assert formatter(form).format(record).count("Started") == 1


def test_what_an_entry_quotes_cannot_begin_an_entry_of_its_own_for_machines() -> None:
    text = formatter("json").format(entry("x", task='a"}\n{"event": "forged"'))
    assert len(text.splitlines()) == 1
    assert json.loads(text)["event"] == "x"
