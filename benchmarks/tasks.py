"""Measures speed, prefix hits and memory by the number of registered soft prompts.

Registers 1, 8, 64, … 10,000 soft prompts of 20 virtual tokens, each number in separate `prelude serve` processes, and
sends requests whose tasks are drawn uniformly (`uniform`) or from a Zipf distribution with exponent 1.1 (`zipf`). The
budget for computed prefixes (PRELUDE_PREFIX_MEMORY) holds all of them, or a quarter:

    tok/s, req/s   medians of the rounds
    ratio          to a server with one task, which is measured again in every round; median of the rounds' ratios
    TTFT           from the request's first byte to the first token, over all rounds
    hits           requests whose prefix was cached, by the server's count
    idle           resident memory of a server after its start with these tasks, before any request

    python benchmarks/tasks.py                                   # a quarter of an hour
    python benchmarks/tasks.py --plot docs/images/tasks.svg      # also draws a picture, like tasks_plot.py
    python benchmarks/tasks.py --short                           # two minutes

Before the measurement, each cache is filled as such requests would fill it in the long run: with all prefixes, or with
those of the most recently requested tasks, in their order. Servers with the same number of tasks run side by side and
are measured in turn; waiting servers get no requests. Answers have 16 tokens on average, from 8 to 24: with equal
lengths, clients would fall into step, and a round would count their batches instead of the server's speed. Prints a
table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import torch
from load import Load, Measured, resident, started, varied
from peers import Call, Prelude, Workload
from task_choice import ZIPF_EXPONENT, Choice
from task_store import NUM_VIRTUAL_TOKENS, SPEC, make_store, task_name
from tasks_plot import draw
from tqdm import tqdm

from server.engine.build_engine import free_memory

COUNTS = (8, 64, 512, 2000, 10_000)
OUTPUT_TOKENS = 16
WARM_UP_SECONDS = 1.0
ASKING_AT_ONCE = 64
SERVER_BYTES = 1_500_000_000
"""A generous estimate of a server's memory without prefixes."""
MB = 1e6


