"""Rows in columns are the rows that were put in, and a garbage collection has next to nothing to look at."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from server.train.data import hold_out, read_data
from server.train.rows import Row, Rows

THREE = [Row("a", "b", 1), Row("c", "d", 2), Row("e", "f", 4)]


def test_rows_are_those_that_were_put_in() -> None:
    rows = Rows(THREE)
    assert len(rows) == 3
    assert list(rows) == THREE == rows
    assert rows[-1] == THREE[2]
    assert rows[1:] == THREE[1:]
    assert rows[:None] == THREE
    assert rows != Rows(THREE[:2])
    assert THREE[1] in rows


def test_no_row_that_is_read_or_held_out_is_an_object_to_collect(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": f"text {i}", "target": "yes"}) + "\n" for i in range(5000)))
    gc.collect()
    before = len(gc.get_objects())
    data = read_data(path)
    training, validation = hold_out(data)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert len(training.rows) + len(validation.rows) == len(data.rows) == 5000
