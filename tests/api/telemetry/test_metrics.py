"""What /metrics tells is what happened: every request is counted once, by its task, its version and its end."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import __version__
from server.keys.file import add_key
from server.keys.key import Scope
from server.registry.events import KINDS
from tests.api.live import LiveServer, as_form, assert_error, live_server, send_and_vanish, wait_until
from tests.api.telemetry.scrape import Scrape
from tests.promtool import needs_promtool, promtool
from tests.support import random_soft_prompt

ROOT = Path(__file__).parents[3]

LATENCIES = ("time_to_first_token", "request_duration", "queue")


def ask(server: LiveServer, task: str | None = None, tokens: int = 3, route: str = "/generate") -> int:
    """One request of five input tokens; answers its status."""
    return server.generate("hello", task, route, max_new_tokens=tokens, ignore_eos_token=True).status_code


def requests(server: LiveServer, outcome: str, task: str, version: str) -> float:
    return Scrape.of(server).value("prelude_requests_total", outcome, task, version)


@needs_promtool
def test_promtool_finds_nothing_to_complain_of(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    for task in ("mood", None, "nobody"):
        ask(own_server, task)
    own_server.client.get("/nowhere")
    assert promtool("check", "metrics", stdin=Scrape.of(own_server).text.encode()) == ""


def test_a_request_is_counted_with_its_times_and_tokens(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    for route in ("/generate", "/generate_stream", "/"):
        assert ask(own_server, "mood", route=route) == 200
    seen = Scrape.of(own_server)
    assert seen.series("prelude_requests_total") == {("finished", "mood", "1"): 3}
    for name in LATENCIES:
        assert seen.series(f"prelude_{name}_seconds_count") == {("mood",): 3}
    assert seen.value("prelude_inter_token_seconds_count") == 3 * 2
    tokens = {kind: seen.value(f"prelude_{kind}_tokens_total", "mood") for kind in ("input", "virtual", "cached")}
    assert tokens == {"input": 15, "virtual": 15, "cached": 15}
    assert seen.value("prelude_output_tokens_total", "mood") == 9
    first, whole = (seen.value(f"prelude_{name}_seconds_sum", "mood") for name in LATENCIES[:2])
    assert 0 < seen.value("prelude_queue_seconds_sum", "mood") < first < whole < 60


def test_the_frozen_model_alone_has_a_name_of_its_own(own_server: LiveServer) -> None:
    assert ask(own_server) == 200
    seen = Scrape.of(own_server)
    assert seen.series("prelude_requests_total") == {("finished", "_model", ""): 1}
    assert seen.value("prelude_virtual_tokens_total", "_model") == 0


def test_choices_and_texts_of_openais_routes_are_counted_too(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    body = {"model": "mood", "prompt": ["hello", "world"], "n": 2, "max_tokens": 3, "ignore_eos": True, "seed": 1}
    assert own_server.client.post("/v1/completions", json=body).status_code == 200
    seen = Scrape.of(own_server)
    assert seen.series("prelude_requests_total") == {("finished", "mood", "1"): 2}
    assert seen.value("prelude_output_tokens_total", "mood") == 2 * 2 * 3
    assert seen.value("prelude_input_tokens_total", "mood") == 10, "choices share their input"


def test_what_is_refused_is_counted_for_its_task_where_that_is_known(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    assert ask(own_server, "mood", tokens=500) == 422
    assert ask(own_server, "nobody") == 404
    assert own_server.client.post("/generate", json={"input": "x"}).status_code == 422
    assert own_server.client.post("/v1/completions", json={}).status_code == 400
    seen = Scrape.of(own_server)
    assert seen.series("prelude_requests_total") == {("refused", "mood", "1"): 1, ("refused", "_none", ""): 3}
    assert seen.series("prelude_input_tokens_total") == {}, "nothing was done for them"


def test_what_fails_is_counted_as_our_fault(own_server: LiveServer) -> None:
    own_server.model.fail_after = 2
    assert ask(own_server) == 500
    assert Scrape.of(own_server).series("prelude_requests_total") == {("failed", "_model", ""): 1}


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_is_counted_once_as_aborted(own_server: LiveServer, route: str) -> None:
    own_server.model.allow(3)
    body = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": 50, "ignore_eos_token": True}}).encode()
    connection = send_and_vanish(own_server.port, route, body)
    wait_until(lambda: own_server.in_flight == 1)
    running = Scrape.of(own_server)
    assert running.value("prelude_requests_running") + running.value("prelude_requests_waiting") == 1
    connection.close()
    wait_until(lambda: requests(own_server, "aborted", "_model", "") == 1)
    own_server.model.allow(None)
    wait_until(lambda: own_server.is_idle)
    seen = Scrape.of(own_server)
    assert seen.series("prelude_requests_total") == {("aborted", "_model", ""): 1}
    assert seen.series("prelude_request_duration_seconds_count") == {}, "only those that finish have a duration"
    assert seen.value("prelude_requests_running") == seen.value("prelude_requests_waiting") == 0


def test_every_request_of_a_crowd_is_counted_exactly_once(own_server: LiveServer) -> None:
    for name in ("one", "two"):
        own_server.publish_random(name, len(name))
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda i: ask(own_server, ("one", "two", None, "none")[i % 4]), range(80)))
    assert statuses.count(200) == 60
    seen = Scrape.of(own_server)
    assert sum(seen.series("prelude_requests_total").values()) == 80
    assert {seen.value("prelude_requests_total", "finished", *of) for of in (("one", "1"), ("_model", ""))} == {20}
    assert seen.value("prelude_http_requests_total", "POST", "/generate", "200") == 60
    assert seen.value("prelude_http_requests_total", "POST", "/generate", "404") == 20


def test_tasks_beyond_the_number_that_is_told_apart_share_a_value_until_a_place_is_free(tmp_path: Path) -> None:
    with live_server(tmp_path, metrics_tasks=2) as live:
        for seed, name in enumerate(("a", "b", "c", "d")):
            live.publish_random(name, seed)
            assert ask(live, name) == 200
        assert Scrape.of(live).tasks() == {"a", "b", "_other"}
        assert requests(live, "finished", "_other", "") == 2
        assert live.client.delete("/prompts/a").status_code == 204
        assert Scrape.of(live).tasks() == {"b", "_other"}, "the series of a deleted task end"
        assert ask(live, "c") == 200
        assert requests(live, "finished", "c", "1") == 1


def test_a_canary_shows_its_sides_and_a_staged_version_does_not(own_server: LiveServer) -> None:
    for seed in (1, 2):
        own_server.publish_random("mood", seed)
    staged = as_form(own_server.files(random_soft_prompt(own_server.model.spec, seed=3)))
    assert own_server.client.put("/prompts/mood?activate=false", files=staged).status_code == 201
    assert own_server.client.put("/prompts/mood/traffic", json={"1": 50, "2": 50}).status_code == 200
    for version in (1, 2, 3):
        assert ask(own_server, f"mood@{version}") == 200
    seen = Scrape.of(own_server).series("prelude_requests_total")
    assert seen == {("finished", "mood", value): 1 for value in ("1", "2", "_other")}


def test_changes_are_counted_by_kind_and_all_kinds_are_there_from_the_start(own_server: LiveServer) -> None:
    assert Scrape.of(own_server).series("prelude_changes_total") == {(kind,): 0 for kind in KINDS}
    for seed in (1, 2):
        own_server.publish_random("mood", seed)
    for what in ("rollback", "delete"):
        method, path = ("DELETE", "/prompts/mood") if what == "delete" else ("POST", "/prompts/mood/rollback")
        assert own_server.client.request(method, path).is_success
        assert Scrape.of(own_server).value("prelude_changes_total", what) == 1
    assert Scrape.of(own_server).value("prelude_changes_total", "publish") == 2


def test_caches_and_tasks_are_told_as_they_are(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    ask(own_server, "mood")
    seen, prefixes, host = Scrape.of(own_server), own_server.engine.prefixes, own_server.registry.host
    assert seen.value("prelude_prefix_cache_bytes") == prefixes.num_bytes > 0
    assert seen.value("prelude_prefix_cache_budget_bytes") == prefixes.budget_bytes
    assert [seen.value(f"prelude_prefix_cache_{name}") for name in ("entries", "hits_total", "misses_total")] == [1] * 3
    assert seen.value("prelude_soft_prompt_cache_bytes") == host.num_bytes > 0
    assert seen.value("prelude_soft_prompt_cache_hits_total") == host.hits > 0
    assert seen.value("prelude_kv_cache_positions") == own_server.engine.kv_cache.allocator.num_positions
    assert seen.value("prelude_kv_cache_used_positions") == 0
    assert (seen.value("prelude_tasks"), seen.value("prelude_tasks_broken")) == (1, 0)
    assert seen.series("prelude_build_info") == {("cpu", "float64", "tiny-llama", __version__): 1}
    assert seen.value("prelude_ready") == 1


def test_positions_of_whoever_runs_are_used(own_server: LiveServer) -> None:
    own_server.model.allow(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, own_server, None, 20)
        wait_until(lambda: Scrape.of(own_server).value("prelude_kv_cache_used_positions") == 32)
        own_server.model.allow(None)
        assert waiting.result() == 200


def test_prefixes_that_do_not_fit_are_counted_as_they_go(own_server: LiveServer) -> None:
    own_server.publish_random("one", 1)
    own_server.engine.prefixes.budget_bytes = own_server.engine.prefixes.num_bytes
    own_server.publish_random("two", 2)
    assert Scrape.of(own_server).value("prelude_prefix_cache_evictions_total") == 1


def test_reading_from_the_store_is_timed_and_failures_are_counted(own_server: LiveServer) -> None:
    for seed, name in enumerate(("kept", "lost")):
        digest = own_server.publish_random(name, seed).digest
        own_server.registry.host.drop(digest)
    for blob in (own_server.settings.prompts_dir / ".store" / "blobs").glob(f"{digest}*"):
        blob.unlink()
    assert ask(own_server, "kept") == 200
    assert ask(own_server, "lost") == 503
    seen = Scrape.of(own_server)
    assert seen.value("prelude_soft_prompt_load_seconds_count") == 1
    assert seen.value("prelude_soft_prompt_load_failures_total") == 1
    assert seen.value("prelude_tasks_broken") == 1
    assert seen.value("prelude_requests_total", "refused", "_none", "") == 1


@pytest.mark.parametrize("path", ["/nowhere", "/prompts/a/b/c/d", "/secret-words"])
def test_routes_that_there_are_not_and_odd_methods_share_a_value(own_server: LiveServer, path: str) -> None:
    assert own_server.client.get(path).status_code == 404
    assert own_server.client.request("PROPFIND", "/generate").status_code == 405
    assert own_server.client.get("/prompts/mood").status_code == 404
    series = Scrape.of(own_server).series("prelude_http_requests_total")
    assert series == {
        ("GET", "_other", "404"): 1,
        ("_other", "/generate", "405"): 1,
        ("GET", "/prompts/{task}", "404"): 1,
    }


def test_apps_do_not_share_their_metrics(own_server: LiveServer, tmp_path: Path) -> None:
    ask(own_server)
    with live_server(tmp_path / "other") as other:
        assert Scrape.of(other).series("prelude_requests_total") == {}


def test_with_keys_metrics_are_for_one_that_is_for_them_and_for_all_tasks(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    texts = {
        name: add_key(path, name, [scope], tasks)[1]
        for name, scope, tasks in (
            ("scraper", Scope.METRICS, None),
            ("admin", Scope.ADMIN, None),
            ("user", Scope.GENERATE, None),
            ("team", Scope.METRICS, ["team-*"]),
        )
    }
    with live_server(tmp_path, api_keys_file=path) as live:

        def get(name: str, path: str = "/metrics") -> int:
            return live.client.get(path, headers={"Authorization": f"Bearer {texts[name]}"}).status_code

        assert [get(name) for name in texts] == [200, 200, 403, 403]
        assert_error(live.client.get("/metrics"), 401, "unauthorized")
        headers = {"Authorization": f"Bearer {texts['scraper']}"}
        body = {"inputs": "hello"}
        assert_error(live.client.post("/generate", json=body, headers=headers), 403, "forbidden", "scope generate")


def documented() -> dict[str, tuple[str, set[str]]]:
    rows = re.findall(
        r"^\| `(prelude_\w+)` \| (\w+) \| ([^|]*)\|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE
    )
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_page_on_operations_lists_every_metric_with_its_labels_and_no_other(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    ask(own_server, "mood")
    found: dict[str, tuple[str, set[str]]] = {}
    for family in Scrape.of(own_server).families:
        if family.name.startswith("prelude_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, labels)
    assert found == documented()
