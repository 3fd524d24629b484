"""The process that runs llguidance: `python -m server.engine.grammars.process DESCRIPTOR`, with a fork per grammar.

This process reads the tokenizer once and then only forks. A fork compiles one grammar; then, after each token of each
text, it computes which tokens may come next. The kernel ends a fork that exceeds its limit of processor time, memory or
stack. When the server ends, its sockets close, so this process and all forks end too.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance

from server.contracts import Grammar, GrammarKind
from server.engine.grammars.ebnf import lark_of
from server.engine.grammars.limits import COMPILE_SECONDS, MASK_SECONDS, MEMORY, PARSER_LIMITS, STACK
from server.engine.grammars.wire import COMMAND, LENGTH, NO_EXTENSION, ORDER, Action, Deed, GrammarReply, GrammarState

META = frozenset("\\.+*?()|[]{}^$#&-~/")
"""Characters with a special meaning in regular expressions."""

ONE_SPACE: Any = {"whitespace_pattern": " ?"}
"""At most one space between the parts of a JSON text; otherwise a small model might generate blanks forever."""

YIELDS = 5
"""The `nice` value of grammar processes. On two cores, one busy process makes the server's steps four times as long
without `nice`, and 1.7 times as long with this value."""
FURTHER = 10
"""The `nice` value of processes that compile for long, so that they also yield to other grammars. Processes whose masks
are slow are scheduled as idle instead, if the system supports it: unlike with `nice` alone, an idle process never keeps
a core from a thread of the engine that wakes up."""


def main() -> None:
    """Read the tokenizer, then fork for each grammar until the server has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server handles these; this process ends with its socket
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    header = json.loads(_exactly(control, LENGTH.unpack(_exactly(control, LENGTH.size))[0]))
    tokenizer = llguidance.LLTokenizer(
        header["tokenizer"], n_vocab=header["vocab_size"], eos_token=header["eos_token_ids"] or None
    )
    del header
    # Data that llguidance creates at its first use is created before the forks, so that they share it.
    llguidance.LLMatcher(tokenizer, source_of(GrammarKind.JSON_SCHEMA, "{}"), log_level=0).compute_bitmask()
    gc.collect()
    gc.freeze()
    control.sendall(b"!")
    Nursery(control, tokenizer).run()
    os._exit(0)


