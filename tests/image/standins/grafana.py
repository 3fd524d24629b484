"""Stands in for Grafana where its image cannot be had: no page, but the same files, addresses and queries.

It reads the data source and the dashboards' folder from /etc/grafana/provisioning, as Grafana does, and answers
`GET /api/health`, and `GET /panels` with the number of points of each panel, asked for through that data source.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import panels  # type: ignore[import-not-found]  # it lies beside this file in the image

PROVISIONING = Path("/etc/grafana/provisioning")


def setting(kind: str, name: str) -> str:
    """A setting of the only file of this kind."""
    (file,) = (PROVISIONING / kind).glob("*.yml")
    found = re.search(rf"\b{name}: (\S+)", file.read_text())
    assert found is not None, f"{file} has no {name}"
    return found[1]


def points() -> dict[str, int]:
    """The number of points of each panel in the last half hour, which is longer than a test."""
    (dashboard,) = Path(setting("dashboards", "path")).glob("*.json")
    found = panels.answers(setting("datasources", "url"), 1800.0, dashboard)
    return {panel.title: sum(len(one.values) for one in panel.series) for panel in found if panel.kind != "row"}


class Handler(BaseHTTPRequestHandler):
    """Answers in JSON."""

    def do_GET(self) -> None:
        """Health, and panels."""
        answer: object = {"database": "ok"}
        if self.path == "/panels":
            answer = points()
        self.send_response(200 if self.path in ("/panels", "/api/health") else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # process 1 ignores it otherwise
    ThreadingHTTPServer(("0.0.0.0", 3000), Handler).serve_forever()
