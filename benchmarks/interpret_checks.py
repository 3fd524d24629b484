"""Checks the tests of `prelude inspect` on the included soft prompts: are their nulls fair?

1. Nearest tokens: the mean cosine of the changes to their nearest tokens, among random directions that are isotropic,
   among directions with the vocabulary's own covariance, and among the mirror images of the changes.
2. Label test: each task's change against the labels of every other task, among tokens of any shape and of the same
   shape; forms of the labels that are not answered, with and without the part that forms of a word share.
3. Similarity: how alike random changes from one start are, once the model has computed their values.
4. Tokens of the lens: how many are listed for the change, for its mirror image, for the change turned at random within
   each layer, and for Gaussian changes.

    PRELUDE_DTYPE=float32 python benchmarks/interpret_checks.py

Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from server.engine.build_engine import load_engine
from server.interpret.lens import MatchedSets, token_p_values
from server.interpret.nearest import orthogonal_change
from server.interpret.null_cache import NullCache
from server.interpret.p_values import adjusted, p_values, unit
from server.interpret.readout import Readout
from server.interpret.results import LEVEL
from server.interpret.states import mean_values, prompt_states
from server.interpret.static import Interpreter
from server.interpret.verdict import written_p
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.start import start_values

ROOT = Path(__file__).parents[1]
DRAWS = 1000
TURNS = 20
SHAPES = ("any shape", "same shape")
FORMS = ("answered", "after a space", "capitalised")


@dataclass(frozen=True)
class Subject:
    """A soft prompt, its start and the mean change of its values, `[layers, kv_heads * head_dim]`."""

    name: str
    soft_prompt: SoftPrompt
    start: torch.Tensor
    change: torch.Tensor


class Checks:
    """All checks of one model."""

    def __init__(self, interpreter: Interpreter, cache: NullCache) -> None:
        """Take an interpreter whose model has a lens."""
        assert isinstance(interpreter.readout, Readout), interpreter.readout
        self.interpreter, self.readout = interpreter, interpreter.readout
        name = f"{interpreter.model.spec.fingerprint}-lens"
        self.variances = cache.get(name, lambda: {"variances": self.readout.variances()})["variances"]
        self.texts = [interpreter.vocabulary.text_of(token) for token in self.readout.token_ids.tolist()]
        self.dice = torch.Generator().manual_seed(7)

    def subjects(self) -> Iterator[Subject]:
        """The included soft prompts with a known start."""
        model, settings = self.interpreter.model, Settings.load()
        for directory in included():
            [soft_prompt] = load_soft_prompts(directory, model.spec, settings.max_virtual_tokens)
            start = start_values(model, soft_prompt)
            change = self.interpreter.values_of(directory.name, soft_prompt).change
            if start is not None and change is not None:
                yield Subject(directory.name, soft_prompt, start, change)

    def near_words(self, subject: Subject) -> dict[str, tuple[float, float]]:
        """The mean over virtual tokens of the cosine to the nearest token: of the changes, then (mean, p) per null."""
        vocabulary, count = self.interpreter.vocabulary, subject.soft_prompt.num_virtual_tokens
        learned = subject.soft_prompt.tensor.to(vocabulary.mean)
        change = orthogonal_change(vocabulary, learned, subject.start.to(learned))
        isotropic = torch.randn(DRAWS, change.shape[1], generator=self.dice).to(change)
        values, vectors = torch.linalg.eigh(vocabulary.covariance())
        shaped = (isotropic.double() * values.clamp_min(0).sqrt()) @ vectors.T
        found = vocabulary.nearest(change, 1).cosines[:, 0]
        result = {"change": (float(found.mean()), 0.0)}
        for name, directions in (("isotropic", isotropic), ("vocabulary", shaped.to(change))):
            null = vocabulary.nearest(unit(directions), 1).cosines[:, 0]
            drawn = null[torch.randint(DRAWS, (DRAWS, count), generator=self.dice)].mean(1)
            result[name] = (float(null.mean()), float(p_values(found.mean()[None], drawn)))
        mirrored = vocabulary.nearest(-change, 1).cosines[:, 0]
        signs = torch.randint(0, 2, (DRAWS, count), generator=self.dice) * 2 - 1
        flipped = (signs * (found - mirrored)).mean(1)
        result["mirror"] = (float(mirrored.mean()), float(p_values((found - mirrored).mean()[None], flipped)))
        return result

    def scores(self, change: torch.Tensor) -> torch.Tensor:
        """The lens: scores `[V]` in standard deviations over the vocabulary."""
        written = self.readout.written(change)[2 * len(change) // 3 :].sum(0, keepdim=True)
        scores = self.readout.scores(written)[0]
        standardised: torch.Tensor = (scores - scores.mean()) / scores.std()
        return standardised

    def first_tokens(self, labels: Sequence[str], form: str) -> tuple[int, ...]:
        """First tokens of labels in a written form."""
        written = {"answered": str, "after a space": " {}".format, "capitalised": str.capitalize}[form]
        encoded = (self.interpreter.model.text.encode(written(one), add_special_tokens=False) for one in labels)
        return tuple(dict.fromkeys(ids[0] for ids in encoded))

    def label_p(self, z: torch.Tensor, tokens: Sequence[int], *, same_shape: bool = True) -> tuple[float, float]:
        """(mean z, p) of tokens among sets of like frequency, and of the same shape."""
        never = frozenset({*self.interpreter.model.text.tokens.special_ids, *tokens})
        shapes = self.texts if same_shape else None
        test = MatchedSets(self.readout.token_ids.tolist(), tokens, never, shapes).test(z, self.texts)
        return test.z, test.p

    def shared_part(self, z: torch.Tensor, tokens: Sequence[int], others: Sequence[int]) -> tuple[float, float, float]:
        """Of other forms: the mean centred cosine to the answered form; (mean z, p) without what that cosine explains.

        A change that raises one form by z raises a token at cosine c to it by c · z, if it does nothing else.
        """
        vocabulary, place = self.interpreter.vocabulary, {t: i for i, t in enumerate(self.readout.token_ids.tolist())}
        answered = vocabulary.rows(torch.tensor([place[token] for token in tokens]))
        everything = vocabulary.rows(torch.arange(len(place)))
        left, _, _, _ = torch.linalg.lstsq(answered @ answered.T, (z[[place[token] for token in tokens]])[:, None])
        rest = z - (everything @ answered.T @ left)[:, 0]
        cosines = (vocabulary.rows(torch.tensor([place[token] for token in others])) @ answered.T).amax(1)
        return float(cosines.mean()), *self.label_p(rest, others)

    def listed(self, change: torch.Tensor) -> int:
        """Number of tokens that the lens would list without a limit."""
        first = 2 * len(change) // 3
        p = token_p_values(self.readout, self.variances[first:], change[first:], self.readout.written(change)[first:])
        return int((adjusted(p) <= LEVEL).sum())

    def turned(self, change: torch.Tensor) -> torch.Tensor:
        """The change of each layer in a random direction, at its length."""
        drawn = torch.randn(change.shape, generator=self.dice).to(change)
        return unit(drawn) * change.norm(dim=1, keepdim=True)

    def permuted(self, change: torch.Tensor) -> torch.Tensor:
        """The values of each layer in a random order, which keeps how uneven they are."""
        return torch.stack([row[torch.randperm(len(row), generator=self.dice)] for row in change])


def included() -> list[Path]:
    """Directories of the included soft prompts."""
    return [*sorted(path.parent for path in ROOT.glob("prompts/*/manifest.json")), ROOT / "examples/sentiment"]


def check(checks: Checks) -> dict[str, Any]:
    """Run all checks, print tables, and return the figures."""
    subjects = list(checks.subjects())
    z = {one.name: checks.scores(one.change) for one in subjects}
    return {
        "near_words": near_words(checks, subjects),
        "labels": {shape: labels_of_all(checks, subjects, z, same_shape=shape == "same shape") for shape in SHAPES},
        "forms": forms_of_labels(checks, subjects, z),
        "alike": random_moves(checks, subjects),
        "listed": listed_tokens(checks, subjects),
    }


def near_words(checks: Checks, subjects: Sequence[Subject]) -> dict[str, Any]:
    """The first check."""
    print("\nMean cosine of the changes to the nearest token; null mean and p")
    found = {one.name: checks.near_words(one) for one in subjects if not one.soft_prompt.is_kv_prefix}
    for name, row in found.items():
        print(f"{name:<18}" + "".join(f"{null:>14} {mean:.4f} p={written_p(p)}" for null, (mean, p) in row.items()))
    return found


def labels_of_all(
    checks: Checks, subjects: Sequence[Subject], z: dict[str, torch.Tensor], *, same_shape: bool
) -> dict[str, Any]:
    """Each task's change for the labels of each task: mean z and p."""
    labels = {one.name: checks.first_tokens(one.soft_prompt.manifest.labels or (), "answered") for one in subjects}
    labels = {name: tokens for name, tokens in labels.items() if tokens}
    print(
        f"\nLabel test, {'same shape' if same_shape else 'any shape'}: changes (rows), labels (columns); mean z and p"
    )
    print(f"{'':<18}" + "".join(f"{name:>18}" for name in labels))
    found, false_alarms, pairs = {}, 0, 0
    for one in subjects:
        row = {name: checks.label_p(z[one.name], of, same_shape=same_shape) for name, of in labels.items()}
        found[one.name] = row
        print(f"{one.name:<18}" + "".join(f"{value:>10.2f} {written_p(p):>7}" for value, p in row.values()))
        others = {labels[name]: p for name, (_, p) in row.items() if labels[name] != labels.get(one.name)}
        false_alarms, pairs = false_alarms + sum(p <= LEVEL for p in others.values()), pairs + len(others)
    print(f"other tasks' labels with p of at most {LEVEL}: {false_alarms} of {pairs}")
    return {"tests": found, "false_alarms": false_alarms, "pairs": pairs}


