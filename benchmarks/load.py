"""HTTP clients and a server process, shared by the benchmarks that measure over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
from peers import Call, Peer, Workload

START_SECONDS = 600
WARM_UP_SECONDS = 3.0
"""Minimum warm-up time; in addition, counting starts only after every client has had a reply."""


@dataclass
class Measured:
    """The measurements of one server in one round."""

    seconds: float = 0.0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    rss: int = 0

    def figures(self) -> dict[str, float]:
        """The figures by name; times in milliseconds."""
        found = {
            "requests_per_second": len(self.first_token) / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "rss_mb": self.rss / 2**20,
        }
        for name, values in (("first_token", self.first_token), ("between_tokens", self.between_tokens)):
            if values:
                found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = 1000 * np.percentile(values, (50, 99))
        return found


def varied(tokens: int, dice: random.Random) -> int:
    """A random answer length with mean `tokens`, because clients with equal lengths fall into step."""
    return max(1, dice.randint(tokens // 2, tokens * 3 // 2))


class Load:
    """The clients of one server."""

    def __init__(self, peer: Peer, workload: Workload, client: httpx.AsyncClient) -> None:
        self._peer, self._workload, self._client = peer, workload, client
        self._measured: Measured | None = None
        self._cold = set(range(workload.clients))  # clients without a reply yet
        self._warm = asyncio.Event()

    async def run(self, seconds: float, warm_up_seconds: float = WARM_UP_SECONDS) -> Measured:
        """Warm up, then count what ends within `seconds`; with no warm-up, count from the first request."""
        tasks = [asyncio.create_task(self._ask(number)) for number in range(self._workload.clients)]
        if warm_up_seconds:
            await asyncio.sleep(warm_up_seconds)
            warm = asyncio.create_task(self._warm.wait())
            await asyncio.wait([warm, *tasks], return_when=asyncio.FIRST_COMPLETED)
        self._measured = measured = Measured()
        began = time.perf_counter()
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        measured.seconds = time.perf_counter() - began
        self._measured = None
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                raise RuntimeError(f"{self._peer.name}: {result!r}")
        return measured

    async def _ask(self, number: int) -> None:
        dice = random.Random(time.time_ns() + number)
        # The first answer has a random length: clients that start together with equal lengths would stay in step
        # forever.
        workload = replace(self._workload, output_tokens=dice.randint(1, self._workload.output_tokens))
        for count in itertools.count(number):
            await self._send(self._peer.call(workload, count % self._workload.tasks, dice))
            workload = self._workload
            self._cold.discard(number)
            if not self._cold:
                self._warm.set()

    async def _send(self, call: Call) -> None:
        began = time.perf_counter()
        arrivals = []
        headers = {"content-type": "application/json"}
        async with self._client.stream(
            "POST", call.path, params=call.params, content=call.body, headers=headers
        ) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code}: {(await reply.aread())[:300]!r}")
            async for line in reply.aiter_lines():
                if self._peer.is_token(line):
                    arrivals.append(time.perf_counter())
                    if self._measured is not None:
                        self._measured.tokens += 1
        ended = time.perf_counter()
        if self._measured is None:
            return
        self._measured.first_token.append((arrivals[0] if arrivals else ended) - began)
        self._measured.between_tokens += [later - sooner for sooner, later in itertools.pairwise(arrivals)]
        if not self._peer.streams:
            self._measured.tokens += self._workload.output_tokens


@contextlib.contextmanager
def started(peer: Peer, workload: Workload, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Context manager: start a server and wait until it answers; yields its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{peer.name}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        command = peer.command(port, folder, workload)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{peer.name} does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url, psutil.Process(process.pid)
    finally:
        if process.poll() is None:  # the measurement may have stopped it
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.terminate()
            _, left = psutil.wait_procs(family, timeout=20)
            for member in left:  # a server that first finishes abandoned requests
                member.kill()
            process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    return False


def resident(process: psutil.Process) -> int:
    """Resident bytes of a server and all its child processes."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


def peak_resident(process: psutil.Process) -> int:
    """The sum of the processes' peak resident bytes; the current bytes if the system does not report peaks."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            total += _high_water(member)
    return total


def _high_water(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    rss: int = process.memory_info().rss
    return rss
