from __future__ import annotations

from typing import Any

import pytest

from server.engine.model.exactness import refuse_inexact
from server.errors import UnsupportedModel
from tests.engine.hybrid_models import hybrid
from tests.support import (
    tiny_model,
)


def test_a_gated_delta_rule_has_a_state_of_its_last_inputs_and_a_matrix_for_each_head() -> None:
    convolved, matrix = 3 * (2 * 2 * 8 + 4 * 6), 4 * 8 * 6
    assert tiny_model("qwen3_5_text").spec.state_width == 2 * (convolved + matrix), "two layers"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layer_types": ["conv"] * 3}, "does not have a layer with attention"),
        ({"conv_L_cache": 1}, "does not have a convolution over more than one token"),
    ],
)
def test_a_hybrid_without_attention_or_without_states_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        hybrid(**fields)


def test_a_hybrid_of_which_all_layers_have_attention_is_served_as_any_model() -> None:
    model = hybrid(layer_types=["full_attention"] * 3)
    refuse_inexact(model)
    assert (model.spec.state_width, model.spec.num_kv_layers) == (0, 3)
