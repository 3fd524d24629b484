"""Two `prelude serve` on one store, each a process of its own: on one folder, and on one bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.registry.objects import open_objects
from tests.api.live import as_form, wait_until
from tests.peft_files import peft_directory
from tests.processes import prelude_serve

SYNC_SECONDS = 0.2
SOON = 3.0
"""Seconds within which a server must have followed the other: some looks, and as much again on a busy machine."""


@dataclass
class Server:
    """One of the two."""

    client: httpx.Client

    def publish(self, task: str, directory: Path) -> int:
        files = {
            path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".json", ".safetensors")
        }
        reply = self.client.put(f"/prompts/{task}", files=as_form(files))
        assert reply.status_code == 201, reply.text
        version: int = reply.json()["version"]
        return version

    def answer(self, task: str) -> tuple[int, str]:
        """Version and text of an answer; (0, code) if there is none."""
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 8}}
        reply = self.client.post("/generate", params={"task": task}, json=body)
        if reply.status_code != 200:
            return 0, reply.json()["code"]
        return int(reply.headers["prelude-version"]), reply.json()["generated_text"]

    def versions(self, task: str) -> dict[int, str]:
        reply = self.client.get(f"/prompts/{task}/versions")
        return {entry["version"]: entry["digest"] for entry in reply.json().get("versions", ())}

    def follows(self, other: Server, task: str) -> bool:
        return self.answer(task) == other.answer(task) and self.versions(task) == other.versions(task)


@pytest.fixture(scope="module")
def soft_prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """As PEFT saves them, each another one."""
    return [peft_directory(tmp_path_factory.mktemp("peft") / "task", seed=seed) for seed in range(10)]


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file:{tmp_path / 'store'}"
    url: str = request.getfixturevalue("s3_store_url")
    return url


@pytest.fixture
def servers(store_url: str, tmp_path: Path, served_tiny: dict[str, str]) -> Iterator[tuple[Server, Server]]:
    """Two processes, started at the same time as in a deployment."""
    settings = served_tiny | {"PRELUDE_STORE": store_url, "PRELUDE_SYNC_SECONDS": str(SYNC_SECONDS)}
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    starting = [prelude_serve(place, **settings) for place in places]
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        one, two = pool.map(stack.enter_context, starting)
        yield Server(one.client), Server(two.client)


def soon(condition: Callable[[], bool]) -> None:
    wait_until(condition, SOON)


def test_two_servers_on_one_store_are_one(
    servers: tuple[Server, Server], store_url: str, soft_prompts: list[Path]
) -> None:
    one, two = servers
    assert one.publish("shared", soft_prompts[0]) == 1
    soon(lambda: two.follows(one, "shared"))
    assert two.publish("shared", soft_prompts[1]) == 2, "numbers go on where the other stopped"
    soon(lambda: one.follows(two, "shared"))
    texts = {one.answer("shared@1")[1], one.answer("shared@2")[1]}
    assert len(texts) == 2, "else equal answers would show nothing"

    assert two.client.post("/prompts/shared/rollback").status_code == 200
    soon(lambda: one.answer("shared")[0] == 1)
    assert one.follows(two, "shared")

    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(lambda i: servers[i % 2].publish("raced", soft_prompts[i]), range(10)))
    assert sorted(numbers) == list(range(1, 11)), "as many versions as publishers, and no number twice"
    soon(lambda: one.follows(two, "raced"))
    assert len(set(one.versions("raced").values())) == 10
    assert one.answer("raced")[0] == 10

    for task in ("shared", "raced"):
        assert one.client.delete(f"/prompts/{task}").status_code == 204
    for reference in ("shared", "shared@1", "raced", "raced@10"):
        soon(lambda reference=reference: two.answer(reference) == (0, "unknown_task"))  # type: ignore[misc]
    assert two.client.get("/prompts").json()["prompts"] == []
    wait_until(lambda: open_objects(store_url).list("blobs") == [])
    assert two.publish("shared", soft_prompts[0]) == 3, "not even a deleted number is given again"
