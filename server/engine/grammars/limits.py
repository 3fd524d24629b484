"""Limits of a grammar. Each number is part of the message to a client that exceeds it."""

from __future__ import annotations

from typing import Any

MiB = 2**20

COMPILE_SECONDS = 1.0
"""Of a processor, to compile a grammar and find its first token's mask. A usual schema takes some milliseconds."""
COMPILE_WALL_SECONDS = 1.9
"""The same by the clock, however busy the machine is; what waits for its turn is not counted."""
MASK_SECONDS = 1.0
"""Of a processor, to take one token of one text and find the next one's mask."""
REQUEST_SECONDS, TOKEN_SECONDS = 5.0, 0.005
"""Processor time for all masks of a request: an initial amount, and an additional amount for each token."""
STALLED_SECONDS = 60.0
"""By the clock, until an answer that does not come is given up: on a machine so busy the limits above may not bite."""

MEMORY = 128 * MiB
"""What one grammar may take, beside what all grammars share."""
ALL_MEMORY_MIB = 1024
"""What compiled grammars may take together. Beyond it no other is compiled, and the largest one has to go."""
STACK = 6 * MiB
MAX_UNUSED = 24
"""Compiled grammars that nobody uses; the one that was used last stays longest."""
MAX_UNUSED_MIB = 128
"""What these may take together; a usual grammar takes about 5."""

PARSER_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""llguidance's own limits, where they are narrower than its defaults: a state takes up to 2 kB."""
