"""The results of all measures: one form for the shell, HTTP, the card and pictures.

Every class is an immutable pydantic model, so `model_dump(mode="json")` is the JSON form. P-values are one-sided; a
p-value that is called adjusted is Benjamini–Hochberg's over the virtual tokens.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

LEVEL = 0.05
"""False discovery rate, and the level of a single test."""
TOP, MOST_TOP = 5, 20
"""Number of neighbours and of tokens of the lens: the default, and the most that a user may ask for."""


class Result(BaseModel):
    """A part of an interpretation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(Result):
    """The distribution of a statistic under its null."""

    mean: float
    sd: float
    low: float
    """5th percentile."""
    high: float
    """95th percentile."""
    top: float
    """99th percentile."""


class Neighbour(Result):
    """A vocabulary token near a vector."""

    token_id: int
    text: str
    cosine: float


class VirtualTokenGeometry(Result):
    """Size and movement of one virtual token's embedding."""

    norm: float
    norm_percentile: float
    """Percent of the vocabulary's embeddings that are shorter."""
    cosine_to_start: float | None = None
    relative_change: float | None = None
    """‖p − p⁰‖ / ‖p⁰‖."""


class LayerGeometry(Result):
    """How far keys and values of one layer moved, as means over the virtual tokens."""

    layer: int
    key_norm: float
    value_norm: float
    key_cosine_to_start: float | None = None
    value_cosine_to_start: float | None = None
    key_relative_change: float | None = None
    value_relative_change: float | None = None


class Geometry(Result):
    """Sizes, movement and effective ranks."""

    effective_rank: float
    effective_rank_of_change: float | None = None
    tokens: tuple[VirtualTokenGeometry, ...] = ()
    """Of input embeddings; empty for a KV prefix."""
    layers: tuple[LayerGeometry, ...] = ()
    """Of a KV prefix; empty for input embeddings."""
    value_change: tuple[tuple[float, ...], ...] = ()
    """`[layers][virtual tokens]`: ‖v − v⁰‖ / ‖v⁰‖ of a KV prefix."""


class NearestOfToken(Result):
    """The vocabulary around one virtual token: around its value, its start and its change."""

    learned: tuple[Neighbour, ...]
    start: tuple[Neighbour, ...] = ()
    """Empty if the start is unknown, as are the fields below."""
    change: tuple[Neighbour, ...] = ()
    is_nearest_to_start: bool | None = None
    """Whether the nearest token of the learned value is also the nearest token of the start."""
    coherence: float
    """Mean pairwise cosine of the neighbours of the learned value."""
    start_coherence: float | None = None
    change_coherence: float | None = None
    p_change: float | None = None
    """Of the cosine between the change and its nearest token, among random directions."""
    p_change_coherence: float | None = None
    p_change_adjusted: float | None = None
    is_word_like: bool | None = None
    """Whether the change is nearer to a token than random directions are, under the false discovery rate."""


class Nearest(Result):
    """Nearest tokens, beside their nulls."""

    tokens: tuple[NearestOfToken, ...]
    neighbours: int
    """Number of neighbours, k."""
    random_cosine: Spread
    """Of random directions: the cosine to the nearest token."""
    random_coherence: Spread
    row_cosine: Spread
    """Of real tokens: the cosine to the nearest other token."""
    row_coherence: Spread
    num_at_start: int | None = None
    num_word_like: int | None = None
    p_change: float | None = None
    """The smallest adjusted p-value of a change."""
    p_change_coherence: float | None = None
    """Of the mean coherence of all changes."""


class VocabularyMap(Result):
    """Places in the plane of the vocabulary's two main components, seen from the mean embedding."""

    variance: tuple[float, float]
    """Shares of the vocabulary's variance along the two axes."""
    vocabulary: tuple[tuple[float, float], ...]
    """A sample of tokens."""
    start: tuple[tuple[float, float], ...] = ()
    """Of the virtual tokens; empty if the start is unknown."""
    learned: tuple[tuple[float, float], ...]


class LensToken(Result):
    """A token that the change raises."""

    token_id: int
    text: str
    z: float
    """Score in standard deviations over the vocabulary."""
    p: float
    """Under Gaussian changes of equal norm per layer."""


class LabelScore(Result):
    """The score of a label's first token."""

    token_id: int
    text: str
    z: float


class LabelTest(Result):
    """Whether the lens raises the labels' first tokens more than tokens of like frequency and shape."""

    tokens: tuple[LabelScore, ...]
    z: float
    """Mean over the labels' first tokens."""
    null: Spread
    p: float


