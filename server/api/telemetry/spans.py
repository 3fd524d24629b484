"""OpenTelemetry traces: a span for each request, and one for each phase of a text that it has answered.

Needs the extra `otel`. The exporter, the sampler and the service's name are set by OpenTelemetry's own variables
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...), which its SDK reads. Spans never contain texts or keys.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from server.contracts import Usage

MOST_TEXTS = 8
"""Texts of one request whose phases get spans; a request may have a thousand texts."""

NAMES = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
}
"""Attributes that OpenTelemetry's conventions name; the others are called prelude.NAME."""

_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Creates the spans of requests."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """Send spans to a processor; without one, to the OTLP endpoint that the environment names."""
        if processor is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            processor = BatchSpanProcessor(OTLPSpanExporter())
        resource = Resource({SERVICE_NAME: "prelude"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("prelude")

    def begin(self, headers: Mapping[str, str], method: str) -> Trace:
        """Start a request's span, as a child of the caller's if the headers name one (W3C Trace Context)."""
        return Trace(self, self._tracer.start_span(method, _W3C.extract(headers), SpanKind.SERVER))

    def add(self, name: str, parent: Span, begun: int, ended: int) -> None:
        """Add a span that is over; both times in nanoseconds since 1970."""
        self._tracer.start_span(name, set_span_in_context(parent), start_time=begun).end(ended)

    def stop(self) -> None:
        """Send what is left, and end the exporter's thread."""
        self._provider.shutdown()


class Trace:
    """The span of one request."""

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self._num_texts = 0

    @property
    def id(self) -> str | None:
        """The trace's id in hexadecimal, for log lines; None if the trace was not sampled."""
        return f"{self._span.get_span_context().trace_id:032x}" if self._span.is_recording() else None

    @property
    def headers(self) -> dict[str, str]:
        """The reply's headers, which name the request's span: `traceparent`, and `tracestate` if there is one."""
        headers: dict[str, str] = {}
        _W3C.inject(headers, set_span_in_context(self._span))
        return headers

    def add_text(self, usage: Usage, submitted: float, first: float | None, last: float) -> None:
        """Add the phases of a text: queue, prefix, prefill and decode, one after the other.

        Args:
            submitted: when it was given to the engine; this and the next two in seconds of `time.perf_counter`.
            first: when its first token came, if one came.
        """
        if not self._span.is_recording() or self._num_texts >= MOST_TEXTS:
            return
        self._num_texts += 1
        queued = submitted + usage.queued_seconds
        prefix = queued + usage.prefix_seconds
        ends = [("queue", queued), ("prefix", prefix), ("prefill", last if first is None else first), ("decode", last)]
        now = time.time_ns() - time.perf_counter_ns()
        times = [now + int(1e9 * min(end, last)) for end in itertools.accumulate((end for _, end in ends), max)]
        begun = now + int(1e9 * submitted)
        for (name, _), ended in zip(ends if first is not None else ends[:-1], times, strict=False):
            self._tracing.add(name, self._span, begun, ended)
            begun = ended

    def end(self, line: Mapping[str, AttributeValue]) -> None:
        """End the request's span; its attributes are the fields of the request's log line."""
        if self._span.is_recording():
            self._span.update_name(" ".join(str(line[key]) for key in ("method", "route") if key in line))
            self._span.set_attributes({NAMES.get(key, f"prelude.{key}"): value for key, value in line.items()})
            status = line.get("status")
            if not isinstance(status, int) or status >= 500:  # without one, the client has left
                self._span.set_status(StatusCode.ERROR)
        self._span.end()
