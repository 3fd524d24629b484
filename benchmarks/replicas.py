"""Measures replicas under Ray Serve: requests per second, latency, prefix hits by routing, and the time to see a swap.

    python benchmarks/replicas.py                        # 1, 2 and 4 replicas
    python benchmarks/replicas.py --counts 2 --seconds 5

Needs the extra `ray`, and a network namespace with only a loopback interface, because Ray's servers bind every address:

    unshare --net sh -c 'ip link set lo up; exec python benchmarks/replicas.py'

The engine sleeps in each step (`replica_app.py`), so the cores do not decide. Tasks are drawn by Zipf's law, and each
replica has room for a quarter of all prefixes. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from task_choice import Choice

from server.deploy.ray_serve import Options, application
from tests.jobs.support import save_tiny_model
from tests.peft_files import peft_directory

URL = "http://127.0.0.1:8000"
TASKS = 64
SWAPS = 30


def files(seed: int, folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """A soft prompt as a form."""
    directory = peft_directory(folder / f"soft-prompt-{seed}", seed=seed)
    return [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]


def percentile(values: list[float], share: float) -> float:
    """A percentile in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(clients: int, seconds: float, by_task: bool) -> list[float]:
    """Latencies of requests for one token, from clients that each wait for their answer.

    Without `by_task`, each request has another session, so that it goes to a replica by chance.
    """
    choice, latencies = Choice("zipf", TASKS), list[float]()
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=URL, timeout=60, trust_env=False) as client:

        async def ask(seed: int) -> None:
            dice = random.Random(seed)
            while time.monotonic() < end:
                began = time.perf_counter()
                body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
                headers = {} if by_task else {"x-session-id": str(dice.random())}
                params = {"task": f"t{choice.draw(dice)}"}
                reply = await client.post("/generate", params=params, json=body, headers=headers)
                assert reply.status_code == 200, reply.text
                latencies.append(time.perf_counter() - began)

        await asyncio.gather(*map(ask, range(clients)))
    return latencies


def swaps(folder: Path, handle: Any) -> list[float]:
    """Seconds from the acknowledgement of a change until the last replica has it."""
    acknowledged: list[float] = []
    with httpx.Client(base_url=URL, timeout=60, trust_env=False) as client:
        forms = [files(seed, folder) for seed in (1001, 1002)]
        first = len(_taken(handle)[0])
        for number in range(SWAPS):
            client.put("/prompts/swapped", files=forms[number % 2]).raise_for_status()
            acknowledged.append(time.time())
            time.sleep(0.2)
    time.sleep(1)
    replicas = _taken(handle)
    last = max(max(taken, default=0) for taken in replicas)
    events = range(last - SWAPS + 1, last + 1)
    assert first <= last
    return [
        max(taken[event] for taken in replicas) - at
        for event, at in zip(events, acknowledged, strict=True)
        if all(event in taken for taken in replicas)
    ]


async def streams_of_a_killed_replica(handle: Any, count: int) -> dict[str, int]:
    """How streams end, in number, when one of the replicas is killed in their middle."""
    ends: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=URL, timeout=60, trust_env=False) as client:

        async def follow(task: int) -> None:
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 80, "ignore_eos_token": True}}
            last = ""
            try:
                async with client.stream("POST", "/generate_stream", params={"task": f"t{task}"}, json=body) as reply:
                    async for line in reply.aiter_lines():
                        last = line or last
            except httpx.TransportError:
                ends["cut off"] += 1
            else:
                event = json.loads(last.removeprefix("data:"))
                ends[event.get("code", "whole" if event.get("generated_text") is not None else "unfinished")] += 1

        running = [asyncio.create_task(follow(task)) for task in range(1, 4 * count + 1)]
        victim = (await handle.broadcast("pid").results_async(timeout_s=30))[0]
        await asyncio.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        await asyncio.gather(*running)
    return dict(ends)


