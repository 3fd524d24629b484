"""What was acknowledged is there after `kill -9` at any moment: of a process that only publishes, and of a server.

The publisher is forked from a nursery that has imported everything, so that hundreds of them can be killed. It tells of
each change on a pipe only after the registry has returned; what was written to a pipe survives its writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from server.contracts import ModelSpec
from server.errors import PreludeError
from server.registry import log_snapshots as snapshots_module
from server.registry import store as store_module
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.state import RegistryState
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.processes import prelude_serve
from tests.soak import Soak

ROOT = Path(__file__).parents[2]
TASKS = ("a", "b")
SPEC = ModelSpec(
    name="tiny",
    fingerprint="f1",
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
    max_model_len=64,
    dtype="float32",
    device="cpu",
)


def open_registry(root: Path) -> Registry:
    """As a server opens it."""
    return Registry(Store(LocalObjects(root)), SPEC, 32)


def fingerprint(state: RegistryState) -> str:
    """Everything that users could see of a state, in short."""
    seen = {
        name: (task.traffic, task.history, {n: version.content.digest for n, version in task.versions.items()})
        for name, task in sorted(state.tasks.items())
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def shorten_logs() -> None:
    """Let processes that are forked from here make a snapshot every few events, and drop what it replaces at once."""
    for module, name, value in (
        (store_module, "SNAPSHOT_EVENTS", 5),
        (store_module, "PRUNE_SECONDS", 0.0),
        (snapshots_module, "GRACE_SECONDS", -1.0),
    ):
        setattr(module, name, value)


def change_for_ever(root: Path, seed: int, pipe: int) -> None:
    """Make one change after the other, and tell of each once it has returned."""
    registry = open_registry(root)
    dice = random.Random(seed)
    while True:
        registry.compact()
        task = dice.choice(TASKS)
        try:
            match dice.choice(["publish", "publish", "stage", "activate", "rollback", "delete_version", "delete"]):
                case "publish" | "stage" as kind:
                    tensor = torch.full((5, 8), dice.random())
                    soft_prompt = SoftPrompt("PROMPT_TUNING", tensor)
                    registry.publish(task, [soft_prompt], "api", activate=kind == "publish")
                case "activate":
                    registry.activate(task, dice.choice(list(registry.task(task).versions)))
                case "rollback":
                    registry.roll_back(task)
                case "delete_version":
                    registry.delete_version(task, dice.choice(list(registry.task(task).versions)))
                case "delete" if dice.random() < 0.1:
                    registry.delete(task)
        except PreludeError:
            continue  # there was nothing to roll back to, or the version is live
        state = registry._state
        os.write(pipe, f"{state.last_event} {fingerprint(state)}\n".encode())


def nursery(*, short_logs: bool = False) -> None:
    """Per line `root seed seconds`: fork a publisher, kill it so long after its first change, say what it said."""
    torch.set_num_threads(1)
    if short_logs:
        shorten_logs()
    for line in sys.stdin:
        root, seed, seconds = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            change_for_ever(Path(root), int(seed), writing)
        os.close(writing)
        select.select([reading], [], [], 30)
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading) as told:
            lines = told.read().splitlines()
        sys.stdout.write(json.dumps(lines) + "\n")
        sys.stdout.flush()


class Nursery:
    """The nursery from outside."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen

    def kill_one(self, root: Path, seed: int, seconds: float) -> tuple[int, str]:
        """Let a publisher live for so long; the last change that it told of, as event number and fingerprint."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(f"{root} {seed} {seconds}\n")
        self._popen.stdin.flush()
        number, seen = json.loads(self._popen.stdout.readline())[-1].split()
        return int(number), seen


@contextlib.contextmanager
def opened_nursery(arguments: str) -> Iterator[Nursery]:
    command = [sys.executable, "-c", f"from tests.registry.test_kill import nursery; nursery({arguments})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as popen:
        yield Nursery(popen)
        assert popen.stdin is not None
        popen.stdin.close()
        assert popen.wait(20) == 0


@pytest.fixture(scope="module")
def publishers() -> Iterator[Nursery]:
    with opened_nursery("") as opened:
        yield opened


@pytest.mark.soak
def test_what_a_killed_publisher_acknowledged_is_there(soak: Soak, tmp_path: Path, publishers: Nursery) -> None:
    extra = 0
    for i in soak.rounds(short=10, full=300, desc="kills of a publisher"):
        told, seen = publishers.kill_one(tmp_path, soak.random.randrange(2**32), soak.random.uniform(0, 0.05))
        store = Store(LocalObjects(tmp_path))
        events = store.events()
        assert len(events) in (told, told + 1), "a change was lost, or more than one was under way"
        assert fingerprint(RegistryState(events[:told])) == seen, "the events do not lead to what was acknowledged"
        extra += len(events) - told
        assert_every_blob_passes(open_registry(tmp_path))
        if i % 50 == 49:  # a long history would make each round slower
            tmp_path = tmp_path / "next"
    assert extra < soak.count(10, 300), "every kill came in the same place"


@pytest.mark.soak
def test_what_a_killed_publisher_acknowledged_is_there_although_it_shortens_the_log(soak: Soak, tmp_path: Path) -> None:
    longest = 0
    with opened_nursery("short_logs=True") as publishers:
        for _ in soak.rounds(short=8, full=300, desc="kills of a publisher that shortens the log"):
            told, seen = publishers.kill_one(tmp_path, soak.random.randrange(2**32), soak.random.uniform(0, 0.05))
            store = Store(LocalObjects(tmp_path))
            state = store.load()
            assert state.last_event in (told, told + 1), "a change was lost, or more than one was under way"
            before = store.snapshots.newest([n for n in store.snapshots.numbers() if n <= told])
            before.take_all(entry for entry in store.events(before.last_event) if entry.number <= told)
            assert fingerprint(before) == seen, "snapshot and events do not lead to what was acknowledged"
            assert_every_blob_passes(open_registry(tmp_path))
            longest = max(longest, len(list((tmp_path / "events").iterdir())))
    assert len(store.snapshots.numbers()) <= 4
    assert longest < 40, "the log was not shortened"


def assert_every_blob_passes(registry: Registry) -> None:
    """Each version's content is whole and is the one that its event promises."""
    assert registry.errors == {}
    for task in registry.tasks():
        for number, version in task.versions.items():
            soft_prompt = registry.fetch(registry.resolve(f"{task.name}@{number}")).result()
            assert soft_prompt.digest == version.content.digest


