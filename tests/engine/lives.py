"""Requests as those who wait for them see them, and what each gets that is alone; `engine_life.py` lets them meet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from server.contracts import Delta, FinishReason, GenerationRequest, Grammar, GrammarKind, Scored
from server.engine.memory.slots import Slot
from server.engine.model.frozen import FrozenModel
from server.engine.scheduling.sequence import Sequence
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import EOS, Outcome, make_engine, random_other_prompt, random_soft_prompt, request, run_engine

INPUTS = [(7,), (200, 3), (5,) * 3, tuple(range(90, 97)), tuple(range(40, 60))]
NEW_TOKENS = [1, 6, 24]
TEMPERATURES = [0.0, 1.5]
TASKS = ["a", "b", "c", None]
ENDS = frozenset({EOS, *range(0, 256, 32)})
"""Tokens that end an answer; a random model hardly ever chooses the one that should."""

KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "several": {"n": 3},
    "labels": {"labels": [(9,), (8, 7), (8, 6, 5), (70, 71)]},
    "short labels": {"labels": [(9,), (8,)]},
    "grammar": {"grammar": Grammar(GrammarKind.REGEX, "[a-z]{2,9}")},
    "several by grammar": {"grammar": Grammar(GrammarKind.REGEX, "[a-z]{2,9}"), "n": 3},
}
"""How many choices a request has, and what they are."""

Asked = tuple[str | None, tuple[int, ...], int, float, str]
REQUESTS: st.SearchStrategy[Asked] = st.tuples(
    st.sampled_from(TASKS),
    st.sampled_from(INPUTS),
    st.sampled_from(NEW_TOKENS),
    st.sampled_from(TEMPERATURES),
    st.sampled_from(["one", *KINDS]),
)


class World:
    """A model, the soft prompts that are published for it, and what each request gets that is alone.

    Attributes:
        soft_prompts: of both kinds, some longer than a step's budget, three of one length.
        poison: the one of them that makes NaN of every position that sees it.
    """

    def __init__(self, model: FrozenModel) -> None:
        """Make the soft prompts; the model's answers will end early at times."""
        model.eos_token_ids = ENDS
        self.model = model
        self.poison = SoftPrompt("PROMPT_TUNING", torch.full((16, model.spec.hidden_size), float("inf")))
        self.soft_prompts = {
            "none": None,
            "short": random_soft_prompt(model.spec, 3, 1),
            "long": random_soft_prompt(model.spec, 16, 2),
            "another long": random_soft_prompt(model.spec, 16, 3),
            "kv": random_other_prompt(model.spec, 7, 4),
            "long kv": random_other_prompt(model.spec, 25, 5),
            "poison": self.poison,
        }
        self.alone: Callable[[tuple[int, ...], str, int, float, str], list[Outcome]] = cache(self._alone)
        self._engine = make_engine(model)
        self.grammars = self._engine.grammars  # compiled once for all lives

    def _alone(
        self, input_ids: tuple[int, ...], soft_prompt: str, new_tokens: int, temperature: float, kind: str
    ) -> list[Outcome]:
        sampling: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "seed": len(input_ids)}
        asked = request("alone", input_ids, **sampling, **KINDS[kind])
        found = run_engine(self._engine, [(asked, self.soft_prompts[soft_prompt])])
        names = ["alone", *(f"alone/{index}" for index in range(1, asked.num_choices))]
        return [found.get(name) or Outcome() for name in names]  # where one choice fails there are no others


@dataclass(eq=False)
class Life:
    """A request as those who wait for it see it, and what it may have to wait for.

    Attributes:
        answer: what each choice gets alone.
        patience: steps that it must end within.
        slots: of all that was ever admitted for it.
        token_ids: of each choice.
        scored: of each choice, the log-probabilities of given tokens.
        ends: of each choice.
        end: of the whole request.
        passed: of each other task, how many were admitted while this request was the first of its own.
    """

    asked: GenerationRequest
    soft_prompt: SoftPrompt | None
    answer: list[Outcome]
    patience: int = 0
    steps: int = 0
    slots: dict[Sequence, Slot | None] = field(default_factory=dict)
    token_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    scored: defaultdict[int, list[Scored]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, FinishReason] = field(default_factory=dict)
    end: FinishReason | None = None
    passed: Counter[str | None] = field(default_factory=Counter)

    @property
    def is_single(self) -> bool:
        """It has one choice, and so one sequence from its beginning to its end."""
        return self.asked.num_choices == 1 and not self.asked.labels

    @property
    def prefix_hash(self) -> str | None:
        return None if self.soft_prompt is None else self.soft_prompt.prefix_hash

    @property
    def virtual(self) -> int:
        return 0 if self.soft_prompt is None else self.soft_prompt.num_virtual_tokens

    @property
    def positions(self) -> int:
        """The most that are computed for it, by all choices: the last new token is never fed."""
        new = max(map(len, self.asked.labels), default=self.asked.sampling.max_new_tokens)
        return self.virtual + len(self.asked.input_ids) + new * self.asked.num_choices

    def take(self, delta: Delta, *, cut_short: bool) -> None:
        """One more part of its answer."""
        assert self.end is None, "something came after the end"
        whole_request = (FinishReason.ABORTED, FinishReason.FAILED)
        assert delta.index not in self.ends or delta.finish_reason in whole_request, "a choice ends once"
        token_ids, answer = self.token_ids[delta.index], self.answer[delta.index]
        self.scored[delta.index] += delta.scored
        if delta.token is not None:
            token_ids.append(delta.token.id)
        assert token_ids == answer.token_ids[: len(token_ids)], "it is not the answer that it gets alone"
        if delta.finish_reason is None:
            assert delta.token is not None, "a part that says nothing"
            return
        self.ends[delta.index] = delta.finish_reason
        self.end = delta.finish_reason if delta.is_last else None
        is_whole = not cut_short and delta.finish_reason is not FinishReason.FAILED
        assert not is_whole or delta.is_last == (len(self.ends) == self.asked.num_choices)
        if delta.usage is not None and not cut_short:
            counts = (delta.usage.virtual_tokens, delta.usage.input_tokens, delta.usage.output_tokens)
            assert counts == (self.virtual, len(self.asked.input_ids), len(token_ids))
            assert delta.usage.cached_tokens in (0, self.virtual)
        if not cut_short:
            assert (token_ids, delta.finish_reason) == (answer.token_ids, answer.finish_reason)
            told = [scored.logprob for scored in self.scored[delta.index]]
            assert told == pytest.approx([scored.logprob for scored in answer.scored], abs=1e-4)
