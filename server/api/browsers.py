"""What a page of somebody else must not make a user's browser do to a server that asks for no key.

A browser on this machine reaches loopback for any page that is open in it. It may not read the answer, but a form can
still POST a rollback (CSRF); and a page whose own name is made to point to 127.0.0.1 after it was loaded can read the
answer as well (DNS rebinding). Browsers tell both: where a request comes from, and by which name it reached us.
Programs send no such headers and are not troubled. With keys there is nothing to steal: no page has one.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import render
from server.errors import Forbidden

READING = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_PAGES = frozenset({"same-origin", "none"})
"""`Sec-Fetch-Site` of a request from our own pages (/docs), or that the user typed."""

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\s]+))(?::\d*)?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class OwnPagesOnly:
    """Refuses what a browser sends for another site's page; pure ASGI."""

    def __init__(self, app: ASGIApp, *, loopback_only: bool) -> None:
        """Wrap an app; `loopback_only` also refuses requests that came by another name than this machine's own."""
        self._app = app
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            body, status = render(scope["path"], refusal)
            await JSONResponse(body, status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | None:
        headers = Headers(scope=scope)
        if self._loopback_only and not all(is_this_machine(host) for host in headers.getlist("host")):
            return Forbidden(
                "Without API keys this server answers only requests to 127.0.0.1, [::1] or localhost.",
                remedy="Address it by one of these. A proxy in front of it should send one as Host; or give the server "
                "keys (PRELUDE_API_KEYS_FILE), or let everybody in (PRELUDE_ALLOW_ANONYMOUS=1).",
            )
        if scope["method"] not in READING and _is_from_another_site(headers):
            return Forbidden(
                "Without API keys this server takes no changes or texts from other sites' pages.",
                remedy="Send it from a program or from the server's own pages; or give the server keys "
                "(PRELUDE_API_KEYS_FILE).",
            )
        return None


def is_loopback(address: str) -> bool:
    """Whether a numeric address is this machine's own: 127.0.0.0/8, ::1, or the former as ::ffff:127.0.0.1."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def is_this_machine(host: str) -> bool:
    """Whether a Host header names this machine by an address or the name that no DNS server can redirect."""
    match = _AUTHORITY.fullmatch(host)
    if match is None:
        return False
    name = match[1] or match[2]
    return name.lower().removesuffix(".") == "localhost" or is_loopback(name)


def _is_from_another_site(headers: Headers) -> bool:
    """As the browser tells; a page cannot set these headers itself, and other programs have no reason to."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in OWN_PAGES
    origin = headers.get("origin")
    if origin is None:
        return False
    scheme, _, authority = origin.lower().partition("://")
    # The page's scheme, not ours, says which port is left out: a proxy may have taken off TLS.
    port = _DEFAULT_PORTS.get(scheme, "")
    return authority.removesuffix(port) != headers.get("host", "").lower().removesuffix(port)
