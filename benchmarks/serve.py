"""Prelude beside what a user would pick instead, over HTTP, one server after the other on the same machine.

Every server gets the same model, dtype and kind of texts, from clients that each send one request after the other for a
fixed time. Rounds are interleaved: in each, every server is started, made ready, measured under one load after the
other, each warmed up first, and stopped.

    python benchmarks/serve.py                                        # all that can be started here; long
    python benchmarks/serve.py --peers prelude vllm-prefix --workloads classify --rounds 1 --seconds 10

Prints a table with ratios and, last, one line of JSON. See peers.py for the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from peers import PEERS, Call, Model, Peer, Workload
from tqdm import tqdm

from server.engine.checkpoint import resolve_checkpoint
from server.settings import Settings

WORKLOADS = {
    "generate": Workload(clients=64, output_tokens=32),
    "classify": Workload(clients=32, output_tokens=4),
    "single": Workload(clients=1, output_tokens=32),
}
START_SECONDS = 300
WARM_UP_SECONDS = 3.0
"""At least; and every client has had an answer before anything is counted."""


@dataclass
class Measured:
    """What one server did in one round."""

    seconds: float = 0.0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    peak_rss: int = 0

    def figures(self) -> dict[str, float]:
        """By name; times in milliseconds."""
        found = {
            "requests_per_second": len(self.first_token) / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_rss_mb": self.peak_rss / 2**20,
        }
        for name, values in (("first_token", self.first_token), ("between_tokens", self.between_tokens)):
            if values:
                ordered = sorted(values)
                found[f"{name}_p50_ms"] = 1000 * statistics.median(ordered)
                found[f"{name}_p99_ms"] = 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        return found


class Load:
    """Clients of one server."""

    def __init__(self, peer: Peer, workload: Workload, client: httpx.AsyncClient) -> None:
        self._peer, self._workload, self._client = peer, workload, client
        self._measured: Measured | None = None
        self._cold = set(range(workload.clients))  # clients that have had no answer yet
        self._warm = asyncio.Event()

    async def run(self, seconds: float) -> Measured:
        """Warm up, then count what ends within so many seconds."""
        tasks = [asyncio.create_task(self._ask(number)) for number in range(self._workload.clients)]
        await asyncio.sleep(WARM_UP_SECONDS)
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
        for count in itertools.count(number):
            await self._send(self._peer.call(self._workload, count % self._workload.tasks, dice))
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
    """A server of its own, once it answers; answers its address and its process."""
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
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    return False


def resident(process: psutil.Process) -> int:
    """Bytes of a server and all that it started."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


async def measure(peer: Peer, workload: Workload, url: str, process: psutil.Process, seconds: float) -> Measured:
    """One round of one server."""
    limits = httpx.Limits(max_connections=workload.clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await peer.prepare(client, workload)
        measured = await Load(peer, workload, client).run(seconds)
    measured.peak_rss = resident(process)
    return measured


def run(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Workload -> server -> figures, medians of the rounds."""
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    turns = list(itertools.product(range(options.rounds), options.peers))
    with tqdm(total=len(turns) * len(options.workloads), desc="measuring") as bar:
        for _, peer_name in turns:
            peer, workloads = PEERS[peer_name](model), [WORKLOADS[name] for name in options.workloads]
            bar.set_postfix_str(f"starting {peer_name}")
            with (
                tempfile.TemporaryDirectory(prefix="prelude-serve-") as folder,
                started(peer, workloads[0], Path(folder)) as (url, process),
            ):
                for name, workload in zip(options.workloads, workloads, strict=True):
                    bar.set_postfix_str(f"{peer_name} {name}")
                    measured = asyncio.run(measure(peer, workload, url, process, options.seconds))
                    found[name, peer_name].append(measured.figures())
                    bar.update()
    result: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, peer_name), rows in found.items():
        keys = rows[0].keys()
        result[name][peer_name] = {key: statistics.median(row[key] for row in rows if key in row) for key in keys}
    return dict(result)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one server in one round")
    options = parser.parse_args()
    result = run(options)
    for name, rows in result.items():
        print(f"\n{name}: {WORKLOADS[name]}; {os.cpu_count()} cores {platform.machine()}")
        print(f"{'':<14}" + "".join(f"{title:>10}" for title in COLUMNS.values()) + f"{'prelude/it':>12}")
        ours = rows.get("prelude", {}).get("tokens_per_second", float("nan"))
        for peer_name, row in rows.items():
            cells = "".join(f"{row.get(key, float('nan')):>10.1f}" for key in COLUMNS)
            print(f"{peer_name:<14}{cells}{ours / row['tokens_per_second']:>12.2f}")
    print(json.dumps(result))


COLUMNS = {
    "requests_per_second": "req/s",
    "tokens_per_second": "tok/s",
    "first_token_p50_ms": "TTFT p50",
    "first_token_p99_ms": "p99 ms",
    "between_tokens_p50_ms": "ITL p50",
    "between_tokens_p99_ms": "p99 ms",
    "peak_rss_mb": "RSS MB",
}

if __name__ == "__main__":
    main()
