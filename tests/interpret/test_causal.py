"""Experiments are evaluations whose systems are changed soft prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from server.contracts import GenerationRequest
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from server.evaluation.intervals import Bootstrap
from server.evaluation.metrics import share
from server.evaluation.standalone import OwnEngine, ask_all
from server.interpret.causal import MEASURES, conclude, plan
from server.interpret.function import last_states, shifts
from server.interpret.influence import influence, zeroed_prefixes
from server.interpret.necessity import necessity
from server.interpret.results import CausalInterpretation
from server.interpret.static import Interpreter
from server.interpret.sufficiency import sufficiency
from server.interpret.variants import NEAREST, RANDOM, changed, ladder, quantised
from server.interpret.vocabulary import Vocabulary
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.forward import target_logits
from server.train.methods import PromptTuning
from tests.evaluation.support import data_of
from tests.interpret.support import begun_at, embeddings, token_states, untrained
from tests.support import make_engine, random_kv_prompt, random_soft_prompt, run_engine, tiny_model
from tests.train.rows import MOODS, TEMPLATE, examples_of

START = (40, 41, 42)


def tried(
    model: FrozenModel,
    soft_prompt: SoftPrompt,
    rows: Sequence[tuple[str, str]] = MOODS,
    measures: Sequence[str] = MEASURES,
) -> CausalInterpretation:
    engine = make_engine(model)
    host, subject = OwnEngine(engine), ("mood", soft_prompt)
    experiments = plan(Interpreter(model), host, data_of(rows), subject, measures=measures)
    seen: list[str] = []
    answers, _ = ask_all(engine, experiments.evaluation, seen.append)
    assert len(seen) == experiments.evaluation.num_questions
    return conclude(experiments, answers)


def test_embeddings_are_tried_in_every_form(tiny32: FrozenModel) -> None:
    moved = untrained(tiny32, START, 0)
    found = tried(tiny32, replace(moved, manifest=begun_at(START, ("no", "yes"))))
    assert found.metric == "accuracy"
    assert found.sufficiency is not None
    names = [step.name for step in found.sufficiency.steps]
    assert {NEAREST, RANDOM, "start", "direction only", "shuffled", "rank 1 of the change", "8 bits"} <= set(names)
    assert found.necessity is not None
    assert len(found.necessity.tokens) == len(START)
    assert found.necessity.replaced_by == "its start"


@pytest.mark.parametrize("start", ["the text", "elsewhere"])
def test_a_wayward_soft_prompt_has_neighbours_that_explain_nothing(tiny: FrozenModel, start: str) -> None:
    """Trained to solve its task and to lie near another text (Khashabi et al. 2022): that text alone does not."""
    text = tuple(tiny.text.encode("some text"))
    begun = text if start == "the text" else tuple(range(40, 40 + len(text)))
    wayward = trained_towards(tiny, text, begun)
    static = Interpreter(tiny).interpret("wayward", wayward)
    assert static.nearest is not None
    assert tuple(token.learned[0].token_id for token in static.nearest.tokens) == text
    if start == "the text":
        assert "word-like" not in static.verdict
    else:
        assert static.verdict.startswith("All 9 virtual tokens are word-like and learned")
        assert "Only rows show whether these words explain anything." in static.verdict
    found = tried(tiny, wayward, MOODS * 3, ("sufficiency",))
    assert found.sufficiency is not None
    assert (found.sufficiency.learned.value, found.sufficiency.none.value) == (1, 0.5)
    assert found.sufficiency.words_explain is False
    assert found.verdict.startswith("The words do not explain it: the nearest tokens keep 0%")


def trained_towards(model: FrozenModel, text: Sequence[int], start: Sequence[int]) -> SoftPrompt:
    """A soft prompt for MOODS that was pulled to the embeddings of a text at the same time.

    In float64, because in float32 the result depends on the number of threads.
    """
    prefix, aim = PromptTuning(embeddings(model, start).double()), embeddings(model, text).double()
    optimizer = torch.optim.Adam(prefix.parameters(), lr=0.1)
    examples = examples_of(model, virtual=len(text))
    for _ in range(200):
        logits, targets = target_logits(model, prefix, examples)
        loss = F.cross_entropy(logits, targets) + 20 * F.mse_loss(prefix.prompt_embeddings, aim)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    fields = begun_at(start, ("no", "yes")).model_copy(update={"input_template": TEMPLATE})
    return SoftPrompt("PROMPT_TUNING", prefix.saved()["prompt_embeddings"], fields)


@pytest.mark.parametrize("known", [True, False])
def test_a_kv_prefix_is_taken_apart_into_keys_values_and_layers(tiny32: FrozenModel, known: bool) -> None:
    tensor = token_states(tiny32, START) + 0.1 * random_kv_prompt(tiny32.spec, 3).tensor
    manifest = begun_at(START, ("no", "yes")) if known else Manifest(labels=("no", "yes"))
    found = tried(tiny32, SoftPrompt("PREFIX_TUNING", tensor, manifest))
    assert found.sufficiency is not None
    names = {step.name for step in found.sufficiency.steps}
    assert ("learned keys, values of the start" in names) == known
    assert found.sufficiency.words_explain is None
    assert found.necessity is not None
    assert found.necessity.replaced_by == ("its start" if known else "a value of zero")


def test_where_text_is_written_the_quality_is_its_probability(tiny32: FrozenModel) -> None:
    engine = make_engine(tiny32)
    data = replace(data_of([("a", "long text"), ("b", "other")]), labels=None)
    soft_prompt = random_soft_prompt(tiny32.spec)
    experiments = plan(Interpreter(tiny32), OwnEngine(engine), data, ("text", soft_prompt), measures=("sufficiency",))
    found = conclude(experiments, ask_all(engine, experiments.evaluation)[0])
    assert found.metric == "log-probability per token"
    assert found.sufficiency is not None
    assert found.sufficiency.learned.value < 0
    assert found.necessity is None


def hits(right: int, rows: int = 200) -> list[bool]:
    return [row < right for row in range(rows)]


def test_r_is_the_share_of_the_gain_that_is_kept() -> None:
    steps = {NEAREST: share(hits(150)), RANDOM: share(hits(60)), "all": share(hits(180))}
    found = sufficiency(Bootstrap(200), share(hits(180)), share(hits(20)), steps)
    ratios = {step.name: step.ratio for step in found.steps}
    words = ratios[NEAREST]
    assert words is not None
    assert words.value == pytest.approx(130 / 160)
    assert words.low < words.value < words.high
    everything = ratios["all"]
    assert everything is not None
    assert (everything.low, everything.value, everything.high) == pytest.approx((1, 1, 1))
    assert found.words_explain is True
    no_gain = sufficiency(Bootstrap(200), share(hits(21)), share(hits(20)), steps)
    assert no_gain.words_explain is None
    assert all(step.ratio is None for step in no_gain.steps)


def test_needed_and_harmful_tokens_are_told_from_noise() -> None:
    flipped = hits(100)
    flipped[::50] = [not hit for hit in flipped[::50]]
    removed = {0: share(hits(60)), 1: share(hits(140)), 2: share(hits(100)), 3: share(flipped)}
    found = necessity(Bootstrap(200), share(hits(100)), removed, "its start")
    assert [one.effect for one in found.tokens] == ["needed", "harmful", "none shown", "none shown"]
    assert (found.needed, found.harmful) == ((0,), (1,))
    assert found.tokens[0].loss.value == pytest.approx(0.2)


def test_fewer_bits_change_more() -> None:
    tensor = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    errors = [float((quantised(tensor, bits) - tensor).norm()) for bits in (8, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.05 * float(tensor.norm())
    assert len(set(quantised(tensor, 2).flatten().tolist())) <= 12


def test_the_last_state_after_virtual_tokens_is_that_of_the_models_own_forward(tiny: FrozenModel) -> None:
    rows = [tiny.text.encode("one"), tiny.text.encode("longer one")]
    tokens = tiny.text.encode("abc")
    whole = last_states(tiny, [tokens + row for row in rows], None)
    as_embeddings = SoftPrompt("PROMPT_TUNING", tiny.embed(torch.tensor(tokens)))
    torch.testing.assert_close(last_states(tiny, rows, as_embeddings), whole)
    as_states = SoftPrompt("PREFIX_TUNING", token_states(tiny, tokens))
    torch.testing.assert_close(last_states(tiny, rows, as_states), whole, rtol=1e-5, atol=1e-5)


def test_equal_soft_prompts_have_equal_functions(tiny32: FrozenModel) -> None:
    one, other = random_soft_prompt(tiny32.spec), random_soft_prompt(tiny32.spec, seed=1)
    found = Interpreter(tiny32).compare([("one", one), ("same", one), ("other", other)])
    functions: Mapping[tuple[str, str], float | None] = {(pair.one, pair.other): pair.function for pair in found.pairs}
    same, others = functions["one", "same"], functions["one", "other"]
    assert same == pytest.approx(1)
    assert others is not None
    assert others < 0.999
    assert len(found.reliability) == 3
    assert shifts(tiny32, one).shape[1] == tiny32.spec.hidden_size


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_a_virtual_token_without_its_value_is_one_scoring_more(tiny32: FrozenModel, kind: str) -> None:
    """The first row is the soft prompt as it is served."""
    soft_prompt = (random_soft_prompt if kind == "embeddings" else random_kv_prompt)(tiny32.spec, 3)
    prefixes = zeroed_prefixes(tiny32, soft_prompt)
    engine = make_engine(tiny32)
    asked = [
        (GenerationRequest(str(index), (65, 66), labels=((70, 71),)), one)
        for index, one in enumerate([soft_prompt, *prefixes])
    ]
    outcomes = run_engine(engine, asked)
    scores = [[one.logprob or 0.0 for one in outcomes[str(index)].scored] for index in range(len(asked))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    found = influence(scores[1:], ["a", "b"])
    assert len(found.influence) == 3
    assert len(found.influence[0]) == 2
    assert any(not math.isclose(value, 0, abs_tol=1e-6) for row in found.influence for value in row)


def test_virtual_tokens_of_a_recurrent_state_cannot_be_zeroed() -> None:
    model = tiny_model("qwen3_5_text")
    with pytest.raises(InvalidRequest, match="keeps a recurrent state"):
        zeroed_prefixes(model, random_soft_prompt(model.spec))


def test_a_variant_generates_no_text_and_keeps_the_template(tiny32: FrozenModel) -> None:
    given = random_soft_prompt(
        tiny32.spec, manifest={"input_template": "Q {input}", "generation": {"max_new_tokens": 50, "min_new_tokens": 9}}
    )
    found = changed(given, given.tensor * 2)
    assert found.manifest.generation.max_new_tokens == 1
    assert found.manifest.input_template == "Q {input}"
    assert found.digest != given.digest
    assert PromptTuning(found.tensor).virtual_tokens(0).shape == given.tensor.shape


def test_the_variants_of_an_empty_soft_prompt_are_finite(tiny32: FrozenModel) -> None:
    """A variant that is not finite is refused by the engine, and the whole job would fail."""
    empty = replace(one := untrained(tiny32, START, 0), tensor=torch.zeros_like(one.tensor))
    steps = ladder(tiny32, Vocabulary.of(tiny32), empty, embeddings(tiny32, START))
    assert all(bool(step.soft_prompt.tensor.isfinite().all()) for step in steps)
