"""Training jobs over a real socket: what is refused before anything is queued, and what is told of what runs."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load

from server.api import body_sizes
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, as_form, assert_error, live_server, wait_until
from tests.jobs.support import LEARNS, ROWS, SECONDS, SLOW, save_tiny_model
from tests.support import random_soft_prompt
from tests.train.rows import MOODS


def jsonl(text: str, target: str) -> bytes:
    return (json.dumps({"input": text, "target": target}) + "\n").encode()


GOOD = "".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in ROWS).encode()
HELD = "".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in MOODS).encode()


@dataclass
class Site:
    """A server that trains, and a folder of data on it."""

    live: LiveServer
    data: Path
    keys: dict[str, str]

    def request(self, method: str, path: str = "", key: str = "all", **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}", **options.pop("headers", {})}
        return self.live.client.request(method, f"/training/jobs{path}", headers=headers, **options)

    def ask(self, key: str = "all", **fields: Any) -> httpx.Response:
        """A job in JSON."""
        return self.request("POST", key=key, json={"task": "mood", "config": LEARNS, **fields})

    def upload(self, files: dict[str, bytes], key: str = "all", **fields: Any) -> httpx.Response:
        """A job that brings its data along."""
        form = {"spec": json.dumps({"task": "mood", "config": LEARNS, **fields})}
        return self.request("POST", key=key, data=form, files={n: (f"{n}.jsonl", c) for n, c in files.items()})

    def jobs(self, key: str = "all") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.request("GET", key=key).json()["jobs"]
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.request("GET", f"/{job_id}").json()
        return found

    def published(self, task: str) -> zipfile.ZipFile:
        """The first version of a task."""
        headers = {"Authorization": f"Bearer {self.keys['all']}"}
        version = self.live.client.get(f"/prompts/{task}/versions/1/download", headers=headers)
        assert version.status_code == 200, version.text
        return zipfile.ZipFile(io.BytesIO(version.content))

    def events(self, job_id: str, **headers: str) -> list[tuple[int | None, dict[str, Any]]]:
        """Until the end, with the ids of those that have one."""
        response = self.request("GET", f"/{job_id}/events", headers=headers, timeout=SECONDS)
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse(response.text)


def parse(text: str) -> list[tuple[int | None, dict[str, Any]]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(":", 1) for line in block.split("\n"))
        if "data" in lines:
            events.append((int(lines["id"]) if "id" in lines else None, json.loads(lines["data"])))
    return events


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    model = save_tiny_model(folder / "tiny")
    (folder / "data").mkdir()
    (folder / "data" / "good.jsonl").write_bytes(GOOD)
    (folder / "secret.jsonl").write_bytes(GOOD)
    path = folder / "keys.json"
    keys = {
        "all": add_key(path, "all", [Scope.PUBLISH], None)[1],
        "team-a": add_key(path, "team-a", [Scope.PUBLISH], ["team-a-*"])[1],
    }
    options: dict[str, Any] = {"api_keys_file": path, "data_dir": folder / "data", "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELUDE_MODEL", str(model))  # live_server's `model` is one that is loaded
        with live_server(folder, max_model_len=128, **options) as live:
            yield Site(live, folder / "data", keys)


def test_a_job_is_trained_published_and_told_of_as_it_goes(site: Site) -> None:
    bound = {"metric": "validation_exact_match", "at_least": 0.9}
    response = site.upload({"data": GOOD, "validation": HELD}, activate=bound)
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/training/jobs/{job['id']}"
    assert (job["task"], job["steps"], job["step"]) == ("mood", 160, 0)
    events = site.events(job["id"])
    assert events[-1][1]["event"] == "end"
    done = events[-1][1]["job"]
    assert (done["state"], done["version"], done["live"]) == ("succeeded", 1, True), done
    assert done["metrics"]["validation_exact_match"] == 1.0
    numbers = [number for number, _ in events if number is not None]
    assert numbers == list(range(1, len(numbers) + 1))
    steps = [event["step"] for _, event in events if event["event"] == "step"]
    assert steps == list(range(1, 161))
    assert [event["state"] for _, event in events if event["event"] == "state"][-1] == "succeeded"
    behind = site.events(job["id"], **{"Last-Event-ID": str(numbers[-3])})
    assert [number for number, _ in behind if number is not None] == numbers[-2:]
    assert_error(site.request("GET", f"/{job['id']}/events", headers={"Last-Event-ID": "x"}), 422, "invalid_request")
    assert "step 160: validation" in site.request("GET", f"/{job['id']}/log").text
    headers = {"Authorization": f"Bearer {site.keys['all']}"}
    versions = site.live.client.get("/prompts/mood/versions", headers=headers).json()
    assert (versions["live"], versions["versions"][0]["source"]) == (1, "api")
    assert versions["versions"][0]["by"] == site.keys["all"].split("_")[1]
    assert site.request("DELETE", f"/{job['id']}").status_code == 204
    assert_error(site.request("GET", f"/{job['id']}"), 404, "unknown_job")


def test_a_job_begins_with_the_version_that_its_start_stood_for(site: Site) -> None:
    short = {**LEARNS, "steps": 2}
    first = site.ask(data="good.jsonl", task="begin", config=short, activate=True).json()
    assert site.events(first["id"])[-1][1]["job"]["state"] == "succeeded"
    still = {**short, "learning_rate": 1e-9, "init": "soft_prompt", "init_from": "begin"}
    job = site.ask(data="good.jsonl", task="onward", config=still).json()
    assert job["spec"]["config"]["init_from"] == "begin@1"
    assert site.events(job["id"])[-1][1]["job"]["state"] == "succeeded"
    begun, went_on = site.published("begin"), site.published("onward")
    assert json.loads(went_on.read("manifest.json"))["training"]["init_from"] == "begin@1"
    before, after = (load(one.read("adapter_model.safetensors"))["prompt_embeddings"] for one in (begun, went_on))
    assert torch.allclose(before, after, atol=1e-6)


def test_a_job_looks_for_the_nearest_task_among_live_ones_that_its_key_may_see(site: Site) -> None:
    short = {**LEARNS, "steps": 2}
    first = site.ask(data="good.jsonl", task="team-a-near", config=short, activate=True).json()
    assert site.events(first["id"])[-1][1]["job"]["state"] == "succeeded"
    job = site.ask("team-a", data="good.jsonl", task="team-a-far", config={**short, "init": "nearest-task"}).json()
    assert site.events(job["id"])[-1][1]["job"]["state"] == "succeeded"
    log = site.request("GET", f"/{job['id']}/log").text
    assert re.search(r"(from|moved towards) .*team-a-near@1[, ]", log), log
    assert "begin@1" not in log, "a task of another team"


def test_a_job_begins_with_nothing_that_is_not_there_for_its_key_or_of_another_kind(site: Site) -> None:
    headers = {"Authorization": f"Bearer {site.keys['all']}"}
    files = as_form(site.live.files(random_soft_prompt(site.live.model.spec)))
    upload = site.live.client.put("/prompts/kept", files=files, headers=headers)
    assert upload.status_code == 201, upload.text
    config = {**LEARNS, "init": "soft_prompt", "init_from": "kept"}
    assert_error(site.ask("team-a", data="good.jsonl", task="team-a-y", config=config), 403, "forbidden", "'kept'")
    longer = {**config, "num_virtual_tokens": 7}
    error = assert_error(site.ask(data="good.jsonl", config=longer), 422, "invalid_training_data")
    assert "kept@1 holds" in error["error"]
    unknown = {**config, "init_from": "nowhere"}
    assert_error(site.ask(data="good.jsonl", config=unknown), 404, "unknown_task")


def test_one_job_runs_and_the_others_wait_until_they_are_cancelled(site: Site) -> None:
    first = site.ask(data="good.jsonl", config=SLOW).json()
    second = site.ask(data="good.jsonl", config=SLOW, task="team-a-mood").json()
    wait_until(lambda: "seconds_left" in site.job(first["id"]), SECONDS)
    running, waiting = site.job(first["id"]), site.job(second["id"])
    assert (running["state"], running["phase"]) == ("running", "training")
    assert running["seconds_left"] > 0
    assert (waiting["state"], waiting["queue_position"]) == ("queued", 1)
    assert [job["id"] for job in site.jobs()[:2]] == [second["id"], first["id"]]
    assert_error(site.request("DELETE", f"/{first['id']}"), 409, "job_runs")
    for job in (second, first):
        cancelled = site.request("POST", f"/{job['id']}/cancel").json()
        assert (cancelled["state"], cancelled["cancelling"]) == ("cancelled", False)
    assert site.request("POST", f"/{first['id']}/cancel").json()["state"] == "cancelled"
    headers = {"Authorization": f"Bearer {site.keys['all']}"}
    assert site.live.client.get("/prompts/team-a-mood", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data": GOOD + b'{"input": "late"}\n'}, "data.jsonl, line 21: no string field 'target'"),
        ({"data": GOOD + jsonl("x" * 300, "yes")}, "data.jsonl, line 21: 303 characters can never fit"),
        ({"data": GOOD, "validation": b"[]\n"}, "validation.jsonl, line 1: no string field 'input'"),
        ({"data": GOOD, "validation": b'{"input": "a", "target": "maybe"}\n'}, "validation.jsonl, line 1: the label"),
        ({"data": b""}, "data.jsonl holds no rows"),
        ({"data": b'{"input": "a", "target": "b"}\n'}, "data.jsonl holds one input only"),
    ],
)
def test_bad_data_is_refused_by_file_and_line_before_anything_is_queued(
    site: Site, files: dict[str, bytes], message: str
) -> None:
    before = site.jobs()
    error = assert_error(site.upload(files), 422, "invalid_training_data", message)
    assert str(site.live.settings.prompts_dir) not in f"{error}"
    assert site.jobs() == before
    assert not list(site.live.settings.jobs_folder.glob(".new-*"))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tusk": "x"}, "unknown field tusk (did you mean task?)"),
        ({"config": {"stepps": 3}}, "unknown field config.stepps (did you mean steps?)"),
        ({"steps": 3}, "unknown field steps (did you mean config.steps?)"),
        ({"config": {"steps": 0}}, "config.steps"),
        ({"config": {"method": "multitask_prompt_tuning"}}, "A job trains one task"),
        ({"config": {"init": "soft_prompt", "init_from": "/etc"}}, "/etc"),
        ({"config": {"num_virtual_tokens": 513}}, "513"),
        ({"task": "No"}, "cannot be the name"),
        ({"task": "tiny-llama"}, "the frozen model's name"),
        ({"input_template": "no place"}, "exactly once"),
        ({"system_message": "template"}, "does not hold {system} exactly once"),
        ({"system_message": "obey"}, "system_message: Input should be 'ignore', 'refuse' or 'template'"),
        ({"activate": {"metric": "validation_loss"}}, "at_least or at_most"),
        ({"activate": {"metric": "validation_loss", "at_least": 0.9, "at_most": 0.1}}, "no value keeps to both"),
        ({"activate": {"metric": "validation_exact_match", "at_least": 90}}, "a share from 0 to 1"),
        ({"activate": "yes"}, "activate"),
        ({"config": {"steps": "10"}}, "config.steps"),
        (
            {"config": {"learning_rate": 0}},
            "learning_rate: Input should be 'auto', or: Input should be greater than 0",
        ),
        (
            {"activate": {"metric": "accuracy", "at_least": 0.5}},
            "activate.metric: Input should be 'validation_",
        ),
        ({"config": {"teacher_template": "{input}", "labels": ["a", "a"]}}, "not at least two different ones"),
        ({"config": {"teacher_template": "{input}" + "x" * 200}}, "teacher's text does not fit the context"),
        ({"config": {"method": "prefix_tuning", "init": "random"}}, "train badly"),
        ({"data": "../secret.jsonl"}, "is no name of a data file"),
        ({"data": "none.jsonl"}, "There is no data file"),
    ],
)
def test_what_can_never_be_trained_is_refused_with_the_field(site: Site, fields: dict[str, Any], part: str) -> None:
    response = site.ask(**{"data": "good.jsonl", **fields})
    assert response.status_code == 422, response.text
    assert part in response.json()["error"]


def test_a_job_without_data_is_refused(site: Site) -> None:
    assert_error(site.ask(), 422, "invalid_training_data", "no data to train on")


def test_a_body_that_is_neither_json_nor_a_whole_form_is_refused(site: Site) -> None:
    for kind, body in (("text/plain", b"x"), ("application/json", b"{")):
        response = site.request("POST", content=body, headers={"Content-Type": kind})
        assert_error(response, 422, "invalid_request")
    files = {"data": ("a", GOOD), "more": ("b", GOOD)}
    assert_error(site.request("POST", data={"spec": "{}"}, files=files), 422, "invalid_request", "'more'")
    both = site.upload({"data": GOOD}, data="good.jsonl")
    assert_error(both, 422, "invalid_request", "both uploaded and named")
    form = site.live.client.build_request("POST", "/", data={"spec": "{}"}, files={"data": ("a", GOOD)})
    cut = form.read()[:-20]
    headers = {"Content-Type": form.headers["content-type"]}
    assert_error(site.request("POST", content=cut, headers=headers), 400, "invalid_request", "cut off")


def test_data_over_the_limit_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_sizes, "MAX_DATA_BYTES", 1000)
    assert_error(site.upload({"data": GOOD * 10}), 413, "payload_too_large", "1,000 bytes")


def test_a_key_with_patterns_trains_and_sees_only_its_own(site: Site) -> None:
    assert_error(site.ask("team-a", data="good.jsonl"), 403, "forbidden", "'mood'")
    theirs = site.ask(data="good.jsonl", config=SLOW).json()["id"]
    own = site.ask("team-a", data="good.jsonl", task="team-a-x", config=SLOW).json()["id"]
    assert theirs not in [job["id"] for job in site.jobs("team-a")]
    assert own in [job["id"] for job in site.jobs("team-a")]
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/log"), ("POST", "/cancel"), ("DELETE", "")):
        response = site.request(method, f"/{theirs}{path}", "team-a")
        assert_error(response, 404, "unknown_job")
    for job_id in (own, theirs):
        assert site.request("POST", f"/{job_id}/cancel").json()["state"] == "cancelled"
