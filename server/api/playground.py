"""GET / for browsers: the playground, a page whose files are built from web/ into server/web/dist.

The page is for browsers alone: a client that does not ask for HTML gets what it gets without the page. File names below
/playground carry a hash of the content, so browsers keep these files.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

ASSETS = "playground"
"""The folder of hashed files, in the bundle and in addresses."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types svelte-trusted-html",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Nothing from elsewhere, no script or style within the page, no frame around it, no HTML from text."""

NOT_BUILT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Prelude</title>
<p>The playground is not built: run <code>npm ci &amp;&amp; npm run build</code> in <code>web/</code> with Node.js 20
or newer, then load this page again; the API is described at <a href="docs">/docs</a>.</p>
</html>
"""

ENCODINGS = {"br": ".br", "gzip": ".gz"}
"""Encodings in which the build leaves each file, the smallest first, by the suffixes of their files."""

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")


def routes(folder: Traversable | None = None) -> list[BaseRoute]:
    """The routes of the page; `folder` is that of the bundle, by default the package's own."""
    page = _Playground(files("server") / "web" / "dist" if folder is None else folder)
    return [
        _PageRoute("/", page.index, include_in_schema=False),
        Route(f"/{ASSETS}/{{name}}", page.asset, include_in_schema=False),
    ]


class _PageRoute(Route):
    """Matches only requests for HTML, so other clients get the same replies as from a server without the page."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Starlette's, for GET by a client that names HTML among what it accepts; `*/*` does not count."""
        headers = Headers(raw=scope.get("headers", []))  # none where the methods of a path are looked up for an error
        is_page = scope["method"] == "GET" and "text/html" in _accepted(headers.get("accept", ""))
        return super().matches(scope) if is_page else (Match.NONE, {})


@dataclass(frozen=True)
class _Playground:
    """The built files, read for each request: they are small, and a new build shows at once."""

    folder: Traversable

    async def index(self, request: Request) -> Response:
        """The page. It is checked for changes at each load, because it names the hashed files."""
        content = _read(self.folder / "index.html")
        if content is None:
            return HTMLResponse(NOT_BUILT, 200, {"Cache-Control": "no-store"})
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**HEADERS, "ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept, Accept-Encoding"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return self._reply(request, self.folder, "index.html", content, headers)

    async def asset(self, request: Request) -> Response:
        """A hashed file, which never changes."""
        name = request.path_params["name"]
        folder = self.folder / ASSETS
        content = _read(folder / name) if _NAME.fullmatch(name) and not name.endswith((".br", ".gz")) else None
        if content is None:
            raise HTTPException(404)
        headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
        return self._reply(request, folder, name, content, headers)

    @staticmethod
    def _reply(
        request: Request, folder: Traversable, name: str, content: bytes, headers: Mapping[str, str]
    ) -> Response:
        """A file, in the smallest encoding that the build made of it and the client takes."""
        accepted = _accepted(request.headers.get("accept-encoding", ""))
        for encoding, suffix in ENCODINGS.items():
            if encoding in accepted and (smaller := _read(folder / f"{name}{suffix}")) is not None:
                headers, content = {**headers, "Content-Encoding": encoding}, smaller
                break
        return Response(content, media_type=_TYPES.get(PurePath(name).suffix), headers=dict(headers))


def _accepted(header: str) -> set[str]:
    """The names in an Accept or Accept-Encoding header, without those of weight 0."""
    parts = (part.replace(" ", "").partition(";q=") for part in header.lower().split(","))
    return {name for name, _, weight in parts if not weight or weight.strip("0.")}


def _read(file: Traversable) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
