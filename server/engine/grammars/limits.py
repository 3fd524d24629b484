"""Limits of a grammar. Each limit appears in the error of a client that exceeds it."""

from typing import Any

MiB = 2**20

COMPILE_SECONDS = 1.0
"""Processor time to compile a grammar and compute its first mask. A usual schema takes some milliseconds."""
COMPILE_WALL_SECONDS = 1.9
"""The same in wall-clock time, on a busy machine too; waiting for a turn does not count."""
MASK_SECONDS = 1.0
"""Processor time to accept one token of one text and compute the next mask."""
REQUEST_SECONDS, TOKEN_SECONDS = 5.0, 0.005
"""Processor time for all masks of a request: an initial amount, and an additional amount for each token."""
STALLED_SECONDS = 60.0
"""Wall-clock time after which a process that does not reply is ended: on a very busy machine, it may take long to use
up its processor time."""

MEMORY = 128 * MiB
"""Memory limit of one grammar, beyond the memory that all grammars share."""
ALL_MEMORY_MIB = 1024
"""Memory limit of all compiled grammars. Above it, no further grammar is compiled and the largest one is ended."""
STACK = 6 * MiB
MAX_UNUSED = 24
"""Maximum number of unused compiled grammars; the least recently used one is removed first."""
MAX_UNUSED_MIB = 128
"""Memory limit of all unused grammars together; a usual grammar takes about 5 MiB."""

PARSER_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""llguidance's own limits where they differ from its defaults: a lexer state takes up to 2 kB."""
