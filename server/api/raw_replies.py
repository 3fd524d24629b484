"""Replies to input that cannot be parsed as a request, and the limits that they quote."""

import json

from server.api.schemas import error_body
from server.errors import InvalidRequest, PreludeError

MAX_HEADER_BYTES = 2**16
"""Size limit of the request line and headers together. It also applies to the chunk headers and the trailer of a
chunked body."""
MAX_URL_BYTES = 2**13
"""Of a request's path and query, which are taken apart on the event loop before a key is asked for."""
BETWEEN = "lines between the body's pieces"


def unreadable(exc: Exception, url_bytes: int) -> tuple[bytes, PreludeError]:
    """Status and error for what the parser does not read."""
    if url_bytes > MAX_URL_BYTES:
        error = InvalidRequest(
            f"The URL has more than {MAX_URL_BYTES:,} bytes.", remedy="Send long values in the body."
        )
        return b"414 URI Too Long", error
    return b"400 Bad Request", InvalidRequest(
        f"The bytes on this connection are not a valid HTTP request: {str(exc) or type(exc).__name__}.",
        remedy="Send plain HTTP, version 1.1, to this port: no TLS, no HTTP/2.",
    )


def too_many_bytes(what: str) -> tuple[bytes, PreludeError]:
    """Status and error for headers, or lines between a body's pieces, over the limit."""
    error = InvalidRequest(f"The {what} have more than {MAX_HEADER_BYTES:,} bytes.", remedy="Send less.")
    return b"431 Request Header Fields Too Large", error


def closing_reply(status: bytes, error: PreludeError) -> bytes:
    """A whole reply, after which the connection is closed."""
    body = json.dumps(error_body(error)).encode()
    head = b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return head + f"content-length: {len(body)}\r\n\r\n".encode() + body
