"""Checks clients, probes and the process after a step runs out of memory, and after the device's context is lost."""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import server
from benchmarks.gpu.devices import device_of
from benchmarks.gpu.stage import Run

STREAMS = 8
ENGINE_FAILED = 70
END_SECONDS = 20.0


class Client(threading.Thread):
    """One stream, and how it ended."""

    def __init__(self, port: int, text: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self._port, self._body = port, server.body(text, tokens)
        self.events: list[dict[str, Any]] = []
        self.status: int | None = None
        self.cut: str | None = None
        self.ended_at = 0.0

    def run(self) -> None:
        """Read to the end of the stream."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            connection.request("POST", "/generate_stream", self._body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            self.status = reply.status
            if reply.status != 200:
                self.events.append(json.loads(reply.read()))
                return
            for line in reply:
                if line.startswith(b"data:"):
                    self.events.append(json.loads(line[5:]))
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self.cut = repr(exc)
        finally:
            self.ended_at = time.monotonic()

    @property
    def end(self) -> str:
        """How the stream ended, in one word."""
        if self.cut is not None:
            return "cut"
        if not self.events:
            return "empty"
        return "error" if "error" in self.events[-1] else "complete"


def measure(run: Run) -> None:
    """Test a tiny server first without memory, then without its device."""
    run.needs(*server.NEEDED)
    device_of(run)
    start = 120.0 if run.rehearse else 30.0
    with tempfile.TemporaryDirectory(prefix="prelude-gpu-") as name:
        folder = Path(name)
        with server.serving(folder, start, rehearse=run.rehearse, tiny=True) as live:
            _no_memory(run, live, folder)
            _lost_device(run, live, folder)
    if run.rehearse:
        run.skip("the device's own errors")


def _no_memory(run: Run, live: server.Server, folder: Path) -> None:
    """A request that is too large must end with an error; concurrent and later requests must succeed."""
    small = _started(live, STREAMS, "short", 64 if run.rehearse else 400)
    (folder / "oom").touch()
    large = Client(live.port, "long " * 80, 4)
    large.start()
    large.join(60)
    for client in small:
        client.join(60)
    (folder / "oom").unlink()
    after = Client(live.port, "long " * 80, 4)
    after.start()
    after.join(60)
    run.note(
        no_memory_large=large.end,
        no_memory_others=_ends(small),
        no_memory_afterwards=after.end,
        no_memory_health=live.status_of("/health"),
    )
    run.check(large.end == "error", f"a request without memory: {large.end}, {large.cut or large.events[-1:]}")
    run.check(all(client.end == "complete" for client in small), f"those beside it: {_ends(small)}")
    run.check(after.end == "complete", f"a request afterwards: {after.end}")
    run.check(live.status_of("/ready") == 200, "the server is not ready after a step without memory")


def _lost_device(run: Run, live: server.Server, folder: Path) -> None:
    """Every stream must end, probes must fail, and the process must end so that it is restarted."""
    streams = _started(live, STREAMS, "short", 400)
    (folder / "assert").touch()
    began = time.monotonic()
    seen: dict[str, set[int | None]] = {"/health": set(), "/ready": set()}
    while live.process.poll() is None and time.monotonic() - began < END_SECONDS:
        for path, statuses in seen.items():
            statuses.add(live.status_of(path))
        time.sleep(0.02)
    ended = time.monotonic() - began
    for client in streams:
        client.join(10)
    run.note(
        lost_streams=_ends(streams),
        lost_streams_s=max(client.ended_at for client in streams) - began,
        lost_health=", ".join(sorted(map(str, seen["/health"]))),
        lost_ready=", ".join(sorted(map(str, seen["/ready"]))),
        lost_process_s=ended,
        lost_status=live.process.poll(),
    )
    run.check(live.process.poll() is not None, f"the process did not end within {END_SECONDS:g} s")
    run.check(live.process.poll() in (None, ENGINE_FAILED), f"it ended with {live.process.poll()}, not {ENGINE_FAILED}")
    run.check(all(client.end == "error" for client in streams), f"streams that were told nothing: {_ends(streams)}")


def _started(live: server.Server, count: int, text: str, tokens: int) -> list[Client]:
    clients = [Client(live.port, f"{text} {number}", tokens) for number in range(count)]
    for client in clients:
        client.start()
    end = time.monotonic() + 30
    while not all(client.events for client in clients):
        if time.monotonic() > end:
            raise RuntimeError(f"streams do not begin: {[client.cut or client.status for client in clients]}")
        time.sleep(0.01)
    return clients


def _ends(clients: list[Client]) -> str:
    ends = [client.end for client in clients]
    return ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))
