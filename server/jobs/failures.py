"""Why a job failed whose process is over."""

import contextlib
import json

from server.errors import PreludeError, StoreFull
from server.jobs.folder import JobFolder
from server.jobs.job import Failure
from server.jobs.process_main import FULL, REFUSED


def failure_of(folder: JobFolder, code: int | None) -> Failure:
    """The failure of a job whose process exited by itself with an error."""
    if code == FULL:
        full = StoreFull(
            "No space is left where PRELUDE_JOBS_DIR is.", remedy="Make room, or delete jobs, then send it again."
        )
        return Failure(full.message, full.code, full.remedy)
    if code == REFUSED:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Failure(**json.loads(folder.failure.read_bytes()))
    return broken(f"Its process ended with {code}.")


def broken(message: str) -> Failure:
    """The failure of a job that reported no reason itself."""
    return Failure(message, PreludeError.code, "Its log (`prelude jobs log`, GET /training/jobs/{job}/log) tells more.")
