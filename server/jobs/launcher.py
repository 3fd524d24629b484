"""Starts a job's process, and ends it, even one that a killed server has left behind."""

import contextlib
import os
import subprocess
import sys
from typing import Protocol

import psutil

from server.jobs.folder import JobFolder, write_json
from server.jobs.job import Status
from server.settings import Settings

END_SECONDS = 10.0

PASSED_ON = (
    *("model", "model_name", "cache_dir", "device", "dtype", "max_model_len", "max_virtual_tokens"),
    "log_level",
)
"""Settings that a job needs: it trains on the frozen model as the server loaded it."""


class Child(Protocol):
    """A job's process; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit status, if it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""

    def kill(self) -> None:
        """End it at once."""


def start_child(folder: JobFolder, settings: Settings, *, steps_back: bool = True) -> Child:
    """Train a folder's job in a process; with `steps_back` the process gets only the cores that the server leaves.

    Raises OSError if no process can be made, or the folder cannot be written.
    """
    write_order(folder, settings, os.getpid(), steps_back=steps_back)
    with folder.log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "server.jobs.process_main", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal should reach only the server. The process stays in the server's session, though:
            # Linux shares cores out between sessions first (autogroup), where a low priority in one of its own would
            # mean nothing.
            process_group=0 if os.name == "posix" else None,
        )


def write_order(folder: JobFolder, settings: Settings, parent: int, *, steps_back: bool) -> None:
    """Write down what the process needs beside the job itself; it ends with the process `parent`."""
    folder.failure.unlink(missing_ok=True)
    passed_on = settings.model_dump(mode="json", include=set(PASSED_ON))
    write_json(folder.order, {"parent": parent, "steps_back": steps_back, "settings": passed_on})


def identify(child: Child) -> float | None:
    """Creation time of a process; it distinguishes the process from a later one with the same pid."""
    with contextlib.suppress(psutil.Error):
        return float(psutil.Process(child.pid).create_time())
    return None


def end_child(child: Child) -> None:
    """End it at once; if its job runs again, it resumes from its last checkpoint."""
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SECONDS)


def end_left_behind(status: Status) -> None:
    """End the process of a job whose server was killed, if it has not noticed yet."""
    if status.pid is None:
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(status.pid)
        if process.create_time() == status.created:
            process.kill()
            process.wait(END_SECONDS)