def forms_of_labels(checks: Checks, subjects: Sequence[Subject], z: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Forms that are not answered: mean z and p; their cosine to the answered form; mean z and p without it."""
    found: dict[str, Any] = {}
    print("\nForms of the labels: mean z, p; cosine to the answered form; mean z, p without what it explains")
    for one in subjects:
        labels = one.soft_prompt.manifest.labels or ()
        tokens = checks.first_tokens(labels, "answered")
        for form in FORMS[1:] if labels else ():
            others = tuple(token for token in checks.first_tokens(labels, form) if token not in tokens)
            if not others:
                continue
            as_it_is, rest = checks.label_p(z[one.name], others), checks.shared_part(z[one.name], tokens, others)
            found.setdefault(one.name, {})[form] = {"as it is": as_it_is, "rest": rest}
            figures = f"{as_it_is[0]:.2f}, {written_p(as_it_is[1])}; {rest[0]:.2f}; {rest[1]:.2f}, {written_p(rest[2])}"
            print(f"{one.name:<18}{form:<16}{figures}")
    return found


def random_moves(checks: Checks, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Cosines of value changes: between random moves of the embeddings, and of the learned change to them."""
    model, found = checks.interpreter.model, {}
    print("\nInput embeddings: cosine of value changes between random moves; of the learned change to random moves")
    for one in subjects:
        if one.soft_prompt.is_kv_prefix:
            continue
        before = mean_values(prompt_states(model, one.soft_prompt, one.start))
        lengths = (one.soft_prompt.tensor.float().cpu() - one.start).norm(dim=1, keepdim=True)
        moves = [one.start + lengths * unit(torch.randn(one.start.shape, generator=checks.dice)) for _ in range(5)]
        changes = [mean_values(prompt_states(model, one.soft_prompt, move)) - before for move in moves]
        alike = [cosine(a, b) for a, b in itertools.combinations(changes, 2)]
        learned = [cosine(one.change, change) for change in changes]
        found[one.name] = {"between random moves": alike, "learned to random": learned}
        print(f"{one.name:<18}{min(alike):.2f} to {max(alike):.2f}; {min(learned):.2f} to {max(learned):.2f}")
    return found


def listed_tokens(checks: Checks, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Numbers of tokens that the lens lists, for the change and for nulls of it."""
    found: dict[str, Any] = {}
    print("\nTokens listed by the lens: change, mirror image; turned and permuted: share of draws with any, most")
    for one in subjects:
        row: dict[str, float] = {"change": checks.listed(one.change), "mirror": checks.listed(-one.change)}
        for kind, make in (("turned", checks.turned), ("permuted", checks.permuted)):
            counts = [checks.listed(make(one.change)) for _ in range(TURNS)]
            row |= {f"{kind}, share": sum(map(bool, counts)) / TURNS, f"{kind}, most": max(counts)}
        found[one.name] = row
        print(f"{one.name:<18}" + ", ".join(f"{key} {value:g}" for key, value in row.items()))
    return found


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two changes of any shape."""
    return float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def main() -> None:
    """Check and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    settings = Settings.load()
    cache = NullCache(settings.cache_dir / "interpretation")
    found = check(Checks(Interpreter(load_engine(settings).model, cache), cache))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
