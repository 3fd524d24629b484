"""The log of a command, on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """Show what is of a level or above; libraries' words on every request and every layer are not of interest."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    for library in ("httpx", "torch.nn.attention.varlen"):
        logging.getLogger(library).setLevel(logging.WARNING)
