"""The log of a command, on standard error: for people, or as JSON for log collectors.

Modules log through the standard library. structlog renders these entries and those of libraries, with the context
variables of the request that they belong to.
"""

import logging
import sys
from io import StringIO
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from server.log_lines import indented, one_line

Form = Literal["console", "json"]


def configure_logging(level: str, form: Form = "console") -> None:
    """Show entries of a level or above, without libraries' entries for every request and every layer."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in ("httpx", "torch.nn.attention.varlen"):
        logging.getLogger(library).setLevel(logging.WARNING)


def formatter(form: Form) -> logging.Formatter:
    """A formatter that writes a log record as one line, followed by its traceback.

    Tracebacks never show variables, which may contain users' texts; structlog would if rich is installed.
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
                colors=False, pad_event_to=0, sort_keys=False, exception_formatter=_indented_traceback
            ),
        ]
    return structlog.stdlib.ProcessorFormatter(processors=last, foreign_pre_chain=common)


def _forge_nothing(logger: object, name: str, event: EventDict) -> EventDict:
    """Escape line ends, so that foreign text cannot forge an entry; structlog itself prevents forged fields."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = one_line(value)
    return event


def _indented_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    out.write(indented(text.getvalue()))


def _drop_copies(logger: object, name: str, event: EventDict) -> EventDict:
    """Remove copies of the message: uvicorn's coloured one, and those that another handler's formatter has left."""
    for copy in ("color_message", "message", "asctime"):
        event.pop(copy, None)
    return event
