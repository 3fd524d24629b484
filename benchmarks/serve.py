"""Compares Prelude with other servers over HTTP on the same machine, pair by pair.

For each workload, all servers are started and stay in memory. The first measurement of each counts from the very first
request, because users meet a server without a warm-up. Then the servers are measured in turn, in alternating order,
each time after a short warm-up. Ratios are taken within each turn, so that a machine that becomes slower changes both
sides. Each client sends one request after the other.

    VLLM_PYTHON=vllm/bin/python python benchmarks/serve.py                       # beside vLLM; about 40 minutes
    python benchmarks/serve.py --peers prelude peft --workloads classify --pairs 1 --seconds 8 --first-seconds 8

Prints one table for each workload and, last, one line of JSON. See peers.py for the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from load import WARM_UP_SECONDS, Load, peak_resident, started
from peers import PEERS, Model, Peer, Workload
from tqdm import tqdm

from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

WORKLOADS = {
    "single": Workload(clients=1, output_tokens=32),
    "classify": Workload(clients=32, output_tokens=4),
    "choices": Workload(clients=32, output_tokens=4, choices=(" positive", " negative")),
    "generate": Workload(clients=64, output_tokens=32),
}


@dataclass
class Contestant:
    """A running server and its figures.

    Attributes:
        first: figures from the very first request on.
        turns: figures of each turn, in order.
    """

    peer: Peer
    url: str
    process: psutil.Process
    first: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)

    async def measure(self, workload: Workload, seconds: float, warm_up_seconds: float) -> dict[str, float]:
        """The figures of one turn."""
        limits = httpx.Limits(max_connections=workload.clients + 4)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            measured = await Load(self.peer, workload, client).run(seconds, warm_up_seconds)
        measured.rss = peak_resident(self.process)
        return measured.figures()

    def publish(self, workload: Workload) -> None:
        """Publish the soft prompts that the workload needs."""

        async def prepare() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
                await self.peer.prepare(client, workload)

        asyncio.run(prepare())


@contextlib.contextmanager
def contestants(model: Model, names: list[str], workload: Workload) -> Iterator[list[Contestant]]:
    """Context manager: all servers, running and prepared."""
    with contextlib.ExitStack() as stack:
        running = []
        for name in names:
            peer = PEERS[name](model)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prelude-serve-"))
            running.append(Contestant(peer, *stack.enter_context(started(peer, workload, Path(folder)))))
            running[-1].publish(workload)
        yield running


def compare(model: Model, workload: Workload, options: argparse.Namespace, bar: tqdm[None]) -> list[Contestant]:
    """Measure all servers that take this workload."""
    names = [name for name in options.peers if PEERS[name].chooses or not workload.choices]
    bar.set_postfix_str(f"starting {', '.join(names)}")
    with contestants(model, names, workload) as running:
        for contestant in running:
            bar.set_postfix_str(f"{contestant.peer.name}, first run")
            contestant.first = asyncio.run(contestant.measure(workload, options.first_seconds, 0))
            bar.update()
        for number in range(options.pairs):
            for contestant in running if number % 2 else reversed(running):
                bar.set_postfix_str(contestant.peer.name)
                contestant.turns.append(
                    asyncio.run(contestant.measure(workload, options.seconds, options.warm_up_seconds))
                )
                bar.update()
    return running


def ratios(ours: Contestant, theirs: Contestant, figure: str) -> list[float]:
    """Our figure divided by theirs, turn by turn."""
    return [mine[figure] / its[figure] for mine, its in zip(ours.turns, theirs.turns, strict=True)]


def table(workload: Workload, running: list[Contestant]) -> list[str]:
    """One line for each server: medians, and the first server's ratios to it."""
    lines = [f"{'':<14}" + "".join(f"{title:>12}" for title in COLUMNS.values()) + f"  {running[0].peer.name} to it"]
    for contestant in running:
        medians = {key: statistics.median(turn.get(key, float("nan")) for turn in contestant.turns) for key in COLUMNS}
        lines.append(f"{contestant.peer.name:<14}" + "".join(f"{medians[key]:>12.1f}" for key in COLUMNS))
        if contestant is not running[0]:
            figure = ratios(running[0], contestant, workload.figure)
            first = running[0].first[workload.figure] / contestant.first[workload.figure]
            ttft = statistics.median(ratios(running[0], contestant, "first_token_p50_ms"))
            lines[-1] += (
                f"  {statistics.median(figure):.2f} ({min(figure):.2f}–{max(figure):.2f}); TTFT {ttft:.2f};"
                f" first run {first:.2f}"
            )
    return lines


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["prelude", "vllm-bare"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=6, help="turns of each server and workload")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a turn")
    parser.add_argument("--warm-up-seconds", type=float, default=WARM_UP_SECONDS, help="least warm-up before a turn")
    parser.add_argument("--first-seconds", type=float, default=60.0, help="length of the first run")
    options = parser.parse_args()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    result = {}
    with tqdm(total=len(options.workloads) * len(options.peers) * (1 + options.pairs), desc="measuring") as bar:
        for name in options.workloads:
            running = compare(model, WORKLOADS[name], options, bar)
            bar.write(f"\n{name}: {WORKLOADS[name]}; {os.cpu_count()} cores {platform.machine()}")
            bar.write("\n".join(table(WORKLOADS[name], running)))
            result[name] = {each.peer.name: {"first": each.first, "turns": each.turns} for each in running}
    print(json.dumps(result))


COLUMNS = {
    "requests_per_second": "req/s",
    "tokens_per_second": "tok/s",
    "first_token_p50_ms": "TTFT p50 ms",
    "first_token_p99_ms": "p99",
    "between_tokens_p50_ms": "ITL p50 ms",
    "between_tokens_p99_ms": "p99",
    "rss_mb": "peak MB",
}

if __name__ == "__main__":
    main()
