"""Makes foreign text in the log, such as a folder's name, unable to start an entry of its own."""

import logging
from typing import Any


def one_line(text: str) -> str:
    """Escape line ends, escape sequences and other invisible characters as Python does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def indented(text: str) -> str:
    """Indent lines, so that each is recognisable as the continuation of an entry."""
    return "\n".join(f"  {one_line(line)}" for line in text.split("\n"))


class LineFormatter(logging.Formatter):
    """The standard library's formatter, with entries on one line and indented tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The entry without its traceback."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback."""
        return indented(super().formatException(ei))