class Publisher(threading.Thread):
    """Publishes one version after the other until the server is gone."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__()
        self._url = url
        self._seed = seed
        self.acknowledged: dict[int, str] = {}
        self.has_begun = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client, contextlib.suppress(httpx.TransportError):
            for number in range(1000):
                reply = client.put("/prompts/t", files=upload(self._seed + number))
                assert reply.status_code == 201, reply.text
                self.acknowledged[reply.json()["version"]] = reply.json()["digest"]
                self.has_begun.set()


@pytest.mark.soak
def test_what_a_killed_server_acknowledged_is_there(soak: Soak, tmp_path: Path, served_tiny: dict[str, str]) -> None:
    known: dict[int, str] = {}
    for i in soak.rounds(short=1, full=6, desc="kills of a server"):
        with prelude_serve(tmp_path, **served_tiny) as process:
            known = assert_all_are_there(process.client, known)
            publisher = Publisher(str(process.client.base_url), seed=1000 * i)
            publisher.start()
            assert publisher.has_begun.wait(60)
            time.sleep(soak.random.uniform(0, 0.3))
            process.popen.kill()
            publisher.join(60)
            known |= publisher.acknowledged
    with prelude_serve(tmp_path, **served_tiny) as process:
        known = assert_all_are_there(process.client, known)
        for version in known:
            assert process.client.get(f"/prompts/t/versions/{version}/download").status_code == 200
        reply = process.client.post("/generate?task=t", json={"inputs": "hello", "parameters": {"max_new_tokens": 2}})
        assert reply.headers["prelude-version"] == str(max(known))


def assert_all_are_there(client: httpx.Client, acknowledged: dict[int, str]) -> dict[int, str]:
    """What was acknowledged is kept and the newest is live; answers what is, which may be one change more."""
    if not acknowledged:
        return {}
    listed = client.get("/prompts/t/versions").json()
    kept: dict[int, str] = {entry["version"]: entry["digest"] for entry in listed["versions"]}
    assert listed["live"] == max(kept)
    assert {version: kept.get(version) for version in acknowledged} == acknowledged
    assert len(kept) - len(acknowledged) in (0, 1)
    return kept


def upload(seed: int) -> list[tuple[str, tuple[str, bytes]]]:
    """A PROMPT_TUNING soft prompt for the tiny model, as a form."""
    from safetensors.torch import save

    tensor = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) / 10
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    return [
        ("files", ("adapter_config.json", json.dumps(config).encode())),
        ("files", ("adapter_model.safetensors", save({"prompt_embeddings": tensor}))),
    ]
