"""Every request has one span, with its phases in order, within its caller's trace; no text and no key is in it."""

from __future__ import annotations

import gzip
import http.server
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, format_trace_id

from server.api.telemetry.spans import MOST_TEXTS, Tracing
from server.api.telemetry.tracing import open_tracing
from server.errors import ConfigurationError
from server.settings import Settings
from tests.api.live import LiveServer, live_server, wait_until
from tests.api.telemetry.logged import logged

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PHASES = ["queue", "prefix", "prefill", "decode"]


class Traced:
    """A server, and the spans that it has sent."""

    def __init__(self, live: LiveServer, exporter: InMemorySpanExporter) -> None:
        self.live = live
        self._exporter = exporter

    def spans(self, *, of_requests: int = 1) -> Sequence[ReadableSpan]:
        """All spans since the last call, once this many requests have ended."""

        def ended() -> bool:
            return sum(span.kind.name == "SERVER" for span in self._exporter.get_finished_spans()) >= of_requests

        wait_until(ended)
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        return spans


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    with live_server(tmp_path_factory.mktemp("traced"), tracing=Tracing(SimpleSpanProcessor(exporter))) as live:
        yield Traced(live, exporter)


def test_a_request_has_a_span_with_its_phases_one_after_the_other(traced: Traced) -> None:
    traced.live.publish_random("mood")
    traced.spans()
    reply = traced.live.generate("a secret text", "mood", max_new_tokens=3, ignore_eos_token=True)
    assert reply.status_code == 200
    *phases, span = traced.spans()
    assert [phase.name for phase in phases] == PHASES
    assert span.name == "POST /generate"
    attributes = dict(span.attributes or {})
    assert attributes["prelude.task"] == "mood"
    assert attributes["prelude.version"] == 1
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert span.status.status_code is StatusCode.UNSET
    for before, after in itertools.pairwise(phases):
        assert before.end_time == after.start_time
    for phase in phases:
        assert phase.parent == span.get_span_context()
        assert 0 <= seconds(phase) <= seconds(span)
    assert "secret" not in "".join(one.to_json() for one in [*phases, span])


def test_the_time_that_a_prefix_takes_to_compute_is_a_phase_of_the_request_that_computes_it(traced: Traced) -> None:
    soft_prompt = traced.live.publish_random("slow", seed=1)
    traced.live.engine.prefixes.drop(soft_prompt.prefix_hash)
    traced.spans()
    traced.live.model.delay = 0.05
    try:
        for _ in range(2):
            traced.live.generate("a", "slow", max_new_tokens=1)
    finally:
        traced.live.model.delay = 0.0
    computing, cached = (span for span in traced.spans(of_requests=2) if span.name == "prefix")
    assert seconds(computing) >= 0.05
    assert seconds(cached) < 0.01


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_trace_of_the_caller_goes_on_and_the_reply_and_the_log_name_it(traced: Traced) -> None:
    with logged() as log:
        reply = traced.live.client.post(
            "/generate",
            json={"inputs": "a", "parameters": {"max_new_tokens": 1}},
            headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"},
        )
        span = traced.spans()[-1]
        wait_until(lambda: bool(log.requests))
        assert log.requests[-1]["trace_id"] == TRACE
    context = span.get_span_context()
    assert context is not None
    assert span.parent is not None
    assert format_trace_id(context.trace_id) == TRACE
    assert f"{span.parent.span_id:016x}" == CALLER
    assert reply.headers["traceparent"] == f"00-{TRACE}-{context.span_id:016x}-01"
    assert reply.headers["tracestate"] == "vendor=1"


def test_a_request_that_its_caller_does_not_sample_sends_nothing_and_still_names_its_trace(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    reply = traced.live.client.post("/generate", json={"inputs": "a"}, headers=headers)
    assert reply.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert reply.headers["traceparent"].endswith("-00")
    traced.live.client.get("/info")
    assert [span.name for span in traced.spans()] == ["GET /info"]


@pytest.mark.parametrize("broken", ["", "00-0-0-01", "00-" + "0" * 32 + f"-{CALLER}-01", "x" * 1000])
def test_a_broken_context_begins_a_new_trace(traced: Traced, broken: str) -> None:
    assert traced.live.client.get("/info", headers={"traceparent": broken}).status_code == 200
    [span] = traced.spans()
    assert span.parent is None


def test_a_refused_request_has_a_span_without_phases(traced: Traced) -> None:
    traced.live.generate("a", "nobody")
    [span] = traced.spans()
    assert dict(span.attributes or {})["http.response.status_code"] == 404
    assert span.status.status_code is StatusCode.UNSET  # the client's error


def test_many_texts_of_one_request_add_few_spans(traced: Traced) -> None:
    body = {"prompt": ["a"] * (MOST_TEXTS + 5), "max_tokens": 1, "model": "tiny-llama"}
    assert traced.live.client.post("/v1/completions", json=body).status_code == 200
    assert len(traced.spans()) == 1 + MOST_TEXTS * len(PHASES)


def test_what_monitoring_polls_is_not_traced(traced: Traced) -> None:
    for path in ("/health", "/metrics", "/info"):
        traced.live.client.get(path)
    assert [span.name for span in traced.spans()] == ["GET /info"]


def test_spans_reach_a_collector_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
            monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
            tracing = open_tracing(Settings.load(tracing=True))
            with live_server(tmp_path, tracing=tracing) as live:
                live.client.get("/info")
            [spans] = received[0].resource_spans  # the last ones are sent as the server stops
        finally:
            collector.shutdown()
            thread.join()
    names = {one.key: one.value.string_value for one in spans.resource.attributes}
    assert names["service.name"] == "mine"
    assert [span.name for span in spans.scope_spans[0].spans] == ["GET /info"]


def test_traces_need_the_extra_and_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(Settings.load()) is None
    monkeypatch.setitem(sys.modules, "server.api.telemetry.spans", None)
    with pytest.raises(ConfigurationError, match="cannot be imported") as caught:
        open_tracing(Settings.load(tracing=True))
    assert "prelude-server[otel]" in str(caught.value.remedy)
