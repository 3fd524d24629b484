"""The server's side of the processes that run llguidance: starts them, receives replies, ends them."""

import contextlib
import itertools
import json
import select
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict

from tokenizers import Tokenizer

from server.contracts import Grammar
from server.engine.grammars.wire import COMMAND, LENGTH, ORDER, Action, Deed, GrammarReplies, GrammarReply, GrammarState
from server.errors import GenerationFailed

START_SECONDS = 60.0
"""Time limit for the first process to read the tokenizer, which usually takes a second."""
SEND_SECONDS = 5.0
END_SECONDS = 0.5


class GrammarProcess:
    """One grammar's process. One thread at a time may use it, except for `close`."""

    def __init__(self, channel: socket.socket, do: Callable[[Deed], object]) -> None:
        """Take ownership of a process's socket; `do` executes a command that cannot be sent through it."""
        self._channel = channel
        self.do = do
        self._frames = GrammarReplies()
        self._unsent = bytearray()
        self._finalizer = weakref.finalize(self, channel.close)
        self.memory = 0
        """The process's memory at its last reply, in MiB."""

    def fileno(self) -> int:
        """The socket's descriptor, to wait on."""
        return self._channel.fileno()

    def begin(self, grammar: Grammar) -> None:
        """Request the compilation of a grammar; the reply is a frame with text number 0."""
        order = json.dumps(asdict(grammar)).encode()
        self._channel.settimeout(SEND_SECONDS)
        with contextlib.suppress(OSError):  # the process has ended, which `receive` reports
            self._channel.sendall(LENGTH.pack(len(order)) + order)
        self._channel.setblocking(False)

    def order(self, action: Action, walk: int, token_id: int = 0) -> None:
        """Queue an order for a text; `flush` sends it."""
        self._unsent += ORDER.pack(action, walk, token_id)

    def flush(self) -> bool:
        """Send queued orders without blocking; returns whether all were sent."""
        try:
            del self._unsent[: self._channel.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # see above
            self._unsent.clear()
        return not self._unsent

    def receive(self, seconds: float = 0.0) -> list[GrammarReply]:
        """Wait at most `seconds` for replies; the last frame of an ended process is ENDED."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(1000 * seconds):
            return []
        frames: list[GrammarReply] = []
        while True:
            try:
                data = self._channel.recv(2**18)
                frames += self._frames.feed(data)
            except BlockingIOError:
                break
            except (OSError, ValueError):  # the socket was closed, or the process ended while writing
                data = b""
            if not data:
                if not frames or frames[-1].state is not GrammarState.ENDED:
                    frames.append(GrammarReply(0, GrammarState.ENDED, 0.0, 0, b"\0"))
                break
        self.memory = max([self.memory, *(frame.mebibytes for frame in frames)])
        return frames

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, asked while no text uses it; the kernel may kill it when memory is short."""
        return any(frame.state is GrammarState.ENDED for frame in self.receive())

    def close(self) -> None:
        """Kill the process; a thread that waits for it receives ENDED."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self.do(Deed.KILL)


class GrammarProcesses:
    """Forks grammar processes from a parent process that has read the tokenizer; safe from any thread.

    The parent is started with the first grammar, and restarted if it ends.
    """

    def __init__(self, backend: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._backend, self._vocab_size, self._eos_token_ids = backend, vocab_size, eos_token_ids
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._control: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None
        self._closed = False

    def make(self) -> GrammarProcess:
        """Start a process, which then waits for its grammar; raises GenerationFailed if none can be started."""
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            for _ in range(2):  # the second attempt uses a new parent process, if the parent has ended
                self._start()
                if self._command(Deed.MAKE, number, theirs.fileno()):
                    return GrammarProcess(ours, lambda deed: self._command(deed, number))
        ours.close()
        raise GenerationFailed("Grammars are not available: their process cannot be started.")

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
            self._control = None
        self._end()

    def _command(self, deed: Deed, number: int, *descriptors: int) -> bool:
        """Send a command to the parent process; returns whether it could be sent."""
        with self._lock:
            if self._control is None:
                return False
            try:
                socket.send_fds(self._control, [COMMAND.pack(deed, number)], descriptors)
            except OSError:
                self._control = None
        return self._control is not None

    def _header(self) -> bytes:
        """The tokenizer, serialised for a new parent process."""
        # llguidance needs a size that covers all of the tokenizer's tokens, even those without a row in the model.
        known = max(self._backend.get_vocab().values()) + 1
        header = {
            "tokenizer": self._backend.to_str(),
            "vocab_size": max(self._vocab_size, known),
            "eos_token_ids": self._eos_token_ids,
        }
        return json.dumps(header).encode()

    def _start(self) -> None:
        """Start the parent process, unless it is running."""
        with self._starting:
            with self._lock:
                if self._control is not None or self._closed:
                    return
            self._end()
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", "server.engine.grammars.process", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # the server handles Ctrl-C in a terminal
                )
            self._end = weakref.finalize(self, _end, ours, process)
            header = self._header()
            ours.settimeout(START_SECONDS)
            with contextlib.suppress(OSError):
                ours.sendall(LENGTH.pack(len(header)) + header)
                if ours.recv(1):
                    ours.settimeout(SEND_SECONDS)
                    with self._lock:
                        self._control = ours
            if self._closed:  # meanwhile
                self.close()


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """End the parent process, which ends its forks; forks also end when the server closes their sockets."""
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    process.kill()
    process.wait()
