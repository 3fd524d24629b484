"""Messages between a server and a grammar's process, as bytes on a socket."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

LENGTH = struct.Struct("<I")
"""Before the first message to a process: how long it is. It is JSON with the fields of a Grammar."""

ORDER = struct.Struct("<BQI")
"""To a process: what to do, for which text, with which token."""

COMMAND = struct.Struct("<BQ")
"""To the process that makes the others: what to do, with which one."""

NO_EXTENSION = "NoExtension"
"""How llguidance begins to say that no token can follow."""

_HEADER = struct.Struct("<IQBfI")


class Action(IntEnum):
    """What to do with one text."""

    ACCEPT = 1
    """Take a token, and say which may come next."""
    ACCEPT_LAST = 2
    """Take a token after which no other comes, whatever the grammar says."""
    DROP = 3
    """Forget the text; it gets no further answer."""


class Deed(IntEnum):
    """What to do with a process."""

    MAKE = 1
    """Its end of a socket comes with the command."""
    KILL = 2
    YIELD = 3
    """Let it yield further to the engine, and to the processes of other grammars."""
    IDLE = 4
    """Let it have only what others leave of the cores."""


class GrammarState(IntEnum):
    """What became of a grammar, or of a text."""

    GOING = 0
    """The payload is a mask: one bit for each token that may come next."""
    COMPLETE = 1
    """The text matches, and nothing can be added."""
    FAILED = 2
    """It cannot continue; the payload says why."""
    ENDED = 3
    """The process has ended; the payload is the number of the signal that ended it."""


class GrammarReply(NamedTuple):
    """An answer of a process."""

    walk: int
    """The text's number; 0 is the grammar itself."""
    state: GrammarState
    seconds: float
    """Of a processor, for this answer."""
    mebibytes: int
    """What the process holds by now, beyond what all of them share."""
    payload: bytes

    def pack(self) -> bytes:
        """As bytes."""
        head = _HEADER.pack(len(self.payload), self.walk, self.state, self.seconds, self.mebibytes)
        return head + self.payload


class GrammarReplies:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[GrammarReply]:
        """The frames that are complete once these bytes have come."""
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            length, walk, state, seconds, mebibytes = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + length
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            yield GrammarReply(walk, GrammarState(state), seconds, mebibytes, payload)
