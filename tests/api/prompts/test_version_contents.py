from __future__ import annotations

import io
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftConfig, PeftModel

from server.engine.model.frozen import FrozenModel
from server.registry.events import VersionContent
from server.registry.host_cache import size_of
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer, assert_error, engine_answer, live_server
from tests.support import random_kv_prompt, random_soft_prompt, tiny_module


def unpack(reply: httpx.Response, directory: Path) -> Path:
    """A downloaded zip as a directory."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        archive.extractall(directory)
    return directory


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_a_download_is_what_peft_loads(server: LiveServer, tmp_path: Path, kind: str) -> None:
    make = random_soft_prompt if kind == "embeddings" else random_kv_prompt
    soft_prompt = make(server.model.spec, seed=4)
    server.publish(f"versions-{kind}", soft_prompt)
    reply = server.client.get(f"/prompts/versions-{kind}/versions/1/download")
    assert reply.headers["content-disposition"] == f'attachment; filename="versions-{kind}-1.zip"'
    directory = unpack(reply, tmp_path)
    assert PeftConfig.from_pretrained(str(directory)).num_virtual_tokens == 5
    peft_model: Any = PeftModel.from_pretrained(tiny_module(attention="eager"), str(directory))
    embedding = peft_model.prompt_encoder["default"].embedding.weight
    assert torch.equal(embedding.float(), soft_prompt.tensor)


def test_a_download_uploaded_again_changes_nothing(server: LiveServer) -> None:
    server.publish_random("versions-round", 1, {"description": "there", "generation": {"max_new_tokens": 4}})
    url = "/prompts/versions-round/versions/1/download"
    first = server.client.get(url)
    assert server.client.get(url).content == first.content
    again = server.put("versions-round", {"x.zip": first.content})
    assert (again.status_code, again.json()["version"]) == (200, 1)
    elsewhere = server.put("versions-round-2", {"x.zip": first.content})
    assert elsewhere.status_code == 201
    assert server.client.get("/prompts/versions-round-2").json()["description"] == "there"


def test_a_version_that_is_not_there_cannot_be_downloaded(server: LiveServer) -> None:
    server.publish_random("versions-down", 1)
    assert_error(server.client.get("/prompts/versions-down/versions/2/download"), 404, "unknown_task")
    assert_error(server.client.get("/prompts/versions-nobody/versions/1/download"), 404, "unknown_task")
    for number in ("0", "x", "-1"):
        reply = server.client.get(f"/prompts/versions-down/versions/{number}/download")
        assert_error(reply, 422, "invalid_request")


def restarted(directory: Path, tasks: int) -> None:
    """Create a store with the given number of tasks."""
    with live_server(directory) as server:
        for seed in range(tasks):
            server.publish_random(f"t{seed}", seed)


def test_a_hundred_requests_for_one_cold_task_load_it_once_and_hold_nobody_up(tmp_path: Path) -> None:
    restarted(tmp_path, 2)
    with live_server(tmp_path, max_sequences=16) as server:
        assert len(server.registry.host) == 0, "a start reads no tensors"
        server.text("hello", "t1", max_new_tokens=1)
        gate = threading.Event()
        load = server.registry.host._load

        def slow_load(content: VersionContent) -> SoftPrompt:
            assert gate.wait(20)
            return load(content)

        server.registry.host._load = slow_load
        loads = server.registry.host.loads
        with ThreadPoolExecutor(100) as pool:
            cold = [pool.submit(server.generate, "hello", "t0", max_new_tokens=1) for _ in range(100)]
            time.sleep(0.3)
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
            reply = httpx.post(f"{server.url}/generate?task=t1", json=body, timeout=10)  # the client's pool is used up
            assert reply.status_code == 200, "the others need not wait"
            assert not any(future.done() for future in cold)
            gate.set()
            assert {future.result().status_code for future in cold} == {200}
        assert server.registry.host.loads == loads + 1


def test_more_tasks_than_fit_into_memory_are_all_served(tmp_path: Path, tiny: FrozenModel) -> None:
    restarted(tmp_path, 12)
    one = size_of(random_soft_prompt(tiny.spec))
    with live_server(tmp_path, host_memory=str(3 * one)) as server:
        for _ in range(2):
            for seed in range(12):
                expected = engine_answer(tiny, random_soft_prompt(tiny.spec, seed=seed), "hello", max_new_tokens=4).text
                assert server.text("hello", f"t{seed}", max_new_tokens=4) == expected
        assert len(server.registry.host) == 3
        assert server.registry.host.num_bytes <= 3 * one


def test_a_version_whose_blob_is_damaged_is_unavailable_until_it_is_published_again(tmp_path: Path) -> None:
    restarted(tmp_path, 2)
    with live_server(tmp_path) as server:
        digest = server.client.get("/prompts/t0").json()["digest"]
        [blob] = (server.settings.prompts_dir / ".store" / "blobs").glob(f"{digest}*")
        blob.write_bytes(blob.read_bytes()[:-4])
        assert_error(server.generate("hello", "t0"), 503, "version_unavailable", "cannot be served")
        assert server.generate("hello", "t1", max_new_tokens=1).status_code == 200
        listed = {entry["task"]: entry for entry in server.client.get("/prompts").json()["prompts"]}
        assert digest in listed["t0"]["error"]
        assert "error" not in listed["t1"]
        assert server.publish("t0", random_soft_prompt(server.model.spec, seed=0))["version"] == 2
        assert server.generate("hello", "t0", max_new_tokens=1).status_code == 200
