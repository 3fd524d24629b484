"""Messages between a server and a grammar's process, as bytes on a socket."""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

LENGTH = struct.Struct("<I")
"""Length of the first message to a process, which is JSON with the fields of a Grammar."""

ORDER = struct.Struct("<BQI")
"""A message to a grammar's process: action, text number, token id."""

COMMAND = struct.Struct("<BQ")
"""A message to the parent process: deed, process number."""

NO_EXTENSION = "NoExtension"
"""Beginning of llguidance's message that no token can follow."""

_HEADER = struct.Struct("<IQBfI")


class Action(IntEnum):
    """What to do with one text."""

    ACCEPT = 1
    """Accept a token and reply with the tokens that may come next."""
    ACCEPT_LAST = 2
    """Accept a text's last token; more tokens will not follow, even if the grammar would allow them."""
    DROP = 3
    """Remove the text; it gets no further replies."""


class Deed(IntEnum):
    """What to do with a process."""

    MAKE = 1
    """Start a process; the command carries its end of a socket."""
    KILL = 2
    YIELD = 3
    """Lower the process's priority, so that it also yields to other grammars."""
    IDLE = 4
    """Let the process run only on otherwise idle cores."""


class GrammarState(IntEnum):
    """The state of a grammar or of a text."""

    GOING = 0
    """The payload is a mask: one bit for each token that may come next."""
    COMPLETE = 1
    """The text matches, and no token can follow."""
    FAILED = 2
    """The grammar or text cannot continue; the payload gives the reason."""
    ENDED = 3
    """The process has ended; the payload is the number of the signal that ended it."""


class GrammarReply(NamedTuple):
    """A reply of a process."""

    walk: int  # the text's number; 0 for the grammar itself
    state: GrammarState
    seconds: float  # processor time of this reply
    mebibytes: int  # the process's memory, beyond the memory that all processes share
    payload: bytes

    def pack(self) -> bytes:
        """Serialise the reply."""
        head = _HEADER.pack(len(self.payload), self.walk, self.state, self.seconds, self.mebibytes)
        return head + self.payload


class GrammarReplies:
    """Splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[GrammarReply]:
        """Add received bytes; returns the frames that are now complete."""
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            length, walk, state, seconds, mebibytes = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + length
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            yield GrammarReply(walk, GrammarState(state), seconds, mebibytes, payload)
