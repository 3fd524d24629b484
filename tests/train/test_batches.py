from __future__ import annotations

import pytest

from server.train.batches import LONG, Batches

SHORT = [5] * 10


def test_every_row_is_seen_once_before_any_comes_again() -> None:
    batches = Batches(SHORT, 4, seed=0)
    seen = [row for step in range(5) for row in batches.at(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_batch_may_be_larger_than_the_data() -> None:
    batch = Batches([5, 6], 5, seed=0).at(0)
    assert {batch.count(row) for row in (0, 1)} == {2, 3}


def test_the_step_alone_says_what_is_read() -> None:
    lengths = [LONG + row for row in range(50)]
    forward = Batches(lengths, 3, seed=4)
    in_order = [forward.at(step) for step in range(60)]
    assert [Batches(lengths, 3, seed=4).at(step) for step in range(60)] == in_order
    assert [Batches(lengths, 3, seed=5).at(step) for step in range(60)] != in_order


def test_long_rows_come_with_rows_of_about_their_length() -> None:
    lengths = [LONG + (row * 37) % 400 for row in range(400)]
    batches = Batches(lengths, 8, seed=0)
    spreads = []
    for step in range(48):
        read = [lengths[row] for row in batches.at(step)]
        spreads.append(max(read) - min(read))
    assert sum(spreads) / len(spreads) < 100, "of 400"
    seen = sorted(row for step in range(48) for row in batches.at(step))
    assert seen == sorted(set(seen)), "within an epoch none comes twice"


@pytest.mark.parametrize("length", [LONG - 1, LONG])
def test_short_rows_are_mixed_because_length_often_tells_the_label(length: int) -> None:
    lengths = [length - 50] * 100 + [length + 50] * 100
    batches = Batches(lengths, 10, seed=0)
    mixed = [len({lengths[row] for row in batches.at(step)}) == 2 for step in range(16)]
    assert all(mixed) == (length < LONG)
