"""How connections are read: uvicorn's own protocol, with a limit on what comes before a body.

httptools, which parses for uvicorn, keeps a header until its end has come, and there is no limit to when that is.
"""

from __future__ import annotations

import json
from typing import Any

from server.api.errors import error_body
from server.errors import InvalidRequest

MAX_HEADER_BYTES = 2**16
"""Of a request's line and headers together."""

PROTOCOL: Any
"""For uvicorn's `http`: `auto` where there is no httptools, since h11 has a limit of its own."""

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    PROTOCOL = "auto"
else:

    class BoundedHttp(HttpToolsProtocol):
        """Closes a connection whose headers do not end."""

        _num_header_bytes = 0
        _is_in_headers = False

        def data_received(self, data: bytes) -> None:
            """Bytes have come; those of a body that follows in the same piece are not held against the headers."""
            super().data_received(data)
            if not self._is_in_headers:
                return
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refuse()

        def on_message_begin(self) -> None:
            """A request begins."""
            super().on_message_begin()
            self._num_header_bytes, self._is_in_headers = 0, True

        def on_headers_complete(self) -> None:
            """Its headers have ended."""
            self._is_in_headers = False
            super().on_headers_complete()

        def _refuse(self) -> None:
            error = InvalidRequest(
                f"The headers have more than {MAX_HEADER_BYTES:,} bytes.", remedy="Send less of them."
            )
            body = json.dumps(error_body(error)).encode()
            head = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
            head += b"content-type: application/json\r\n"
            self.transport.write(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    PROTOCOL = BoundedHttp
