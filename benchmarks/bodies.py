"""Measures the worst bodies: how long they block the server's event loop, and by how much its memory grows.

Each route in /openapi.json that accepts a body gets the worst bodies within its limit, one after the other: many names,
values, items, texts and errors, deep nesting, long names, huge numbers, texts full of escapes or wide characters, each
as the whole body and in each of its fields; forms with large fields and files, many parts, long headers, and files full
of text that resembles a boundary.

In the server's process a task sleeps 5 ms at a time and records how late it wakes: the loop's lag. Only the part of a
lag in which the process itself was computing counts, so that other processes on the same cores are not measured. Memory
is the peak of the resident set minus its size before the request, after freed memory was returned.

    python benchmarks/bodies.py                    # all of them, some minutes
    python benchmarks/bodies.py --short            # a sample, 20 seconds

Prints a table and, last, one line of JSON. Exits with 1 if a lag exceeds 100 ms, or if memory grows by more than three
times the route's limit (JSON) or the body's size (forms, which may be larger and are stored on disk).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from body_shapes import Case, cases_of
from fastapi import FastAPI
from tqdm import tqdm

from server import serve as server_serve
from server.api.app import create_app
from server.engine.worker import EngineWorker
from server.settings import Settings

MOST_LAG_MS = 100.0
MOST_MEMORY = 3
NOISE_BYTES = 8 * 2**20
"""Memory that any request may add: caches that are filled once, threads' stacks."""
ENGINE_BYTES = 512 * 2**20
"""Additional memory that an engine step may take, even for a small body: the logits of all scored tokens."""
FORM_BYTES = 24 * 2**20
REPLY_SECONDS = 60.0
"""Time limit of a client. A thousand inputs take longer, but the measurement is complete by then."""
UNANSWERED = 599
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cost:
    """The measured cost of one body."""

    status: int
    seconds: float
    lag_ms: float
    grown: int


def measure(port: int, process: int, case: Case) -> Cost:
    """Send one body and measure the server."""
    ask(port, "GET", "/bench/lag")
    status = Path(f"/proc/{process}/status")
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5")
    before = _kilobytes(status, "VmRSS")
    began = time.perf_counter()
    answer, reply = ask(port, case.method, case.path, case.body, {"Content-Type": case.content_type})
    seconds = time.perf_counter() - began
    time.sleep(0.02)
    grown = max(0, _kilobytes(status, "VmHWM") - before) * 1024
    lag = json.loads(ask(port, "GET", "/bench/lag")[1])["lag_ms"]
    if answer == 202:  # a job that runs on would be measured with the bodies after it
        ask(port, "DELETE", f"{case.path}/{json.loads(reply)['id']}")
    return Cost(answer, seconds, lag, grown)


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a reply; status 0 if the server closed the connection, `UNANSWERED` after a timeout."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_SECONDS)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (BrokenPipeError, ConnectionResetError):
        return 0, b""
    except TimeoutError:
        return UNANSWERED, b""
    finally:
        connection.close()


def serve(port: int, folder: Path) -> None:
    """Run the server with a probe of its event loop."""

    def probed(settings: Settings, worker: EngineWorker, *others: Any) -> FastAPI:
        app = create_app(settings, worker, *others)
        # Touch all pages now, so that no request is charged for them.
        worker._engine.kv_cache.states.zero_()  # noqa: SLF001
        worst = [0.0]
        libc = ctypes.CDLL(None)

        async def watch() -> None:
            while True:
                began, computed = time.perf_counter(), time.process_time()
                await asyncio.sleep(0.005)
                late = time.perf_counter() - began - 0.005
                worst[0] = max(worst[0], min(late, time.process_time() - computed))

        tasks: list[asyncio.Task[None]] = []

        @app.get("/bench/lag", include_in_schema=False)
        async def lag() -> dict[str, float]:
            if not tasks:
                tasks.append(asyncio.create_task(watch()))
            found, worst[0] = worst[0], 0.0
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
                await asyncio.sleep(0.01)
                worst[0] = 0.0
            return {"lag_ms": 1000 * found}

        return app

    settings = Settings.load(
        port=port, prompts_dir=folder / "prompts", jobs_dir=folder / "jobs", store=f"file:{folder / 'store'}"
    )
    with mock.patch.object(server_serve, "create_app", probed):
        server_serve.serve(settings)