class LensLayer(Result):
    """The labels' mean z through one layer alone."""

    layer: int
    z: float
    low: float
    """5th percentile of token sets of like frequency and shape."""
    high: float


class Lens(Result):
    """The value-change lens: what the change of the values writes into the output."""

    first_layer: int
    """The lens sums the layers from here to the last one."""
    num_layers: int
    tokens: tuple[LensToken, ...]
    """Tokens with the highest scores under the false discovery rate; may be empty."""
    num_significant: int
    labels: LabelTest | None = None
    """None if the task has no labels."""
    labels_in_start: int = 0
    """Number of the labels' first tokens that are among the initial tokens; they are tested only if all of them are."""
    control_form: LabelTest | None = None
    """The labels in a form that is not answered, after a space or capitalised; forms of a word share directions."""
    control_start: LabelTest | None = None
    """Negative control: the values of the start alone."""
    all_layers: LabelTest | None = None
    """The label test through all layers."""
    curve: tuple[LensLayer, ...] = ()


class Interpretation(Result):
    """What can be said of a soft prompt without data."""

    task: str
    digest: str
    prefix_hash: str
    peft_type: str
    num_virtual_tokens: int
    model: str
    fingerprint: str
    start_is_known: bool
    start: str
    """What the soft prompt began with, in words."""
    verdict: str
    """One sentence or two, made from the tests."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why; caveats."""
    geometry: Geometry | None = None
    nearest: Nearest | None = None
    vocabulary_map: VocabularyMap | None = None
    """None for a KV prefix."""
    lens: Lens | None = None


class TaskPair(Result):
    """How alike two soft prompts are."""

    one: str
    other: str
    change: float | None = None
    """Cosine of the mean value changes; None if a start is unknown."""
    p_change: float | None = None
    """Among Gaussian changes; None if both soft prompts are input embeddings, of which that null says nothing."""
    raw: float
    """Cosine of the mean values themselves, which mostly says whether they began alike."""
    shares_start: bool = False
    function: float | None = None
    """Cosine of the mean shifts of the last hidden state."""


class Similarity(Result):
    """How alike several soft prompts are, by change and by function."""

    tasks: tuple[str, ...]
    pairs: tuple[TaskPair, ...]
    reliability: tuple[float, ...] = ()
    """Of each task, the cosine of the shifts on two halves of the probes: the most that two tasks can reach."""
    notes: tuple[str, ...] = ()


class Interval(Result):
    """A figure with its 95 % interval, by bootstrap over the rows."""

    value: float
    low: float
    high: float


class LadderStep(Result):
    """A changed soft prompt, and how much of the learned one's quality it keeps."""

    name: str
    quality: Interval
    ratio: Interval | None = None
    """R = (Q(X) − Q(none)) / (Q(learned) − Q(none)); None if the learned one is not shown to be better than none."""


class Sufficiency(Result):
    """What suffices to have the effect of the soft prompt: the discretisation gap, and coarser forms."""

    learned: Interval
    none: Interval
    steps: tuple[LadderStep, ...]
    words_explain: bool | None = None
    """Whether R of the nearest tokens lies above 0 and above R of random tokens; None for a KV prefix, or without R."""


class Removal(Result):
    """What the quality loses if one virtual token is replaced."""

    token: int
    loss: Interval
    """Q(learned) − Q(without it), on the same rows."""
    p: float
    """Two-sided, by the paired bootstrap; adjusted over the virtual tokens."""
    effect: str
    """`needed`, `harmful` or `none shown`."""


class Necessity(Result):
    """Leave one out: which virtual tokens the quality depends on."""

    replaced_by: str
    tokens: tuple[Removal, ...]
    null: Spread
    """Losses by the removal of a token that is drawn at random."""
    needed: tuple[int, ...]
    harmful: tuple[int, ...]


class CausalInterpretation(Result):
    """What experiments on rows show."""

    task: str
    digest: str
    data: str
    data_sha256: str
    rows: int
    metric: str
    """`accuracy`, or `log-probability per token` where text is written."""
    verdict: str
    sufficiency: Sufficiency | None = None
    necessity: Necessity | None = None


class Influence(Result):
    """Virtual token × output token: how much less likely an output token is when a virtual token's value is zeroed."""

    tokens: tuple[str, ...]
    """Texts of the output tokens."""
    logprobs: tuple[float, ...]
    """Of the output tokens, with all virtual tokens."""
    influence: tuple[tuple[float, ...], ...]
    """`[virtual tokens][output tokens]`: Δ log p, in nats; positive where the virtual token helps."""
