"""Several `prelude serve` on one bucket, each with its own way to the store, and what can happen to them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.chaos.faulty_store import Fault, FaultyStore
from tests.processes import COMMAND, Server, start_forked

START_SECONDS = 700.0

TICK_SECONDS, LATE_SECONDS = 0.2, 1.0

MOVABLE_CLOCK = """
import datetime, pathlib, signal, time
moved, real_time = [0.0], time.time
def move(*_):
    moved[0] = float(pathlib.Path({file!r}).read_text())
class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
signal.signal(signal.SIGUSR2, move)
time.time, datetime.datetime = lambda: real_time() + moved[0], Moved
"""
"""Runs in a server before the command: on SIGUSR2 its clock is ahead by as many seconds as the file says."""

STORE_FAULTS: tuple[Fault, ...] = ("slow", "partitioned", "refused", "failing", "full", "deaf", "filling")


class Node:
    """One server, which may be killed, paused and started again at its address.

    Attributes:
        store: its way to the store.
        troubles: times between which it may not have seen the store; the end of one that lasts is infinite.
        faults: by kind, how often each has happened.
    """

    def __init__(self, directory: Path, settings: dict[str, str], store: FaultyStore) -> None:
        directory.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = store
        self.troubles: list[tuple[float, float]] = []
        self.faults: Counter[str] = Counter()
        self._directory = directory
        self._clock = directory / "clock"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
        self._environment = {**inherited, **settings, "AWS_ENDPOINT_URL": store.url}
        self._lives = 0
        self._process: Server | None = None

    def start(self) -> None:
        """Start and wait until it is ready."""
        self._lives += 1
        arguments = ["serve", "--port", str(self.port), "--prompts-dir", str(self._directory / "prompts")]
        program = MOVABLE_CLOCK.format(file=str(self._clock)) + COMMAND
        self._process = start_forked(program, arguments, self._environment, self.log)
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            is_early = time.monotonic() < end
            assert is_early, self.log.read_text()
            assert self._process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    @property
    def log(self) -> Path:
        """The log of its present life."""
        return self._directory / f"log-{self._lives}.txt"

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    def suffer(self, kind: str, seconds: float) -> None:
        """Let something happen to it, and end well: it answers again."""
        assert self._process is not None
        self.faults[kind] += 1
        began = time.monotonic()
        trouble = len(self.troubles)
        self.troubles.append((began, float("inf")))
        if kind == "kill":
            self.kill()
            self.start()
        elif kind == "pause":
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self._process.send_signal(signal.SIGCONT)
        elif kind.startswith("clock"):
            self._clock.write_text(kind.removeprefix("clock "))
            self._process.send_signal(signal.SIGUSR2)
            time.sleep(seconds)
            self._clock.write_text("0")
            self._process.send_signal(signal.SIGUSR2)
        else:
            assert kind in STORE_FAULTS
            self.store.fault = kind
            time.sleep(seconds)
            self.store.fault = None
        self.troubles[trouble] = (began, time.monotonic())

    def sees_since(self, at: float, bound: float) -> float:
        """How old an answer may be that it gives at some time: `bound` seconds, and longer if it was in trouble."""
        since = at - bound
        for began, ended in sorted(self.troubles, reverse=True):
            if began < at and ended > since:
                since = min(since, began - bound)
        return since

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


def watch_the_machine(nodes: list[Node], until: float) -> None:
    """Note as a trouble of all nodes when this process did not run, as on a machine that is overloaded or suspended."""
    before = time.monotonic()
    while before < until:
        time.sleep(TICK_SECONDS)
        now = time.monotonic()
        if now - before > LATE_SECONDS:
            for node in nodes:
                node.troubles.append((before, now))
        before = now


def in_threads(work: list[threading.Thread]) -> None:
    """Start all and wait for all."""
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
