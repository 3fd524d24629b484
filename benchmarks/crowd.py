"""Opens many streams at once: does each end properly, how long do they take, and how much memory do they need?

All clients connect at the same moment and request a few tokens each, divided among `--tasks` tasks.

    python benchmarks/crowd.py
    python benchmarks/crowd.py --streams 500 --tokens 32

Prints a table and, last, one line of JSON. Exits with 1 if a stream did not end properly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from load import peak_resident, resident, started
from peers import Model, Prelude, Workload

from server.engine.model.weights import resolve_checkpoint
from server.serve import allow_many_connections
from server.settings import Settings


async def stream(peer: Prelude, workload: Workload, client: httpx.AsyncClient, number: int) -> str:
    """Run one stream; returns how it ended."""
    call = peer.call(workload, number % workload.tasks, random.Random(number))
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", call.path, params=call.params, content=call.body, headers=headers) as reply:
            lines = [line async for line in reply.aiter_lines() if line.startswith("data:")]
    except httpx.HTTPError as exc:
        return type(exc).__name__
    if reply.status_code != 200:
        return str(reply.status_code)
    return "whole" if json.loads(lines[-1].removeprefix("data:")).get("generated_text") is not None else "cut off"


async def crowd(model: Model, url: str, process: psutil.Process, workload: Workload) -> dict[str, object]:
    """Start all streams at once."""
    peer = Prelude(model)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        await peer.prepare(client, workload)
        for number in range(workload.tasks):
            await stream(peer, workload, client, number)
        before, began = resident(process), time.perf_counter()
        ends = Counter(await asyncio.gather(*(stream(peer, workload, client, i) for i in range(workload.clients))))
        seconds = time.perf_counter() - began
        info = (await client.get("/info")).json()
    return {
        "ends": dict(ends),
        "seconds": round(seconds, 1),
        "mib_before": round(before / 2**20),
        "mib_peak": round(peak_resident(process) / 2**20),
        "mib_after": round(resident(process) / 2**20),
        "model": info["model"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--tasks", type=int, default=8)
    options = parser.parse_args()
    allow_many_connections()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    workload = Workload(options.streams, options.tokens, tasks=options.tasks)
    with (
        tempfile.TemporaryDirectory(prefix="prelude-crowd-") as folder,
        started(Prelude(model), workload, Path(folder)) as (url, process),
    ):
        result = asyncio.run(crowd(model, url, process, workload))
    print(f"\n{options.streams} streams of {options.tokens} tokens")
    for name, value in result.items():
        print(f"{name:<12} {value}")
    print(json.dumps(result))
    sys.exit(0 if result["ends"] == {"whole": options.streams} else 1)


if __name__ == "__main__":
    main()
