"""Measures how much the event loop and the engine's thread slow each other down: they share one interpreter lock.

The same requests, always 64 in flight, are sent in interleaved rounds:

    direct    to an engine whose steps run in a plain loop
    worker    through the engine's thread to coroutines, as the API awaits it, without HTTP
    http      to `prelude serve`, as server-sent events

Each runs in a separate process; waiting processes are idle. The ratio of `worker` to `direct` shows the cost of passing
results between threads; a client with a reply also sends its next request only after the next step has begun. The ratio
of `http` to `worker` adds HTTP, JSON and this benchmark's clients, which use the same cores; their share of the
processor time is therefore reported too. In the server's process a task sleeps 5 ms at a time and records how late it
wakes (the loop's lag), both idle and under load. uvloop's timers have a resolution of one millisecond.

    python benchmarks/loop.py                      # two minutes
    python benchmarks/loop.py --rounds 1 --seconds 4

Prints a table and, last, one line of JSON.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from server.huge_pages import restart_with_huge_pages
from server.openmp import share_cores

if __name__ == "__main__":
    restart_with_huge_pages()
share_cores()  # before torch

import httpx  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import uvloop  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from load import Load, started, varied  # noqa: E402
from peers import Call, PreludeBare, Workload  # noqa: E402
from tqdm import tqdm  # noqa: E402

from server import serve as server_serve  # noqa: E402
from server.api.app import create_app  # noqa: E402
from server.contracts import GenerationRequest, SamplingParams  # noqa: E402
from server.engine.engine import Engine  # noqa: E402
from server.engine.worker import EngineWorker  # noqa: E402
from server.settings import Settings  # noqa: E402

STREAMS = 64
OUTPUT_TOKENS = 32
"""Mean number of output tokens, varied from half to one and a half times, so that clients do not fall into step."""
PROBE_SECONDS = 0.005
IDLE_SECONDS = 3.0
ENGINE_WARM_UP_SECONDS = 4.0
ENGINES = ("direct", "worker")


class Probe:
    """A service that records by how many seconds a sleeping task of the event loop wakes too late."""

    def __init__(self) -> None:
        """Prepare the probe."""
        self._late: list[float] = []

    def start(self) -> None:
        """Start the task; called on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Do nothing: the task ends with its loop."""

    def take(self) -> list[float]:
        """The delays since the last call."""
        late, self._late = self._late, []
        return late

    async def _run(self) -> None:
        while True:
            due = time.perf_counter() + PROBE_SECONDS
            await asyncio.sleep(PROBE_SECONDS)
            self._late.append(max(0.0, time.perf_counter() - due))


def serve_with_probe(folder: Path, port: int) -> None:
    """Run `prelude serve` with an additional task and route in its app."""
    probe = Probe()

    def probed(settings: Settings, worker: EngineWorker, registry: Any, services: Sequence[Any], keys: Any) -> FastAPI:
        app = create_app(settings, worker, registry, [*services, probe], keys)
        app.add_api_route("/lag", probe.take)
        return app

    with mock.patch.object(server_serve, "create_app", probed):
        server_serve.serve(Settings.load(port=port, prompts_dir=folder, max_sequences=STREAMS))


class Probed(PreludeBare):
    """A server with the probe, started from this file."""

    name = "http"

    def __init__(self) -> None:
        """Create the peer without a model, because its clients send text."""

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        return [sys.executable, __file__, "--child", "http", str(folder), str(port)]

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        return super().call(replace(workload, output_tokens=varied(OUTPUT_TOKENS, dice)), task, dice)


def requests(engine: Engine) -> Iterator[GenerationRequest]:
    """The requests of `Probed`, tokenised, with log-probabilities as in streams."""
    dice, workload = random.Random(0), Workload(STREAMS, OUTPUT_TOKENS)
    for number in itertools.count():
        ids = tuple(engine.model.text.encode(workload.text(dice)))
        params = SamplingParams(max_new_tokens=varied(OUTPUT_TOKENS, dice), ignore_eos=True, logprobs=True)
        yield GenerationRequest(str(number), ids, params)


class Direct:
    """An engine whose steps run on the process's only thread."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine."""
        self._engine, self._requests = engine, requests(engine)

    def tokens(self, seconds: float) -> int:
        """Run steps for `seconds`; returns the number of tokens."""
        end, tokens = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            tokens += self._step()
        return tokens

    def _step(self) -> int:
        scheduler = self._engine.scheduler
        for _ in range(STREAMS - len(scheduler.waiting) - len(scheduler.running)):
            self._engine.add(next(self._requests), None)
        return sum(delta.token is not None for delta in self._engine.step())

    def rate(self, seconds: float) -> float:
        """Tokens per second, after the same warm-up as over HTTP; aborts all requests at the end."""
        self.tokens(ENGINE_WARM_UP_SECONDS)
        began = time.perf_counter()
        tokens = self.tokens(seconds)
        rate = tokens / (time.perf_counter() - began)
        for sequence in [*self._engine.scheduler.waiting, *self._engine.scheduler.running]:
            self._engine.abort(sequence.request_id)
        return rate


