"""A stress test of one server with all kinds of load at once: answers, swaps, bad input, clients that disconnect.

    python benchmarks/soak.py                    # 10 minutes
    python benchmarks/soak.py --minutes 1

Every reply is checked against the replies that its request allows. At the end the server must be idle and ready, and
exit with 0 on SIGTERM; its log must not contain a traceback, and its memory must not have grown by more than 5 % since
the end of the warm-up (a fifth of the time). Prints the actions, the unexpected results and, last, one line of JSON;
exits with 1 if there were unexpected results.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from load import started
from peers import Model, Prelude, Workload
from soak_clients import ACTIONS, TASKS, Soak
from tqdm import tqdm

from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

WARM_SHARE = 0.2
GROWTH_PERCENT = 5.0
STOP_SECONDS = 30.0
"""Time limit for the server to stop; an idle server takes a second or two."""
MiB = 2**20


class SmallPrelude(Prelude):
    """A server with small caches, which fill up soon, so that later growth is a leak."""

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        limits = ("--kv-memory", "512MiB", "--prefix-memory", "64MiB", "--host-memory", "8MiB")
        return [*super().command(port, folder, workload), *limits]


async def run(url: str, process: psutil.Process, options: argparse.Namespace) -> Soak:
    """Run all clients for the whole time, then wait until the server is idle."""
    limits = httpx.Limits(max_connections=options.clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        soak = Soak(client, (await client.get("/info")).json()["hidden_size"])
        for task in TASKS:
            await soak.ask("publish", {201}, "PUT", f"/prompts/{task}", files=soak.upload(random.Random(task)))
        began, seconds = time.monotonic(), 60 * options.minutes
        actions, weights = list(ACTIONS), list(ACTIONS.values())

        async def work(number: int) -> None:
            dice = random.Random(options.seed * 1000 + number)
            while time.monotonic() - began < seconds:
                await dice.choices(actions, weights)[0](soak, dice)

        workers = asyncio.gather(*(work(number) for number in range(options.clients)))
        with tqdm(total=int(seconds), unit="s", desc="soak") as bar:
            while not workers.done():
                await asyncio.sleep(1)
                bar.update(min(1, int(seconds) - bar.n))
                bar.set_postfix_str(f"{sum(soak.done.values()):,} replies, {len(soak.unexpected)} unexpected")
                soak.memory.append((time.monotonic() - began, process.memory_info().rss))
        await workers
        for _ in range(100):
            if not (await client.get("/info")).json()["in_flight"]:
                break
            await asyncio.sleep(0.1)
        else:
            soak.unexpected.append("requests are in flight though nobody waits")
        await soak.ask("ready", {200}, "GET", "/ready")
    return soak


def stop(process: psutil.Process) -> int | None:
    """The exit status of a server on SIGTERM; None if it does not end."""
    process.terminate()
    with contextlib.suppress(psutil.TimeoutExpired):
        status: int | None = process.wait(STOP_SECONDS)
        return status
    return None


def growth(memory: list[tuple[float, int]]) -> tuple[float, float, float]:
    """Megabytes after the warm-up and at the end, and the growth in percent; medians over a tenth of the time each."""
    seconds = memory[-1][0]

    def around(share: float) -> float:
        values = [rss for at, rss in memory if share <= at / seconds <= share + 0.1]
        return statistics.median(values) / MiB

    warm, end = around(WARM_SHARE), around(0.9)
    return warm, end, 100 * (end / warm - 1)


def main() -> int:
    """Run the test, stop the server, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    peer = SmallPrelude(model)
    with tempfile.TemporaryDirectory(prefix="prelude-soak-") as folder:
        with started(peer, Workload(1, 1), Path(folder)) as (url, process):
            soak = asyncio.run(run(url, process, options))
            status = stop(process)
            soak.check("stop", status == 0, f"the server ended with {status}")
        log = Path(folder, f"{peer.name}.log").read_text()
    if "Traceback" in log:
        soak.unexpected.append("the log has a traceback:\n" + log[log.index("Traceback") :][:3000])
    warm, end, percent = growth(soak.memory)
    if percent > GROWTH_PERCENT:
        soak.unexpected.append(f"memory grew by {percent:.1f} %")
    print(f"\n{os.cpu_count()} cores {platform.machine()}, {options.minutes:g} minutes, {options.clients} clients")
    for name, count in sorted(soak.done.items()):
        print(f"{name:<24}{count:>8,}")
    print(f"resident memory: {warm:,.0f} MiB once warm, {end:,.0f} MiB at the end, {percent:+.1f} %")
    print(f"unexpected: {len(soak.unexpected)}")
    for problem in soak.unexpected[:20]:
        print(f"  {problem}")
    result = {"replies": sum(soak.done.values()), "unexpected": len(soak.unexpected), "growth_percent": percent}
    print(json.dumps({**result, "warm_mib": warm, "end_mib": end, "done": soak.done}))
    return int(bool(soak.unexpected))


if __name__ == "__main__":
    sys.exit(main())
