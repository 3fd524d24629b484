"""What went wrong in other servers, each as it was reported there, and what must be so here.

Repositories and numbers name the reports. Answers are compared with those of an engine of its own, which has served
nothing before and has nobody beside it.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer, assert_error, engine_answer, live_server, wait_until
from tests.support import random_kv_prompt, random_soft_prompt

TEXT = "what is it about"


def answer(model: FrozenModel, soft_prompt: SoftPrompt | None, max_new_tokens: int = 12) -> str:
    """What nobody but this soft prompt could make of the text."""
    return engine_answer(model, soft_prompt, TEXT, max_new_tokens=max_new_tokens).text


def listed(server: LiveServer) -> dict[str, int]:
    """Tasks and versions as GET /prompts tells them."""
    prompts = server.client.get("/prompts").json()["prompts"]
    return {entry["task"]: entry["version"] for entry in prompts if "version" in entry}


def test_vllm_42125_a_reload_under_the_same_name_does_not_reuse_the_old_prefix(
    own_server: LiveServer, tiny: FrozenModel
) -> None:
    for soft_prompt in (random_soft_prompt(tiny.spec, seed=1), random_soft_prompt(tiny.spec, seed=2)):
        own_server.publish("same-name", soft_prompt)
        for _ in range(3):  # the second and third time from the prefix cache
            assert own_server.text(TEXT, "same-name", max_new_tokens=12) == answer(tiny, soft_prompt)
    assert own_server.client.post("/prompts/same-name/rollback").status_code == 200
    assert own_server.text(TEXT, "same-name", max_new_tokens=12) == answer(tiny, random_soft_prompt(tiny.spec, seed=1))


@pytest.mark.parametrize("make", [random_soft_prompt, random_kv_prompt])
def test_llama_cpp_26207_what_was_cached_for_one_task_is_not_reused_for_another(
    own_server: LiveServer, tiny: FrozenModel, make: type
) -> None:
    one, other = make(tiny.spec, seed=1), make(tiny.spec, seed=2)
    own_server.publish("one", one)
    own_server.publish("other", other)
    expected = {"one": answer(tiny, one), "other": answer(tiny, other), None: answer(tiny, None)}
    assert len(set(expected.values())) == 3
    for task in ("one", "other", None, "other", "one", None, "one"):
        assert own_server.text(TEXT, task, max_new_tokens=12) == expected[task], "the same text, one task after another"
    with ThreadPoolExecutor(12) as pool:
        tasks = ["one", "other", None] * 8
        texts = list(pool.map(lambda task: own_server.text(TEXT, task, max_new_tokens=12), tasks))
    assert texts == [expected[task] for task in tasks]


def test_trl_7017_a_soft_prompt_is_not_unloaded_while_a_request_uses_it(
    own_server: LiveServer, tiny: FrozenModel
) -> None:
    soft_prompt = own_server.publish_random("used", 1)
    own_server.model.delay = 0.01
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(own_server.generate, TEXT, "used", max_new_tokens=40) for _ in range(6)]
        wait_until(lambda: own_server.in_flight == 6)
        assert own_server.client.delete("/prompts/used").status_code == 204
        for future in running:
            assert future.result().status_code == 200, future.result().text
            assert future.result().json()["generated_text"] == answer(tiny, soft_prompt, 40)
    assert_error(own_server.generate(TEXT, "used"), 404, "unknown_task")


def test_skyrl_2129_a_reload_does_not_race_a_generation(own_server: LiveServer, tiny: FrozenModel) -> None:
    contents = [random_soft_prompt(tiny.spec, seed=seed) for seed in range(5)]
    expected = [answer(tiny, soft_prompt, 30) for soft_prompt in contents]
    own_server.publish("reloaded", contents[0])
    own_server.model.delay = 0.002
    with ThreadPoolExecutor(6) as pool:
        running = []
        for soft_prompt in contents:
            own_server.publish("reloaded", soft_prompt)
            running += [pool.submit(own_server.generate, TEXT, "reloaded", max_new_tokens=30) for _ in range(4)]
        for future in running:
            version = int(future.result().headers["prelude-version"])
            assert future.result().json()["generated_text"] == expected[version - 1]


def test_tgis_a_replaced_file_is_read_again_with_its_new_length(tmp_path: Path, tiny: FrozenModel) -> None:
    prompts = tmp_path / "prompts"
    short, long = random_soft_prompt(tiny.spec, 4, seed=1), random_soft_prompt(tiny.spec, 40, seed=2)
    save_soft_prompt(prompts / "file", short, tiny.spec)
    with live_server(tmp_path) as server:
        wait_until(lambda: listed(server) == {"file": 1}, 10)
        room = server.model.spec.max_model_len - len(tiny.text.encode(TEXT))
        assert server.generate(TEXT, "file", max_new_tokens=room - 4).status_code == 200
        save_soft_prompt(prompts / "file", long, tiny.spec)
        wait_until(lambda: listed(server) == {"file": 2}, 10)
        assert server.text(TEXT, "file", max_new_tokens=12) == answer(tiny, long)
        reply = server.generate(TEXT, "file", max_new_tokens=5, details=True)
        assert reply.json()["details"]["virtual_tokens"] == 40
        assert_error(server.generate(TEXT, "file", max_new_tokens=room - 4), 422, "input_too_long", "40 virtual")
        assert server.generate(TEXT, "file", max_new_tokens=room - 40).status_code == 200


def test_caikit_and_nemo_a_deleted_soft_prompt_is_not_served_from_memory(tmp_path: Path, tiny: FrozenModel) -> None:
    prompts = tmp_path / "prompts"
    soft_prompt = random_soft_prompt(tiny.spec, seed=1)
    save_soft_prompt(prompts / "dropped", soft_prompt, tiny.spec)

    def assert_gone(server: LiveServer) -> None:
        for reference in ("dropped", "dropped@1", "uploaded", "uploaded@1"):
            assert_error(server.generate(TEXT, reference), 404, "unknown_task")
        assert listed(server) == {}

    with live_server(tmp_path) as server:
        wait_until(lambda: listed(server) == {"dropped": 1}, 10)
        server.publish("uploaded", random_soft_prompt(tiny.spec, seed=2))
        for task in ("dropped", "uploaded"):
            server.text(TEXT, task, max_new_tokens=2)
            assert server.client.delete(f"/prompts/{task}").status_code == 204
        assert_gone(server)
        wait_until(lambda: len(server.engine.prefixes) == 0)
        assert len(server.registry.host) == 0
    with live_server(tmp_path) as server:  # the directory is still in the inbox
        assert_gone(server)
        shutil.rmtree(prompts / "dropped")
        server.publish("again", random_soft_prompt(tiny.spec, seed=3))
        assert listed(server) == {"again": 1}


def test_vllm_10784_what_is_loaded_is_listed(own_server: LiveServer) -> None:
    assert listed(own_server) == {}
    for version in (1, 2):
        own_server.publish_random("shown", version)
        assert listed(own_server) == {"shown": version}
    own_server.client.post("/prompts/shown/rollback")
    assert listed(own_server) == {"shown": 1}
    own_server.client.delete("/prompts/shown")
    assert listed(own_server) == {}


def test_vllm_48019_an_unknown_or_misspelt_task_is_never_answered_by_the_bare_model(own_server: LiveServer) -> None:
    own_server.publish_random("sentiment", 1)
    body = {"inputs": TEXT}
    for query, status in (({"task": "sentimnet"}, 404), ({"task": ""}, 422), ({"tsak": "sentiment"}, 422)):
        reply: httpx.Response = own_server.client.post("/generate", params=query, json=body)
        assert reply.status_code == status, reply.text
        assert "generated_text" not in json.loads(reply.content)
