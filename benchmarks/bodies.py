"""What the worst bodies cost a server: how long its event loop stands still, and by how much its memory grows.

Every route of /openapi.json that takes a body is sent, one after the other, the worst that fits within its limit: many
names, values, items, texts and errors, deep nesting, long names, huge numbers, texts full of escapes or of wide
characters, each as the whole body and in each of the body's fields; forms with large fields and files, many parts, long
headers, and files full of what looks like a boundary.

In the server's process a task sleeps 5 ms at a time and notes by how much it wakes too late: the loop's lag. Of that,
only what the process itself has computed meanwhile counts, or a neighbour on the same cores would be measured. Memory
is the peak of the resident set above what it was before the request, once what was freed had been given back.

    python benchmarks/bodies.py                    # all of them, some minutes
    python benchmarks/bodies.py --short            # a sample, 20 seconds

Prints a table and, last, one line of JSON. Ends with 1 if a lag is over 100 ms, or memory grows by more than three
times the route's limit (JSON) or the body (forms, which may be larger and lie on disk).
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
"""What a request may add whatever its body is: caches that are filled once, threads' stacks."""
ENGINE_BYTES = 512 * 2**20
"""What a step of the engine may take beside, however small the body that it answers: logits of all scored tokens."""
FORM_BYTES = 24 * 2**20
REPLY_SECONDS = 60.0
"""A thousand inputs take longer; what is measured has been seen by then, and the client leaves."""
UNANSWERED = 599
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cost:
    """What one came to."""

    status: int
    seconds: float
    lag_ms: float
    grown: int


def measure(port: int, process: int, case: Case) -> Cost:
    """Send one, and look at the server."""
    ask(port, "GET", "/bench/lag")
    status = Path(f"/proc/{process}/status")
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5")
    before = _kilobytes(status, "VmRSS")
    began = time.perf_counter()
    answer, _ = ask(port, case.method, case.path, case.body, {"Content-Type": case.content_type})
    seconds = time.perf_counter() - began
    time.sleep(0.02)
    grown = max(0, _kilobytes(status, "VmHWM") - before) * 1024
    lag = json.loads(ask(port, "GET", "/bench/lag")[1])["lag_ms"]
    return Cost(answer, seconds, lag, grown)


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a reply; 0 where the server hung up, `UNANSWERED` where the answer took too long."""
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
    """The server, with the probe in it."""

    def probed(settings: Settings, worker: EngineWorker, *others: Any) -> FastAPI:
        app = create_app(settings, worker, *others)
        worker._engine.kv_cache.states.zero_()  # noqa: SLF001 - its pages are the server's, whoever uses them first
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
    """A server of its own; answers its port and its process."""
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
        measure(port, process, cases[0])  # the first request of all fills caches
        found: list[tuple[Case, Cost]] = []
        for case in tqdm(cases, desc="bodies", unit="body", mininterval=1 if sys.stderr.isatty() else 30):
            cost = measure(port, process, case)
            if is_over(case, cost):  # once more: a first time may have been another's fault
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
