"""A hostile client beside ordinary ones: nobody else fails or waits long, and the process outlives it unchanged."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from server.engine.model.frozen import FrozenModel
from server.keys.file import add_key
from server.keys.key import Scope
from server.soft_prompts.formats import save_soft_prompt
from tests.api.hostile import ATTACKS, Hostile, attack_for
from tests.api.live import LiveServer, live_server, wait_until
from tests.processes import prelude_serve
from tests.soak import Soak
from tests.support import random_soft_prompt

CLIENTS = 16
MAX_SLOWDOWN = 2.0
MAX_GROWTH = 1.10
TASK = "plain"

QUICK = sorted(
    set(ATTACKS) - {"deep schema", "endless product", "endless intersection", "large references", "slow masks"}
)
"""Those that a server refuses within a moment, whatever machine it has."""


@dataclass
class Crowd:
    """Ordinary clients, each with one request at a time.

    Attributes:
        seconds: what each answer took.
        problems: answers that are not 200.
    """

    url: str
    key: str
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ask_for(self, seconds: float, clients: int = CLIENTS) -> float:
        """Ask until the time is over; the 99th percentile of what an answer took, in seconds."""
        self.seconds.clear()
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self._ask_until, end) for _ in range(clients)]:
                done.result()
        return statistics.quantiles(self.seconds, n=100)[98]

    def _ask_until(self, end: float) -> None:
        headers = {"Authorization": f"Bearer {self.key}"}
        body = {"inputs": "Tell me", "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}
        with httpx.Client(base_url=self.url, timeout=120, headers=headers) as client:
            while time.monotonic() < end:
                began = time.monotonic()
                try:
                    reply = client.post("/generate", params={"task": TASK}, json=body)
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))
                    continue
                self.seconds.append(time.monotonic() - began)
                if reply.status_code != 200:
                    self.problems.append(f"{reply.status_code} {reply.text[:200]}")


def _keys(file: Path) -> tuple[str, str]:
    """Keys for the ordinary clients and for the hostile one."""
    return (
        add_key(file, "crowd", [Scope.ADMIN], None)[1],
        add_key(file, "hostile", [Scope.GENERATE, Scope.PUBLISH], [TASK])[1],
    )


@pytest.mark.soak
def test_no_quick_attack_makes_anybody_else_fail(soak: Soak, tmp_path: Path) -> None:
    ordinary, key = _keys(tmp_path / "keys.json")
    with live_server(tmp_path, api_keys_file=tmp_path / "keys.json") as server:
        _publish(server, ordinary)
        random.seed(soak.random.random())
        hostile = Hostile(server.port, key, TASK, seconds=10)
        crowd = Crowd(server.url, ordinary)
        asking = threading.Thread(target=lambda: crowd.ask_for(soak.count(1, 20), clients=4))
        asking.start()
        for _ in soak.rounds(1, 20, "rounds of attacks"):
            for name in QUICK:
                hostile.attack(name)
        asking.join()
        hostile.leave()
        assert crowd.problems == []
        assert not [name for name, statuses in hostile.statuses.items() if max(statuses) >= 500]
        wait_until(lambda: not server.worker.num_in_flight, seconds=20)


def _publish(server: LiveServer, key: str) -> None:
    server.client.headers["Authorization"] = f"Bearer {key}"
    server.publish_random(TASK)


@pytest.mark.soak
def test_a_hostile_client_neither_slows_nor_ends_a_server_nor_leaves_anything_in_its_memory(
    soak: Soak, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    soak.only_in_full()
    smollm2: FrozenModel = request.getfixturevalue("smollm2")  # not loaded to be skipped
    ordinary, key = _keys(tmp_path / "keys.json")
    save_soft_prompt(tmp_path / "prompts" / TASK, random_soft_prompt(smollm2.spec, seed=1), smollm2.spec)
    settings = {"PRELUDE_API_KEYS_FILE": str(tmp_path / "keys.json"), "PRELUDE_MAX_SEQUENCES": "64"}
    with (
        prelude_serve(tmp_path, **settings) as process,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as hostile,
    ):
        port = process.client.base_url.port
        assert port is not None
        crowd = Crowd(str(process.client.base_url), ordinary)
        hostile.submit(attack_for, port, key, TASK, soak.seed, 20.0).result()  # what is made once is made now
        crowd.ask_for(10, clients=80)  # and every place is used once: a page of memory costs most at its first use
        crowd.ask_for(10)
        alone = crowd.ask_for(60)
        memory = _memory(process.popen.pid)
        attacks = hostile.submit(attack_for, port, key, TASK, soak.seed + 1, 120.0)
        beside = crowd.ask_for(120)
        statuses = attacks.result()
        time.sleep(20)
        after = _memory(process.popen.pid)
        soak.screen.write(f"p99 alone {alone:.2f} s, beside {beside:.2f} s; memory {memory:,} -> {after:,} bytes\n")
        soak.screen.write("".join(f"  {name}: {sorted(set(found))}\n" for name, found in statuses.items()))
        assert process.popen.poll() is None, process.log.read_text()[-2000:]
        assert crowd.problems == []
        assert not [name for name, found in statuses.items() if max(found) in (500, 502)]
        assert beside <= MAX_SLOWDOWN * alone
        assert after <= MAX_GROWTH * memory
        process.popen.terminate()
        assert process.ended_with(60) == 0


def _memory(pid: int) -> int:
    """Bytes in memory of a server and of its children; what they share counts once (proportional set size)."""
    process = psutil.Process(pid)
    return sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)])
