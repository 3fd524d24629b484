"""Whether the server sends traces. `spans.py`, which creates them, needs the extra `otel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import ConfigurationError
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.telemetry.spans import Tracing


def open_tracing(settings: Settings) -> Tracing | None:
    """What sends traces; None if none are wanted. Raises ConfigurationError if OpenTelemetry is not installed."""
    if not settings.tracing:
        return None
    try:
        from server.api.telemetry.spans import Tracing
    except ImportError as exc:
        raise ConfigurationError(
            f"PRELUDE_TRACING is set, and OpenTelemetry, which sends traces, cannot be imported: {exc}.",
            remedy='Install it with `pip install "prelude-server[otel]"`.',
        ) from exc
    return Tracing()
