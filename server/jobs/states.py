"""A cache of all jobs' states: a status file is read again only after it has been replaced."""

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from server.jobs.job import JOB_ID, JobState

log = logging.getLogger(__name__)

STATUS = "status.json"

Stamp = tuple[int, int, int]


class States:
    """Follows the status files of a folder; safe from any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[Stamp, JobState | None]] = {}
        self._lock = threading.Lock()

    def all(self) -> dict[str, JobState]:
        """The state by job id, oldest first, of every job whose status can be read."""
        with self._lock:
            found = {job_id: self._look(job_id) for job_id in job_ids(self._root)}
            for job_id in self._known.keys() - found.keys():
                del self._known[job_id]
        return {job_id: state for job_id, state in found.items() if state is not None}

    def _look(self, job_id: str) -> JobState | None:
        path = f"{self._root}/{job_id}/{STATUS}"
        known = self._known.get(job_id)
        try:
            stat = os.stat(path)  # noqa: PTH116 - pathlib takes three times as long, at each of a thousand
            stamp = stat.st_mtime_ns, stat.st_ino, stat.st_size
            if known is not None and known[0] == stamp:
                return known[1]
            with open(path, "rb") as file:  # noqa: PTH123
                state: JobState | None = JobState(json.load(file)["state"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
            if known is None or known[1] is not None:
                log.warning("the state of the training job in %s/%s cannot be read: %s", self._root, job_id, exc)
            stamp, state = (0, 0, 0), None
        self._known[job_id] = stamp, state
        return state


def job_ids(root: Path) -> list[str]:
    """The ids of all jobs in a folder, oldest first; none if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(root) if JOB_ID.fullmatch(name))
    except OSError:
        return []


def count_states(states: Iterable[JobState]) -> dict[JobState, int]:
    """How many jobs are in each state."""
    counted = Counter(states)
    return {state: counted[state] for state in JobState}
