"""Telemetry: request ids, one line in the log per request, metrics."""