class Nursery:
    """Forks a process for each grammar and reports its end."""

    def __init__(self, control: socket.socket, tokenizer: llguidance.LLTokenizer) -> None:
        self._control, self._tokenizer = control, tokenizer
        self._channels: dict[int, socket.socket] = {}  # pid -> socket on which its end is reported
        self._pids: dict[int, int] = {}  # number -> pid

    def run(self) -> None:
        """Execute commands until the server closes its end of the socket."""
        ended, on_end = socket.socketpair()
        ended.setblocking(False)
        on_end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(on_end.fileno(), warn_on_full_buffer=False)
        self._control.setblocking(False)  # a process may end at any time, and only this process is notified
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            poll.poll()
            with contextlib.suppress(BlockingIOError):
                ended.recv(4096)
            self._bury()
            with contextlib.suppress(BlockingIOError):
                if not self._obey():
                    break
        for pid in self._channels:
            os.kill(pid, signal.SIGKILL)

    def _obey(self) -> bool:
        """Execute one command; returns False if the server has ended."""
        data, descriptors, _, _ = socket.recv_fds(self._control, COMMAND.size, 1)  # this function ignores flags
        if len(data) < COMMAND.size:
            return False
        deed, number = COMMAND.unpack(data)
        if deed == Deed.MAKE:
            self._make(number, socket.socket(fileno=descriptors[0]))
        elif (pid := self._pids.get(number)) is not None:  # not waited for yet, so the pid is still valid
            if deed == Deed.KILL:
                os.kill(pid, signal.SIGKILL)
            else:
                _yield_further(pid, idle=deed == Deed.IDLE)
        return True

    def _make(self, number: int, channel: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:  # too many processes, or too little memory; the server sees that the socket is closed
            return channel.close()
        if pid:
            self._pids[number], self._channels[pid] = pid, channel
            return None
        try:
            signal.set_wakeup_fd(-1)
            for other in (self._control, *self._channels.values()):
                other.close()
            _limit()
            serve(channel, self._tokenizer)
        finally:
            os._exit(0)

    def _bury(self) -> None:
        """Report ended processes, with the signal, on their sockets."""
        while self._channels:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._pids = {number: other for number, other in self._pids.items() if other != pid}
            with self._channels.pop(pid) as channel, contextlib.suppress(OSError):
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                channel.send(GrammarReply(0, GrammarState.ENDED, 0.0, 0, bytes([number])).pack(), socket.MSG_DONTWAIT)


def _yield_further(pid: int, *, idle: bool) -> None:
    """Lower a process's priority permanently; with `idle`, it runs only on otherwise idle cores."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, FURTHER)
    if idle:
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def _limit() -> None:
    """Set this process's limits, except the processor time of each piece of work."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # keeps llguidance's crash output out of the server's log
        os.dup2(null, descriptor)
    gc.disable()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, YIELDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (STACK if hard < 0 else min(STACK, hard), hard))
    with contextlib.suppress(OSError, ValueError):  # no such file, or a lower limit already applies
        shared = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (shared + MEMORY, shared + MEMORY))
    with contextlib.suppress(OSError):  # the kernel's first choice to kill when memory is short
        Path("/proc/self/oom_score_adj").write_text("1000")


def serve(channel: socket.socket, tokenizer: llguidance.LLTokenizer) -> None:
    """Receive and compile a grammar, then compute masks for its texts until the server closes its end of the socket."""
    shared = _held()
    order = json.loads(_exactly(channel, LENGTH.unpack(_exactly(channel, LENGTH.size))[0]))
    begun = time.process_time()
    try:
        with _at_most(COMPILE_SECONDS):
            grammar = Grammar(GrammarKind(order["kind"]), order["source"], order["after_space"])
            compiled, mask = compile_grammar(tokenizer, grammar)
        state, payload = GrammarState.GOING, mask
    except MemoryError:
        os.abort()  # as llguidance does when it runs out of memory
    except Exception as exc:  # noqa: BLE001 - llguidance's converters raise exceptions of any class, with a message
        state, payload = GrammarState.FAILED, (str(exc) or type(exc).__name__).encode(errors="replace")
    del order
    channel.sendall(GrammarReply(0, state, time.process_time() - begun, _held() - shared, payload).pack())
    if state is GrammarState.GOING:
        Texts(channel, compiled, shared).run()


class Texts:
    """The texts in progress of one grammar."""

    def __init__(self, channel: socket.socket, compiled: llguidance.LLMatcher, shared: int) -> None:
        self._channel, self._compiled, self._shared = channel, compiled, shared
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._orders: deque[tuple[int, int, int]] = deque()
        self._rest = b""

    def run(self) -> None:
        """Handle one token after the other until the server closes its end of the socket."""
        while self._read():
            if self._orders:
                action, walk, token_id = self._orders.popleft()
                self._channel.sendall(self._answer(walk, token_id, action == Action.ACCEPT))

    def _read(self) -> bool:
        """Read new orders, waiting if there are none; orders for dropped texts are removed."""
        try:
            data = self._channel.recv(2**16, socket.MSG_DONTWAIT if self._orders else 0)
        except BlockingIOError:
            return True
        data = self._rest + data
        whole = len(data) // ORDER.size * ORDER.size
        self._rest = data[whole:]
        for action, walk, token_id in ORDER.iter_unpack(data[:whole]):
            if action == Action.DROP:
                self._matchers.pop(walk, None)
                self._orders = deque(order for order in self._orders if order[1] != walk)
            else:
                self._orders.append((action, walk, token_id))
        return bool(data)

    def _answer(self, walk: int, token_id: int, needs_mask: bool) -> bytes:
        begun = time.process_time()
        with _at_most(MASK_SECONDS):
            matcher = self._matchers.get(walk)
            if matcher is None:
                matcher = self._matchers[walk] = self._compiled.deep_copy()
            matcher.consume_token(token_id)
            state, payload = GrammarState.GOING, b""
            if needs_mask and not matcher.is_stopped():
                payload = matcher.compute_bitmask()  # after an error, this mask would allow the text to end
            if matcher.is_error():
                state, payload = GrammarState.FAILED, matcher.get_error().encode()
            elif matcher.is_stopped():
                state, payload = GrammarState.COMPLETE, b""
        return GrammarReply(walk, state, time.process_time() - begun, _held() - self._shared, payload).pack()


