"""Measures the time to first token of a quiet task, alone and while another task is flooded.

A few clients send short requests to a quiet task, one after the other, while another task gets either no requests, or
requests for long answers from far more clients than there are slots. On a first-come-first-served server, the quiet
task would wait for the flood's whole queue; on a fair server, it waits only for the current step.

    python benchmarks/fairness.py
    python benchmarks/fairness.py --rounds 1 --seconds 5

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
from pathlib import Path

import httpx
from load import Load, Measured, started
from peers import Call, Model, Prelude, Workload
from tqdm import tqdm

from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

QUIET, FLOOD = 0, 1


class OneTask(Prelude):
    """Prelude, with all requests for one task."""

    def __init__(self, model: Model, task: int) -> None:
        super().__init__(model)
        self._task = task

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        return super().call(workload, self._task, dice)


async def measure(model: Model, url: str, options: argparse.Namespace) -> list[tuple[Measured, Measured]]:
    """Measure the quiet task in each round, alone and beside the flood."""
    quiet = Workload(options.quiet, options.quiet_tokens, tasks=2)
    flood = Workload(options.flood, options.flood_tokens, tasks=2)
    limits = httpx.Limits(max_connections=quiet.clients + flood.clients + 4)
    rounds = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await Prelude(model).prepare(client, quiet)
        for _ in tqdm(range(options.rounds), "rounds"):
            alone = await Load(OneTask(model, QUIET), quiet, client).run(options.seconds)
            flooding = asyncio.create_task(Load(OneTask(model, FLOOD), flood, client).run(options.seconds + 10))
            await asyncio.sleep(5)  # until every slot is taken
            beside = await Load(OneTask(model, QUIET), quiet, client).run(options.seconds)
            await flooding
            rounds.append((alone, beside))
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", type=int, default=16, help="clients of the quiet task")
    parser.add_argument("--quiet-tokens", type=int, default=16, help="of each of its answers")
    parser.add_argument("--flood", type=int, default=256, help="clients of the other one")
    parser.add_argument("--flood-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each half of a round")
    options = parser.parse_args()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    peer, workload = Prelude(model), Workload(options.quiet, options.quiet_tokens, tasks=2)
    with (
        tempfile.TemporaryDirectory(prefix="prelude-fairness-") as folder,
        started(peer, workload, Path(folder)) as (url, _),
    ):
        rounds = asyncio.run(measure(model, url, options))
    print(f"\n{os.cpu_count()} cores {platform.machine()}; {options.quiet} quiet clients, {options.flood} flooding")
    result = {}
    for index, name in enumerate(("alone", "beside the flood")):
        figures = [measured[index].figures() for measured in rounds]
        keys = ("first_token_p50_ms", "first_token_p99_ms", "requests_per_second")
        result[name] = {key: statistics.median(row[key] for row in figures) for key in keys}
        print(f"{name:<18}" + "".join(f"{key:>22} {value:>7.1f}" for key, value in result[name].items()))
    ratios = [b.figures()["first_token_p99_ms"] / a.figures()["first_token_p99_ms"] for a, b in rounds]
    print(f"p99 beside the flood to alone: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
    print(json.dumps({**result, "ratios": ratios}))


if __name__ == "__main__":
    main()
