"""Several servers on one store: each looks, every PRELUDE_SYNC_SECONDS, whether the others have changed something."""

from __future__ import annotations

import logging
import threading

from server.errors import PreludeError
from server.registry.registry import Registry

log = logging.getLogger(__name__)


class Syncer:
    """Calls `registry.sync` on a thread, from `start` to `stop`; a store that is away for a while is asked again."""

    def __init__(self, registry: Registry, seconds: float) -> None:
        """Nothing runs yet."""
        self._registry = registry
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        failing = False
        while not self._stop.wait(self._seconds):
            try:
                self._registry.sync()
                if failing:
                    log.info("the store answers again")
                failing = False
            except PreludeError as exc:
                if not failing:
                    log.warning("changes of other servers are not seen: %s", exc)
                failing = True
            except Exception:
                log.exception("changes of other servers could not be taken over")
