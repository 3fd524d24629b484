"""All that can be said of a soft prompt without data: geometry, nearest tokens, lens, verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from server.engine.model.frozen import FrozenModel
from server.interpret.function import shifts
from server.interpret.geometry import embedding_geometry, prefix_geometry
from server.interpret.lens import LabelTokens, value_change_lens
from server.interpret.nearest import nearest_tokens, neighbour_null
from server.interpret.null_cache import NullCache
from server.interpret.readout import Readout, find_readout
from server.interpret.results import TOP, Interpretation, Lens, Similarity
from server.interpret.similarity import TaskValues, similarity
from server.interpret.states import check_numbers, mean_values, prompt_states
from server.interpret.verdict import CAVEAT, UNKNOWN, verdict
from server.interpret.vocabulary import Vocabulary
from server.interpret.vocabulary_map import vocabulary_map
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import TrainingStart, declared_start
from server.train.methods import KeyValues
from server.train.start import start_values


class Interpreter:
    """Interprets soft prompts for one frozen model; keeps what does not depend on the soft prompt.

    Methods may be called from any thread, one at a time.
    """

    def __init__(self, model: FrozenModel, cache: NullCache | None = None) -> None:
        """Take a loaded model; nulls are kept in `cache`."""
        self.model = model
        self._cache = cache or NullCache()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        return Vocabulary.of(self.model)

    @cached_property
    def readout(self) -> Readout | str:
        """The model's output path, or why it was not found."""
        return find_readout(self.model, self.vocabulary.token_ids)

    @cached_property
    def _texts(self) -> list[str]:
        return [self.vocabulary.text_of(token) for token in self.vocabulary.token_ids.tolist()]

    @torch.no_grad()
    def interpret(
        self, task: str, soft_prompt: SoftPrompt, others: Sequence[SoftPrompt] = (), *, top: int = TOP
    ) -> Interpretation:
        """Interpret one soft prompt.

        Args:
            others: soft prompts that it may have started from.

        Raises:
            InvalidRequest: see `check_numbers`.
        """
        start = start_values(self.model, soft_prompt, others)
        geometry, nearest, places, notes = None, None, None, []
        states, before = self._states(soft_prompt, start)
        if soft_prompt.is_kv_prefix:
            geometry = prefix_geometry(states, before)
            notes.append("Nearest tokens are not defined for keys and values.")
        else:
            learned = soft_prompt.tensor.to(self.vocabulary.mean)
            first = None if start is None else start.to(learned)
            geometry = embedding_geometry(learned, first, self.vocabulary.norms)
            null = neighbour_null(self.vocabulary, top, self._cache, self.model.spec.fingerprint)
            nearest = nearest_tokens(self.vocabulary, null, learned, first, top)
            places = vocabulary_map(self.vocabulary, self._cache, self.model.spec.fingerprint, learned, first)
        lens = None
        if isinstance(self.readout, str):
            notes.append(self.readout)
        elif before is not None:
            initial = mean_values(before)
            lens = self._lens(self.readout, soft_prompt, mean_values(states) - initial, initial, top)
            notes.append(CAVEAT)
        declared = declared_start(soft_prompt.manifest)
        return Interpretation(
            task=task,
            digest=soft_prompt.digest,
            prefix_hash=soft_prompt.prefix_hash,
            peft_type=soft_prompt.peft_type,
            num_virtual_tokens=soft_prompt.num_virtual_tokens,
            model=self.model.spec.name,
            fingerprint=self.model.spec.fingerprint,
            start_is_known=start is not None,
            start=start_in_words(declared, is_known=start is not None),
            verdict=UNKNOWN if start is None else verdict(geometry, nearest, lens),
            notes=tuple(notes),
            geometry=geometry,
            nearest=nearest,
            vocabulary_map=places,
            lens=lens,
        )

    @torch.no_grad()
    def values_of(self, task: str, soft_prompt: SoftPrompt, others: Sequence[SoftPrompt] = ()) -> TaskValues:
        """What `similarity` compares of a soft prompt, without its function."""
        states, before = self._states(soft_prompt, start_values(self.model, soft_prompt, others))
        values = mean_values(states)
        change = None if before is None else values - mean_values(before)
        declared = declared_start(soft_prompt.manifest)
        return TaskValues(task, values, change, declared, is_kv_prefix=soft_prompt.is_kv_prefix)

    def compare(
        self, soft_prompts: Sequence[tuple[str, SoftPrompt]], on_task: Callable[[], None] = lambda: None
    ) -> Similarity:
        """Compare soft prompts by their changes and by their function; `on_task` is called after each one."""
        everything = [soft_prompt for _, soft_prompt in soft_prompts]
        found = []
        for name, soft_prompt in soft_prompts:
            values = self.values_of(name, soft_prompt, everything)
            found.append(replace(values, shifts=shifts(self.model, soft_prompt)))
            on_task()
        return similarity(found)

    def _states(self, soft_prompt: SoftPrompt, start: torch.Tensor | None) -> tuple[KeyValues, KeyValues | None]:
        """Keys and values of the soft prompt, and of its start if that is known."""
        check_numbers([soft_prompt.tensor] if start is None else [soft_prompt.tensor, start])
        states = prompt_states(self.model, soft_prompt)
        before = None if start is None else prompt_states(self.model, soft_prompt, start)
        check_numbers(part for layer in (*states, *(before or ())) for part in layer)
        return states, before

    def _lens(
        self, readout: Readout, soft_prompt: SoftPrompt, change: torch.Tensor, start: torch.Tensor, top: int
    ) -> Lens:
        name = f"{self.model.spec.fingerprint}-lens"
        variances = self._cache.get(name, lambda: {"variances": readout.variances()})["variances"]
        labels = self._labels(soft_prompt)
        return value_change_lens(readout, variances.to(change.device), change, start, labels, self._texts, top=top)

    def _labels(self, soft_prompt: SoftPrompt) -> LabelTokens | None:
        labels = soft_prompt.manifest.labels
        if not labels:
            return None
        answered = self._first_tokens(labels)
        forms = ([f" {label}" for label in labels], [label.capitalize() for label in labels])
        others = (tuple(token for token in self._first_tokens(form) if token not in answered) for form in forms)
        start = declared_start(soft_prompt.manifest) or TrainingStart(initial_token_ids=())
        return LabelTokens(
            answered,
            next((form for form in others if form), ()),
            tuple(token for token in answered if token in set(start.remaining_token_ids)),
            frozenset(self.model.text.tokens.special_ids),
        )

    def _first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Distinct first tokens, tokenised as the targets of training are."""
        encoded = (self.model.text.encode(text, add_special_tokens=False) for text in texts)
        return tuple(dict.fromkeys(ids[0] for ids in encoded if ids))


def start_in_words(start: TrainingStart | None, *, is_known: bool) -> str:
    """What a soft prompt began with."""
    if start is None:
        return "unknown: its manifest does not declare one"
    if start.kept is not None and is_known:
        whole = start.model_copy(update={"kept": None, "num_virtual_tokens": None})
        remain = f"{len(start.kept)} of the {start.num_virtual_tokens} virtual tokens remain"
        return f"{start_in_words(whole, is_known=True)}; {remain}"
    if start.prefix_hash is not None:
        return f"the soft prompt {start.prefix_hash[:12]}…{'' if is_known else ', which is not at hand'}"
    if not is_known:
        return "unknown: the declared start does not fit this model"
    if start.teacher_tokens is not None:
        return f"the last tokens of the teacher's text of {start.teacher_tokens} tokens"
    if start.random_seed is not None:
        return f"random numbers (seed {start.random_seed})"
    return "the embeddings, or the keys and values, of vocabulary tokens"
