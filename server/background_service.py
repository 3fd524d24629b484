"""Background threads beside the app: the inbox watcher, the store watcher, the supervisor of training jobs."""

import threading
from abc import ABC, abstractmethod


class Service(ABC):
    """Runs `_run` on a thread from `start` to `stop`; `_run` must check `_stop` often and return once it is set."""

    def __init__(self, name: str, stop_seconds: float) -> None:
        """Prepare the thread; `stop` waits `stop_seconds` for it, then abandons it: it may hang in a store."""
        self._stop_seconds = stop_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; work in progress is either completed or has no effect."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._stop_seconds)

    @abstractmethod
    def _run(self) -> None:
        """The work."""
