"""Every profile of docker-compose.yml that needs no GPU, brought up unchanged and used."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.image.drawing import draw
from tests.image.engine import ROOT, START_SECONDS, Engine, soft_prompt
from tests.image.panels import answers

PROMETHEUS = "http://127.0.0.1:9090"
SENTIMENT = "examples/sentiment"
CLIENTS = 4
HEALTH_SECONDS = 180
SYNC_SECONDS = 15
"""Replicas look for each other's changes every two seconds; a busy machine is slower."""


@pytest.fixture(scope="module")
def compose(engine: Engine) -> list[str]:
    """The command: COMPOSE, such as `podman-compose`, else that of the engine."""
    if "COMPOSE" in os.environ:
        return shlex.split(os.environ["COMPOSE"])
    podman = shutil.which("podman-compose")
    if engine.is_podman and podman:
        return [podman]
    return [engine.command, "compose"]


@contextmanager
def up(compose: list[str], profile: str | None, *services: str) -> Iterator[Callable[..., str]]:
    """Bring a profile up, and down again with its volumes; what runs compose with more arguments."""
    command = [*compose, *(("--profile", profile) if profile else ())]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    try:
        run("up", "--detach", *services)
        yield run
    finally:
        with contextlib.suppress(AssertionError):
            print(run("logs")[-4000:])
        run("down", "--volumes")


def eventually(check: Callable[[], Any], seconds: float) -> Any:
    """What a check answers, once that is true."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if answer := check():
                return answer
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(1)


def is_ready(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200


def load(seconds: float) -> None:
    """Requests of all kinds that the dashboard shows, from several clients; publishing and errors among them."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(_client, number, end) for number in range(CLIENTS)]:
            done.result()


def _client(number: int, end: float) -> None:
    contents = itertools.cycle(map(soft_prompt, (SENTIMENT, "prompts/emotion")))
    with httpx.Client(base_url="http://127.0.0.1:8000", timeout=600) as client:
        for turn in itertools.count():
            if time.monotonic() > end:
                return
            if number == 0:
                if turn % 8 == 0:
                    client.put("/prompts/new", files=next(contents)).raise_for_status()
                assert client.post("/generate?task=missing", json={"inputs": "hello"}).status_code == 404
            for task in ("sms_spam", "emotion", "banking77", "e2e_nlg", *(("new", "new@1") if number == 0 else ())):
                client.post(f"/generate?task={task}", json={"inputs": "hello"}).raise_for_status()
            client.post("/generate", json={"inputs": "Count:", "parameters": {"max_new_tokens": 20}}).raise_for_status()
            time.sleep(0.5)


def all_are_restricted_and_healthy(engine: Engine, *services: str) -> None:
    for service in services:
        container = engine.service(service)
        eventually(lambda: engine.is_healthy(container), HEALTH_SECONDS)  # noqa: B023
        host = engine.inspect(container)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["PidsLimit"] == 2048
        assert host["Memory"] > 0
        assert host["Memory"] == host["MemorySwap"] or engine.is_podman, "podman-compose does not know memswap_limit"
        (options,) = [line.split()[3] for line in mounts(engine, container) if line.split()[1] == "/tmp"]
        assert "size=" in options
        status = engine("exec", container, "cat", "/proc/1/status")
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)


def mounts(engine: Engine, container: str) -> list[str]:
    return engine("exec", container, "cat", "/proc/mounts").splitlines()


def test_the_server_alone_comes_up_and_keeps_its_tasks_over_a_restart(compose: list[str], engine: Engine) -> None:
    with up(compose, None) as run:
        eventually(lambda: is_ready(8000), START_SECONDS)
        all_are_restricted_and_healthy(engine, "prelude")
        body = {"inputs": "a gripping, beautifully acted film that stays with you"}
        httpx.put("http://127.0.0.1:8000/prompts/new", files=soft_prompt(SENTIMENT), timeout=60).raise_for_status()
        run("restart", "prelude")
        eventually(lambda: is_ready(8000), START_SECONDS)
        reply = httpx.post("http://127.0.0.1:8000/generate?task=new", json=body, timeout=60)
        assert reply.json()["generated_text"] == "positive"
        assert httpx.get("http://127.0.0.1:8000/prompts/sms_spam").status_code == 200, "of the inbox, prompts/"


def test_the_server_and_what_observes_it_come_up_and_no_panel_is_empty(compose: list[str], engine: Engine) -> None:
    seconds = float(os.environ.get("LOAD_SECONDS", "80"))
    with up(compose, "observability") as run:
        eventually(lambda: is_ready(8000), START_SECONDS)
        all_are_restricted_and_healthy(engine, "prelude", "prometheus", "grafana")
        began = time.monotonic()
        load(seconds)
        run("restart", "prelude")  # then it reads soft prompts from the store
        eventually(lambda: is_ready(8000), START_SECONDS)
        assert httpx.get("http://127.0.0.1:8000/prompts/new").status_code == 200
        load(seconds)
        (target,) = httpx.get(f"{PROMETHEUS}/api/v1/targets").json()["data"]["activeTargets"]
        assert target["health"] == "up"
        assert target["labels"] == {"instance": "prelude:8000", "job": "prelude"}
        (group,) = httpx.get(f"{PROMETHEUS}/api/v1/rules").json()["data"]["groups"]
        assert len(group["rules"]) == 10
        panels = answers(PROMETHEUS, time.monotonic() - began, ROOT / "deploy/grafana/prelude.json")
        if picture := os.environ.get("PICTURE"):
            draw(panels, ROOT / picture)
        assert not [panel.title for panel in panels if panel.empty]
        health = httpx.get("http://127.0.0.1:3000/api/health").json()
        assert health["database"] == "ok"
        if "version" not in health:  # the stand-in: what Grafana would have asked through its data source
            reply = httpx.get("http://127.0.0.1:3000/panels", timeout=600)
            assert reply.status_code == 200, reply.text
            assert reply.json()
            assert all(reply.json().values()), reply.text


def test_two_replicas_on_one_bucket_serve_what_one_of_them_was_given(compose: list[str], engine: Engine) -> None:
    with up(compose, "store", "replica-1", "replica-2"):
        for port in (8001, 8002):
            eventually(lambda: is_ready(port), START_SECONDS)  # noqa: B023
        all_are_restricted_and_healthy(engine, "s3", "replica-1", "replica-2")
        httpx.put("http://127.0.0.1:8001/prompts/new", files=soft_prompt(SENTIMENT), timeout=60).raise_for_status()
        body = {"inputs": "a gripping, beautifully acted film that stays with you"}

        def served() -> str | None:
            reply = httpx.post("http://127.0.0.1:8002/generate?task=new", json=body, timeout=60)
            return reply.json()["generated_text"] if reply.status_code == 200 else None

        assert eventually(served, SYNC_SECONDS) == "positive"
