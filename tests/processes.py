"""`prelude serve` in a process of its own, ready to be asked, stopped or killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import httpx

START_SECONDS = 90
COMMAND = "from server.cli.main import app\napp()"
PRELOADED = ["server.cli.main", "server.serve", "server.train.train_task", "transformers.models.llama.modeling_llama"]
"""What a server imports. Forks share it; to import it again takes each process six seconds of a core."""


class Server(Protocol):
    """What a test does with a process; `subprocess.Popen` has all of it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, signal_number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A fork with the methods of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, signal_number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal_number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class Process:
    """A running `prelude serve`."""

    popen: Server
    client: httpx.Client
    log: Path

    def ended_with(self, seconds: float) -> int:
        """Wait for the end; answers the exit code."""
        return self.popen.wait(seconds)


def start_forked(code: str, arguments: list[str], environment: dict[str, str], log: Path) -> Server:
    """In a fork of a process that has imported what a server needs."""
    log.unlink(missing_ok=True)
    return fork(_run, (code, arguments, environment), log)


@contextmanager
def prelude_serve(directory: Path, program: str = "", /, **settings: str) -> Iterator[Process]:
    """Start the command and wait until it is ready.

    Args:
        directory: for its log, its store and its inbox.
        program: code that runs before the command, in the same process.
        settings: environment variables; PRELUDE_PORT instead of a free port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(settings.get("PRELUDE_PORT", free.getsockname()[1]))
    log = directory / "log.txt"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")},
        "PRELUDE_DTYPE": "float32",
        "PRELUDE_STORE": f"file:{directory / 'store'}",
        "PRELUDE_MAX_SEQUENCES": "4",
        "HF_HUB_OFFLINE": "1",
        **settings,
    }
    arguments = ["serve", "--port", str(port), "--prompts-dir", str(directory / "prompts")]
    popen = start_forked(f"{program}\n{COMMAND}", arguments, environment, log)
    try:
        limits = httpx.Limits(keepalive_expiry=1.0)  # the server closes an idle connection after 5 s
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
            end = time.monotonic() + START_SECONDS
            while not _is_ready(client):
                assert popen.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield Process(popen, client, log)
    finally:
        popen.kill()
        popen.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def fork(target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> Forked:
    """Call a function in a process that has imported what a server imports; its output is added to the log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_call, args=(target, arguments, log))
    process.start()
    return Forked(process)


def _call(target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    target(*arguments)


def _run(code: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Be the command, as if this process had been started for it."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # OpenMP has read the environment before the fork
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["prelude", *arguments]
    with contextlib.suppress(KeyboardInterrupt):
        exec(compile(code, "<prelude serve>", "exec"), {"__name__": "__main__"})
