"""Measures what interpretation costs: seconds and memory without data, and what a job of experiments costs requests.

Clients of the classify workload of serve.py request short answers, in rounds with and without a running job of
`POST /interpretations`. Rounds are interleaved, because the machine's speed varies from minute to minute.

    python benchmarks/interpret.py
    python benchmarks/interpret.py --rounds 1 --seconds 8

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
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from load import Load, Measured, started
from peers import Model, Prelude, Workload
from tqdm import tqdm

from server.engine.build_engine import load_engine
from server.engine.model.weights import resolve_checkpoint
from server.interpret.null_cache import NullCache
from server.interpret.static import Interpreter
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts

ROOT = Path(__file__).parents[1]
TASK = "sms_spam"
ROWS = 500
START_SECONDS = 120
KEYS = ("tokens_per_second", "requests_per_second", "first_token_p50_ms", "first_token_p99_ms")


def static_costs(settings: Settings) -> dict[str, float]:
    """Seconds and MiB of interpretations without data: the first one, which draws the nulls, and a later one."""
    engine, process, found = load_engine(settings), psutil.Process(), {}
    for task in ("emotion", TASK):
        soft_prompt = load_soft_prompts(ROOT / "prompts" / task, engine.model.spec, settings.max_virtual_tokens)[0]
        interpreter, before = Interpreter(engine.model, NullCache()), process.memory_info().rss
        for name in ("first", "later"):
            began = time.perf_counter()
            interpreter.interpret(task, soft_prompt)
            found[f"{task}, {name}, s"] = time.perf_counter() - began
            if name == "first":  # later ones find its nulls where the server keeps them
                interpreter = Interpreter(engine.model, NullCache(settings.cache_dir / "interpretation"))
                interpreter.interpret(task, soft_prompt)
        found[f"{task}, MiB"] = (process.memory_info().rss - before) / 2**20
    return found


def rows(workload: Workload) -> bytes:
    """Rows of experiments: texts of the workload's kind, with labels."""
    dice = random.Random(0)
    lines = [{"input": workload.text(dice), "target": dice.choice(("ham", "spam"))} for _ in range(ROWS)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@asynccontextmanager
async def experimenting(client: httpx.AsyncClient, data: bytes) -> AsyncIterator[dict[str, float]]:
    """Context manager: a job of experiments that has begun; reports its answers per second after it was cancelled."""
    reply = await client.post(f"/prompts/{TASK}/interpretation", files={"data": ("rows.jsonl", data)})
    reply.raise_for_status()
    path = f"/interpretations/{reply.json()['id']}"
    for _ in range(START_SECONDS):
        job = (await client.get(path)).json()
        if done_of(job) > 0 or job["state"] == "failed":
            break
        await asyncio.sleep(1)
    if job["state"] != "running":
        raise RuntimeError(f"the job does not run: {job}")
    done: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    began, first = loop.time(), done_of(job)
    yield done
    last = done_of((await client.get(path)).json())
    done["answers_per_second"] = (last - first) / (loop.time() - began)
    (await client.post(f"{path}/cancel")).raise_for_status()


def done_of(job: dict[str, Any]) -> int:
    """The number of rows that a job's systems have answered."""
    return int(job["progress"]["done"])


async def measure(
    model: Model, url: str, workload: Workload, options: argparse.Namespace
) -> list[tuple[Measured, Measured, float]]:
    """For each round: the measurements without and with a job, and the job's answers per second."""
    limits = httpx.Limits(max_connections=workload.clients + 4)
    data, peer, rounds = rows(workload), Prelude(model), []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await peer.prepare(client, workload)
        reply = await client.put(f"/prompts/{TASK}", files=soft_prompt_files())
        reply.raise_for_status()
        for _ in tqdm(range(options.rounds), "rounds"):
            alone = await Load(peer, workload, client).run(options.seconds)
            async with experimenting(client, data) as done:
                beside = await Load(peer, workload, client).run(options.seconds)
            rounds.append((alone, beside, done["answers_per_second"]))
    return rounds


def soft_prompt_files() -> list[tuple[str, tuple[str, bytes]]]:
    """The files of an upload of the task."""
    names = ("manifest.json", "adapter_config.json", "adapter_model.safetensors")
    return [("files", (name, (ROOT / "prompts" / TASK / name).read_bytes())) for name in names]


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
        tempfile.TemporaryDirectory(prefix="prelude-interpret-") as folder,
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
    print(f"throughput beside to without: {ratios['tokens_per_second']:.2f} (at least 0.75 is wanted)")
    print(f"first token p99 beside to without: {ratios['first_token_p99_ms']:.2f}")
    speed = statistics.median(answers for _, _, answers in rounds)
    print(f"the job's answers a second meanwhile: {speed:.2f}")
    static = static_costs(settings)
    print("without data: " + "; ".join(f"{name} {value:.2f}" for name, value in static.items()))
    print(json.dumps({**result, "ratios": ratios, "job_answers_per_second": speed, "static": static}))


if __name__ == "__main__":
    main()
