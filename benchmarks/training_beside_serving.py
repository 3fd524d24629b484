"""Measures how much a training job slows down requests: throughput and time to first token.

Clients of the classify workload of serve.py request short answers, in rounds with and without a running job. Rounds are
interleaved, because the machine's speed varies from minute to minute. The job is a real one, started over HTTP and
cancelled after each of its rounds.

    python benchmarks/training_beside_serving.py
    python benchmarks/training_beside_serving.py --rounds 1 --seconds 8

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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from load import Load, Measured, started
from peers import Model, Prelude, Workload
from tqdm import tqdm

from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

START_SECONDS = 300
LONG = {"steps": 999, "evaluations": 1, "learning_rate": 0.001, "batch_size": 16}
"""Enough steps that the job does not end, but so few that each step is recorded."""
KEYS = ("tokens_per_second", "requests_per_second", "first_token_p50_ms", "first_token_p99_ms")


def rows(workload: Workload) -> bytes:
    """Training rows: texts of the workload's kind, with labels."""
    dice = random.Random(0)
    lines = [{"input": workload.text(dice), "target": dice.choice(("yes", "no"))} for _ in range(2000)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@asynccontextmanager
async def training(client: httpx.AsyncClient, data: bytes) -> AsyncIterator[dict[str, float]]:
    """Context manager: a job that has begun its steps; reports steps and seconds after it was cancelled."""
    form = {"spec": json.dumps({"task": "bench-job", "config": LONG})}
    reply = await client.post("/training/jobs", data=form, files={"data": ("rows.jsonl", data)})
    reply.raise_for_status()
    path = f"/training/jobs/{reply.json()['id']}"
    for _ in range(START_SECONDS):
        job = (await client.get(path)).json()
        if job["step"] > 0 or job["state"] == "failed":
            break
        await asyncio.sleep(1)
    if job["state"] != "running":
        raise RuntimeError(f"the job does not run: {job}")
    done: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    began, first = loop.time(), job["step"]
    yield done
    last = (await client.get(path)).json()["step"]
    done["steps_per_second"] = (last - first) / (loop.time() - began)
    (await client.post(f"{path}/cancel")).raise_for_status()


async def measure(
    model: Model, url: str, workload: Workload, options: argparse.Namespace
) -> list[tuple[Measured, Measured, float]]:
    """For each round: the measurements without and with a job, and the job's steps per second."""
    limits = httpx.Limits(max_connections=workload.clients + 4)
    data, peer, rounds = rows(workload), Prelude(model), []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await peer.prepare(client, workload)
        for _ in tqdm(range(options.rounds), "rounds"):
            alone = await Load(peer, workload, client).run(options.seconds)
            async with training(client, data) as done:
                beside = await Load(peer, workload, client).run(options.seconds)
            rounds.append((alone, beside, done["steps_per_second"]))
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half of a round")
    options = parser.parse_args()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    workload = Workload(options.clients, options.tokens)
    with (
        tempfile.TemporaryDirectory(prefix="prelude-beside-") as folder,
        started(Prelude(model), workload, Path(folder)) as (url, _),
    ):
        rounds = asyncio.run(measure(model, url, workload, options))
    print(f"\n{os.cpu_count()} cores {platform.machine()}; {options.clients} clients, {options.tokens} tokens each")
    result: dict[str, dict[str, float]] = {}
    for index, name in enumerate(("without a job", "beside a job")):
        figures = [(alone, beside)[index].figures() for alone, beside, _ in rounds]
        result[name] = {key: statistics.median(row[key] for row in figures) for key in KEYS}
        print(f"{name:<16}" + "".join(f"{key:>22} {value:>7.1f}" for key, value in result[name].items()))
    pairs = [(alone.figures(), beside.figures()) for alone, beside, _ in rounds]
    ratios = {
        key: statistics.median(beside[key] / alone[key] for alone, beside in pairs)
        for key in ("tokens_per_second", "first_token_p99_ms")
    }
    speed = statistics.median(steps for _, _, steps in rounds)
    print(f"throughput beside to without: {ratios['tokens_per_second']:.2f} (at least 0.75 is wanted)")
    print(f"first token p99 beside to without: {ratios['first_token_p99_ms']:.2f} (at most 2 is wanted)")
    print(f"the job's steps a second meanwhile: {speed:.2f}")
    print(json.dumps({**result, "ratios": ratios, "job_steps_per_second": speed}))


if __name__ == "__main__":
    main()
