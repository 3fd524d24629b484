"""Grammars for generated text: each is compiled once, in its own process, and cached for later requests.

llguidance, which runs only in those processes (`process.py`), computes which tokens may come next. If a grammar exceeds
a limit (`limits.py`), its process ends, and requests with that grammar are refused at once for a while.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from server.contracts import TOO_DEEP, Grammar, GrammarKind
from server.engine.grammars.limits import (
    ALL_MEMORY_MIB,
    COMPILE_SECONDS,
    COMPILE_WALL_SECONDS,
    MAX_UNUSED,
    MAX_UNUSED_MIB,
    MEMORY,
    STACK,
    MiB,
)
from server.engine.grammars.processes import GrammarProcess, GrammarProcesses
from server.engine.grammars.wire import GrammarReply, GrammarState
from server.errors import GenerationFailed, InvalidRequest, Overloaded

NAMES = {
    GrammarKind.JSON_SCHEMA: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "choice",
    GrammarKind.LARK: "Lark grammar",
    GrammarKind.EBNF: "EBNF grammar",
}
REMEDY = (
    "Mend or simplify it; JSON schemas as of draft 2020-12, regular expressions without look-around, "
    "EBNF in GBNF's form with a rule named root, Lark with a rule named start."
)

REFUSED, REFUSED_SECONDS = 256, 60.0
"""How many grammars that exceeded a limit are remembered, and for how long they are refused."""


class Compiled:
    """A compiled grammar and its process."""

    def __init__(self, key: bytes, process: GrammarProcess, first: bytes) -> None:
        """Create a grammar without users; `key` is its hash, and `first` the mask of a text's first token."""
        self.key, self.process, self.first = key, process, first
        self.users = 0
        """Number of requests that hold the grammar; `Grammars` counts them."""