async def requests_during_a_restart(restart: Callable[[], object]) -> dict[str, int]:
    """Statuses of requests, in number, while all replicas are replaced."""
    statuses: Counter[str] = Counter()
    restarting = asyncio.create_task(asyncio.to_thread(restart))
    async with httpx.AsyncClient(base_url=URL, timeout=60, trust_env=False) as client:

        async def ask(seed: int) -> None:
            dice = random.Random(seed)
            while not restarting.done():
                body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
                reply = await client.post("/generate", params={"task": f"t{dice.randint(1, TASKS)}"}, json=body)
                statuses[str(reply.status_code)] += 1
                await asyncio.sleep(0.1)

        await asyncio.gather(*map(ask, range(4)))
    await restarting
    return dict(statuses)


def _taken(handle: Any) -> list[dict[int, float]]:
    found: list[dict[int, float]] = handle.broadcast("taken").results(timeout_s=30)
    return found


def measure(count: int, by_task: bool, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    from replica_app import MeasuredReplica

    os.environ["PRELUDE_STORE"] = f"file:{folder / f'store-{count}-{by_task}'}"
    arguments = Options(min_replicas=count, max_replicas=count, cpus=0.01)
    replica_app = application(arguments, MeasuredReplica)
    handle = serve.run(replica_app, name="prelude", route_prefix="/")
    with httpx.Client(base_url=URL, timeout=60, trust_env=False) as client:
        for task in range(1, TASKS + 1):
            client.put(f"/prompts/t{task}", files=files(task, folder)).raise_for_status()
    seen = swaps(folder, handle)
    asyncio.run(load(8, 1.0, by_task))
    before = handle.broadcast("hits_and_misses").results(timeout_s=30)
    alone = asyncio.run(load(1, options.seconds / 2, by_task))
    many = asyncio.run(load(8 * count, options.seconds, by_task))
    after = handle.broadcast("hits_and_misses").results(timeout_s=30)
    hits, misses = (sum(row[i] for row in after) - sum(row[i] for row in before) for i in (0, 1))
    restarted = application(arguments.model_copy(update={"downscale_seconds": 601.0, "cpus": 0.02}), MeasuredReplica)
    statuses, ends = {}, {}
    if by_task and count > 1:
        ends = asyncio.run(streams_of_a_killed_replica(handle, count))
        time.sleep(10)
        statuses = asyncio.run(
            requests_during_a_restart(lambda: serve.run(restarted, name="prelude", route_prefix="/"))
        )
    serve.delete("prelude")
    return {
        "replicas": count,
        "routing": "by task" if by_task else "by chance",
        "alone_p50_ms": percentile(alone, 0.5),
        "requests_per_second": len(many) / options.seconds,
        "p50_ms": percentile(many, 0.5),
        "p99_ms": percentile(many, 0.99),
        "hit_rate": hits / max(1, hits + misses),
        "swap_p50_ms": 1000 * statistics.median(seen),
        "swap_max_ms": 1000 * max(seen),
        "swaps": len(seen),
        "killed": ends,
        "restarted": statuses,
    }


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prelude-replicas-") as name:
        folder = Path(name)
        model = save_tiny_model(folder / "tiny")
        prefixes = {"PRELUDE_PREFIX_MEMORY": "20000", "PRELUDE_PROMPTS_DIR": str(folder / "prompts")}
        os.environ.update(
            {"PRELUDE_MODEL": str(model), "PRELUDE_MAX_MODEL_LEN": "128", "PRELUDE_DTYPE": "float32", **prefixes}
        )
        os.environ.update({"PRELUDE_STORE": f"file:{folder / 'store'}", "RAY_USAGE_STATS_ENABLED": "0"})
        os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"
        application(Options())  # sets the variables that Ray's processes need
        ray.init(include_dashboard=False, num_cpus=8, log_to_driver=False)
        rows = []
        for count in options.counts:
            for by_task in (True, False) if count > 1 else (True,):
                rows.append(measure(count, by_task, options, folder))
                print(json.dumps(rows[-1]), flush=True)
        ray.shutdown()
    print(json.dumps({"machine": f"{os.cpu_count()} cores", "rows": rows}))


if __name__ == "__main__":
    main()
