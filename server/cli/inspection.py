"""`prelude inspect`: what a soft prompt means, with tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.cli.errors import errors_as_sentences
from server.cli.inspect_options import InspectOptions
from server.cli.logs import configure_logging
from server.cli.options import with_options_of
from server.cli.results_file import check_results_file, check_results_folder, console_beside, not_written, write_results
from server.errors import InvalidRequest, InvalidSoftPrompt
from server.settings import Settings

if TYPE_CHECKING:  # the command itself loads torch, so that --help is fast
    from server.contracts import ModelSpec
    from server.engine.engine import Engine
    from server.evaluation.data import EvaluationData
    from server.interpret.results import CausalInterpretation
    from server.interpret.static import Interpreter
    from server.soft_prompts.soft_prompt import SoftPrompt

MEASURES = ("sufficiency", "necessity")
MOST_ROWS = 200
"""Rows of an experiment without --limit."""


@with_options_of(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Say what a soft prompt means: a verdict made from tests, then tables.

    Without data: sizes and movement, nearest tokens of the value, of the start and of the change, and the tokens that
    the change raises through the model. With --data also experiments: what keeps the effect, and which virtual tokens
    it needs. With --compare: how alike several tasks are.
    """
    configure_logging("warning")
    with errors_as_sentences():
        measures = _checked(options)
        check_results_file(options.json_file)
        check_results_folder(options.svg)
        document = _there(options) if _is_there(options) else _here(options, measures)
        write_results(options.json_file, document)


def _is_there(options: InspectOptions) -> bool:
    """Whether the server itself answers: what needs no data, it computes once and keeps."""
    return options.url is not None and options.data is None and not options.compare


def _there(options: InspectOptions) -> dict[str, Any]:
    """Print what a server says of its soft prompt; the model is not loaded."""
    from server.cli.inspection_tables import print_static
    from server.cli.remote import DEFAULT_URL, connected
    from server.interpret.results import Interpretation
    from server.soft_prompts.names import split_version

    task, number = split_version(options.tasks[0])
    with connected(options.url or DEFAULT_URL, options.key) as client:
        found = client.interpretation(task, number, options.top)
    static = Interpretation.model_validate(found)
    print_static(static, console_beside(options.json_file))
    _draw(options.svg, static=static)
    return {"static": static.model_dump(mode="json")}


def _here(options: InspectOptions, measures: list[str]) -> dict[str, Any]:
    """Interpret with a model of one's own, and print it."""
    from server.cli.inspection_tables import print_causal, print_similarity, print_static
    from server.engine.build_engine import load_engine
    from server.evaluation.data import read_evaluation_data
    from server.interpret.null_cache import NullCache
    from server.interpret.static import Interpreter

    settings, out = Settings.load(), console_beside(options.json_file)
    for name in options.tasks:
        _check_reference(settings, options, name)
    data = None if options.data is None else read_evaluation_data(options.data, limit=options.limit or MOST_ROWS)
    engine = load_engine(settings)
    interpreter = Interpreter(engine.model, NullCache(settings.cache_dir / "interpretation"))
    found = [(name, *_find(settings, engine.model.spec, options, name)) for name in options.tasks]
    named = [(name, soft_prompt) for name, soft_prompt, _ in found]
    if options.compare:
        with _bar(len(named), "task") as on_task:
            similarity = interpreter.compare(named, on_task)
        print_similarity(similarity, out)
        _draw(options.svg, similarity=similarity)
        return {"similarity": similarity.model_dump(mode="json")}
    [(name, soft_prompt, others)] = found
    static, causal = interpreter.interpret(name, soft_prompt, others, top=options.top), None
    print_static(static, out)
    document: dict[str, Any] = {"static": static.model_dump(mode="json")}
    if data is not None:
        causal = _experiment(engine, interpreter, data, measures, found[0])
        print_causal(causal, out)
        document["causal"] = causal.model_dump(mode="json")
    _draw(options.svg, static=static, causal=causal)
    return document


