"""A new kind of job is one module and one line in the table; all routes but POST come with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response
from pydantic import BaseModel
from typing_extensions import override

from server.api.bodies import Body
from server.api.deps import KeyIdDep
from server.api.jobs.in_process import InServerBody, InServerJob, InServerJobs, accept
from server.api.jobs.job_bodies import read_order
from server.api.jobs.job_kind import job_router
from server.api.jobs.table import KINDS
from server.errors import InvalidRequest, UnknownEvaluation
from tests.api.live import LiveServer, assert_error, live_server, wait_until

PIECES = 5


class CountRequest(BaseModel):
    """POST /counts."""

    task: str
    seconds: float = 0.0


class CountBody(InServerBody):
    """One count."""

    counted: int


class CountList(BaseModel):
    """All counts."""

    counts: list[CountBody]


class CountWork:
    """Counts to five."""

    def __init__(self, request: CountRequest) -> None:
        self.task, self.seconds = request.task, request.seconds
        self.total = self.counted = self.ended = 0

    def prepare(self, check_cancelled: Any) -> None:
        if self.task == "refused":
            raise InvalidRequest("There is nothing to count.")
        check_cancelled()
        self.total = PIECES

    async def run(self, on_piece: Any) -> None:
        for self.counted in range(1, PIECES + 1):
            await asyncio.sleep(self.seconds)
            on_piece()

    def release(self) -> None:
        self.ended += 1


router = job_router("/counts", "counts")


class Counts(InServerJobs[CountWork]):
    """The counts of a server."""

    router, word, noun, unknown = router, "count", "count", UnknownEvaluation
    body, listing = CountBody, CountList

    @override
    def show(self, job: InServerJob[CountWork], *, with_result: bool = True) -> CountBody:
        return CountBody(**self.fields_of(job), counted=job.work.counted)


@router.post("", status_code=202)
async def start_count(request: Request, response: Response, key_id: KeyIdDep) -> Any:
    def parse(body: Body) -> CountRequest:
        return CountRequest.model_validate(body.value)

    async def make() -> CountWork:
        async with read_order(request, ("data",), parse) as order:
            return CountWork(order.fields)

    return await accept(Counts.of(request), request, response, key_id, make)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.api.app.KINDS", (*KINDS, Counts))
        with live_server(tmp_path_factory.mktemp("counts")) as server:
            yield server


def ask(live: LiveServer, **fields: Any) -> Any:
    return live.client.post("/counts", json={"task": "mood", **fields})


def test_a_new_kind_has_every_route_with_its_post_alone(live: LiveServer) -> None:
    started = ask(live, seconds=0.05)
    assert started.status_code == 202, started.text
    path = started.headers["location"]
    text = live.client.get(f"{path}/events", timeout=20).text
    events = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith("data:")]
    assert events[-1]["job"]["progress"] == {"done": PIECES, "total": PIECES}
    shown = live.client.get(path).json()
    assert (shown["state"], shown["counted"]) == ("done", PIECES)
    assert live.client.get("/counts").json()["counts"] == [shown]
    assert live.client.delete(path).status_code == 204
    assert_error(live.client.get(path), 404, "unknown_evaluation", "no count")


def test_what_its_preparation_refuses_is_the_reply_and_leaves_nothing(live: LiveServer) -> None:
    before = live.client.get("/counts").json()
    assert_error(ask(live, task="refused"), 422, "invalid_request", "nothing to count")
    assert live.client.get("/counts").json() == before


def test_jobs_of_all_kinds_in_the_server_run_one_at_a_time(live: LiveServer) -> None:
    first, second = (ask(live, seconds=60.0).headers["location"] for _ in range(2))
    wait_until(lambda: live.client.get(first).json()["state"] == "running")
    manifest = {"labels": ["no", "yes"], "input_template": "{input}\n"}
    live.publish_random("mood", 1, manifest)
    rows = b'{"input": "a", "target": "no"}\n{"input": "b", "target": "yes"}\n'
    other = live.client.post("/evaluations", data={"task": "mood"}, files={"data": ("d.jsonl", rows)})
    assert other.json()["state"] == "waiting", other.text
    assert live.client.get(second).json()["state"] == "waiting"
    for path in (second, first):
        assert live.client.post(f"{path}/cancel").json()["state"] == "cancelled"
    wait_until(lambda: live.client.get(other.headers["location"]).json()["state"] == "done")


def test_a_body_over_the_bound_of_orders_is_refused(live: LiveServer) -> None:
    assert ask(live, task="x" * 2**20).status_code == 413


def test_a_drain_ends_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.app.KINDS", (*KINDS, Counts))
    works: list[CountWork] = []
    release = CountWork.release

    def noted(work: CountWork) -> None:
        works.append(work)
        release(work)

    monkeypatch.setattr(CountWork, "release", noted)
    with live_server(tmp_path) as server:
        path = ask(server, seconds=60.0).headers["location"]
        asyncio.run_coroutine_threadsafe(server.worker.drain(30), server.loop).result(30)
        wait_until(lambda: server.client.get(path).json()["state"] == "aborted")
        assert server.client.get(path).json()["error"]["code"] == "server_draining"
    assert [work.ended for work in works] == [1]
