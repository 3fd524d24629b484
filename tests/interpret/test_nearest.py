from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from server.interpret.nearest import nearest_tokens, neighbour_null
from server.interpret.null_cache import MOST_FILES, NullCache
from server.interpret.results import Interpretation
from server.interpret.static import Interpreter
from server.interpret.vocabulary import Vocabulary
from tests.interpret.support import distance_from_uniform, embeddings, planted, untrained
from tests.support import random_kv_prompt, random_soft_prompt, tiny_model

KNOWN, START = (65, 90, 110, 200), (3, 40, 41, 250)


def test_a_planted_soft_prompt_is_found(tiny32: FrozenModel) -> None:
    found = Interpreter(tiny32).interpret("planted", planted(tiny32, KNOWN, START))
    assert found.nearest is not None
    assert [token.change[0].token_id for token in found.nearest.tokens] == list(KNOWN)
    assert found.nearest.num_word_like == 4
    assert found.nearest.num_at_start == 0
    assert "All 4 virtual tokens are word-like and learned" in found.verdict


def test_what_only_stayed_near_its_start_is_not_called_word_like(tiny32: FrozenModel) -> None:
    found = Interpreter(tiny32).interpret("untrained", untrained(tiny32, START, 1, size=0.1))
    assert found.nearest is not None
    assert found.nearest.num_at_start == 4
    assert found.nearest.num_word_like == 0
    assert "still nearest to the tokens they started from; what training added is near no word" in found.verdict


def test_random_changes_have_uniform_p_values(tiny32: FrozenModel) -> None:
    """Of 200 seeds, each a virtual token that moved in a random direction."""
    vocabulary = Vocabulary.of(tiny32)
    null = neighbour_null(vocabulary, 5, NullCache(), "tiny")
    tokens = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    moved = untrained(tiny32, tokens, seed=6)
    found = nearest_tokens(vocabulary, null, moved.tensor, embeddings(tiny32, tokens), 5)
    p = torch.tensor([token.p_change for token in found.tokens], dtype=torch.float64)
    assert distance_from_uniform(p) < 1.63
    assert found.num_word_like == 0


def test_a_soft_prompt_trained_elsewhere_gets_neighbours_but_no_verdict(tiny32: FrozenModel) -> None:
    found = Interpreter(tiny32).interpret("foreign", random_soft_prompt(tiny32.spec))
    assert not found.start_is_known
    assert found.verdict.startswith("The start is unknown")
    assert found.nearest is not None
    assert all(token.learned and not token.change and token.p_change is None for token in found.nearest.tokens)
    assert found.lens is None


@pytest.mark.parametrize("size", [1e20, 3e38])
def test_numbers_whose_lengths_float32_cannot_hold_get_no_verdict(tiny32: FrozenModel, size: float) -> None:
    """Their cosines are 0 or NaN, and a NaN has the smallest p-value."""
    interpreter, huge = Interpreter(tiny32), planted(tiny32, KNOWN, START)
    huge.tensor[0] *= size / huge.tensor[0].abs().max()
    for soft_prompt in (
        huge,
        replace(random_kv_prompt(tiny32.spec, 2), tensor=torch.full((2, tiny32.spec.kv_width), size)),
    ):
        with pytest.raises(InvalidRequest, match="cannot be interpreted"):
            interpreter.interpret("huge", soft_prompt)
        with pytest.raises(InvalidRequest, match="cannot be interpreted"):
            interpreter.compare([("huge", soft_prompt)])


@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like], ids=["zero", "equal"])
def test_degenerate_virtual_tokens_have_finite_figures(tiny32: FrozenModel, make: Callable[..., torch.Tensor]) -> None:
    found = Interpreter(tiny32).interpret("odd", replace(one := planted(tiny32, [65], [3]), tensor=make(one.tensor)))
    assert Interpretation.model_validate_json(found.model_dump_json()) == found
    assert found.verdict.startswith("The virtual token is no longer nearest to the token it started from")


def test_rows_without_a_token_are_no_neighbours(tiny32: FrozenModel) -> None:
    """The tokenizer has 258 tokens, the model 260 rows."""
    found = Interpreter(tiny32).interpret("padded", planted(tiny32, (259, 258), (1, 2)))
    assert found.nearest is not None
    near = {one.token_id for token in found.nearest.tokens for one in (*token.learned, *token.change)}
    assert max(near) < 258


def test_the_neighbours_are_those_of_a_search_in_one_piece(tiny32: FrozenModel) -> None:
    vocabulary = Vocabulary.of(tiny32)
    rows = vocabulary.rows(torch.arange(len(vocabulary.token_ids)))
    directions = vocabulary.centred(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)))
    expected = (directions @ rows.T).topk(4)
    found = vocabulary.nearest(directions, 4)
    assert torch.equal(found.rows, expected.indices)
    gram = rows[found.rows] @ rows[found.rows].transpose(1, 2)
    torch.testing.assert_close(vocabulary.coherence(found), (gram.sum((1, 2)) - 4) / 12)
    assert not (vocabulary.nearest(rows[:5], 4, without=torch.arange(5)).rows == torch.arange(5)[:, None]).any()


def test_a_null_is_computed_once_and_the_folder_is_bounded(tmp_path: Path) -> None:
    cache, calls = NullCache(tmp_path), []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"null": torch.arange(3.0)}

    for _ in range(2):
        assert cache.get("a", compute)["null"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    [file] = tmp_path.iterdir()
    file.write_bytes(b"half of it")
    assert cache.get("a", compute)["null"].tolist() == [0, 1, 2]
    assert len(calls) == 2
    for index in range(MOST_FILES + 3):
        cache.get(str(index), compute)
    assert len(list(tmp_path.iterdir())) == MOST_FILES


def test_a_folder_that_cannot_be_written_to_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert NullCache(tmp_path / "file" / "folder").get("a", lambda: {"null": torch.zeros(1)})["null"].tolist() == [0]


def test_untied_and_scaled_embeddings_are_those_that_the_model_reads() -> None:
    model = tiny_model("gemma2", dtype=torch.float32)
    found = Interpreter(model).interpret("planted", planted(model, KNOWN, START))
    assert found.nearest is not None
    assert [token.change[0].token_id for token in found.nearest.tokens] == list(KNOWN)


@pytest.mark.parametrize("is_optimised", [False, True])
def test_tied_embeddings_are_read_at_the_input_and_written_at_the_output(is_optimised: bool) -> None:
    """Optimised models hold the output embeddings in another layout, and the input embeddings must stay as they are."""
    model = tiny_model(dtype=torch.float32)
    read = cast(nn.Embedding, model.module.get_input_embeddings())
    weight = read.weight.detach().clone()
    model.module.get_output_embeddings().weight = read.weight  # type: ignore[no-untyped-call]
    if is_optimised:
        optimise(model, ("fused", "packed"), None)
    interpreter = Interpreter(model)
    found = interpreter.interpret("planted", planted(model, KNOWN, START))
    assert found.nearest is not None
    assert [token.change[0].token_id for token in found.nearest.tokens] == list(KNOWN)
    readout = interpreter.readout
    assert not isinstance(readout, str)
    written = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    scores = (written * readout.gain) @ weight[:258].T
    torch.testing.assert_close(readout.scores(written), scores - scores.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert found.lens is not None