def _checked(options: InspectOptions) -> list[str]:
    """The measures; refuses options that contradict each other."""
    if options.compare != (len(options.tasks) > 1):
        raise InvalidRequest(
            "--compare takes at least two tasks, and without it one is inspected.", remedy="Add tasks, or leave it out."
        )
    twice = next((task for task in options.tasks if options.tasks.count(task) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"{twice!r} is named twice.", remedy="Name each soft prompt once.")
    given = {"--data": options.data, "--measures": options.measures, "--limit": options.limit}
    unused = [option for option, value in given.items() if value is not None]
    if options.compare and unused:
        raise InvalidRequest(
            f"{unused[0]} is for experiments with one soft prompt, and --compare makes none.",
            remedy=f"Leave out {unused[0]}, or inspect each task by itself.",
        )
    if options.data is None and unused:
        raise InvalidRequest(
            f"{unused[0]} is for experiments, and experiments need rows.",
            remedy=f"Give rows with --data, or leave out {unused[0]}.",
        )
    if options.measures is None:
        return list(MEASURES)
    measures = list(dict.fromkeys(name.strip() for name in options.measures.split(",") if name.strip()))
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        said = f"There is no measure {', '.join(unknown)!r}." if unknown else "--measures names no measure."
        raise InvalidRequest(said, remedy=f"Name {' or '.join(MEASURES)}, or both with a comma between them.")
    return measures


def _check_reference(settings: Settings, options: InspectOptions, name: str) -> None:
    """Refuse a name that cannot be found, before the model is loaded."""
    from server.cli import task_source
    from server.soft_prompts.declared import CONFIG_FILE

    if options.url is not None:
        return
    path = Path(name)
    if (path / CONFIG_FILE).is_file():
        return
    if "/" in name or (path.is_dir() and not (settings.prompts_dir / name).is_dir()):
        raise InvalidSoftPrompt(
            f"{path} is no soft prompt: it has no {CONFIG_FILE}."
            if path.is_dir()
            else f"There is no directory {path}.",
            remedy="Name a directory that PEFT's save_pretrained wrote, or a task.",
        )
    task_source.check_reference(settings, name)


def _find(
    settings: Settings, model: ModelSpec, options: InspectOptions, name: str
) -> tuple[SoftPrompt, list[SoftPrompt]]:
    """A soft prompt, and those that it may have started from."""
    from server.cli import task_source
    from server.soft_prompts.declared import CONFIG_FILE
    from server.soft_prompts.formats import load_soft_prompts
    from server.soft_prompts.start import declared_start

    if options.url is not None:
        _, soft_prompt = task_source.pulled(settings, model, name, options.url, options.key)
    elif (Path(name) / CONFIG_FILE).is_file():
        soft_prompt = load_soft_prompts(Path(name), model, settings.max_virtual_tokens)[0]
    else:
        soft_prompt = task_source.find(settings, model, name, None, None, []).soft_prompt
    others = []
    start = declared_start(soft_prompt.manifest)
    if start is not None and start.prefix_hash is not None:
        for directory in sorted(settings.prompts_dir.glob(f"*/{CONFIG_FILE}")):
            others += load_soft_prompts(directory.parent, model, settings.max_virtual_tokens)
    return soft_prompt, others


def _experiment(
    engine: Engine,
    interpreter: Interpreter,
    data: EvaluationData,
    measures: list[str],
    subject: tuple[str, SoftPrompt, list[SoftPrompt]],
) -> CausalInterpretation:
    from server.evaluation.standalone import OwnEngine, ask_all
    from server.interpret.causal import conclude, plan

    name, soft_prompt, others = subject
    experiments = plan(interpreter, OwnEngine(engine), data, (name, soft_prompt), others=others, measures=measures)
    with _bar(experiments.evaluation.num_questions, "row") as on_row:
        answers, _ = ask_all(engine, experiments.evaluation, lambda _: on_row())
    return conclude(experiments, answers)


def _draw(folder: Path | None, **results: Any) -> None:
    if folder is None:
        return
    from server.interpret.pictures import draw

    try:
        draw(folder, **results)
    except OSError as exc:
        raise not_written(folder, "--svg", exc) from exc


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, dynamic_ncols=True) as bar:

        def count() -> None:
            bar.update()

        yield count
