"""A job of a real server, in processes as they are in a deployment: whoever is killed, it comes to its end."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.jobs.folder import JobsFolder
from server.jobs.progress_log import read_lines
from tests.api.live import wait_until
from tests.jobs.support import LEARNS, ROWS, SECONDS
from tests.processes import prelude_serve
from tests.soak import Soak
from tests.train.rows import MOODS

CONFIG = LEARNS | {"steps": 400, "evaluations": 40, "learning_rate": 0.05}


def lines(rows: Any) -> bytes:
    return "".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in rows).encode()


def job_of(client: httpx.Client) -> dict[str, Any]:
    [job] = client.get("/training/jobs").json()["jobs"]
    found: dict[str, Any] = job
    return found


@pytest.mark.soak
def test_a_server_that_is_killed_finds_its_job_again_and_publishes_what_it_learned(
    soak: Soak, served_tiny: dict[str, str], tmp_path: Path
) -> None:
    soak.only_in_full()  # test_runner.py kills each of the two, on its own
    jobs = JobsFolder(tmp_path / "prompts" / ".jobs")
    kills = 5
    for number in range(kills + 1):
        with prelude_serve(tmp_path, **served_tiny) as process:
            if number == 0:
                spec = {"task": "mood", "config": CONFIG, "activate": True}
                files = {"data": ("rows.jsonl", lines(ROWS)), "validation": ("held.jsonl", lines(MOODS))}
                reply = process.client.post("/training/jobs", data={"spec": json.dumps(spec)}, files=files)
                assert reply.status_code == 202, reply.text
            if number < kills:
                seen = job_of(process.client)["step"]
                aim = min(seen + 20, 380)
                wait_until(lambda aim=aim: job_of(process.client)["step"] >= aim, SECONDS)  # type: ignore[misc]
                [job] = jobs.jobs()
                process.popen.kill()
                process.popen.wait()
                child = job.status.pid
                assert child is not None
                wait_until(lambda child=child: not psutil.pid_exists(child), 30)  # type: ignore[misc]
                continue
            wait_until(lambda: job_of(process.client)["state"] == "succeeded", SECONDS)
            done = job_of(process.client)
            assert (done["version"], done["live"], done["restarts"]) == (1, True, kills)
            body = {"inputs": "good", "parameters": {"max_new_tokens": 4}}
            answer = process.client.post("/generate", params={"task": "mood"}, json=body)
            assert answer.headers["prelude-version"] == "1"
    [job] = jobs.jobs()
    steps = [line["step"] for line in read_lines(jobs.folder(job.id).record)[0] if line["event"] == "step"]
    assert steps == list(range(1, 401)), "each step is in the record, and none twice"


def test_a_jobs_process_has_the_lowest_priority_and_maps_the_file_of_the_weights(
    model_directory: Path, served_tiny: dict[str, str], tmp_path: Path
) -> None:
    if not hasattr(os, "SCHED_IDLE"):
        pytest.skip("this system has no class for idle work")
    with prelude_serve(tmp_path, **served_tiny) as process:
        spec = {"task": "mood", "config": LEARNS | {"steps": 1_000_000, "evaluations": 1}}
        reply = process.client.post(
            "/training/jobs", data={"spec": json.dumps(spec)}, files={"data": ("rows.jsonl", lines(ROWS))}
        )
        assert reply.status_code == 202, reply.text
        jobs = JobsFolder(tmp_path / "prompts" / ".jobs")
        wait_until(lambda: jobs.jobs()[0].status.pid is not None, SECONDS)
        [job] = jobs.jobs()
        assert job.status.pid is not None
        wait_until(lambda: os.sched_getscheduler(job.status.pid or 0) == os.SCHED_IDLE, SECONDS)
        assert os.getsid(job.status.pid) == os.getsid(process.popen.pid), "in another, its class would mean nothing"
        child = psutil.Process(job.status.pid)
        assert child.nice() == 19
        # Beside other tests, an idle process might never come to its first step.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(job.status.pid, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, job.status.pid, 0)
        wait_until(lambda: job_of(process.client)["step"] > 0, SECONDS)
        weights = str(model_directory / "model.safetensors")
        [mapped] = [area for area in child.memory_maps(grouped=True) if area.path == weights]
        assert mapped.private_dirty == 0
        process.popen.terminate()
        assert process.ended_with(30) == 0
        assert not psutil.pid_exists(job.status.pid)
        [job] = jobs.jobs()
        assert job.status.state == "queued"
