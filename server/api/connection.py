"""Reading connections: uvicorn's protocol, with limits on bytes, time and number before a request is known.

httptools, which parses for uvicorn, keeps a header until its end has come, however long it is. uvicorn waits without a
limit for the rest of a request, takes the trailer of a chunked body for headers, closes the connection if a client
shuts down its sending side after its request, and sends chunks to clients of HTTP/1.0, which do not know them.
"""

import asyncio
import select
from typing import Any

from server.api.raw_replies import BETWEEN, MAX_HEADER_BYTES, MAX_URL_BYTES, closing_reply, too_many_bytes, unreadable
from server.errors import InvalidRequest, Overloaded, PreludeError

HEADER_SECONDS = 20.0
"""Seconds within which a request's headers must be complete, counted from the connection or the previous reply."""
BODY_SECONDS, BODY_RATE = 20.0, 2**14
"""Seconds that a body may take, and bytes received that add one more second."""
STALLED_SECONDS = 60.0
"""Seconds for which a client may read nothing of the data that is waiting to be sent to it."""
MAX_PIPELINED = 16
"""Requests on one connection that wait for the reply to the one before."""
LOOKS = (0.02, 0.1, 0.5, 2.0)
"""Seconds between checks whether a client that has shut down its sending side has disconnected."""

PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Bytes sent to find out whether a client is still there: a waiting client ignores them; the system of a client that
has gone answers with a reset."""


class Connections:
    """Makes the protocol of each connection to one server, and limits their number.

    If there are too many, the one that has waited longest for a request is closed. A client that opens many connections
    therefore soon replaces its own, and enough file descriptors are left for the store, jobs and other requests.
    """

    def __init__(self, most: int | None = None) -> None:
        """None has been made.

        Args:
            most: connections at once. Default: three quarters of the files that the process may open, 128 left over.
        """
        self.most = most_connections() if most is None else most
        self._waiting: dict[Any, None] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The protocol of a new connection, for uvicorn."""
        return BoundedHttp(self, *args, **options)

    def waits(self, protocol: Any) -> None:
        """Note that a connection is waiting for a request."""
        self._waiting.pop(protocol, None)
        self._waiting[protocol] = None

    def is_done_waiting(self, protocol: Any) -> None:
        """A request has come on a connection, or it is closed."""
        self._waiting.pop(protocol, None)

    def make_room(self, connections: int) -> None:
        """Close the one that has waited longest, the new one included, if there are too many."""
        if connections > self.most and self._waiting:
            next(iter(self._waiting)).give_way()


def most_connections() -> int:
    """Connections that leave enough files for everything else."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**14
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = 2**16 if soft == resource.RLIM_INFINITY else soft
    return max(16, files - max(128, files // 4))


try:
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:

    def bounded_protocol() -> Any:
        """uvicorn's own choice."""
        return "auto"
