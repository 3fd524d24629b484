"""The interpretation in the card of `prelude eval --card`: static measures, experiments on some rows, pictures."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from server.engine.engine import Engine
from server.errors import ConfigurationError
from server.evaluation.data import EvaluationData
from server.evaluation.standalone import OwnEngine, ask_all
from server.interpret.causal import conclude, plan
from server.interpret.null_cache import NullCache
from server.interpret.pictures import draw
from server.interpret.section import PICTURES, card_section
from server.interpret.static import Interpreter
from server.soft_prompts.soft_prompt import SoftPrompt

ROWS = 200
"""Number of rows for experiments, each of which asks as many systems as there are variants and virtual tokens."""

Bar = Callable[[int], AbstractContextManager[Callable[[str], None]]]


def interpret_for_card(
    engine: Engine, cache_dir: Path, directory: Path, data: EvaluationData, subject: tuple[str, SoftPrompt], bar: Bar
) -> str:
    """Interpret a soft prompt, draw pictures beside its card if matplotlib is installed, and return the card's section.

    Raises ConfigurationError for a picture that cannot be written.
    """
    interpreter = Interpreter(engine.model, NullCache(cache_dir / "interpretation"))
    static = interpreter.interpret(*subject)
    rows = replace(data, rows=data.rows[:ROWS], references=data.references[:ROWS])
    experiments = plan(interpreter, OwnEngine(engine), rows, subject)
    with bar(experiments.evaluation.num_questions) as on_row:
        answers, _ = ask_all(engine, experiments.evaluation, on_row)
    causal = conclude(experiments, answers)
    try:
        drawn = draw(directory, static=static, causal=causal) if find_spec("matplotlib") else []
    except OSError as exc:
        raise ConfigurationError(
            f"Pictures cannot be written to {directory}: {exc.strerror or exc}.", remedy="Check who may write there."
        ) from exc
    return card_section(static, causal, {path.stem for path in drawn if path.stem in PICTURES})
