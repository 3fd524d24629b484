"""Pruning removes what harms or does nothing, one after another, and is judged by rows that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from server.evaluation.data import EvaluationData
from server.evaluation.intervals import Statistic
from server.evaluation.metrics import share
from server.interpret.pruning import Pruning, halves, prune, pruning_verdict, shortened
from server.interpret.similarity import share_start
from server.interpret.static import Interpreter
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import declared_start
from server.train.start import start_values
from tests.evaluation.support import data_of
from tests.interpret.support import begun_at, embeddings, token_states

ROWS = 200
DATA = replace(data_of([(f"row {i}", "yes" if i % 2 else "no") for i in range(ROWS)]), labels=("yes", "no"))
NUMBERED = SoftPrompt("PROMPT_TUNING", torch.arange(6.0)[:, None].repeat(1, 4), Manifest(labels=("yes", "no")))
"""Each virtual token is its number."""

Right = Callable[[set[int], int], bool]


def pruned(right: Right, tolerance: float = 0.02) -> tuple[Pruning, list[set[int]]]:
    """Prune `NUMBERED`, with which a row (by its line) is answered right or not, and the rows of each question."""
    asked: list[set[int]] = []

    def ask(named: Sequence[tuple[str, SoftPrompt]], data: EvaluationData) -> Mapping[str, Statistic]:
        asked.append({row.line for row in data.rows})
        return {
            name: share([right({int(one) for one in soft_prompt.tensor[:, 0]}, row.line) for row in data.rows])
            for name, soft_prompt in named
        }

    return prune(NUMBERED, DATA, ask, tolerance), asked


def test_what_harms_or_does_nothing_is_removed_and_stand_ins_are_not_removed_together() -> None:
    def right(tokens: set[int], line: int) -> bool:
        if 0 not in tokens or not tokens & {3, 4}:  # 0 is needed, and one of 3 and 4
            return False
        return line % 5 != 0 or 1 not in tokens  # 1 harms a fifth of the rows; 2 and 5 do nothing

    found, asked = pruned(right)
    assert found.alone.harmful == (1,)
    assert found.alone.needed == (0,)
    assert found.removed == (1, 2, 3, 5)
    assert [step.token for step in found.steps] == [1, 2, 3, 4, 5], "the least needed is tried first"
    assert not next(step for step in found.steps if step.token == 4).removed
    assert found.loss is not None
    assert found.loss.high < 0
    assert found.is_shown
    assert "can be removed" in pruning_verdict(found)
    *chose, judged = asked
    assert all(rows == chose[0] for rows in chose)
    assert not chose[0] & judged
    assert chose[0] | judged == {row.line for row in DATA.rows}


def test_a_choice_that_other_rows_do_not_confirm_is_not_shown() -> None:
    chosen = {row.line for row in halves(DATA)[0].rows}
    found, _ = pruned(lambda tokens, line: 2 in tokens or line in chosen)
    assert found.removed
    assert found.loss is not None
    assert found.loss.value == 1
    assert not found.is_shown
    assert "Nothing is published" in pruning_verdict(found)


def test_where_every_virtual_token_is_needed_none_is_removed_and_nothing_is_judged() -> None:
    found, asked = pruned(lambda tokens, line: len(tokens) == 6)
    assert (found.kept, found.loss, found.is_shown) == (tuple(range(6)), None, False)
    assert pruning_verdict(found).startswith("None of the virtual tokens can be removed")
    assert len(asked) == 1
    alike, _ = pruned(lambda tokens, line: True)
    assert len(alike.kept) == 1, "one always remains"


def test_both_halves_have_the_same_share_of_each_label() -> None:
    one, other = halves(DATA)
    assert sum(row.target == "yes" for row in one.rows) == sum(row.target == "yes" for row in other.rows) == 50
    with pytest.raises(InvalidRequest, match="19 rows are too few"):
        halves(replace(DATA, rows=DATA.rows[:19]))


def cut(soft_prompt: SoftPrompt, kept: Sequence[int]) -> SoftPrompt:
    found, _ = pruned(lambda tokens, line: True)
    count = soft_prompt.num_virtual_tokens
    return shortened(
        soft_prompt, found.model_copy(update={"kept": tuple(kept), "num_virtual_tokens": count}), "a@3", DATA
    )


@pytest.mark.parametrize("kind", ["tokens", "random", "kv", "another"])
def test_each_remaining_virtual_token_keeps_its_start(tiny32: FrozenModel, kind: str) -> None:
    """Also after a second pruning; the start of keys and values depends on the removed tokens before them."""
    tokens = (40, 41, 42, 43)
    manifest, others = begun_at(tokens, ("yes", "no")), []
    if kind == "random":
        manifest = Manifest(training={"start": {"initial_token_ids": list(tokens), "random_seed": 3}})
    elif kind == "another":
        others = [SoftPrompt("PROMPT_TUNING", embeddings(tiny32, tokens))]
        manifest = Manifest(training={"start": {"prefix_hash": others[0].prefix_hash}})
    states = token_states(tiny32, tokens) if kind == "kv" else embeddings(tiny32, tokens)
    whole = SoftPrompt("PREFIX_TUNING" if kind == "kv" else "PROMPT_TUNING", states + 1, manifest)
    first = start_values(tiny32, whole, others)
    assert first is not None
    once = cut(whole, (0, 2, 3))
    twice = cut(once, (1, 2))
    for soft_prompt, kept in ((once, [0, 2, 3]), (twice, [2, 3])):
        found = start_values(tiny32, soft_prompt, others)
        assert found is not None
        torch.testing.assert_close(found, first[kept])
        torch.testing.assert_close(soft_prompt.tensor, whole.tensor[kept])
    said = Interpreter(tiny32).interpret("cut", twice, others)
    assert said.start_is_known
    assert said.start.endswith("2 of the 4 virtual tokens remain")
    start = declared_start(twice.manifest)
    assert start is not None
    assert start.remaining_token_ids == (() if kind == "another" else (42, 43))
    assert share_start(start, declared_start(whole.manifest))


def test_the_manifest_says_what_was_removed_and_keeps_no_figure_of_the_whole(tiny32: FrozenModel) -> None:
    whole = SoftPrompt(
        "PROMPT_TUNING", embeddings(tiny32, (40, 41)), Manifest(metrics={"validation_loss": 1}, training={"seed": 0})
    )
    found = cut(whole, (1,))
    manifest = found.manifest
    assert (manifest.num_virtual_tokens, manifest.digest, manifest.prefix_hash) == (1, found.digest, found.prefix_hash)
    assert manifest.training is not None
    assert manifest.training["seed"] == 0
    assert "start" not in manifest.training
    record = manifest.training["pruned"]
    assert (record["from"], record["from_digest"], record["kept"]) == ("a@3", whole.digest, [1])
    assert manifest.metrics is not None
    assert manifest.metrics["pruning_rows"] == 100
    assert "validation_loss" not in manifest.metrics


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (0, 4), (-1, 0)])
def test_a_start_whose_remaining_positions_make_no_sense_is_unknown(tiny32: FrozenModel, kept: tuple[int, ...]) -> None:
    start = {"initial_token_ids": [40, 41, 42, 43], "kept": list(kept), "num_virtual_tokens": 4}
    soft_prompt = SoftPrompt("PROMPT_TUNING", embeddings(tiny32, (40, 41)), Manifest(training={"start": start}))
    assert start_values(tiny32, soft_prompt) is None
