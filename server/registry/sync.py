"""Several servers on one store: each looks for changes of the others every PRELUDE_SYNC_SECONDS."""

import logging
import threading
from collections.abc import Callable

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
        self._compacting: threading.Thread | None = None
        self._failures: dict[str, type[Exception]] = {}  # problem -> kind of error that is already logged

    def _run(self) -> None:
        unseen = "changes of other servers are not seen"
        while not self._stop.wait(self._seconds):
            had_failed = unseen in self._failures
            if self._succeeds(self._registry.sync, unseen):
                if had_failed:
                    log.info("changes of other servers are seen again")
                self._compact()

    def _compact(self) -> None:
        """Shorten the log on a thread of its own: a snapshot of many tasks takes longer than a change may be unseen."""
        if self._compacting is None or not self._compacting.is_alive():
            arguments = self._registry.compact, "the event log is not shortened"  # harmless: it stays longer
            self._compacting = threading.Thread(target=self._succeeds, args=arguments, name="compact", daemon=True)
            self._compacting.start()

    def _succeeds(self, work: Callable[[], None], problem: str) -> bool:
        """Whether the work succeeded; logs a failure unless the last one was of the same kind."""
        try:
            work()
        except Exception as exc:
            if type(exc) is not self._failures.get(problem):
                log.warning("%s: %s", problem, exc, exc_info=not isinstance(exc, PreludeError))
            self._failures[problem] = type(exc)
            return False
        self._failures.pop(problem, None)
        return True
