"""The verdict: one or two sentences, made only from the tests."""

from server.interpret.results import LEVEL, Geometry, Lens, Nearest, Necessity, Sufficiency
from server.interpret.variants import NEAREST, RANDOM

UNKNOWN = "The start is unknown, so nothing can be said of what training added."
NOT_YET = "Only rows show whether these words explain anything."
"""Training can pull virtual tokens to any text while they solve the task (Khashabi et al. 2022)."""
CAVEAT = "The lens sees direct paths only, and takes attention as even over the virtual tokens."


def verdict(geometry: Geometry, nearest: Nearest | None, lens: Lens | None) -> str:
    """The verdict on a soft prompt whose start is known."""
    said = [_of_tokens(nearest) if nearest is not None else _of_prefix(geometry)]
    if lens is not None:
        said.append(_of_lens(lens))
    return " ".join(said)


def _of_tokens(nearest: Nearest) -> str:
    count, kept, words = len(nearest.tokens), nearest.num_at_start or 0, nearest.num_word_like or 0
    start = f"{_share(kept, count)} still nearest to the {'token it' if count == 1 else 'tokens they'} started from"
    if count == 1 and not kept:
        start = "The virtual token is no longer nearest to the token it started from"
    if words:
        near = f"{_share(words, count)} word-like and learned: what training added is near a word"
        return f"{near} (p = {written_p(nearest.p_change)}). {start}. {NOT_YET}"
    return f"{start}; what training added is near no word (p = {written_p(nearest.p_change)})."


def _of_prefix(geometry: Geometry) -> str:
    moved = max(geometry.layers, key=lambda layer: layer.value_relative_change or 0.0)
    keys = [layer.key_cosine_to_start or 0.0 for layer in geometry.layers]
    middle = sorted(keys)[len(keys) // 2]
    return (
        f"Keys and values have no nearest tokens. The keys stayed {'close to' if middle >= 0.9 else 'away from'} their "
        f"start (median cosine {middle:.2f}); the values moved most in layer {moved.layer}, by "
        f"{moved.value_relative_change or 0.0:.1f} times their length."
    )


def _of_lens(lens: Lens) -> str:
    if lens.labels is not None:
        verb = "raises" if lens.labels.p <= LEVEL else "does not raise"
        return f"Seen through the model, what training added {verb} the labels (p = {written_p(lens.labels.p)})."
    if lens.tokens:
        names = ", ".join(f"“{token.text}”" for token in lens.tokens)
        return f"Seen through the model, what training added raises {names}."
    return "Seen through the model, what training added raises no single token more than random changes do."


def written_p(p: float | None) -> str:
    """A p-value with as many digits as it has."""
    if p is None:
        return "unknown"
    return f"{p:.1g}" if p < 0.001 else f"{p:.3f}".rstrip("0") if p < 0.01 else f"{p:.2f}"


def _share(number: int, count: int) -> str:
    if count == 1:
        return "The virtual token is" if number else "The virtual token is not"
    if number == count:
        return f"All {count} virtual tokens are"
    return f"{number or 'None'} of the {count} virtual tokens {'is' if number == 1 else 'are'}"


def causal_verdict(sufficiency: Sufficiency | None, necessity: Necessity | None) -> str:
    """What the experiments show, in words."""
    said = []
    if sufficiency is not None:
        said.append(_of_ladder(sufficiency))
    if necessity is not None:
        count, needed, harmful = len(necessity.tokens), necessity.needed, necessity.harmful
        verb = "is" if len(needed) == 1 else "are"
        said.append(f"{len(needed) or 'None'} of the {count} virtual tokens {verb} shown to be needed")
        said[-1] += f"; {len(harmful)} harm: {', '.join(map(str, harmful))}." if harmful else "; none is shown to harm."
    return " ".join(said)


def _of_ladder(found: Sufficiency) -> str:
    if all(step.ratio is None for step in found.steps):
        return "The soft prompt is not shown to be better than none on these rows, so nothing can explain it."
    if found.words_explain is None:
        return "There are no nearest tokens whose words could explain it."
    ratios = {step.name: step.ratio for step in found.steps}
    words, chance = ratios[NEAREST], ratios[RANDOM]
    assert words is not None
    assert chance is not None
    verb = "explain it" if found.words_explain else "do not explain it"
    kept, by_chance = (f"{one.value:.0%} ({one.low:.0%} to {one.high:.0%})" for one in (words, chance))
    return f"The words {verb}: the nearest tokens keep {kept} of the gain, random tokens {by_chance}."