class Attempt:
    """A grammar that is being compiled."""

    def __init__(self, grammars: Grammars, grammar: Grammar, process: GrammarProcess) -> None:
        """Start compiling in a new process."""
        self._grammars, self._grammar, self.process = grammars, grammar, process
        self._lock = threading.Lock()
        self._closed = False
        self._until = time.monotonic() + COMPILE_WALL_SECONDS
        process.begin(grammar)

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`; returns whether the grammar is compiled, so that `Grammars.hold` finds it.

        Raises:
            InvalidRequest: the grammar cannot be used; the error gives the reason.
            GenerationFailed: the grammar's process ended for an unknown reason.
        """
        left = self._until - time.monotonic()
        frames = self.process.receive(max(0.0, min(seconds, left)))
        if not frames and time.monotonic() < self._until:
            return False
        with self._lock:
            if self._closed:
                return False
            self._closed = True  # `close` must no longer end the process
        if frames and frames[0].state is GrammarState.GOING:
            if not unpacked(frames[0].payload, self._grammars.vocab_size).any():
                self.process.close()
                raise unusable(self._grammar, "No text of the model's tokens can match it")
            self._grammars.keep(self._grammar, self.process, frames[0].payload)
            return True
        self.process.close()
        if not frames:
            raise unusable(self._grammar, f"it takes more than {COMPILE_WALL_SECONDS:g} s to compile")
        if frames[0].state is GrammarState.FAILED:
            raise unusable(self._grammar, frames[0].payload.decode(errors="replace"))
        why = limit_reached(frames[0], f"it takes more than {COMPILE_SECONDS:g} s to compile")
        raise self._grammars.refuse(self._grammar, why)

    def close(self) -> None:
        """Give up, unless the grammar is compiled."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self.process.close()


class Grammars:
    """Compiled grammars for one tokenizer; safe from any thread."""

    def __init__(self, backend: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Prepare; the first process starts with the first grammar, because reading the tokenizer takes a second."""
        self.vocab_size = vocab_size
        self._processes = GrammarProcesses(backend, vocab_size, sorted(eos_token_ids))
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[InvalidRequest, float]] = OrderedDict()
        self._lock = threading.Lock()

    def hold(self, grammar: Grammar) -> Compiled | None:
        """A compiled grammar, held until `release`; None if it is not compiled. Raises the error of a refused one."""
        key = _key(grammar)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None and not compiled.users and compiled.process.has_ended:
                del self._compiled[key]
                compiled = None
            if compiled is not None:
                self._compiled.move_to_end(key)
                compiled.users += 1
                return compiled
            error, until = self._refused.get(key, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise InvalidRequest(error.message, remedy=error.remedy)
        return None

    def release(self, compiled: Compiled) -> None:
        """End one use of a grammar."""
        with self._lock:
            compiled.users -= 1
        self._end_unused()

    def begin(self, grammar: Grammar) -> Attempt:
        """Start compiling a grammar; takes a second or more for the first grammar, else milliseconds.

        Raises:
            GenerationFailed: no process can be started.
            Overloaded: the grammars in use take all memory that grammars may take.
        """
        self._end_unused(spared=0)
        if (memory := self.memory) > ALL_MEMORY_MIB:
            raise Overloaded(f"The grammars in use hold {memory} MiB, and the server allows {ALL_MEMORY_MIB}.")
        return Attempt(self, grammar, self._processes.make())

    def compile(self, grammar: Grammar) -> Compiled:
        """Compile a grammar unless it is already compiled, and hold it; blocks, and raises what `wait` raises."""
        while (compiled := self.hold(grammar)) is None:
            self.begin(grammar).wait(COMPILE_WALL_SECONDS)
        return compiled

    def keep(self, grammar: Grammar, process: GrammarProcess, first: bytes) -> None:
        """Add a compiled grammar to the cache."""
        compiled = Compiled(_key(grammar), process, first)
        with self._lock:
            before = self._compiled.pop(compiled.key, None)
            self._compiled[compiled.key] = compiled
        if before is not None and not before.users:
            before.process.close()
        self._end_unused()

    def refuse(self, grammar: Grammar, why: str) -> InvalidRequest:
        """The error of a grammar that exceeded a limit; the grammar is refused for a while."""
        error = unusable(grammar, why)
        self._remember(_key(grammar), error)
        return error

    def discard(self, compiled: Compiled, error: InvalidRequest | None = None) -> None:
        """End a grammar's process for all its users; with an error, also refuse the grammar for a while."""
        with self._lock:
            if self._compiled.get(compiled.key) is compiled:
                del self._compiled[compiled.key]
        compiled.process.close()
        if error is not None:
            self._remember(compiled.key, error)

    def close(self) -> None:
        """End all processes."""
        self._processes.close()

    @property
    def memory(self) -> int:
        """Memory of all grammars together, in MiB."""
        with self._lock:
            return _memory_of(self._compiled.values())

    def largest(self) -> Compiled | None:
        """The grammar that takes the most memory, if all grammars together exceed the limit; else None."""
        if self.memory <= ALL_MEMORY_MIB:
            return None
        self._end_unused()
        with self._lock:
            if _memory_of(self._compiled.values()) <= ALL_MEMORY_MIB:
                return None
            return max(self._compiled.values(), key=lambda compiled: compiled.process.memory)

    def _end_unused(self, spared: int = 1) -> None:
        """End unused grammars, least recently used first, until they are within the limits on number and memory.

        `spared` unused grammars are kept in any case: a grammar that was just compiled is about to be held.
        """
        with self._lock:
            idle = [compiled for compiled in self._compiled.values() if not compiled.users]
            in_use = _memory_of(compiled for compiled in self._compiled.values() if compiled.users)
            most = min(MAX_UNUSED_MIB, ALL_MEMORY_MIB - in_use)
            ended = []
            while len(idle) > spared and (len(idle) > MAX_UNUSED or _memory_of(idle) > most):
                ended.append(idle.pop(0))
                del self._compiled[ended[-1].key]
        for compiled in ended:
            compiled.process.close()

    def _remember(self, key: bytes, error: InvalidRequest) -> None:
        with self._lock:
            self._refused[key] = (error, time.monotonic() + REFUSED_SECONDS)
            self._refused.move_to_end(key)
            while len(self._refused) > REFUSED:
                self._refused.popitem(last=False)


def _memory_of(grammars: Iterable[Compiled]) -> int:
    return sum(compiled.process.memory for compiled in grammars)


def unpacked(mask: bytes, vocab_size: int) -> np.ndarray:
    """Booleans `[vocab_size]`: the tokens that may come next; tokens beyond the mask are not allowed."""
    allowed = np.zeros(vocab_size, dtype=bool)
    bits = np.frombuffer(mask, dtype=np.uint8)
    known = np.unpackbits(bits, count=min(vocab_size, 8 * len(bits)), bitorder="little").view(bool)
    allowed[: len(known)] = known
    return allowed


def brief(why: str) -> str:
    """llguidance's message on one line, without its parser's state and the full stop."""
    return " ".join(why.partition("<state>")[0].split())[:300].rstrip(" .")


def unusable(grammar: Grammar, why: str) -> InvalidRequest:
    """The error of a grammar that cannot be used."""
    if grammar.kind is GrammarKind.JSON_SCHEMA and "recursion limit exceeded" in why:
        why = TOO_DEEP  # replaces a position in a text that the user has not written
    return InvalidRequest(f"The {NAMES[grammar.kind]} cannot be used: {brief(why)}.", remedy=REMEDY)


def limit_reached(frame: GrammarReply, too_slow: str) -> str:
    """Describe the limit that ended a process.

    Raises GenerationFailed if none did; when memory runs out, the kernel kills grammars first (SIGKILL).
    """
    number = frame.payload[0]
    if number == signal.SIGPROF:
        return too_slow
    if number in (signal.SIGSEGV, signal.SIGBUS):
        return f"it takes more than {STACK // MiB} MiB of stack, as a long chain of definitions does"
    if number == signal.SIGABRT:
        return f"it takes more than {MEMORY // MiB} MiB of memory"
    raise GenerationFailed("The grammar's process has ended.", remedy="Retry.")


def _key(grammar: Grammar) -> bytes:
    """A hash of a grammar, whose source may be megabytes long."""
    text = f"{grammar.kind}\0{grammar.after_space}\0{grammar.source}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
