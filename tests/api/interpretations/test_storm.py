"""Interpretation of tasks that change meanwhile: each request ends once, with the version that it was asked of."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.evaluations.support import MANIFEST, PAIRS, jsonl
from tests.api.live import LiveServer, wait_until
from tests.soak import Soak
from tests.support import random_soft_prompt

TASKS = ("storm-one", "storm-two")
READERS = 2
FILES = {"data": ("test.jsonl", jsonl(*PAIRS[:2]))}
ENDED = {"done", "cancelled", "failed"}
GONE = {"unknown_task"}
"""The error of a task, or of a version, that was deleted meanwhile."""


@dataclass
class Storm:
    """Clients that interpret and generate while one operator per task changes it.

    Attributes:
        published: (task, version) -> soft prompt, as the server acknowledged it.
        claims: what clients got: task, version, and the digest or number of virtual tokens that was shown for it.
        jobs: experiments that were accepted.
        problems: whatever must not happen.
    """

    server: LiveServer
    seed: int
    published: dict[tuple[str, int], SoftPrompt] = field(default_factory=dict)
    claims: list[tuple[str, int, str | int]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, changes: Iterable[int]) -> None:
        """Change tasks this often while clients ask, then wait for them."""
        with ThreadPoolExecutor(READERS + 2) as pool, httpx.Client(base_url=self.server.url, timeout=60) as client:
            for task in TASKS:
                self.publish(client, task, 1)
            clients = [pool.submit(self.ask, self.read, i) for i in range(READERS)]
            clients += [pool.submit(self.ask, work, 9) for work in (self.influence, self.experiment)]
            dice = random.Random(f"{self.seed} operator")
            for number in changes:
                self.change(client, dice, number)
            self.over.set()
            for asking in clients:
                asking.result()

    def ask(self, work: Any, number: int) -> None:
        """One client: the same kind of request again and again, at least once."""
        dice = random.Random(f"{self.seed} {work.__name__} {number}")
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not self.problems:
                work(client, dice)
                if self.over.is_set():
                    return

    def read(self, client: httpx.Client, dice: random.Random) -> None:
        """A static interpretation, of the live version or of another; then an ordinary answer."""
        task = dice.choice(TASKS)
        numbers = [version for name, version in list(self.published) if name == task]
        asked = dice.choice([None, *numbers])
        query = {} if asked is None else {"version": asked}
        if found := self.checked(client.get(f"/prompts/{task}/interpretation", params=query)):
            body = found.json()
            if asked is not None:
                self.claims.append((task, asked, body["digest"]))
            self.claims.append((task, 0, body["digest"]))
        self.checked(client.post("/generate", params={"task": task}, json={"inputs": "hello"}))

    def influence(self, client: httpx.Client, dice: random.Random) -> None:
        """An answer with its heat map, which has one row for each virtual token of its version."""
        task = dice.choice(TASKS)
        asked = {"inputs": "hello", "parameters": {"details": True, "influence": True, "max_new_tokens": 2}}
        if found := self.checked(client.post("/generate", params={"task": task}, json=asked)):
            rows = found.json()["details"]["influence"]["influence"]
            self.claims.append((task, int(found.headers["Prelude-Version"]), len(rows)))

    def experiment(self, client: httpx.Client, dice: random.Random) -> None:
        """A job, waited for to its end; some are cancelled."""
        task = dice.choice(TASKS)
        started = self.checked(client.post(f"/prompts/{task}/interpretation", files=FILES), 202)
        if started is None:
            return
        path = f"/interpretations/{started.json()['id']}"
        self.jobs.append(path)
        if dice.random() < 0.3:
            self.checked(client.post(f"{path}/cancel"), 200, 409)
        wait_until(lambda: client.get(path).json()["state"] in ENDED, 60)
        ended = client.get(path).json()
        if ended["state"] == "failed":
            self.problems.append(f"{path} failed: {ended.get('error')}")
        if ended["state"] == "done":
            self.claims.append((task, ended["version"], ended["result"]["digest"]))
            self.claims.append((task, ended["version"], len(ended["result"]["necessity"]["tokens"])))

    def change(self, client: httpx.Client, dice: random.Random, number: int) -> None:
        """Publish, roll back, delete an idle version or the whole task, which is then published again."""
        task = dice.choice(TASKS)
        match dice.choice(["publish", "publish", "rollback", "delete", "delete all"]):
            case "publish":
                self.publish(client, task, number)
            case "rollback":
                self.checked(client.post(f"/prompts/{task}/rollback"), 200, 409)
            case "delete":
                entries = client.get(f"/prompts/{task}/versions").json()["versions"]
                if idle := [entry["version"] for entry in entries if not entry["live"]]:
                    self.checked(client.delete(f"/prompts/{task}/versions/{dice.choice(idle)}"), 204)
            case _:
                self.checked(client.delete(f"/prompts/{task}"), 204)
                self.publish(client, task, number)

    def publish(self, client: httpx.Client, task: str, number: int) -> None:
        """Upload another soft prompt; remember which version it became."""
        start = {"training": {"start": {"initial_token_ids": [5, 6, 7, 8][: 1 + number % 4]}}}
        manifest: Mapping[str, Any] = {**MANIFEST, **start}
        seed = len(self.published)
        made = random_soft_prompt(self.server.model.spec, 1 + number % 4, seed=seed, manifest=manifest)
        files = [("files", item) for item in self.server.files(made).items()]
        if reply := self.checked(client.put(f"/prompts/{task}", files=files), 200, 201):
            self.published[task, reply.json()["version"]] = made

    def checked(self, reply: httpx.Response, *expected: int) -> httpx.Response | None:
        """The reply; None for a refusal that a change of tasks explains. Anything else is a problem."""
        if reply.status_code in (expected or (200,)):
            return None if reply.status_code == 409 else reply
        code = reply.json().get("code") if reply.status_code < 500 else None
        if code not in GONE and reply.status_code != 429:
            self.problems.append(f"{reply.request.method} {reply.request.url}: {reply.status_code} {reply.text[:300]}")
        return None

    def wrong(self) -> list[tuple[str, int, str | int]]:
        """Claims about a version that are not true of it; version 0 stands for any version of the task."""
        digests = {task: {made.digest for (name, _), made in self.published.items() if name == task} for task in TASKS}
        return [
            (task, version, shown)
            for task, version, shown in self.claims
            if (
                shown not in digests[task]
                if version == 0
                else shown
                not in (self.published[task, version].digest, self.published[task, version].num_virtual_tokens)
            )
        ]


@pytest.mark.soak
def test_interpretations_end_once_and_are_of_the_version_asked_for(server: LiveServer, soak: Soak) -> None:
    storm = Storm(server, soak.seed)
    storm.run(soak.rounds(short=6, full=1500, desc="changes"))
    assert storm.problems == []
    assert storm.wrong() == []
    assert len(storm.claims) > READERS
    assert len(set(storm.jobs)) == len(storm.jobs) > 0
    for task in TASKS:
        assert server.client.delete(f"/prompts/{task}").status_code == 204
    for job in storm.jobs:
        assert server.client.get(job).json().get("state", "removed") in {*ENDED, "removed"}
    wait_until(lambda: server.is_idle)
    server.engine.scheduler.check_integrity()
