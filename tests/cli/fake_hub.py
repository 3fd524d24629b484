"""A hub on loopback: as much of its HTTP as `huggingface_hub.snapshot_download` asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tests.api.live import Files, serving


@dataclass
class FakeHub:
    """What it holds and what it was asked for."""

    url: str
    repositories: Mapping[str, Files]
    downloads: list[str] = field(default_factory=list)


@contextmanager
def fake_hub(repositories: Mapping[str, Files], *, gated: tuple[str, ...] = ()) -> Iterator[FakeHub]:
    """Serve repositories, each with the one revision `main`."""
    app = FastAPI()
    hub = FakeHub("", repositories)

    def refusal(repository: str, revision: str) -> JSONResponse | None:
        if repository not in repositories:
            return JSONResponse({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        if repository in gated:
            return JSONResponse({"error": "Access is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", commit(repository)):
            return JSONResponse({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    @app.get("/api/models/{org}/{name}/revision/{revision:path}")
    def info(org: str, name: str, revision: str) -> Response:
        repository = f"{org}/{name}"
        refused = refusal(repository, revision)
        return refused or JSONResponse({"id": repository, "sha": commit(repository), "siblings": [], "tags": []})

    @app.get("/api/models/{org}/{name}/tree/{revision}")
    def tree(org: str, name: str, revision: str) -> Response:
        refused = refusal(f"{org}/{name}", revision)
        files = repositories.get(f"{org}/{name}", {})
        listed = [{"type": "file", "path": path, "size": len(data), "oid": oid(data)} for path, data in files.items()]
        return refused or JSONResponse(listed)

    @app.api_route("/{org}/{name}/resolve/{revision}/{path}", methods=["GET", "HEAD"])
    def resolve(org: str, name: str, revision: str, path: str, request: Request) -> Response:
        refused = refusal(f"{org}/{name}", revision)
        if refused is not None:
            return refused
        data = repositories[f"{org}/{name}"][path]
        if request.method == "GET":
            hub.downloads.append(path)
        return Response(data, headers={"X-Repo-Commit": commit(f"{org}/{name}"), "ETag": f'"{oid(data)}"'})

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none")
    with serving(config) as port:
        hub.url = f"http://127.0.0.1:{port}"
        yield hub


def commit(repository: str) -> str:
    """The one commit of a repository."""
    return oid(repository.encode())


def oid(data: bytes) -> str:
    """Forty hex digits."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
