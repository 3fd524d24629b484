"""Several servers on one store: each looks for changes of the others every PRELUDE_SYNC_SECONDS."""

from __future__ import annotations

import logging

from server.background_service import Service
from server.errors import PreludeError
from server.registry.registry import Registry

log = logging.getLogger(__name__)

STOP_SECONDS = 0.8


class Syncer(Service):
    """Calls `registry.sync` on a thread, from `start` to `stop`; a store that is away for a while is asked again."""

    def __init__(self, registry: Registry, seconds: float) -> None:
        super().__init__("sync", STOP_SECONDS)
        self._registry = registry
        self._seconds = seconds
        self._compact_failure: type[Exception] | None = None  # kind of error that is already logged

    def _run(self) -> None:
        failure: type[Exception] | None = None  # kind of error that is already logged
        while not self._stop.wait(self._seconds):
            try:
                self._registry.sync()
            except Exception as exc:
                if type(exc) is not failure:
                    is_ours = not isinstance(exc, PreludeError)
                    log.warning("changes of other servers are not seen: %s", exc, exc_info=is_ours)
                failure = type(exc)
            else:
                if failure is not None:
                    log.info("changes of other servers are seen again")
                failure = None
                self._compact()

    def _compact(self) -> None:
        """Compact the event log. A failure is harmless: the log only stays longer."""
        try:
            self._registry.compact()
        except Exception as exc:
            if type(exc) is not self._compact_failure:
                is_ours = not isinstance(exc, PreludeError)
                log.warning("the event log is not shortened: %s", exc, exc_info=is_ours)
            self._compact_failure = type(exc)
        else:
            self._compact_failure = None