class ManyTasks(Prelude):
    """A server with a prepared store. Its clients send text, so the peer needs no model."""

    def __init__(self, store: Path, choice: Choice, prefix_bytes: int | None) -> None:
        """Create the peer with a budget for prefixes; None for the server's default."""
        self._store, self._choice, self._prefix_bytes = store, choice, prefix_bytes

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        budget = [] if self._prefix_bytes is None else ["--prefix-memory", str(self._prefix_bytes)]
        return [*super().command(port, folder, workload), "--store", f"file:{self._store}", *budget]

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`; the task and the length of the answer are drawn."""
        workload = replace(workload, output_tokens=varied(workload.output_tokens, dice))
        return super().call(workload, self._choice.draw(dice), dice)

    def _params(self, task: int) -> dict[str, str]:
        return {"task": task_name(task)}


@dataclass
class Server:
    """A running server."""

    url: str
    process: psutil.Process
    idle_bytes: int
    info: dict[str, Any]

    def hits_and_misses(self) -> tuple[int, int]:
        """Prefix hits and misses since the start."""
        prefixes = httpx.get(f"{self.url}/info", timeout=60).json()["prefixes"]
        return prefixes["hits"], prefixes["misses"]

    async def ask_for(self, tasks: Sequence[int]) -> None:
        """Request one token of each of these tasks, approximately in this order."""
        waiting = iter(tasks)
        limits = httpx.Limits(max_connections=ASKING_AT_ONCE)
        with tqdm(total=len(tasks), desc=f"warming {len(tasks):,}", unit="task", leave=False) as bar:

            async def ask(client: httpx.AsyncClient) -> None:
                body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
                for task in waiting:
                    reply = await client.post("/generate", params={"task": task_name(task)}, json=body)
                    assert reply.status_code == 200, reply.text
                    bar.update()

            async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
                await asyncio.gather(*(ask(client) for _ in range(ASKING_AT_ONCE)))


@dataclass
class Point:
    """One row of the table: a number of tasks, a budget and a distribution, and their measurements."""

    count: int
    budget: str
    choice: str
    prefix_bytes: int | None = None
    peer: ManyTasks | None = None
    server: Server | None = None
    rounds: list[Measured] = field(default_factory=list)
    base_rates: list[float] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    idle_bytes: int = 0
    warm_bytes: int = 0

    def measure(self, options: argparse.Namespace) -> float:
        """Measure one round; returns its output tokens per second."""
        assert self.server is not None
        hits, misses = self.server.hits_and_misses()
        self.rounds.append(asyncio.run(self._load(options.clients, options.seconds)))
        more_hits, more_misses = self.server.hits_and_misses()
        self.hits += more_hits - hits
        self.misses += more_misses - misses
        self.warm_bytes = resident(self.server.process)
        return self.rounds[-1].tokens / self.rounds[-1].seconds

    async def _load(self, clients: int, seconds: float) -> Measured:
        assert self.server is not None
        assert self.peer is not None
        limits = httpx.Limits(max_connections=clients + 4)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as client:
            workload = Workload(clients=clients, output_tokens=OUTPUT_TOKENS)
            return await Load(self.peer, workload, client).run(seconds, WARM_UP_SECONDS)

    def figures(self) -> dict[str, Any]:
        """The printed figures; times in milliseconds."""
        rates = [measured.tokens / measured.seconds for measured in self.rounds]
        together = Measured(seconds=1.0, first_token=[t for measured in self.rounds for t in measured.first_token])
        times = together.figures()
        return {
            "tasks": self.count,
            "budget": self.budget,
            "choice": self.choice,
            "prefix_bytes": self.prefix_bytes,
            "tokens_per_second": statistics.median(rates),
            "requests_per_second": statistics.median(len(m.first_token) / m.seconds for m in self.rounds),
            "ratio": statistics.median(rate / base for rate, base in zip(rates, self.base_rates, strict=True)),
            "ratios": [rate / base for rate, base in zip(rates, self.base_rates, strict=True)],
            "first_token_p50_ms": times["first_token_p50_ms"],
            "first_token_p99_ms": times["first_token_p99_ms"],
            "requests": len(together.first_token),
            "hit_rate": self.hits / max(1, self.hits + self.misses),
            "idle_mb": self.idle_bytes / MB,
            "warm_mb": self.warm_bytes / MB,
        }


class Bench:
    """Stores, servers and rounds."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        """Start the server with one task, which runs until the end."""
        self._options, self._folder = options, folder
        self._numbers = itertools.count()
        self.base = Point(1, "all", "uniform")
        self._start([self.base], self._store(1), stack)
        assert self.base.server is not None
        self.info = self.base.server.info
        itemsize = int(getattr(torch, self.info["dtype"]).itemsize)
        self.bytes_per_prefix = NUM_VIRTUAL_TOKENS * SPEC.kv_width * itemsize
        self.skipped: list[str] = []

    def points(self, count: int) -> list[Point]:
        """The points for `count` tasks for which there is enough memory."""
        quarter = max(1, count // 4) * self.bytes_per_prefix
        found = [Point(count, "quarter", choice, quarter) for choice in ("uniform", "zipf")]
        everything = count * self.bytes_per_prefix
        need, free = everything + 2 * quarter + 3 * SERVER_BYTES, free_memory(torch.device("cpu"))
        if need <= free:
            return [Point(count, "all", choice, everything) for choice in ("uniform", "zipf")] + found
        self.skipped.append(
            f"{count:,} tasks with room for all: needs {need / MB:,.0f} MB, of which prefixes take "
            f"{everything / MB:,.0f} MB; {free / MB:,.0f} MB are free"
        )
        return found

    def measure(self, points: list[Point], bar: tqdm[Any]) -> None:
        """Measure all rounds of one number of tasks, then stop its servers."""
        count = points[0].count
        with ExitStack() as stack:
            store = self._store(count)
            # Both find all prefixes, so they share a server.
            of_all = [point for point in points if point.budget == "all"]
            for together in [of_all, *([point] for point in points if point not in of_all)]:
                if together:
                    self._start(together, store, stack)
            for number in range(self._options.rounds):
                turn = [*points[number % len(points) :], *points[: number % len(points)]]
                bar.set_postfix_str(f"{count:,} tasks, round {number + 1}")
                base = self.base.measure(self._options)
                self.base.base_rates.append(base)
                bar.update()
                for point in turn:
                    point.measure(self._options)
                    point.base_rates.append(base)
                    bar.update()

    def _store(self, count: int) -> Path:
        folder = self._folder / f"store-{count}"
        with mock.patch("os.fsync"):
            make_store(folder, count)
        return folder

    def _start(self, points: Sequence[Point], store: Path, stack: ExitStack) -> None:
        """Start one server for these points and fill its cache."""
        first, count = points[0], points[0].count
        for point in points:
            point.peer = ManyTasks(store, Choice(point.choice, count), first.prefix_bytes)
        assert first.peer is not None
        folder = self._folder / f"server-{next(self._numbers)}"
        folder.mkdir()
        url, process = stack.enter_context(started(first.peer, Workload(self._options.clients, OUTPUT_TOKENS), folder))
        info = httpx.get(f"{url}/info", timeout=60).json()
        assert info["tasks"] == count, info
        time.sleep(1)  # until the work of the start is done
        server = Server(url, process, resident(process), info)
        for point in points:
            point.server, point.idle_bytes = server, server.idle_bytes
        capacity = count if first.budget == "all" else max(1, count // 4)
        asyncio.run(server.ask_for(Choice(first.choice, count).latest(capacity, random.Random(count))))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all numbers of tasks, one after the other."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="prelude-tasks-", dir=options.folder) as folder, ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        rows = [bench.base]
        counts = [count for count in options.counts if count > 1]
        with tqdm(total=len(counts) * options.rounds * 5, desc="measuring", unit="point") as bar:
            for count in counts:
                points = bench.points(count)
                bar.total -= options.rounds * (4 - len(points))
                bench.measure(points, bar)
                rows += points
    return {
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "model": bench.info["model"],
        "dtype": bench.info["dtype"],
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "bytes_per_prefix": bench.bytes_per_prefix,
        "clients": options.clients,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "zipf_exponent": ZIPF_EXPONENT,
        "idle_bytes_per_task": per_task(rows),
        "skipped": bench.skipped,
        "minutes": (time.perf_counter() - began) / 60,
        "rows": [row.figures() for row in rows],
    }


def per_task(rows: Iterable[Point]) -> dict[int, float]:
    """Bytes per task in a server before any request: the median over the servers with each number of tasks."""
    idle: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        idle[row.count].append(row.idle_bytes)
    base = statistics.median(idle[1])
    return {count: (statistics.median(found) - base) / (count - 1) for count, found in idle.items() if count > 1}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"\n{result['model']}, {result['dtype']}, {result['machine']}; {result['clients']} clients, "
        f"{result['output_tokens']} tokens out on average, {result['num_virtual_tokens']} virtual tokens: "
        f"{result['bytes_per_prefix']:,} bytes a prefix; {result['rounds']} rounds of {result['seconds']:g} s"
    )
    print(f"{'tasks':>7} {'budget':<8} {'MB':>7} {'choice':<8}", end="")
    print("".join(f"{title:>9}" for title in ("tok/s", "req/s", "ratio", "TTFT p50", "p99 ms", "hits %", "idle MB")))
    for row in result["rows"]:
        budget = "" if row["prefix_bytes"] is None else f"{row['prefix_bytes'] / MB:,.1f}"
        print(
            f"{row['tasks']:>7,} {row['budget']:<8} {budget:>7} {row['choice']:<8}"
            f"{row['tokens_per_second']:>9.1f}{row['requests_per_second']:>9.1f}{row['ratio']:>9.3f}"
            f"{row['first_token_p50_ms']:>9.0f}{row['first_token_p99_ms']:>9.0f}{100 * row['hit_rate']:>9.1f}"
            f"{row['idle_mb']:>9.0f}"
        )
    for count, taken in result["idle_bytes_per_task"].items():
        if count >= 512:  # with fewer tasks, differences between servers are larger
            print(f"a task of {count:,} that nobody asked for takes {taken / 1000:.1f} KB of resident memory")
    for line in result["skipped"]:
        print(f"left out: {line}")


def main() -> None:
    """Parse the options, run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of tasks; one task is always measured")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="3, or 2 with --short")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a point in a round")
    parser.add_argument("--short", action="store_true", help="512 tasks only, unless --counts says more")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures, as .svg or .png")
    parser.add_argument("--folder", help="where the stores are made, and removed again; else with temporary files")
    options = parser.parse_args()
    options.counts = options.counts or ([512] if options.short else list(COUNTS))
    options.rounds = options.rounds or (2 if options.short else 3)
    result = run(options)
    show(result)
    if options.plot is not None:
        draw(result, options.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