class Awaited:
    """An engine on its own thread, awaited by one coroutine for each stream."""

    def __init__(self, engine: Engine) -> None:
        """Start the thread; called on the event loop."""
        self._worker, self._requests = EngineWorker(engine), requests(engine)
        self._worker.start()
        self._tokens = 0

    async def rate(self, seconds: float) -> float:
        """Tokens per second; see `Direct.rate`."""
        streams = [asyncio.create_task(self._ask()) for _ in range(STREAMS)]
        await asyncio.sleep(ENGINE_WARM_UP_SECONDS)
        before, began = self._tokens, time.perf_counter()
        await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        rate = (self._tokens - before) / (time.perf_counter() - began)
        for stream in streams:
            stream.cancel()
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
        return rate

    async def _ask(self) -> None:
        while True:
            async for delta in self._worker.generate(next(self._requests), None):
                self._tokens += delta.token is not None


def run_engine(name: str) -> None:
    """The child process: prints "ready", then for each line with a number of seconds the tokens per second."""
    settings = Settings.load(max_sequences=STREAMS)
    if name == "direct":
        direct = Direct(server_serve.start_engine(settings))
        print("ready", flush=True)
        for line in sys.stdin:
            print(direct.rate(float(line)), flush=True)
        return

    async def work() -> None:
        awaited = Awaited(engine)
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(await awaited.rate(float(line)), flush=True)

    with ThreadPoolExecutor(1) as starter:  # as in `serve`
        engine = starter.submit(server_serve.start_engine, settings).result()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())


@contextmanager
def engine_child(name: str) -> Iterator[subprocess.Popen[str]]:
    """Context manager: a child process that measures on request."""
    command = [sys.executable, __file__, "--child", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", f"{name} does not start"
            yield process
        finally:
            process.kill()


def rate_of(process: subprocess.Popen[str], seconds: float) -> float:
    """Measure one round in a child process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


async def rate_over_http(url: str, process: psutil.Process, seconds: float) -> tuple[float, list[float], float]:
    """One round: tokens per second, the loop's lag, and the clients' share of the processor time that both took."""
    limits = httpx.Limits(max_connections=STREAMS + 4)
    workload = Workload(STREAMS, OUTPUT_TOKENS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await client.get("/lag")
        before = processor_seconds(psutil.Process()), processor_seconds(process)
        measured = await Load(Probed(), workload, client).run(seconds)
        ours = processor_seconds(psutil.Process()) - before[0]
        theirs = processor_seconds(process) - before[1]
        lag = (await client.get("/lag")).json()
    return measured.tokens / measured.seconds, lag, ours / (ours + theirs)


def processor_seconds(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def summary(late: Sequence[float]) -> dict[str, float]:
    """Median and tails in milliseconds."""
    found = {f"p{share}": 1000 * float(np.percentile(late, share)) for share in (50, 99, 99.9)}
    return {**found, "max": 1000 * max(late), "probes": len(late)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start all three processes and measure them in turn."""
    rates: dict[str, list[float]] = {name: [] for name in (*ENGINES, "http")}
    lags: list[float] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory(prefix="prelude-loop-") as folder, ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=3 * options.rounds + 3, desc="starting"))
        engines = {}
        for name in ENGINES:
            engines[name] = stack.enter_context(engine_child(name))
            bar.update()
        workload = Workload(STREAMS, OUTPUT_TOKENS)
        url, process = stack.enter_context(started(Probed(), workload, Path(folder)))
        bar.update()
        bar.set_description("measuring")
        httpx.get(f"{url}/lag")
        time.sleep(IDLE_SECONDS)
        idle = httpx.get(f"{url}/lag").json()
        for _ in range(options.rounds):
            for name in ENGINES:
                rates[name].append(rate_of(engines[name], options.seconds))
                bar.update()
            rate, lag, share = asyncio.run(rate_over_http(url, process, options.seconds))
            rates["http"].append(rate)
            shares.append(share)
            lags += lag
            bar.update()
    return {
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "streams": STREAMS,
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "ratios": {
            f"{name}/{floor}": statistics.median(a / b for a, b in zip(rates[name], rates[floor], strict=True))
            for name, floor in (("worker", "direct"), ("http", "worker"), ("http", "direct"))
        },
        "clients_share": statistics.median(shares),
        "lag_ms": {"idle": summary(idle), "load": summary(lags)},
    }


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each in a round")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        name, *where = options.child
        if name == "http":
            serve_with_probe(Path(where[0]), int(where[1]))
        else:
            run_engine(name)
        return
    result = run(options)
    print(f"\n{result['machine']}, {STREAMS} streams of {OUTPUT_TOKENS} tokens on average, {options.rounds} rounds")
    print("".join(f"{name + ' tok/s':>16}" for name in result["tokens_per_second"]), end="")
    print("".join(f"{name:>16}" for name in result["ratios"]) + f"{'clients CPU':>16}")
    print("".join(f"{rate:>16.1f}" for rate in result["tokens_per_second"].values()), end="")
    print("".join(f"{ratio:>16.3f}" for ratio in result["ratios"].values()) + f"{result['clients_share']:>16.2f}")
    print(f"\n{'lag of the event loop':<24}" + "".join(f"{name:>10}" for name in ("p50", "p99", "p99.9", "max")))
    for name, row in result["lag_ms"].items():
        print(f"{name:<24}" + "".join(f"{row[key]:>7.1f} ms" for key in ("p50", "p99", "p99.9", "max")))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