def compile_grammar(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> tuple[llguidance.LLMatcher, bytes]:
    """Compile a grammar; returns a matcher at the beginning of a text, and the mask of the first token.

    The ValueError for a grammar that cannot be used gives the reason.
    """
    limits = llguidance.LLParserLimits(**PARSER_LIMITS)
    source = source_of(grammar.kind, grammar.source)
    if grammar.after_space:
        source = _after_space(source)
    compiled = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if compiled.is_error():
        raise ValueError(compiled.get_error())
    first = compiled.deep_copy()
    may_be_empty = first.is_accepting()
    mask = first.compute_bitmask()
    if first.is_error() and not first.get_error().startswith(NO_EXTENSION):
        raise ValueError(first.get_error())
    ends = bytearray(len(mask))
    for token_id in tokenizer.eos_tokens:
        ends[token_id // 8] |= 1 << token_id % 8
    if first.is_error():
        mask = bytes(ends) if may_be_empty else b""
    if not may_be_empty and not any(byte & ~end for byte, end in zip(mask, ends, strict=False)):
        raise ValueError("No text can match it.")
    return compiled, mask


def source_of(kind: GrammarKind, source: str) -> str:
    """Convert a grammar to llguidance's own format; raises ValueError if it cannot be read."""
    make = llguidance.LLMatcher
    if kind is GrammarKind.JSON_SCHEMA:
        return make.grammar_from_json_schema(source, overrides=ONE_SPACE)
    if kind is GrammarKind.REGEX:  # \d and \w are ASCII, as in ECMA 262 and JSON schemas' patterns
        return make.grammar_from_regex(llguidance.regex_to_lark(source, "dw"))
    if kind is GrammarKind.LARK:
        return make.grammar_from_lark(source)
    if kind is GrammarKind.EBNF:
        return make.grammar_from_lark(lark_of(source))
    # One expression instead of one rule for each text, because the parser supports at most 2,000 rules.
    return make.grammar_from_regex("|".join(map(_literally, json.loads(source))))


def _after_space(source: str) -> str:
    """Put a space before a grammar, so that the text may begin with the token that training used there."""
    parts = json.loads(source) if source.startswith("{") else {"grammars": [{"lark_grammar": source}]}
    first, *others = parts["grammars"]
    return json.dumps(
        parts | {"grammars": [{"lark_grammar": 'start: " " @matched'}, first | {"name": "matched"}, *others]}
    )


def _literally(text: str) -> str:
    """A regular expression that matches only this text."""
    return "(?:" + "".join(f"\\{c}" if c in META else c for c in text) + ")"


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Context manager: the kernel ends this process by SIGPROF if the block exceeds this processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _held() -> int:
    """This process's peak memory in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def _exactly(channel: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes from a socket; ends the process if the socket is closed first."""
    data = bytearray()
    while len(data) < size:
        if not (more := channel.recv(min(size - len(data), 2**20))):
            sys.exit(0)
        data += more
    return bytes(data)


if __name__ == "__main__":
    main()
