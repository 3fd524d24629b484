"""Ray Serve with replicas, over HTTP. Needs the extra `ray` and a network of its own: `make test-ray`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = [
    pytest.mark.skipif(
        [name for _, name in socket.if_nameindex()] != ["lo"],
        reason="Ray's servers bind every address: `make test-ray` gives them a network of their own",
    ),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # Ray itself uses what is deprecated
]

URL = "http://127.0.0.1:8000"
TASKS = 8
SYNC_SECONDS = 20.0
MAX_SEQUENCES = 4
PATIENCE = 120.0
"""Seconds that a condition may take to come true on a busy machine."""
LONG = {"inputs": "hello", "parameters": {"max_new_tokens": 200, "ignore_eos_token": True}}
SHORT = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}


class Cluster:
    """Ray Serve with one application, and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client = httpx.Client(base_url=URL, timeout=PATIENCE, trust_env=False)
        self.handle: DeploymentHandle[Any]

    def run(self, **options: Any) -> None:
        """Start the application, or replace its replicas by others with these options."""
        from ray import serve

        from server.deploy.ray_serve import Options, application
        from tests.deploy.ray_replica import TestedReplica

        arguments = Options(**{"cpus": 0.01, "max_replicas": options.get("min_replicas", 1), **options})
        self.handle = serve.run(application(arguments, TestedReplica), name="prelude", route_prefix="/")

    def publish(self, task: str, seed: int) -> int:
        """Publish a soft prompt; returns its version."""
        from tests.peft_files import peft_directory

        directory = self.folder / f"soft-prompt-{seed}"
        if not directory.exists():
            peft_directory(directory, seed=seed)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
        reply = self.client.put(f"/prompts/{task}", files=files)
        assert reply.status_code in (200, 201), reply.text
        version: int = reply.json()["tasks"][0]["version"]
        return version

    def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """A method's answers from all replicas that live."""
        answers = self.handle.broadcast(method, *arguments).results(timeout_s=PATIENCE, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def requests(self) -> Counter[tuple[str, str]]:
        """Requests that had an answer so far, by replica and task."""
        found: Counter[tuple[str, str]] = Counter()
        for labels, value in samples(self.client.get("/metrics").text, "prelude_requests_total"):
            if labels["outcome"] == "finished":
                found[labels["replica"], labels["task"]] += int(value)
        return found


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """The samples of a metric."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return [(dict(re.findall(r'(\w+)="([^"]*)"', line)), float(line.rpartition(" ")[2])) for line in lines]


def wait_until(is_true: Callable[[], bool]) -> float:
    """Wait for a condition; returns the seconds that it took."""
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)
    return time.monotonic() - began


async def end_of_stream(client: httpx.AsyncClient, task: str, begun: asyncio.Event | None = None) -> str:
    """How a stream ends: `whole`, the code of an error event, or `cut off`."""
    last = ""
    try:
        async with client.stream("POST", "/generate_stream", params={"task": task}, json=LONG) as reply:
            async for line in reply.aiter_lines():
                last = line or last
                if line and begun is not None:
                    begun.set()
    except httpx.TransportError:
        return "cut off"
    event = json.loads(last.removeprefix("data:"))
    code: str = event.get("code", "whole" if event.get("generated_text") is not None else "unfinished")
    return code


def streams(tasks: list[str], during: Callable[[], object] = lambda: None) -> Counter[str]:
    """How streams end, in number; `during` runs once all have begun."""

    async def follow_all() -> list[str]:
        async with httpx.AsyncClient(base_url=URL, timeout=PATIENCE, trust_env=False) as client:
            begun = [asyncio.Event() for _ in tasks]
            following = [asyncio.create_task(end_of_stream(client, *pair)) for pair in zip(tasks, begun, strict=True)]
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), PATIENCE)
            await asyncio.to_thread(during)
            return await asyncio.gather(*following)

    return Counter(asyncio.run(follow_all()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from server.deploy.ray_environment import prepare
    from tests.jobs.support import save_tiny_model

    folder = tmp_path_factory.mktemp("ray")
    own = {
        "PRELUDE_MODEL": str(save_tiny_model(folder / "tiny")),
        "PRELUDE_MAX_MODEL_LEN": "256",
        "PRELUDE_DTYPE": "float32",
        "PRELUDE_MAX_SEQUENCES": str(MAX_SEQUENCES),
        "PRELUDE_SYNC_SECONDS": str(SYNC_SECONDS),
        "PRELUDE_PROMPTS_DIR": str(folder / "prompts"),
        "PRELUDE_STORE": f"file:{folder / 'store'}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        prepare()
        ray.init(include_dashboard=False, num_cpus=8, log_to_driver=False)
        cluster = Cluster(folder)
        try:
            cluster.run(min_replicas=2)
            for number in range(TASKS):
                cluster.publish(f"t{number}", number)
            yield cluster
        finally:
            cluster.client.close()
            ray.shutdown()


def test_tokens_arrive_as_they_are_made_and_a_closed_stream_frees_its_sequence(cluster: Cluster) -> None:
    with cluster.client.stream("POST", "/generate_stream?task=t0", json=LONG) as reply:
        lines = (line for line in reply.iter_lines() if line)
        first = json.loads(next(lines).removeprefix("data:"))
        assert "token" in first
        assert first["generated_text"] is None, "it has not ended"
        assert sum(cluster.ask_all("running")) == 1
    wait_until(lambda: sum(cluster.ask_all("running")) == 0)
    outcomes = samples(cluster.client.get("/metrics").text, "prelude_requests_total")
    assert {labels["outcome"]: value for labels, value in outcomes} == {"aborted": 1}


def test_a_change_that_one_replica_acknowledged_is_served_by_all(cluster: Cluster) -> None:
    def is_everywhere(version: int) -> bool:
        return set(cluster.ask_all("live_version", "swapped")) == {version}

    seconds = []
    for seed in (101, 102, 103, 104):
        version = cluster.publish("swapped", seed)
        seconds.append(wait_until(lambda version=version: is_everywhere(version)))  # type: ignore[misc]
    print(f"announced: all replicas have a change after {sorted(seconds)[1]:.3f} s")
    assert sorted(seconds)[1] < SYNC_SECONDS / 10, "it does not wait for the next look at the store"
    cluster.ask_all("miss_announcements", True)
    version = cluster.publish("swapped", 105)
    late = wait_until(lambda: is_everywhere(version))
    print(f"announcement lost: after {late:.1f} s")
    assert late < 2 * SYNC_SECONDS
    cluster.ask_all("miss_announcements", False)


def test_the_requests_of_a_task_go_to_one_replica_and_overflow_when_it_is_full(cluster: Cluster) -> None:
    before = cluster.requests()
    for number in range(5 * TASKS):
        reply = cluster.client.post("/generate", params={"task": f"t{number % TASKS}"}, json=SHORT)
        assert reply.status_code == 200
    new = cluster.requests() - before
    assert Counter(task for _, task in new) == {f"t{number}": 1 for number in range(TASKS)}, "one replica each"
    assert len({replica for replica, _ in new}) == 2, "not all the same"
    before = cluster.requests()
    assert streams(["t1"] * 2 * MAX_SEQUENCES) == {"whole": 2 * MAX_SEQUENCES}
    assert len(cluster.requests() - before) == 2


def test_one_scrape_has_the_metrics_of_each_replica(cluster: Cluster) -> None:
    text = cluster.client.get("/metrics").text
    running = [labels["replica"] for labels, _ in samples(text, "prelude_requests_running")]
    assert len(running) == len(set(running)) == 2
    assert text.count("# TYPE prelude_requests_running ") == 1


def test_streams_of_a_killed_replica_end_with_an_error_event_and_nothing_else_ends(cluster: Cluster) -> None:
    pids = cluster.ask_all("pid")
    ends = streams([f"t{number}" for number in range(TASKS)], lambda: os.kill(pids[0], signal.SIGKILL))
    print(f"killed one of two replicas: {dict(ends)}")
    assert set(ends) == {"request_aborted", "whole"}
    wait_until(lambda: len(set(cluster.ask_all("pid")) - {pids[0]}) == 2)


def test_while_replicas_are_replaced_no_request_fails(cluster: Cluster) -> None:
    pids, statuses = set(cluster.ask_all("pid")), Counter[int]()

    def restart() -> None:
        restarting = threading.Thread(target=lambda: cluster.run(min_replicas=2, cpus=0.02))
        restarting.start()
        for number in itertools.count():
            reply = cluster.client.post("/generate", params={"task": f"t{number % TASKS}"}, json=SHORT)
            statuses[reply.status_code] += 1
            if not restarting.is_alive():
                return

    ends = streams([f"t{number}" for number in range(TASKS // 2)], restart)
    print(f"replicas replaced: {dict(statuses)}, streams {dict(ends)}")
    assert set(statuses) == {200}
    assert set(ends) == {"whole"}
    wait_until(lambda: len(now := cluster.ask_all("pid")) == 2 and pids.isdisjoint(now))


def test_replicas_come_with_the_queue_and_go_with_it(cluster: Cluster) -> None:
    cluster.run(min_replicas=1, max_replicas=3, upscale_seconds=1, downscale_seconds=2, target_ongoing_requests=2)
    wait_until(lambda: len(cluster.ask_all("pid")) == 1)
    is_loaded, ends = threading.Event(), Counter[str]()
    is_loaded.set()

    def load() -> None:
        while is_loaded.is_set():
            ends.update(streams([f"t{number}" for number in range(TASKS)]))

    loading = threading.Thread(target=load)
    loading.start()
    up = wait_until(lambda: len(cluster.ask_all("pid")) > 1)
    is_loaded.clear()
    loading.join()
    down = wait_until(lambda: len(cluster.ask_all("pid")) == 1)
    print(f"a second replica after {up:.0f} s of load, one again {down:.0f} s after it; streams: {dict(ends)}")
    assert set(ends) == {"whole"}