@contextmanager
def started(folder: Path) -> Iterator[tuple[int, int]]:
    """Context manager: start a server; yields its port and process id."""
    shutil.copytree(ROOT / "prompts/sms_spam", folder / "prompts/sms_spam")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    command = [sys.executable, __file__, "--serve", str(port), "--folder", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**environment, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(port, "GET", "/ready")[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not start:\n{(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.3)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_over(case: Case, cost: Cost) -> bool:
    """Whether a case misses the target."""
    allowed = MOST_MEMORY * (case.limit or case.size) + NOISE_BYTES
    if cost.status in (200, UNANSWERED):
        allowed += ENGINE_BYTES
    return cost.lag_ms > MOST_LAG_MS or cost.grown > allowed or 500 <= cost.status < UNANSWERED


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a sample of them")
    parser.add_argument("--sample", type=int, help="so many of them, chosen at random")
    parser.add_argument("--only", default="", help="routes whose path holds this")
    parser.add_argument("--rows", type=int, default=15, help="how many of the worst to print")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="prelude-bodies-") as folder, started(Path(folder)) as (port, process):
        document = json.loads(ask(port, "GET", "/openapi.json")[1])
        form_bytes = FORM_BYTES // (6 if options.short else 1)
        cases = [case for case in cases_of(document, form_bytes) if options.only in case.path]
        routes = {(case.method, case.path) for case in cases}
        count = options.sample or (80 if options.short else len(cases))
        cases = random.Random(7).sample(cases, min(count, len(cases)))
        measure(port, process, cases[0])  # the very first request fills caches
        found: list[tuple[Case, Cost]] = []
        for case in tqdm(cases, desc="bodies", unit="body", mininterval=1 if sys.stderr.isatty() else 30):
            cost = measure(port, process, case)
            for _ in range(3):  # once more: something else may have run at that moment
                if is_over(case, cost):
                    again = measure(port, process, case)
                    cost = min(cost, again, key=lambda one: (is_over(case, one), one.lag_ms))
            found.append((case, cost))
    over = [(case, cost) for case, cost in found if is_over(case, cost)]
    print(f"\n{len(found):,} bodies to {len(routes)} routes; the slowest and the largest, and what misses the target\n")
    slowest = sorted(found, key=lambda one: -one[1].lag_ms)[: options.rows]
    largest = sorted(found, key=lambda one: -one[1].grown)[: options.rows]
    print(f"{'route':<32} {'body':<58} {'MiB':>6} {'status':>6} {'s':>6} {'lag, ms':>8} {'grown, MiB':>10}")
    for case, cost in dict.fromkeys([*over, *slowest, *largest]):
        print(
            f"{case.method + ' ' + case.path:<32.32} {case.shape:<58.58} {case.size / 2**20:>6.1f} {cost.status:>6} "
            f"{cost.seconds:>6.2f} {cost.lag_ms:>8.1f} {cost.grown / 2**20:>10.1f}{'  MISSED' * is_over(case, cost)}"
        )
    worst = {
        "bodies": len(found),
        "routes": len(routes),
        "missed": len(over),
        "lag_ms": round(max(cost.lag_ms for _, cost in found), 1),
        "grown_mib_json": round(max((cost.grown for case, cost in found if case.limit), default=0) / 2**20, 1),
        "grown_mib_form": round(max((cost.grown for case, cost in found if not case.limit), default=0) / 2**20, 1),
    }
    print(json.dumps(worst))
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
