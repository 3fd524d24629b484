"""Work on a thread of its own beside the app: the inbox's watcher, the store's, the runner of training jobs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class Service(ABC):
    """Runs `_run` from `start` to `stop`; it looks at `_stop` often, and ends once that is set."""

    def __init__(self, name: str, stop_seconds: float) -> None:
        """Begin nothing yet.

        Args:
            name: of the thread.
            stop_seconds: how long `stop` waits for the thread. One that hangs in a store is left behind.
        """
        self._stop_seconds = stop_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what was begun is left whole or as if it had not been begun."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._stop_seconds)

    @abstractmethod
    def _run(self) -> None:
        """The work."""
