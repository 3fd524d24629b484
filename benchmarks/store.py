"""Measures what a store of ten thousand to a million tasks costs: start, memory, snapshots, changes and lists.

    snapshot   size of a snapshot, and seconds to copy the state for it (changes wait) and to encode it
    start      seconds to open the registry on the snapshot and LATER events after it, in a new process
    memory     resident memory that this takes, per task, and the most that it took meanwhile
    change     milliseconds of a publish, of a delete, and of taking over another server's event
    requests   milliseconds of GET /prompts (pages of 100 and of 1,000), GET /prompts/{task}, GET /info, GET /v1/models,
               GET /metrics, and of a request for a task that does not exist; while one task cannot be served

    python benchmarks/store.py                       # 10,000 and 100,000 tasks
    python benchmarks/store.py --tasks 1000000       # 4 GB of memory, ten minutes

Each task has one version, with a manifest of its own like that of `sms_spam`. Blobs are names only. Prints a table and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from task_store import SPEC
from tqdm import tqdm

from server.api.app import create_app
from server.engine.worker import EngineWorker
from server.errors import VersionUnavailable
from server.registry.events import Activate, Event, NewVersion, Publish, VersionContent
from server.registry.log_snapshots import encode
from server.registry.manifest_text import ManifestSummary, ManifestText, compact_json
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.state import RegistryState
from server.registry.store import Store
from server.serve import limits
from server.settings import Settings
from tests.support import make_engine, random_soft_prompt, tiny_model

LATER = 500
"""Events after the newest snapshot: half the distance between two."""
AT = "2026-01-01T00:00:00.000+00:00"
ROUNDS = 20


def task_name(number: int) -> str:
    """The name of a task, numbered from 1."""
    return f"customer-{number:07d}"


def events(tasks: int) -> Iterator[Event]:
    """One publish of each task, in an order that is not the names'."""
    manifest = json.loads((Path(__file__).parents[1] / "prompts" / "sms_spam" / "manifest.json").read_text())
    about: ManifestSummary | None = None
    for number in range(1, tasks + 1):
        task = task_name(number * 7919 % tasks)
        description, digest = f"Is it spam, says {task}?", hashlib.sha256(task.encode()).hexdigest()
        text = ManifestText(compact_json({**manifest, "task": task, "description": description}))
        if about is not None:  # reading a million manifests would take minutes
            text = ManifestText(text.text, replace(about, identity=digest[:16], description=description))
        about = text.about
        numbers = hashlib.sha256(digest.encode()).hexdigest()
        content = VersionContent(digest, numbers, "PROMPT_TUNING", (20, SPEC.hidden_size), 46080, f"{digest}-1", text)
        yield Event(number, AT, "api", "key", Publish((NewVersion(task, 1, content),)))


class NamesOnly(LocalObjects):
    """A folder that says it has the blob of each task."""

    def __init__(self, root: Path, tasks: int) -> None:
        super().__init__(root)
        self._blobs = [f"{hashlib.sha256(task_name(n).encode()).hexdigest()}-1.safetensors" for n in range(tasks)]

    def list(self, folder: str) -> list[str]:
        """See Objects."""
        return self._blobs if folder == "blobs" else super().list(folder)


def make(folder: Path, tasks: int) -> dict[str, float]:
    """Fold the events of all tasks, and write the snapshot and LATER events after it."""
    objects = LocalObjects(folder)
    state = RegistryState(tqdm(events(tasks), f"folding {tasks:,}", total=tasks, unit="task", mininterval=10))
    began = time.perf_counter()
    copy = state.copy()
    copied = time.perf_counter()
    data = encode(copy)
    encoded = time.perf_counter()
    objects.create(f"snapshots/{tasks:012d}.json.gz", data)
    for number in range(tasks + 1, tasks + LATER + 1):
        event = Event(number, AT, "api", "key", Activate(task_name(number % tasks), 1))
        objects.create(f"events/{number:012d}.json", event.to_json())
    return {"snapshot_mb": len(data) / 1e6, "copy_s": copied - began, "encode_s": encoded - copied}


async def requests(registry: Registry) -> dict[str, float]:
    """Milliseconds of some requests."""
    engine = make_engine(tiny_model("llama", dtype=torch.float32))
    settings = Settings(allow_anonymous=True)
    app = create_app(settings, EngineWorker(engine, limits(settings)), registry)
    found: dict[str, float] = {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:

        async def measure(name: str, ask: Callable[[], Awaitable[httpx.Response]], status: int = 200) -> None:
            times: list[float] = []
            while len(times) < ROUNDS and sum(times) < 5:
                began = time.perf_counter()
                reply = await ask()
                times.append(time.perf_counter() - began)
                assert reply.status_code == status, reply.text[:1000]
            found[f"{name}_first_ms"] = 1000 * times[0]
            found[f"{name}_ms"] = 1000 * statistics.median(times)

        body = {"inputs": "hello"}
        await measure("prompts", lambda: client.get("/prompts"))
        await measure("prompts_1000", lambda: client.get("/prompts?limit=1000"))
        await measure("prompt", lambda: client.get(f"/prompts/{task_name(7)}"))
        await measure("unknown", lambda: client.post("/generate?task=custommer-0000007", json=body), 404)
        await measure("info", lambda: client.get("/info"))
        await measure("models", lambda: client.get("/v1/models"))
        await measure("metrics", lambda: client.get("/metrics"))
    return found


def measure(folder: Path, tasks: int) -> dict[str, Any]:
    """Open the registry in this process, change it and ask it."""
    objects = NamesOnly(folder, tasks)
    gc.collect()
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    registry = Registry(Store(objects), SPEC, 512)
    seconds = time.perf_counter() - began
    gc.collect()
    idle = psutil.Process().memory_info().rss
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    changes: dict[str, Callable[[int], object]] = {
        "publish": lambda i: registry.publish(
            f"new-{i}", [random_soft_prompt(SPEC, num_virtual_tokens=20, seed=i)], "api"
        ),
        "unpublish": lambda i: registry.delete(f"new-{i}"),
        "sync": lambda _: registry.sync(),
    }
    other = Store(objects)
    found: dict[str, Any] = {}
    for name, change in changes.items():
        times = []
        for i in range(ROUNDS):
            if name == "sync":
                other.append(Event(registry.last_event + 1, AT, "api", "key", Activate(task_name(i + 1), 1)))
            start = time.perf_counter()
            change(i)
            times.append(time.perf_counter() - start)
        found[f"{name}_ms"] = 1000 * statistics.median(times)
    with contextlib.suppress(VersionUnavailable):  # its blob is only a name
        registry.fetch(registry.resolve(task_name(5))).result()
    assert registry.num_errors == 1
    gc.freeze()
    memory = {"bytes_per_task": (idle - before) / tasks, "most_bytes_per_task": (most - before) / tasks}
    return {"start_s": seconds, **memory, **found, **asyncio.run(requests(registry))}


def run(tasks: int) -> dict[str, Any]:
    """One size; each part in a new process."""
    with tempfile.TemporaryDirectory(prefix="prelude-store-") as folder:
        row: dict[str, Any] = {"tasks": tasks}
        for part in ("make", "measure"):
            command = [sys.executable, __file__, "--part", part, "--folder", folder, "--tasks", str(tasks)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        return row


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--part", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = make if options.part == "make" else measure
        print(json.dumps(part(options.folder, options.tasks[0])))
        return
    rows = [run(tasks) for tasks in options.tasks]
    for name in rows[0]:
        print(f"{name:20}" + "".join(f"{row[name]:>14,.2f}" for row in rows))
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}))


if __name__ == "__main__":
    main()
