from __future__ import annotations

import pytest
import torch
from torch import nn

from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel
from server.interpret.lens import LabelTokens, MatchedSets, shape_of, value_change_lens
from server.interpret.readout import Readout, find_readout
from server.interpret.static import Interpreter
from server.interpret.vocabulary import Vocabulary
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.methods import join_key_values, split_key_values
from tests.interpret.support import begun_at, distance_from_uniform, token_states, untrained
from tests.support import HYBRIDS, TINY, random_kv_prompt, random_soft_prompt, tiny_model

START = (3, 40, 41, 250)
TEXTS = [str(token) for token in range(258)]


def readout_of(model: FrozenModel) -> Readout:
    found = find_readout(model, Vocabulary.of(model).token_ids)
    assert isinstance(found, Readout), found
    return found


@pytest.mark.parametrize("architecture", sorted(TINY | HYBRIDS))
def test_the_output_path_of_each_architecture_is_found(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    readout = readout_of(model)
    assert len(readout.projections) == model.spec.num_kv_layers
    width = model.spec.num_key_value_heads * model.spec.head_dim
    first = readout.scores(readout.through(0, torch.ones(1, width)))
    torch.testing.assert_close(readout.scores(readout.through(0, 3 * torch.ones(1, width))), 3 * first)
    assert float(first.std()) > 0


def test_the_lens_of_grouped_heads_is_the_product_of_the_weights(tiny32: FrozenModel) -> None:
    module, spec = tiny32.module, tiny32.spec
    assert spec.num_attention_heads == 2 * spec.num_key_value_heads
    values = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    repeated = values.view(2, 8).repeat_interleave(2, dim=0).flatten()
    decoder = module.get_decoder()  # type: ignore[no-untyped-call]
    written = decoder.layers[1].self_attn.o_proj.weight @ repeated
    logits = (module.get_output_embeddings().weight @ (decoder.norm.weight * written))[:258]  # type: ignore[no-untyped-call]
    readout = readout_of(tiny32)
    torch.testing.assert_close(readout.through(1, values)[0], written)
    torch.testing.assert_close(readout.scores(written[None])[0], logits - logits.mean())
    drawn = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    expected = readout.scores(readout.through(1, drawn)).var(0)
    torch.testing.assert_close(readout.variances()[1], expected, rtol=0.05, atol=0)


def test_an_optimised_model_has_the_same_lens() -> None:
    plain, fast = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    optimise(fast, ("fused", "packed"), None)
    torch.testing.assert_close(readout_of(plain).variances(), readout_of(fast).variances(), rtol=1e-4, atol=1e-4)


def test_layers_that_run_as_one_have_the_same_lens() -> None:
    """As on processors with AMX, where the decoder has one part that holds all layers."""
    plain, joined = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    decoder = joined.module.get_decoder()  # type: ignore[no-untyped-call]
    holder = nn.Module()
    holder.layers = decoder.layers
    decoder.layers = nn.ModuleList([holder])
    assert torch.equal(readout_of(plain).variances(), readout_of(joined).variances())


def raising(model: FrozenModel, token: int, size: float) -> SoftPrompt:
    """A KV prefix whose values changed, in the last layer, to what writes a token."""
    readout, spec = readout_of(model), model.spec
    basis = torch.eye(spec.num_key_value_heads * spec.head_dim)
    layer = spec.num_kv_layers - 1
    direction = readout.scores(readout.through(layer, basis))[:, token]
    states = [list(pair) for pair in split_key_values(token_states(model, START), spec)]
    change = (size * direction / direction.norm()).view(spec.num_key_value_heads, 1, spec.head_dim)
    states[layer][1] = states[layer][1] + change
    tensor = join_key_values(tuple((key, value) for key, value in states))
    return SoftPrompt("PREFIX_TUNING", tensor, begun_at(START, [model.text.tokens.text_of(token), "B"]))


def test_a_token_that_the_values_came_to_write_is_raised(tiny32: FrozenModel) -> None:
    found = Interpreter(tiny32).interpret("raising", raising(tiny32, 80, 5.0), top=3)
    assert found.lens is not None
    assert found.lens.first_layer == 1
    assert found.lens.labels is not None
    scores = {token.token_id: token.z for token in found.lens.labels.tokens}
    assert scores[80] == max(scores.values()) > 2
    assert found.nearest is None
    assert found.geometry is not None
    last = found.geometry.layers[-1]
    assert last.key_relative_change == 0
    assert last.value_relative_change is not None
    assert last.value_relative_change > 0
    assert len(found.geometry.value_change) == tiny32.spec.num_kv_layers


def test_a_kv_prefix_without_a_known_start_has_no_lens(tiny32: FrozenModel) -> None:
    found = Interpreter(tiny32).interpret("foreign", random_kv_prompt(tiny32.spec))
    assert found.lens is None
    assert found.geometry is not None
    assert found.geometry.effective_rank_of_change is None
    assert all(layer.value_relative_change is None for layer in found.geometry.layers)
    assert found.verdict.startswith("The start is unknown")


def test_random_changes_have_uniform_p_values_of_their_labels(tiny32: FrozenModel) -> None:
    """Over 200 seeds; each has other labels."""
    readout = readout_of(tiny32)
    generator = torch.Generator().manual_seed(2)
    ids = readout.token_ids.tolist()
    found = []
    for _ in range(200):
        changes = torch.randn(1, 16, generator=generator)
        z = readout.scores(readout.through(1, changes))[0]
        labels = torch.randint(60, 250, (3,), generator=generator).tolist()
        sets = MatchedSets(ids, tuple(dict.fromkeys(labels)), frozenset(labels))
        found.append(sets.test(z / z.std(), TEXTS).p)
    assert distance_from_uniform(torch.tensor(found, dtype=torch.float64)) < 1.63


def test_labels_whose_whole_shape_is_raised_are_not_called_raised() -> None:
    """A change towards all words of small letters says nothing of the labels among them."""
    generator = torch.Generator().manual_seed(4)
    texts = [("word", " word", "Word", "1,")[int(kind)] for kind in torch.randint(0, 4, (2000,), generator=generator)]
    ids = list(range(2000))
    small = torch.tensor([text == "word" for text in texts])
    z = torch.randn(2000, generator=generator) / 4 + small.float()
    labels = [index for index in range(900, 2000) if texts[index] == "word"][:5]
    z[labels] = 1.0
    assert MatchedSets(ids, labels, frozenset(labels)).test(z, texts).p < 0.05
    assert MatchedSets(ids, labels, frozenset(labels), texts).test(z, texts).p > 0.2
    few = [text if text != "word" or index in labels else "Word" for index, text in enumerate(texts)]
    assert MatchedSets(ids, labels, frozenset(labels), few).test(z, texts).null.sd > 0, "too few alike: frequency alone"


@pytest.mark.parametrize(
    ("text", "shape"),
    [(" ham", "space, small"), ("ham", "small"), ("Ham", "capitalised"), ("HAM", "capitals"), ("hAm", "mixed")],
)
def test_a_shape_is_the_space_before_a_word_and_its_letters(text: str, shape: str) -> None:
    assert shape_of(text) == shape
    assert shape_of(f"{text}1").endswith("other")


def test_random_changes_raise_no_token(tiny32: FrozenModel) -> None:
    readout = readout_of(tiny32)
    variances = readout.variances()
    generator = torch.Generator().manual_seed(3)
    listed = [
        value_change_lens(
            readout, variances, torch.randn(2, 16, generator=generator), torch.zeros(2, 16), None, TEXTS
        ).num_significant
        for _ in range(50)
    ]
    assert sum(count > 0 for count in listed) <= 6


def test_labels_that_began_in_the_soft_prompt_are_tested_only_if_there_are_no_others(tiny32: FrozenModel) -> None:
    readout = readout_of(tiny32)
    given = (readout, readout.variances(), torch.ones(2, 16), torch.zeros(2, 16))
    some = value_change_lens(*given, LabelTokens((65, 66), (), in_start=(65,)), TEXTS).labels
    every = value_change_lens(*given, LabelTokens((65, 66), (), in_start=(65, 66)), TEXTS).labels
    assert some is not None
    assert every is not None
    assert [token.token_id for token in some.tokens] == [66]
    assert [token.token_id for token in every.tokens] == [65, 66]


def test_a_shared_start_does_not_make_two_tasks_similar(tiny32: FrozenModel) -> None:
    one, other = untrained(tiny32, START, 1, size=0.1), untrained(tiny32, START, 2, size=0.1)
    found = Interpreter(tiny32).compare([("one", one), ("other", other), ("foreign", random_soft_prompt(tiny32.spec))])
    [pair, foreign, _] = found.pairs
    assert pair.raw > 0.9
    assert pair.shares_start
    assert pair.change is not None
    assert abs(pair.change) < 0.6
    assert pair.p_change is None, "the model makes even random changes alike"
    assert any("no p-value" in note for note in found.notes)
    assert foreign.change is None
    assert "The start of foreign is unknown" in found.notes[0]


def test_hybrid_models_are_interpreted_by_their_attention_layers() -> None:
    model = tiny_model("qwen3_5_text", dtype=torch.float32)
    found = Interpreter(model).interpret("planted", untrained(model, START, 0))
    assert found.lens is not None
    assert found.lens.num_layers == 1
