"""Seen tokens are those that a set holds, and penalties are what a counter gives."""

from __future__ import annotations

import random
from collections import Counter

from server.engine.sampling.seen_tokens import SeenTokens


def test_seen_tokens_are_those_given_and_penalties_are_for_those_generated() -> None:
    rng = random.Random(0)
    given = [rng.randrange(50) for _ in range(30)]
    seen, counts, expected = SeenTokens(given, 0.5, 0.25), Counter[int](), set(given)
    for _ in range(300):
        token_id = rng.randrange(200)
        seen.add(token_id)
        counts[token_id] += 1
        expected.add(token_id)
        assert set(seen.ids.tolist()) == expected
        assert len(seen.ids) == len(expected)
        penalties = {i: 0.5 + 0.25 * counts[i] if counts[i] else 0.0 for i in expected}
        assert dict(zip(seen.ids.tolist(), seen.minus.tolist(), strict=True)) == penalties


def test_seen_tokens_know_whether_a_vocabulary_holds_them() -> None:
    assert SeenTokens().are_within(1)
    seen = SeenTokens((3, 9))
    assert seen.are_within(10)
    assert not seen.are_within(9)
    seen.add(12)
    assert not seen.are_within(12)
    assert not SeenTokens((-1, 3)).are_within(10)
