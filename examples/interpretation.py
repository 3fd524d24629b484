"""Why nearest tokens do not say what a soft prompt learned, shown on the included soft prompts, and what does.

    python examples/interpretation.py
    python examples/interpretation.py --svg docs/images

First the naive reading: nearest tokens of each virtual token of `emotion`. Then the control: nearest tokens of what the
virtual tokens were before training. Then the lens, for all included soft prompts, and how alike they seem and are. The
text is docs/interpretation.md. Needs no server and no data; takes half a minute on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.engine.build_engine import load_engine
from server.interpret.null_cache import NullCache
from server.interpret.pictures import draw
from server.interpret.results import Interpretation, Nearest, Similarity
from server.interpret.static import Interpreter
from server.interpret.verdict import written_p
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt

ROOT = Path(__file__).parents[1]
NAIVE, PREFIX = "emotion", "sms_spam"
"""A soft prompt of input embeddings, and one of keys and values."""


def included(interpreter: Interpreter) -> dict[str, SoftPrompt]:
    """The included soft prompts by name."""
    directories = [*sorted(path.parent for path in ROOT.glob("prompts/*/manifest.json")), ROOT / "examples/sentiment"]
    most = Settings.load().max_virtual_tokens
    return {path.name: load_soft_prompts(path, interpreter.model.spec, most)[0] for path in directories}


def naive_reading(found: Nearest) -> None:
    """Print nearest tokens as they are usually shown, and how tight their clusters are."""
    print("\n1. The naive reading: nearest tokens of each virtual token\n")
    for index, token in enumerate(found.tokens):
        near = ", ".join(repr(one.text) for one in token.learned)
        print(f"{index:>4}  {near:<60.60}  coherence {token.coherence:.2f}")
    tight = sum(token.coherence > found.random_coherence.high for token in found.tokens)
    print(f"\nMean coherence {mean([token.coherence for token in found.tokens]):.2f}; neighbours of random directions")
    print(f"{found.random_coherence.mean:.2f}. {tight} of {len(found.tokens)} clusters are tighter than 95 % of those.")
    print("So the soft prompt has become word-like? Neighbours of any real token are as tight: ", end="")
    print(f"{found.row_coherence.mean:.2f}.")


def control(found: Nearest) -> None:
    """Print the same for the start, and for what training added."""
    print("\n2. The control: the same for the start, and for what training added\n")
    for index, token in enumerate(found.tokens):
        start, added = (", ".join(repr(one.text) for one in some[:3]) for some in (token.start, token.change))
        same = "= start" if token.is_nearest_to_start else "       "
        print(f"{index:>4}  {same}  start: {start:<34.34}  added: {added:<40.40}")
    cosine = mean([token.change[0].cosine for token in found.tokens])
    coherence = mean([token.change_coherence or 0.0 for token in found.tokens])
    null = found.random_cosine
    print(f"\n{found.num_at_start} of {len(found.tokens)} virtual tokens are nearest to the token they started from.")
    print(f"What training added: cosine to the nearest token {cosine:.3f}; random directions {null.mean:.3f}", end="")
    print(f" (99 %: {null.top:.3f}).\nSmallest adjusted p-value: {written_p(found.p_change)}. ", end="")
    print(f"Its clusters: coherence {coherence:.2f}, p = {written_p(found.p_change_coherence)}.")


def lens(results: Mapping[str, Interpretation]) -> None:
    """Print what each soft prompt raises through the model."""
    print("\n3. The value-change lens: what the soft prompts raise through the model\n")
    for task, result in results.items():
        if result.lens is None:
            continue
        tokens = ", ".join(repr(token.text) for token in result.lens.tokens) or "no single token"
        labels = "no labels"
        if result.lens.labels is not None:
            labels = f"labels: z {result.lens.labels.z:.2f}, p = {written_p(result.lens.labels.p)}"
        print(f"  {task:<18}{labels:<34}raises {tokens}")


def likeness(found: Similarity) -> None:
    """Print how alike KV prefixes seem by their values, and are by their changes and by what they do."""
    print("\n4. How alike tasks are: raw values say who had the same start\n")
    print(f"  {'':<34}{'raw':>8}{'change':>8}{'function':>10}  start")
    for pair in sorted(found.pairs, key=lambda pair: -pair.raw):
        change, function = (" –" if value is None else f"{value:.2f}" for value in (pair.change, pair.function))
        names = f"{pair.one} and {pair.other}"
        print(f"  {names:<34}{pair.raw:>8.2f}{change:>8}{function:>10}  {'shared' if pair.shares_start else ''}")


def mean(values: Sequence[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)


def tell(
    interpreter: Interpreter, soft_prompts: Mapping[str, SoftPrompt], svg: Path | None = None
) -> dict[str, Interpretation]:
    """Print the story; `soft_prompts` has at least `NAIVE`. Pictures go to `svg`. Returns what was found by task."""
    others = list(soft_prompts.values())
    results = {task: interpreter.interpret(task, one, others) for task, one in soft_prompts.items()}
    nearest = results[NAIVE].nearest
    assert nearest is not None, f"{NAIVE} has input embeddings"
    naive_reading(nearest)
    control(nearest)
    lens(results)
    similarity = interpreter.compare(list(soft_prompts.items()))
    likeness(similarity)
    if svg is not None:
        svg.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=svg) as folder:
            for task in (NAIVE, PREFIX):
                for path in draw(Path(folder), static=results[task], similarity=similarity):
                    name = path.name if path.stem == "similarity" else f"{task}_{path.name}"
                    path.replace(svg / f"interpretation_{name}")
        print(f"\nPictures: {svg}/interpretation_*.svg")
    return results


def main() -> None:
    """Load the model and the included soft prompts, and tell the story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="write pictures to this folder")
    options = parser.parse_args()
    settings = Settings.load()
    interpreter = Interpreter(load_engine(settings).model, NullCache(settings.cache_dir / "interpretation"))
    tell(interpreter, included(interpreter), options.svg)


if __name__ == "__main__":
    main()