else:

    class BoundedHttp(HttpToolsProtocol):
        """Closes a connection whose request does not come to its end."""

        def __init__(self, connections: Connections, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._bounds = connections
            self._is_in_headers = self._is_in_body = self._body_came = self._has_ended = False
            self._num_bytes = 0  # of headers, or since a body's last piece
            self._num_body_bytes, self._began = 0, 0.0
            self._deadline: asyncio.TimerHandle | None = None
            self._stalled: asyncio.TimerHandle | None = None
            self._running: Any = None  # the request that is being answered; `cycle` is the last one that has come

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Somebody connects."""
            super().connection_made(transport)
            self._wait()
            self._bounds.make_room(len(self.connections))

        def connection_lost(self, exc: Exception | None) -> None:
            """The connection is closed."""
            self._bounds.is_done_waiting(self)
            for timer in (self._deadline, self._stalled):
                if timer is not None:
                    timer.cancel()
            self._deadline = self._stalled = None
            self._leave()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Bytes have come; those of a body in the same piece do not count towards the limit of the headers."""
            if self.transport.is_closing():
                return
            self._body_came = False
            self._unset_keepalive_if_required()
            try:
                self._parse(data)
            except httptools.HttpParserError as exc:
                self._refuse(*unreadable(exc, len(self.url)))
            if self._is_in_headers or (self._is_in_body and not self._body_came):
                self._num_bytes += len(data)
                if self._num_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                    self._refuse(*too_many_bytes("headers" if self._is_in_headers else BETWEEN))
            else:
                self._num_bytes = 0

        def eof_received(self) -> bool:  # type: ignore[override]
            """The client has shut down its sending side; if its request is complete, it still gets the reply."""
            cycle = self.cycle
            if self._is_in_headers or self._is_in_body:
                has_reply = cycle is not None and cycle.response_started and not cycle.response_complete
                if not has_reply and not self.pipeline:
                    where = "its headers" if self._is_in_headers else "its body"
                    error = InvalidRequest(f"The request breaks off in {where}.", remedy="Send it whole.")
                    self._refuse(b"400 Bad Request", error)
                return False
            if cycle is None or not hasattr(select, "poll"):
                return False
            if cycle.response_complete or (cycle.response_started and not self.pipeline):
                return False
            cycle.keep_alive = False
            running = self._running
            if not self._has_ended and not running.response_started and running.scope["http_version"] == "1.1":
                self.transport.write(PROBE)
                self._look(running, 0)
            self._has_ended = True
            return True

        def on_message_begin(self) -> None:
            """A request begins."""
            if len(self.pipeline) >= MAX_PIPELINED:
                raise httptools.HttpParserError("too many requests wait for a reply")
            super().on_message_begin()
            self._num_bytes, self._is_in_headers = 0, True

        def on_url(self, url: bytes) -> None:
            """A part of a request's URL has come."""
            super().on_url(url)
            if len(self.url) > MAX_URL_BYTES:
                raise httptools.HttpParserError("the URL is too long")

        def on_header(self, name: bytes, value: bytes) -> None:
            """Called for each header, and for each field of a trailer; trailer fields are ignored."""
            if self._is_in_headers:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            """A request's headers have ended."""
            if self.parser.should_upgrade():  # the request is parsed again without its upgrade header, see `_parse`
                return
            self._is_in_headers, self._is_in_body = False, True
            self._num_bytes = self._num_body_bytes = 0
            self._bounds.is_done_waiting(self)
            super().on_headers_complete()
            if self.scope["http_version"] != "1.1":
                _delimit_by_close(self.cycle)
            self._expire_in(BODY_SECONDS)

        def on_body(self, body: bytes) -> None:
            """A piece of a body has come."""
            self._body_came = True
            self._num_body_bytes += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            """A request has come to its end."""
            if self.parser.should_upgrade():
                return
            self._is_in_body = False
            if self._deadline is not None and not self.cycle.response_complete:
                self._deadline.cancel()
                self._deadline = None
            super().on_message_complete()

        def on_response_complete(self) -> None:
            """A request was answered, perhaps before its body was read."""
            super().on_response_complete()
            if self.cycle.response_complete:
                self._wait()
                if self.transport.get_write_buffer_size():
                    self.pause_writing_since()

        def pause_writing(self) -> None:
            """The client does not take what is sent."""
            super().pause_writing()
            self.pause_writing_since()

        def resume_writing(self) -> None:
            """It does again."""
            super().resume_writing()
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def pause_writing_since(self) -> None:
            """Start to check whether the client reads anything."""
            if self._stalled is None:
                size = self.transport.get_write_buffer_size()
                self._stalled = self.loop.call_later(STALLED_SECONDS, self._give_up, size)

        def give_way(self) -> None:
            """Close a connection without a request, to make room for another."""
            self._bounds.is_done_waiting(self)
            error = Overloaded("There are too many connections.")
            self._refuse(b"503 Service Unavailable", error)

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def _abort(self) -> None:
            self._leave()  # before the connection is closed: what is written to it until then raises
            self.transport.abort()

        def _leave(self) -> None:
            """Tell the request that is being answered that its client has gone; others that wait never begin."""
            cycle = self._running
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

        def _parse(self, data: bytes) -> None:
            """Parse a piece; a request to upgrade the protocol, as Java's clients send, is parsed without that header.

            httptools stops after such a request's headers, and would take its body for the other protocol.
            """
            while True:
                try:
                    return self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as stop:
                    if self.parser.get_method() == b"CONNECT":
                        raise httptools.HttpParserError("this is no proxy") from stop
                    version = self.parser.get_http_version().encode()
                    lines = [b" ".join((self.parser.get_method(), self.url, b"HTTP/" + version))]
                    lines += [b": ".join(header) for header in self.headers if header[0] != b"upgrade"]
                    data = b"\r\n".join([*lines, b"", data[stop.args[0] :]])
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

        def _wait(self) -> None:
            if not self.transport.is_closing():
                self._bounds.waits(self)
                self._expire_in(HEADER_SECONDS)

        def _expire_in(self, seconds: float) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            self._began = self.loop.time()
            self._deadline = self.loop.call_later(seconds, self._expire)

        def _expire(self) -> None:
            if self.transport.is_closing():
                return
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if is_answering and (self.flow.read_paused or not self._is_in_body):  # the server causes the delay
                self._expire_in(BODY_SECONDS)
                return
            if is_answering:
                left = self._began + BODY_SECONDS + self._num_body_bytes / BODY_RATE - self.loop.time()
                if left > 0.01:
                    self._deadline = self.loop.call_later(left, self._expire)
                    return
            if not self._is_in_headers and not is_answering:
                self._abort()  # nobody waits for an answer
                return
            error = InvalidRequest("The request took too long to arrive.", remedy="Send it without pauses.")
            self._refuse(b"408 Request Timeout", error)

        def _give_up(self, before: int) -> None:
            self._stalled = None
            size = self.transport.get_write_buffer_size()
            if size >= before > 0:
                self._abort()
            elif size:
                self.pause_writing_since()

        def _look(self, cycle: Any, number: int) -> None:
            if cycle.response_started or self.transport.is_closing():
                return
            poll = select.poll()
            poll.register(self.transport.get_extra_info("socket").fileno(), 0)
            if poll.poll(0):  # only errors and hang-ups are polled for, not readability or writability
                self._abort()
            elif number < len(LOOKS):
                self.loop.call_later(LOOKS[number], self._look, cycle, number + 1)

        def _refuse(self, status: bytes, error: PreludeError) -> None:
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if is_answering and (self.cycle.response_started or self.pipeline):
                self._abort()  # whatever were written now would be part of another reply
                return
            self.transport.write(closing_reply(status, error))
            self.transport.close()
            if self.transport.get_write_buffer_size():
                self.pause_writing_since()

    def _delimit_by_close(cycle: Any) -> None:
        """Let a reply without Content-Length end where the connection does."""
        send = cycle.send

        async def send_unframed(message: Any) -> None:
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        cycle.chunked_encoding, cycle.keep_alive, cycle.send = False, False, send_unframed

    def bounded_protocol() -> Any:
        """What makes the protocols of one server's connections."""
        return Connections()
