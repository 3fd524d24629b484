"""/docs: Swagger UI over /openapi.json. All its files come from this server, so it works offline."""

import importlib.resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""Files of Swagger UI, of those that fastapi-offline carries, by their media types."""

START = "start.js"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prelude</title>
<link rel="icon" href="data:,">
<link rel="service-desc" type="application/json" href="./openapi.json">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
"""Its addresses are relative, so that a proxy may put the server below a path."""

_START = """SwaggerUIBundle({
  url: document.querySelector("link[rel=service-desc]").href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""

HEADERS = {
    # `data:` are the icons in the style sheet.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
"""Nothing from elsewhere, no script within the page, no frame around it."""


async def _page(request: Request) -> Response:
    return HTMLResponse(_PAGE, headers=HEADERS)


async def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name == START:
        return Response(_START, media_type="text/javascript")
    if name not in ASSETS:
        raise HTTPException(404)
    with importlib.resources.as_file(importlib.resources.files("fastapi_offline") / "static" / name) as path:
        return FileResponse(path, media_type=ASSETS[name], headers={"Cache-Control": "max-age=3600"})


ROUTES = (Route("/docs", _page, include_in_schema=False), Route("/docs/{name}", _asset, include_in_schema=False))
