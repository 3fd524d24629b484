"""The log of a command, on standard error: for people, or as JSON for log collectors.

Modules log through the standard library. structlog renders what they and the libraries say, with what is bound to the
request that it was said for.
"""

from __future__ import annotations

import logging
import sys
from io import StringIO
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from server.log_lines import indented, one_line

Form = Literal["console", "json"]


def configure_logging(level: str, form: Form = "console") -> None:
    """Show what is of a level or above; libraries' words on every request and every layer are not of interest."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in ("httpx", "torch.nn.attention.varlen"):
        logging.getLogger(library).setLevel(logging.WARNING)


def formatter(form: Form) -> logging.Formatter:
    """Writes a record of the standard library as one line, and its traceback.

    A traceback never shows variables, which hold texts; that is what structlog would do of itself where rich is
    installed.
    """
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _drop_copies,
    ]
    last: list[Processor]
    if form == "json":
        last = [
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _forge_nothing,
            structlog.dev.ConsoleRenderer(
                colors=False,
                pad_event_to=0,
                sort_keys=False,
                exception_formatter=_indented_traceback,
            ),
        ]
    return structlog.stdlib.ProcessorFormatter(processors=last, foreign_pre_chain=common)


def _forge_nothing(logger: object, name: str, event: EventDict) -> EventDict:
    """Let no text that others chose look like another entry; structlog quotes what would look like another field."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = one_line(value)
    return event


def _indented_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    out.write(indented(text.getvalue()))


def _drop_copies(logger: object, name: str, event: EventDict) -> EventDict:
    """Without copies of the message: uvicorn's in colours, and what another handler's formatter has left."""
    for copy in ("color_message", "message", "asctime"):
        event.pop(copy, None)
    return event
