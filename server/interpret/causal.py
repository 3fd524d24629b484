"""Experiments on rows: sufficiency and necessity, on top of an evaluation in which every variant is a soft prompt.

`plan` puts the evaluation together, its caller has all systems answered (`evaluation/standalone.py` by an engine of its
own, `evaluation/beside_traffic.py` beside live traffic), and `conclude` makes the interpretation of the answers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from server.evaluation.data import EvaluationData
from server.evaluation.evaluation import Evaluation, prepare
from server.evaluation.intervals import Bootstrap, Statistic
from server.evaluation.metrics import accuracy
from server.evaluation.questions import Answer
from server.evaluation.resource_limits import EvaluationBounds
from server.evaluation.systems import ZERO_SHOT, Host, RequestedBaselines
from server.interpret.necessity import necessity
from server.interpret.results import CausalInterpretation, Necessity, Sufficiency
from server.interpret.states import check_numbers
from server.interpret.static import Interpreter
from server.interpret.sufficiency import sufficiency
from server.interpret.variants import Variant, changed, ladder, removals
from server.interpret.verdict import causal_verdict
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.start import start_values

SUFFICIENCY, NECESSITY = "sufficiency", "necessity"
MEASURES = (SUFFICIENCY, NECESSITY)


@dataclass(frozen=True)
class Experiments:
    """Planned experiments.

    Attributes:
        evaluation: all systems: the soft prompt, its variants, and the frozen model without virtual tokens.
        ladder: the variants of sufficiency.
        removals: the variants of necessity.
        replaced_by: what takes the place of a removed virtual token.
    """

    evaluation: Evaluation
    ladder: tuple[Variant, ...]
    removals: tuple[Variant, ...]
    replaced_by: str


def plan(
    interpreter: Interpreter,
    host: Host,
    data: EvaluationData,
    subject: tuple[str, SoftPrompt],
    *,
    others: Sequence[SoftPrompt] = (),
    measures: Collection[str] = MEASURES,
    version: int | None = None,
    bounds: EvaluationBounds | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Experiments:
    """Plan the experiments, and check all rows.

    Args:
        others: soft prompts that it may have started from.
        measures: some of `MEASURES`.
        check_cancelled: called between pieces of the work; if it raises, the work ends.

    Raises:
        InvalidRequest, InvalidTrainingData, ConfigurationError: rows are missing or do not fit.
    """
    name, soft_prompt = subject
    model, start = interpreter.model, start_values(interpreter.model, soft_prompt, others)
    check_numbers([soft_prompt.tensor] if start is None else [soft_prompt.tensor, start])
    steps = ladder(model, interpreter.vocabulary, soft_prompt, start) if SUFFICIENCY in measures else []
    how, without = removals(soft_prompt, start, model) if NECESSITY in measures else ("", [])
    evaluation = prepare(
        host,
        data,
        (name, changed(soft_prompt, soft_prompt.tensor)),
        others=[(f"{name}: {one.name}", one.soft_prompt) for one in (*steps, *without)],
        wanted=RequestedBaselines(zero_shot=True),
        version=version,
        bounds=bounds,
        check_cancelled=check_cancelled,
    )
    # Only given texts are scored, so nothing but one token is generated.
    brief = tuple(replace(one, longest=1) if one.name == ZERO_SHOT else one for one in evaluation.systems)
    about = replace(evaluation.about, digest=soft_prompt.digest)
    return Experiments(replace(evaluation, systems=brief, about=about), tuple(steps), tuple(without), how)


def conclude(experiments: Experiments, answers: Mapping[str, Sequence[Answer]]) -> CausalInterpretation:
    """The interpretation of all answers, by system and in the order of the rows."""
    about, labels = experiments.evaluation.about, experiments.evaluation.questions.labels
    qualities = {name: quality(experiments.evaluation, of) for name, of in answers.items()}
    bootstrap = Bootstrap(len(experiments.evaluation.rows))
    learned, none = qualities[about.name], qualities[ZERO_SHOT]
    suffices: Sufficiency | None = None
    needs: Necessity | None = None
    if experiments.ladder:
        steps = {one.name: qualities[f"{about.name}: {one.name}"] for one in experiments.ladder}
        suffices = sufficiency(bootstrap, learned, none, steps)
    if experiments.removals:
        without = {
            one.removed: qualities[f"{about.name}: {one.name}"]
            for one in experiments.removals
            if one.removed is not None
        }
        needs = necessity(bootstrap, learned, without, experiments.replaced_by)
    return CausalInterpretation(
        task=about.name,
        digest=about.digest,
        data=about.data,
        data_sha256=about.data_sha256,
        rows=about.rows,
        metric="accuracy" if labels else "log-probability per token",
        verdict=causal_verdict(suffices, needs),
        sufficiency=suffices,
        necessity=needs,
    )


def quality(evaluation: Evaluation, answers: Sequence[Answer]) -> Statistic:
    """What experiments compare: accuracy by the likeliest label, or the mean log-probability of target tokens."""
    labels = [label.strip() for label in evaluation.questions.labels]
    if labels:
        targets = [labels.index(row.target.strip()) for row in evaluation.rows]
        return accuracy(targets, [answer.chosen for answer in answers])
    rows = np.array([[-answer.loss, answer.tokens] for answer in answers], dtype=np.float64)
    return Statistic(rows, lambda sums: sums[..., 0] / sums[..., 1])
