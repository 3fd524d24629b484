"""Soft prompts over HTTP: what is published is served from the next request on, and what runs finishes as it began."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer, as_form, assert_error, engine_answer, live_server, wait_until, zip_of
from tests.support import random_kv_prompt, random_soft_prompt


def test_an_upload_is_answered_with_what_it_made(server: LiveServer) -> None:
    soft_prompt = random_soft_prompt(server.model.spec, 7, seed=1)
    response = server.put("prompts-new", server.files(soft_prompt))
    assert response.status_code == 201
    assert response.json() == {
        "task": "prompts-new",
        "version": 1,
        "digest": soft_prompt.digest,
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 7,
        "live": True,
        "tasks": [{"task": "prompts-new", "version": 1}],
    }


def test_the_live_content_again_is_a_no_op(server: LiveServer) -> None:
    files = server.files(random_soft_prompt(server.model.spec, seed=1))
    first, again = server.put("prompts-same", files), server.put("prompts-same", files)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert server.client.get("/prompts/prompts-same").json()["versions"] == [1]


def test_new_content_is_served_from_the_next_request_on(server: LiveServer, tiny: FrozenModel) -> None:
    texts = []
    for version in range(1, 6):
        soft_prompt = server.publish_random("prompts-swap", seed=version)
        response = server.generate("hello", "prompts-swap", max_new_tokens=15)
        assert response.headers["prelude-version"] == str(version)
        texts.append(response.json()["generated_text"])
        assert texts[-1] == engine_answer(tiny, soft_prompt, "hello", max_new_tokens=15).text
    assert len(set(texts)) == 5


def test_each_version_shows_its_own_manifest(server: LiveServer) -> None:
    for version in (1, 2):
        server.publish_random("prompts-shown", seed=version, manifest={"description": f"the {version}."})
    for query, description in (({}, "the 2."), ({"version": 1}, "the 1."), ({"version": 2}, "the 2.")):
        shown = server.client.get("/prompts/prompts-shown", params=query).json()
        assert shown["manifest"]["description"] == description
        assert shown["version"] == 2
    assert_error(server.client.get("/prompts/prompts-shown?version=3"), 404, "unknown_task", "no version 3")
    assert_error(server.client.get("/prompts/prompts-shown?version=0"), 422, "invalid_request", "version")


def test_older_content_again_is_a_new_version(server: LiveServer) -> None:
    old, new = (random_soft_prompt(server.model.spec, seed=seed) for seed in (1, 2))
    assert [server.publish("prompts-back", content)["version"] for content in (old, new, old, old)] == [1, 2, 3, 3]


def test_whatever_differs_in_a_manifest_makes_a_version(server: LiveServer) -> None:
    spec = server.model.spec
    manifests: list[dict[str, Any]] = [
        {"description": "one"},
        {"description": "one", "task": "filled-in", "digest": "by a download"},
        {"description": "two"},
        {"description": "two", "input_template": "{input}!"},
        {"description": "two", "input_template": "{input}!", "generation": {"max_new_tokens": 3}},
    ]
    versions = [
        server.publish("prompts-manifest", random_soft_prompt(spec, seed=1, manifest=manifest))["version"]
        for manifest in manifests
    ]
    assert versions == [1, 1, 2, 3, 4]


def test_a_request_in_flight_finishes_on_the_version_that_it_began_with(
    own_server: LiveServer, tiny: FrozenModel
) -> None:
    old = own_server.publish_random("swapped", 1)
    own_server.model.delay = 0.02  # a publish takes steps of its own, to warm the prefix: the model cannot be held
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 40}}
    with own_server.client.stream("POST", "/generate_stream", params={"task": "swapped"}, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        events = [json.loads(next(lines).removeprefix("data:"))]
        new = own_server.publish_random("swapped", 2)
        later = own_server.generate("hello", "swapped", max_new_tokens=3)
        assert own_server.in_flight == 1, "the first request is over, so that this test shows nothing"
        own_server.model.delay = 0.0
        events += [json.loads(line.removeprefix("data:")) for line in lines]
    assert response.headers["prelude-version"] == "1"
    assert events[-1]["generated_text"] == engine_answer(tiny, old, "hello", max_new_tokens=40).text
    assert later.headers["prelude-version"] == "2"
    assert later.json()["generated_text"] == engine_answer(tiny, new, "hello", max_new_tokens=3).text


def test_a_request_in_flight_survives_the_deletion_of_its_task(own_server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = own_server.publish_random("deleted", 1)
    own_server.model.allow(2)
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 20}}
    with own_server.client.stream("POST", "/generate_stream", params={"task": "deleted"}, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        assert own_server.client.delete("/prompts/deleted").status_code == 204
        assert_error(own_server.generate("hello", "deleted"), 404, "unknown_task")
        own_server.model.allow(None)
        *_, last = lines
    text = json.loads(last.removeprefix("data:"))["generated_text"]
    assert text == engine_answer(tiny, soft_prompt, "hello", max_new_tokens=20).text


def test_swaps_under_load_never_tear_an_answer(own_server: LiveServer, tiny: FrozenModel) -> None:
    contents = [random_soft_prompt(own_server.model.spec, seed=seed) for seed in range(6)]
    expected = [engine_answer(tiny, content, "hello", max_new_tokens=25).text for content in contents]
    own_server.publish("busy", contents[0])
    with ThreadPoolExecutor(8) as pool:
        futures = []
        for content in contents:
            own_server.publish("busy", content)
            futures += [pool.submit(own_server.generate, "hello", "busy", max_new_tokens=25) for _ in range(6)]
        for future in futures:
            response = future.result()
            version = int(response.headers["prelude-version"])
            assert response.json()["generated_text"] == expected[version - 1]


@pytest.mark.parametrize("folder", ["", "my_task/"])
def test_a_zip_is_taken_flat_or_with_one_folder(server: LiveServer, tiny: FrozenModel, folder: str) -> None:
    soft_prompt = random_soft_prompt(server.model.spec, seed=9)
    files = {**server.files(soft_prompt), "README.md": b"# mine", "notes/run.log": b"x"}
    name = f"prompts-zip{len(folder)}"
    response = server.put(name, {"soft_prompt.zip": zip_of(files, folder)})
    assert response.status_code == 201, response.text
    assert response.json()["digest"] == soft_prompt.digest
    assert (
        server.text("hello", name, max_new_tokens=9) == engine_answer(tiny, soft_prompt, "hello", max_new_tokens=9).text
    )


def test_a_kv_prefix_is_served_as_well(server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = random_kv_prompt(server.model.spec, seed=3)
    assert server.publish("prompts-kv", soft_prompt)["peft_type"] == "PREFIX_TUNING"
    expected = engine_answer(tiny, soft_prompt, "hello", max_new_tokens=15).text
    assert server.text("hello", "prompts-kv", max_new_tokens=15) == expected


def test_files_without_a_manifest_are_enough(server: LiveServer) -> None:
    files = server.files(random_soft_prompt(server.model.spec, seed=1))
    del files["manifest.json"]
    assert server.put("prompts-bare", files).status_code == 201


def test_a_multitask_upload_makes_one_task_per_row(server: LiveServer, tiny: FrozenModel) -> None:
    torch.manual_seed(0)
    tensors = {
        "prompt_embeddings": torch.randn(5, tiny.spec.hidden_size),
        "prefix_task_cols": torch.randn(3, 5, 2),
        "prefix_task_rows": torch.randn(3, 2, tiny.spec.hidden_size),
    }
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 5}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    response = server.put("prompts-multi", files)
    assert response.status_code == 201, response.text
    names = [f"prompts-multi-{i}" for i in range(3)]
    assert response.json()["tasks"] == [{"task": name, "version": 1} for name in names]
    assert response.json()["task"] == names[0]
    texts = [server.text("hello", name, max_new_tokens=15) for name in names]
    for text, cols, rows in zip(texts, tensors["prefix_task_cols"], tensors["prefix_task_rows"], strict=True):
        row = SoftPrompt("PROMPT_TUNING", tensors["prompt_embeddings"] * (cols @ rows))
        assert text == engine_answer(tiny, row, "hello", max_new_tokens=15).text
    assert len(set(texts)) == 3
    assert_error(server.generate("hello", "prompts-multi"), 404, "unknown_task", names[0])


def test_a_deleted_task_is_gone_at_once_and_its_numbers_are_not_given_again(server: LiveServer) -> None:
    server.publish_random("prompts-gone", 1)
    server.publish_random("prompts-gone", 2)
    response = server.client.delete("/prompts/prompts-gone")
    assert (response.status_code, response.content) == (204, b"")
    for gone in (
        server.generate("hello", "prompts-gone"),
        server.generate("hello", "prompts-gone@1"),
        server.client.get("/prompts/prompts-gone"),
        server.client.delete("/prompts/prompts-gone"),
    ):
        assert_error(gone, 404, "unknown_task")
    assert "prompts-gone" not in server.client.get("/prompts", params={"limit": 1000}).text
    assert server.publish("prompts-gone", random_soft_prompt(server.model.spec, seed=1))["version"] == 3


def test_the_list_names_every_task_in_pages(own_server: LiveServer) -> None:
    published = {f"t{i}": own_server.publish_random(f"t{i}", i, {"description": f"task {i}"}) for i in (3, 1, 4, 0, 2)}
    everything = own_server.client.get("/prompts").json()
    assert everything == {
        "prompts": [
            {
                "task": name,
                "version": 1,
                "digest": published[name].digest,
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": 5,
                "description": f"task {name[1]}",
            }
            for name in sorted(published)
        ]
    }
    pages: list[list[str]] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = own_server.client.get("/prompts", params=query).json()
        pages.append([prompt["task"] for prompt in page["prompts"]])
        if "next" not in page:
            break
        query["after"] = page["next"]
    assert pages == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert "next" not in own_server.client.get("/prompts", params={"limit": 5}).json()
    assert own_server.client.get("/prompts", params={"after": "t9"}).json() == {"prompts": []}
    after_none = own_server.client.get("/prompts", params={"after": "t11", "limit": 1}).json()
    assert [prompt["task"] for prompt in after_none["prompts"]] == ["t2"]


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 1001}, {"limit": "many"}, {"limt": 3}])
def test_a_page_that_cannot_be_is_refused(server: LiveServer, query: dict[str, Any]) -> None:
    assert_error(server.client.get("/prompts", params=query), 422, "invalid_request")


def test_one_task_tells_its_versions_and_its_manifest(server: LiveServer) -> None:
    server.publish_random("prompts-one", 1)
    manifest = {"description": "second", "labels": ["ham", "spam"], "metrics": {"exact_match": 0.9}, "extra": 1}
    soft_prompt = server.publish_random("prompts-one", 2, manifest)
    assert server.client.get("/prompts/prompts-one").json() == {
        "task": "prompts-one",
        "version": 2,
        "digest": soft_prompt.digest,
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 5,
        "description": "second",
        "versions": [1, 2],
        "manifest": {**manifest, "generation": {}},
    }


@pytest.mark.parametrize(
    "name", ["UPPER", "a b", ".hidden", "-x", "_x", "x" * 65, "a@1", "sch%C3%B6n", "a%00b", "tiny-llama%20"]
)
def test_a_name_that_no_task_can_have_is_refused(server: LiveServer, name: str) -> None:
    files = server.files(random_soft_prompt(server.model.spec))
    for response in (
        server.put(name, files),
        server.client.get(f"/prompts/{name}"),
        server.client.delete(f"/prompts/{name}"),
    ):
        assert_error(response, 422, "invalid_task_name")


def test_no_task_may_take_the_frozen_models_name(server: LiveServer) -> None:
    response = server.put("tiny-llama", server.files(random_soft_prompt(server.model.spec)))
    assert_error(response, 422, "invalid_task_name", "tiny-llama")


def test_a_misspelt_option_publishes_and_deletes_nothing(server: LiveServer) -> None:
    server.publish_random("prompts-kept", 1)
    form = as_form(server.files(random_soft_prompt(server.model.spec, seed=2)))
    response = server.client.put("/prompts/prompts-kept", params={"dryrun": "true"}, files=form)
    assert_error(response, 422, "invalid_request", "'dryrun'")
    response = server.client.put("/prompts/prompts-kept", data={"actvate": "false"}, files=form)
    assert_error(response, 422, "invalid_request", "'actvate'")
    assert_error(server.client.delete("/prompts/prompts-kept", params={"x": "1"}), 422, "invalid_request")
    assert server.client.get("/prompts/prompts-kept").json()["versions"] == [1]


def test_a_broken_entry_of_the_inbox_is_told_and_the_others_are_served(own_server: LiveServer) -> None:
    inbox = own_server.settings.prompts_dir
    for name, drop in (("good", None), ("broken", "adapter_model.safetensors"), ("Bad Name", None)):
        (inbox / name).mkdir(parents=True)
        for file, content in own_server.files(random_soft_prompt(own_server.model.spec)).items():
            if file != drop:
                (inbox / name / file).write_bytes(content)

    def entries_by_name() -> dict[str, dict[str, Any]]:
        return {entry["task"]: entry for entry in own_server.client.get("/prompts").json()["prompts"]}

    wait_until(lambda: set(entries_by_name()) == {"good", "broken", "Bad Name"}, 10)
    entries = entries_by_name()
    assert entries["broken"].keys() == {"task", "error"}
    assert "adapter_model.safetensors is missing" in entries["broken"]["error"]
    assert "error" not in entries["good"]
    assert own_server.generate("hello", "good").status_code == 200
    assert_error(own_server.generate("hello", "broken"), 404, "unknown_task")


def test_a_restarted_server_serves_what_was_acknowledged(tmp_path: Path) -> None:
    with live_server(tmp_path) as before:
        before.publish_random("kept", 1)
        before.publish_random("kept", 2)
        before.publish_random("dropped", 3)
        before.client.delete("/prompts/dropped")
        listed, text = before.client.get("/prompts").json(), before.text("hello", "kept", max_new_tokens=10)
    with live_server(tmp_path) as after:
        assert after.client.get("/prompts").json() == listed
        assert after.text("hello", "kept", max_new_tokens=10) == text
        assert after.client.get("/prompts/kept").json()["versions"] == [1, 2]
        assert_error(after.generate("hello", "dropped"), 404, "unknown_task")


def test_racing_uploads_all_count_and_none_is_lost(own_server: LiveServer) -> None:
    forms = [own_server.files(random_soft_prompt(own_server.model.spec, seed=seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies: list[httpx.Response] = list(pool.map(lambda files: own_server.put("raced", files), forms))
    assert sorted(reply.json()["version"] for reply in replies) == list(range(1, 9))
    detail = own_server.client.get("/prompts/raced").json()
    assert detail["versions"] == list(range(1, 9))
    winner = next(reply.json() for reply in replies if reply.json()["version"] == 8)
    assert detail["digest"] == winner["digest"]


def test_what_a_newer_prelude_stored_breaks_no_list(own_server: LiveServer) -> None:
    own_server.publish_random("newer", 1)
    own_server.publish_random("newer", 2)
    events = sorted((own_server.settings.prompts_dir / ".store" / "events").iterdir())
    fields = json.loads(events[-1].read_text())
    fields |= {"number": fields["number"] + 1, "at": "yesterday", "nonce": "n"}
    fields["change"]["published"][0]["version"] = 3
    fields["change"]["published"][0]["content"]["manifest"] = {"generation": {"dry_multiplier": 0.8}}
    (events[-1].parent / f"{fields['number']:012d}.json").write_text(json.dumps(fields))
    own_server.registry.sync()
    client = own_server.client
    [entry] = [item for item in client.get("/prompts").json()["prompts"] if item["task"] == "newer"]
    assert "dry_multiplier" in entry["error"]
    assert client.get("/prompts/newer").json()["manifest"] == {"generation": {"dry_multiplier": 0.8}}
    unread, second, _ = client.get("/prompts/newer/versions").json()["versions"]
    assert "dry_multiplier" in unread["error"]
    assert "error" not in second
    assert "newer" in [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert client.get("/v1/models/newer").json()["created"] == 0
    assert_error(client.post("/prompts/newer/activate", json={"version": 3}), 503, "version_unavailable")
    assert_error(client.get("/prompts/newer/versions/3/download"), 503, "version_unavailable")
    assert client.post("/prompts/newer/activate", json={"version": 2}).status_code == 200
    assert client.delete("/prompts/newer/versions/3").status_code == 204
