"""The log as people and as machines read it; in neither form does it show what variables hold."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars

from server.cli.logs import Form, formatter
from server.log_lines import LineFormatter

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


FORGED = "\x1b[31mred\x1b[0m\n12:00:00 [error    ] the disk is on fire\u2028x"


def test_what_others_have_named_begins_no_entry_of_its_own() -> None:
    text = formatter("console").format(entry("the folder %s is broken", FORGED, task=FORGED))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert r"\x1b[31mred\x1b[0m\n12:00:00" in text


def test_a_value_looks_like_no_other_field() -> None:
    text = formatter("console").format(entry("request", request_id="1 status=204 key=4f0c", route="/prompts/{task}"))
    assert text.endswith("[warning  ] request request_id='1 status=204 key=4f0c' route=/prompts/{task}")
    assert "status=2" in formatter("console").format(entry("request", status="2"))
    quoted = formatter("console").format(entry("request", request_id="a' status='2"))
    assert quoted.endswith("""request_id="a' status='2\"""")


def test_the_lines_of_a_traceback_are_indented() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as exc:
        text = formatter("console").format(entry("failed", exc_info=(type(exc), exc, exc.__traceback__)))
    _, *rest = text.split("\n")
    assert any("the disk is on fire" in line for line in rest)
    assert all(line.startswith("  ") for line in rest if line)
    assert "\x1b" not in text


def test_a_jobs_own_log_cannot_be_forged_either() -> None:
    text = LineFormatter("%(levelname)s %(message)s").format(entry("row %s", FORGED))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
