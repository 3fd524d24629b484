"""The process that runs llguidance: `python -m server.engine.grammars.process DESCRIPTOR`, and a fork per grammar.

No request can be trusted to give llguidance a grammar that it comes to an end with, in any time, memory or stack. So
the server's own process never calls it. This process reads the tokenizer once and then only forks; a fork compiles one
grammar, then says after each token of each text which tokens may come next. The kernel ends a fork that takes more
than its share of processor time, memory or stack, whatever llguidance does. This process ends with the server, because
its socket does; so does every fork.
"""

from __future__ import annotations

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
"""Characters that mean something in a regular expression."""

ONE_SPACE: Any = {"whitespace_pattern": " ?"}
"""Between the parts of a JSON text. Were any number allowed, a small model could go on with blanks for ever."""

YIELDS = 5
"""How far each process yields to the engine (`nice`). One busy process that does not yield makes the steps of a server
on two cores four times as long; one that yields this far, 1.7 times."""
FURTHER = 10
"""How far a process yields that compiles for long, to those of other grammars as well. One whose masks are slow is
scheduled as idle instead, where the system has that: it never keeps a core from a thread of the engine that wakes up,
which `nice` alone allows."""


class Unusable(Exception):
    """A grammar cannot be used; says why."""


def main() -> None:
    """Read the tokenizer, then fork until the server has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the server to handle; this process ends with its socket
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    header = json.loads(_exactly(control, LENGTH.unpack(_exactly(control, LENGTH.size))[0]))
    tokenizer = llguidance.LLTokenizer(
        header["tokenizer"], n_vocab=header["vocab_size"], eos_token=header["eos_token_ids"] or None
    )
    del header
    # What llguidance makes at its first use is made before the forks, so that they share it.
    llguidance.LLMatcher(tokenizer, source_of(GrammarKind.JSON_SCHEMA, "{}"), log_level=0).compute_bitmask()
    gc.collect()
    gc.freeze()
    control.sendall(b"!")
    Nursery(control, tokenizer).run()
    os._exit(0)


class Nursery:
    """Makes a process for each grammar, and sees them end."""

    def __init__(self, control: socket.socket, tokenizer: llguidance.LLTokenizer) -> None:
        """Listen to the server; there are no processes yet."""
        self._control = control
        self._tokenizer = tokenizer
        self._channels: dict[int, socket.socket] = {}  # pid -> its end of the socket, to say there that it has ended
        self._pids: dict[int, int] = {}  # number -> pid

    def run(self) -> None:
        """Obey until the server closes its end."""
        ended, on_end = socket.socketpair()
        ended.setblocking(False)
        on_end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(on_end.fileno(), warn_on_full_buffer=False)
        self._control.setblocking(False)  # a process may end at any time, and nobody else sees it
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
        """Do what the server says; False if it has gone."""
        data, descriptors, _, _ = socket.recv_fds(self._control, COMMAND.size, 1)  # which ignores flags
        if len(data) < COMMAND.size:
            return False
        deed, number = COMMAND.unpack(data)
        if deed == Deed.MAKE:
            self._make(number, socket.socket(fileno=descriptors[0]))
        elif (pid := self._pids.get(number)) is not None:  # not yet waited for, so that the number is still its own
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
        """Say on their sockets which processes have ended, and by what."""
        while self._channels:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._pids = {number: other for number, other in self._pids.items() if other != pid}
            with self._channels.pop(pid) as channel, contextlib.suppress(OSError):
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                channel.send(GrammarReply(0, GrammarState.ENDED, 0.0, 0, bytes([number])).pack(), socket.MSG_DONTWAIT)


def _yield_further(pid: int, *, idle: bool) -> None:
    """Let a process yield to others, or have only what they leave of the cores; both are for good."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, FURTHER)
    if idle:
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def _limit() -> None:
    """What the kernel holds this process to, beside the time of each piece of work."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # how llguidance dies is no line for the server's log
        os.dup2(null, descriptor)
    gc.disable()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, YIELDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (STACK if hard < 0 else min(STACK, hard), hard))
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or what there is is less already
        shared = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (shared + MEMORY, shared + MEMORY))
    with contextlib.suppress(OSError):  # the first to go where memory is short
        Path("/proc/self/oom_score_adj").write_text("1000")


def serve(channel: socket.socket, tokenizer: llguidance.LLTokenizer) -> None:
    """Compile the grammar that comes, then answer for its texts until the server closes its end."""
    shared = _held()
    order = json.loads(_exactly(channel, LENGTH.unpack(_exactly(channel, LENGTH.size))[0]))
    begun = time.process_time()
    try:
        with _at_most(COMPILE_SECONDS):
            grammar = Grammar(GrammarKind(order["kind"]), order["source"], order["after_space"])
            compiled, mask = compile_grammar(tokenizer, grammar)
        state, payload = GrammarState.GOING, mask
    except MemoryError:
        os.abort()  # as llguidance ends where it gets no memory
    except Exception as exc:  # noqa: BLE001 - llguidance's converters raise anything, and say what is wrong
        state, payload = GrammarState.FAILED, (str(exc) or type(exc).__name__).encode(errors="replace")
    del order
    channel.sendall(GrammarReply(0, state, time.process_time() - begun, _held() - shared, payload).pack())
    if state is GrammarState.GOING:
        Texts(channel, compiled, shared).run()


class Texts:
    """The texts of one grammar that are under way."""

    def __init__(self, channel: socket.socket, compiled: llguidance.LLMatcher, shared: int) -> None:
        self._channel = channel
        self._compiled = compiled
        self._shared = shared
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._orders: deque[tuple[int, int, int]] = deque()
        self._rest = b""

    def run(self) -> None:
        """Answer one token after the other until the server closes its end."""
        while self._read():
            if self._orders:
                action, walk, token_id = self._orders.popleft()
                self._channel.sendall(self._answer(walk, token_id, action == Action.ACCEPT))

    def _read(self) -> bool:
        """Take what has come; waits if there is nothing to do. What is dropped needs no answer any more."""
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

    def _answer(self, walk: int, token_id: int, goes_on: bool) -> bytes:
        begun = time.process_time()
        with _at_most(MASK_SECONDS):
            matcher = self._matchers.get(walk)
            if matcher is None:
                matcher = self._matchers[walk] = self._compiled.deep_copy()
            matcher.consume_token(token_id)
            state, payload = GrammarState.GOING, b""
            if goes_on and not matcher.is_stopped():
                payload = matcher.compute_bitmask()  # on an error, this mask would let the text end
            if matcher.is_error():
                state, payload = GrammarState.FAILED, matcher.get_error().encode()
            elif matcher.is_stopped():
                state, payload = GrammarState.COMPLETE, b""
        return GrammarReply(walk, state, time.process_time() - begun, _held() - self._shared, payload).pack()


def compile_grammar(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> tuple[llguidance.LLMatcher, bytes]:
    """A matcher at the beginning of a text, and the mask of the first token.

    Raises:
        Unusable, ValueError: the grammar cannot be used; says why.
    """
    limits = llguidance.LLParserLimits(**PARSER_LIMITS)
    source = source_of(grammar.kind, grammar.source)
    if grammar.after_space:
        source = _after_space(source)
    compiled = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if compiled.is_error():
        raise Unusable(compiled.get_error())
    first = compiled.deep_copy()
    may_be_empty = first.is_accepting()
    mask = first.compute_bitmask()
    if first.is_error() and not first.get_error().startswith(NO_EXTENSION):
        raise Unusable(first.get_error())
    ends = bytearray(len(mask))
    for token_id in tokenizer.eos_tokens:
        ends[token_id // 8] |= 1 << token_id % 8
    if first.is_error():
        mask = bytes(ends) if may_be_empty else b""
    if not may_be_empty and not any(byte & ~end for byte, end in zip(mask, ends, strict=False)):
        raise Unusable("No text can match it.")
    return compiled, mask


def source_of(kind: GrammarKind, source: str) -> str:
    """A grammar in llguidance's own form.

    Raises:
        ValueError: it cannot be read.
    """
    make = llguidance.LLMatcher
    if kind is GrammarKind.JSON_SCHEMA:
        return make.grammar_from_json_schema(source, overrides=ONE_SPACE)
    if kind is GrammarKind.REGEX:  # as ECMA 262 and thus JSON schemas' patterns read it: \d and \w are ASCII
        return make.grammar_from_regex(llguidance.regex_to_lark(source, "dw"))
    if kind is GrammarKind.LARK:
        return make.grammar_from_lark(source)
    if kind is GrammarKind.EBNF:
        return make.grammar_from_lark(lark_of(source))
    # One expression, not a rule for each: the parser keeps no more than 2,000 of those in mind.
    return make.grammar_from_regex("|".join(map(_literally, json.loads(source))))


def _after_space(source: str) -> str:
    """The same grammar after a space, so that the first token may be the one that training puts there."""
    parts = json.loads(source) if source.startswith("{") else {"grammars": [{"lark_grammar": source}]}
    first, *others = parts["grammars"]
    return json.dumps(
        parts | {"grammars": [{"lark_grammar": 'start: " " @matched'}, first | {"name": "matched"}, *others]}
    )


def _literally(text: str) -> str:
    """A regular expression that only this text matches."""
    return "(?:" + "".join(f"\\{c}" if c in META else c for c in text) + ")"


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """The kernel ends this process by SIGPROF if the block takes more of a processor, in whatever code."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _held() -> int:
    """The most MiB that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def _exactly(channel: socket.socket, size: int) -> bytes:
    """As many bytes from a socket; ends the process if it is closed before."""
    data = bytearray()
    while len(data) < size:
        if not (more := channel.recv(min(size - len(data), 2**20))):
            sys.exit(0)
        data += more
    return bytes(data)


if __name__ == "__main__":
    main()
