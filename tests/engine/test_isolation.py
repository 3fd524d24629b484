"""Invariants 2 and 5: nobody's answer depends on the neighbours, and everybody ends exactly once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from server.contracts import FinishReason, GenerationRequest
from server.engine.model.frozen import FrozenModel
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.soak import Soak
from tests.support import (
    EOS,
    HYBRIDS,
    Outcome,
    make_engine,
    random_kv_prompt,
    random_other_prompt,
    random_soft_prompt,
    request,
    run_engine,
    tiny_model,
)

Work = list[tuple[GenerationRequest, SoftPrompt | None]]


def mixed_work(model: FrozenModel, count: int, seed: int, **sampling: Any) -> Work:
    """Requests of all lengths over three tasks and none."""
    rng = random.Random(seed)
    prompts = {
        "a": random_soft_prompt(model.spec, 5, 1),
        "b": random_soft_prompt(model.spec, 20, 2),
        "kv": random_other_prompt(model.spec, 7, 3),
    }
    work: Work = []
    for i in range(count):
        task = rng.choice(["a", "b", "kv", None])
        ids = [rng.randrange(256) for _ in range(rng.randint(1, 40))]
        asked = request(str(i), ids, task, max_new_tokens=rng.randint(1, 20), **sampling)
        work.append((asked, prompts[task] if task else None))
    return work


def alone(model: FrozenModel, work: Work) -> dict[str, Outcome]:
    """Every request in an engine of its own."""
    return {asked.request_id: run_engine(make_engine(model), [(asked, sp)])[asked.request_id] for asked, sp in work}


def texts(outcomes: dict[str, Outcome]) -> dict[str, tuple[str, list[int]]]:
    return {name: (outcome.text, outcome.token_ids) for name, outcome in outcomes.items()}


@pytest.mark.parametrize("architecture", ["llama", *HYBRIDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arrive_every", [0, 2])
def test_a_mixed_batch_gives_everybody_the_text_that_they_get_alone(
    architecture: str, dtype: torch.dtype, arrive_every: int
) -> None:
    model = tiny_model(architecture, dtype=dtype)
    work = mixed_work(model, 24, seed=arrive_every)
    assert texts(run_engine(make_engine(model), work, arrive_every=arrive_every)) == texts(alone(model, work))


def test_sampling_is_reproducible_by_seed_whatever_the_batch(tiny32: FrozenModel) -> None:
    work = mixed_work(tiny32, 16, seed=5, temperature=1.3, top_k=50, top_p=0.95, repetition_penalty=1.2)
    assert texts(run_engine(make_engine(tiny32), work)) == texts(alone(tiny32, work))


def test_another_seed_gives_another_answer(tiny: FrozenModel) -> None:
    answers = {
        run_engine(make_engine(tiny), [(request("r", [1, 2, 3], max_new_tokens=12, temperature=2.0, seed=s), None)])[
            "r"
        ].text
        for s in range(4)
    }
    assert len(answers) == 4


def test_sixty_four_requests_over_three_shipped_tasks_answer_as_one_at_a_time(
    served_smollm2: FrozenModel,
) -> None:
    """The embedded model in float32: exactly the texts that they give alone."""
    root = Path(__file__).parents[2]
    directories = [root / "prompts" / "sms_spam", root / "prompts" / "emotion", root / "examples" / "sentiment"]
    prompts = [load_soft_prompts(directory, served_smollm2.spec, 512)[0] for directory in directories]
    inputs = ["Free entry! Call now to claim your prize", "I feel great today", "Are you coming home?", "What is this?"]
    work: Work = []
    for i in range(64):
        soft_prompt = prompts[i % 3]
        ids = served_smollm2.text.encode(soft_prompt.manifest.render(f"{inputs[i % 4]}"))
        work.append((request(str(i), ids, f"task {i % 3}", max_new_tokens=4, ignore_eos=True), soft_prompt))
    together = texts(
        run_engine(make_engine(served_smollm2, max_sequences=64, max_batch_tokens=256, num_slabs=72), work)
    )
    engine = make_engine(served_smollm2)
    for asked, asked_of in work[:12]:  # the others ask the same again
        assert texts(run_engine(engine, [(asked, asked_of)])) == {asked.request_id: together[asked.request_id]}
    assert [together[str(i)] for i in range(12, 64)] == [together[str(i % 12)] for i in range(12, 64)]
    assert len({text for text, _ in together.values()}) > 6


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ["llama", *HYBRIDS])
def test_whoever_comes_goes_or_is_aborted_everybody_ends_exactly_once(architecture: str, soak: Soak) -> None:
    """test_engine_life.py watches such lives at each step; here are architectures that it leaves out."""
    model = tiny_model(architecture)
    aborts = st.dictionaries(st.integers(1, 30), st.sampled_from([str(i) for i in range(10)]), max_size=5)

    @with_seed(soak.random.randrange(2**32))
    @settings(max_examples=soak.count(12, 500), database=None)
    @given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 3), aborts)
    def live(seed: int, max_sequences: int, arrive_every: int, abort: dict[int, str]) -> None:
        all_end_exactly_once(model, mixed_work(model, 10, seed), max_sequences, arrive_every, abort)

    live()


def all_end_exactly_once(
    model: FrozenModel, work: Work, max_sequences: int, arrive_every: int, abort: dict[int, str]
) -> None:
    engine = make_engine(model, max_sequences=max_sequences, num_slabs=2)
    outcomes = run_engine(engine, work, arrive_every=arrive_every, abort=abort)
    assert len(outcomes) == 10
    for asked, _ in work:
        outcome = outcomes[asked.request_id]
        assert outcome.ends == 1
        if outcome.finish_reason is FinishReason.LENGTH:
            assert len(outcome.token_ids) == asked.sampling.max_new_tokens
        elif outcome.finish_reason is FinishReason.EOS_TOKEN:
            assert outcome.token_ids[-1] == EOS
        else:
            assert outcome.finish_reason is FinishReason.ABORTED
            assert asked.request_id in abort.values()


def test_an_abort_frees_the_slot_at_once(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    engine.add(request("r", [1, 2, 3], max_new_tokens=50), None)
    engine.step()
    assert engine.kv_cache.allocator.used
    delta = engine.abort("r")
    assert delta is not None
    assert delta.finish_reason is FinishReason.ABORTED
    assert not engine.kv_cache.allocator.used
    assert not engine.has_work
    assert engine.abort("r") is None, "a request ends once"


def test_a_soft_prompt_that_overflows_fails_alone_and_poisons_nobody(tiny32: FrozenModel) -> None:
    """NaN in a slot would otherwise reach its next owner: a masked position weighs 0, but 0 * NaN is NaN."""
    bad = random_kv_prompt(tiny32.spec, 5)
    bad = SoftPrompt("PREFIX_TUNING", torch.full_like(bad.tensor, 3e38))
    good = request("good", [1, 2, 3], max_new_tokens=8)
    expected = run_engine(make_engine(tiny32), [(good, None)])["good"].token_ids
    engine = make_engine(tiny32, num_slabs=1)
    outcomes = run_engine(engine, [(request("bad", [1, 2, 3], max_new_tokens=8), bad), (good, None)])
    assert outcomes["bad"].finish_reason is FinishReason.FAILED
    assert outcomes["good"].token_ids == expected
    for i in range(8):  # every slot that the bad one may have left behind
        again = request(f"again {i}", [1, 2, 3], max_new_tokens=8)
        assert run_engine(engine, [(again, None)])[f"again {i}"].token_ids == expected


def test_a_client_that_hangs_up_in_the_middle_of_a_poisonous_prefill_leaves_nothing_behind(
    tiny32: FrozenModel,
) -> None:
    """Its keys and values are NaN already, and no token was chosen yet that would have shown it."""
    values = torch.zeros(
        5, tiny32.spec.num_hidden_layers, 2, tiny32.spec.kv_width // tiny32.spec.num_hidden_layers // 2
    )
    values[:, :, 1] = 3e38
    evil = SoftPrompt("PREFIX_TUNING", values.reshape(5, -1))
    asked = request("good", [1, 2, 3], max_new_tokens=8)
    expected = run_engine(make_engine(tiny32), [(asked, None)])["good"].token_ids
    engine = make_engine(tiny32, num_slabs=1, max_batch_tokens=16)
    engine.add(request("evil", list(range(100)), max_new_tokens=4), evil)
    engine.step()
    engine.step()
    slot = next(iter(engine.kv_cache.allocator.used))
    assert not engine.kv_cache.copy_out(slot, slot.length).is_finite, "the attack does nothing here"
    engine.abort("evil")
    # A short row is read as far as its longest neighbour reaches, masked behind its own end.
    victims: Work = [(request(f"victim {i}", [1, 2, 3], max_new_tokens=8), None) for i in range(3)]
    neighbour = request("neighbour", list(range(20)), max_new_tokens=8)
    outcomes = run_engine(engine, [*victims, (neighbour, None)])
    assert all(outcomes[f"victim {i}"].token_ids == expected for i in range(3))
