"""Protection against foreign web pages, for servers that require no key.

A browser on this machine reaches loopback for any page that is open in it. It may not read the answer, but a form can
still POST a rollback (CSRF); and a page whose own name is made to point to 127.0.0.1 after it was loaded can read the
answer as well (DNS rebinding). Browsers send headers that show both: the origin of the page, and the host name of the
request. Other programs send no such headers and are not affected. A server with keys needs no such protection, because
a foreign page has no key.

Pages from the origins in `PRELUDE_CORS_ORIGINS` may do what the server's own pages may. CORS headers allow the browser
to show the page the reply.
"""

import ipaddress
import re
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_format import ErrorFormats
from server.errors import Forbidden

READING = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_PAGES = frozenset({"same-origin", "none"})
"""`Sec-Fetch-Site` of a request from our own pages (/docs), or that the user typed."""

CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST", "PUT", "DELETE"),
    "allow_headers": ("Authorization", "If-Match", "If-None-Match", "X-Request-Id"),
    "expose_headers": (
        *("ETag", "Retry-After", "X-Request-Id", "Content-Disposition"),
        *("Prelude-Model", "Prelude-Task", "Prelude-Version", "Prelude-System-Message"),
    ),
    "allow_private_network": True,
}
"""What a page of an origin that is let in may send and read. Cookies are no part of it: there are none."""

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\s]+))(?::\d*)?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every reply that does not set them itself: it is no page, and no page may show it in a frame."""


class SecurityHeaders:
    """Tells browsers what they may do with a reply; pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class OwnPagesOnly:
    """Refuses what a browser sends for another site's page; pure ASGI."""

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str] | None, origins: frozenset[str], formats: ErrorFormats
    ) -> None:
        """Wrap an app. Requests may come to this machine's own names and to `hosts`, or to any name if it is None.

        Pages of `origins` are let in; `*` is any. `formats` render the refusals.
        """
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._formats = formats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            body, status = self._formats.render(scope["path"], refusal)
            await JSONResponse(body, status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | None:
        headers = Headers(scope=scope)
        if not all(map(self._is_ours, headers.getlist("host"))):
            if self._hosts:
                return Forbidden(
                    "This server does not answer to the name that the request was sent to.",
                    remedy="Address it by a name that PRELUDE_ALLOWED_HOSTS lists, or add this one there.",
                )
            return Forbidden(
                "Without API keys this server answers only requests to 127.0.0.1, [::1] or localhost.",
                remedy="Address it by one of these. A proxy in front of it should send one as Host; or give the server "
                "keys (PRELUDE_API_KEYS_FILE), name its own (PRELUDE_ALLOWED_HOSTS), or let everybody in "
                "(PRELUDE_ALLOW_ANONYMOUS=1).",
            )
        is_let_in = not self._origins.isdisjoint({"*", headers.get("origin", "").lower()})
        if scope["method"] not in READING and _is_from_another_site(headers) and not is_let_in:
            return Forbidden(
                "Without API keys this server takes no changes or texts from other sites' pages.",
                remedy="Send it from a program or from the server's own pages; name the page's origin in "
                "PRELUDE_CORS_ORIGINS; or give the server keys (PRELUDE_API_KEYS_FILE).",
            )
        return None

    def _is_ours(self, host: str) -> bool:
        return self._hosts is None or is_this_machine(host) or _name_of(host) in self._hosts


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
    name = _name_of(host)
    return name == "localhost" or is_loopback(name)


def _name_of(host: str) -> str:
    """The name or address in a Host header, in small letters; empty if there is none."""
    match = _AUTHORITY.fullmatch(host)
    return "" if match is None else (match[1] or match[2]).lower().removesuffix(".")


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
