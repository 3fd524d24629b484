"""Each key's share of a step: no key's texts and inputs make the steps of others much longer.

A key that runs alone may fill a step. If several API keys are active, each may take as many tokens of a step as all the
others together, plus one sixteenth of the token budget. A key at this limit decodes its sequences in turns, and its
prefills may take at least half of its share. A key with many sequences, long inputs or expensive sampling therefore
gets about as much time as each other key, not several times as much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.scheduling.sequence import Sequence

STEP_PARTS = 16
"""A key that is not alone may take what all other keys take together, plus the token budget divided by this number."""

FEWEST = 3
"""The fewest input tokens that a key may always compute in a step: an input of four is divided into two and two."""

RULES_COST = 3
"""Cost of a decoding row that needs sampling or log-probabilities, relative to a greedy row (1)."""


@dataclass
class _Demand:
    """What the sequences of a key could take of a step."""

    decoding: list[Sequence] = field(default_factory=list)
    filling: list[Sequence] = field(default_factory=list)
    rows: int = 0
    """What the rows that decode cost."""
    tokens: int = 0
    """Input tokens to be computed."""

    def add(self, sequence: Sequence, pending: int) -> None:
        if pending == 1:
            self.decoding.append(sequence)
            self.rows += _cost(sequence)
        else:
            self.filling.append(sequence)
            self.tokens += pending


class FairSteps:
    """Shares out the token budget of each step."""

    def __init__(self, max_batch_tokens: int, next_chunk: Callable[[Sequence], int]) -> None:
        """Share out a budget of tokens; `next_chunk` says how many tokens of a sequence one step can compute."""
        self._max_batch_tokens = max_batch_tokens
        self._next_chunk = next_chunk
        self._least = max(RULES_COST, max_batch_tokens // STEP_PARTS)
        self._steps = 0

    def share(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Which sequences compute how many tokens in the next step; those that decode come first.

        Every sequence that decodes gets its one token, and inputs get what is left of the budget, in the order of
        `running`, except where a key would take too much beside others.
        """
        self._steps += 1
        demands: defaultdict[str | None, _Demand] = defaultdict(_Demand)
        for sequence in running:
            if pending := sequence.num_pending:
                demands[sequence.request.key_id].add(sequence, pending)
        if len(demands) == 1:
            [(key, demand)] = demands.items()
            return self._fill(demand.decoding, demand.filling, {key: self._max_batch_tokens})
        weights = {key: demand.rows + min(demand.tokens, self._least) for key, demand in demands.items()}
        decoding: list[Sequence] = []
        limits: dict[str | None, int] = {}
        for key, demand in demands.items():
            limit = self._least + sum(weights.values()) - weights[key]
            limits[key] = min(demand.tokens, max(limit - demand.rows, limit // 2, FEWEST))
            decoding += self._take_turns(demand, limit - limits[key])
        filling = [sequence for sequence in running if sequence.num_pending > 1]
        return self._fill(decoding, filling, limits)

    def _take_turns(self, demand: _Demand, limit: int) -> list[Sequence]:
        """As many of the key's decoding sequences as fit within the limit, least recently decoded first."""
        if demand.rows <= limit:
            return demand.decoding
        chosen = []
        for sequence in sorted(demand.decoding, key=lambda sequence: sequence.decoded_in):
            if limit <= 0:
                break
            limit -= _cost(sequence)
            sequence.decoded_in = self._steps
            chosen.append(sequence)
        return chosen

    def _fill(
        self, decoding: list[Sequence], filling: list[Sequence], limits: dict[str | None, int]
    ) -> list[tuple[Sequence, int]]:
        """Add inputs to sequences that decode, as far as the budget and the limits of their keys reach."""
        budget = self._max_batch_tokens - len(decoding)
        shares = [(sequence, 1) for sequence in decoding]
        for sequence in filling:
            key = sequence.request.key_id
            count = self._chunk(sequence, min(budget, limits[key]))
            if count > 0:
                shares.append((sequence, count))
                budget -= count
                limits[key] -= count
        return shares

    def _chunk(self, sequence: Sequence, most: int) -> int:
        """How many tokens of an input to compute: all that a step can, or a part that leaves no single token.

        Attention takes a single token for a decoded one, and rounds differently then. Without such parts, results do
        not depend on how an input was divided.
        """
        wanted = self._next_chunk(sequence)
        if wanted <= most or self._max_batch_tokens < 2 * FEWEST:
            return min(wanted, most)
        count = most - 1 if sequence.num_pending - most == 1 else most
        return count if count > 1 else 0


def _cost(sequence: Sequence) -> int:
    return 1 if sequence.is_plain else RULES_COST
