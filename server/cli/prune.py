"""`prelude prune`: removes virtual tokens that harm or do nothing, and publishes the rest as a staged version."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from server.cli.errors import errors_as_sentences, printable
from server.cli.logs import configure_logging
from server.cli.options import with_options_of
from server.cli.prune_options import PruneOptions
from server.cli.results_file import STDOUT, check_results_file, console_beside, write_results
from server.settings import Settings

if TYPE_CHECKING:  # the command itself loads torch, so that --help is fast
    from server.contracts import ModelSpec
    from server.engine.engine import Engine
    from server.evaluation.data import EvaluationData
    from server.evaluation.intervals import Statistic
    from server.interpret.pruning import Ask
    from server.soft_prompts.soft_prompt import SoftPrompt

REPEATS = 7
"""Measurements of a first token; the median counts."""


@dataclass(frozen=True)
class Saved:
    """What a request is spared by a shorter soft prompt."""

    virtual_tokens: int
    kv_bytes: int
    """Of each running sequence, and of the cached prefix."""
    first_token_ms: float
    """Of a request whose prefix is not cached."""

    @property
    def sentence(self) -> str:
        """All of it in words."""
        return (
            f"Saved: {self.virtual_tokens} virtual tokens, {self.kv_bytes:,} bytes of keys and values per sequence, "
            f"{self.first_token_ms:.1f} ms of a first token whose prefix is not cached (median of {REPEATS})."
        )


@with_options_of(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Remove virtual tokens that harm or do nothing, and publish the shortened soft prompt as a staged version.

    Virtual tokens are removed one after another, the least needed first, as one half of the rows says; on the other
    half the shortened soft prompt is compared with the whole one. It is published only if the 95 % interval of the
    loss is within --tolerance, and never made live: `prelude prompts activate` does that.
    """
    configure_logging("warning")
    with errors_as_sentences():
        from tqdm import tqdm

        from server.cli import task_source
        from server.cli.inspection_tables import print_pruning
        from server.engine.build_engine import load_engine
        from server.evaluation.data import read_evaluation_data
        from server.interpret.pruning import halves, most_questions, shortened
        from server.interpret.pruning import prune as choose

        settings = Settings.load()
        check_results_file(options.json_file)
        if options.url is None:
            task_source.check_reference(settings, options.task)
        data = read_evaluation_data(options.data, limit=options.limit)
        halves(data)  # too few rows are refused before the model is loaded
        engine = load_engine(settings)
        model = engine.model.spec
        if options.url is None:
            found = task_source.find(settings, model, options.task, None, None, [])
            name, soft_prompt = found.name, found.soft_prompt
        else:
            name, soft_prompt = task_source.pulled(settings, model, options.task, options.url, options.key)
        with tqdm(total=most_questions(soft_prompt, len(data.rows)), unit="row", dynamic_ncols=True) as bar:
            pruning = choose(soft_prompt, data, _asker(engine, lambda _: bar.update()), options.tolerance)
        result = shortened(soft_prompt, pruning, name, data) if pruning.loss is not None else None
        saved = None if result is None else _saved(engine, soft_prompt, result, data)
        out = console_beside(options.json_file)
        print_pruning(name, pruning, data.name, out)
        if saved is not None:
            out.print(saved.sentence, highlight=False)
        version = None
        if result is not None and pruning.is_shown and not options.dry_run:
            version = _publish(settings, model, options, name.partition("@")[0], result)
        document = pruning.model_dump(mode="json")
        write_results(options.json_file, {**document, "saved": saved and vars(saved), "version": version})


def _asker(engine: Engine, on_row: Callable[[str], object]) -> Ask:
    """Has soft prompts answer rows in an engine of its own."""
    from server.evaluation.evaluation import prepare
    from server.evaluation.standalone import OwnEngine, ask_all
    from server.interpret.causal import quality

    def ask(named: Sequence[tuple[str, SoftPrompt]], data: EvaluationData) -> Mapping[str, Statistic]:
        evaluation = prepare(OwnEngine(engine), data, named[0], others=named[1:])
        answers, _ = ask_all(engine, evaluation, on_row)
        for _, soft_prompt in named:
            engine.prefixes.drop(soft_prompt.prefix_hash)
        return {name: quality(evaluation, of) for name, of in answers.items()}

    return ask


def _saved(engine: Engine, whole: SoftPrompt, result: SoftPrompt, data: EvaluationData) -> Saved:
    """Measure both in turn, each time without a cached prefix."""
    seconds: dict[str, list[float]] = {"whole": [], "result": []}
    ids = engine.model.text.encode(whole.manifest.render(data.rows[0].input))
    for _ in range(REPEATS):
        for name, soft_prompt in (("whole", whole), ("result", result)):
            seconds[name].append(_first_token(engine, soft_prompt, ids))
    spec = engine.model.spec
    count = whole.num_virtual_tokens - result.num_virtual_tokens
    difference = statistics.median(seconds["whole"]) - statistics.median(seconds["result"])
    return Saved(count, count * spec.kv_width * engine.model.dtype.itemsize, round(1000 * difference, 2))


def _first_token(engine: Engine, soft_prompt: SoftPrompt, ids: Sequence[int]) -> float:
    from server.contracts import GenerationRequest, SamplingParams

    engine.prefixes.drop(soft_prompt.prefix_hash)
    began = time.perf_counter()
    engine.add(GenerationRequest("first", tuple(ids), SamplingParams(max_new_tokens=1, ignore_eos=True)), soft_prompt)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def _publish(settings: Settings, model: ModelSpec, options: PruneOptions, task: str, result: SoftPrompt) -> int:
    """Publish a staged version and say how to make it live; returns its number."""
    if options.url is not None:
        from server.cli.remote import connected
        from server.soft_prompts.formats import save_soft_prompt

        with tempfile.TemporaryDirectory(prefix="prelude-prune-") as folder:
            save_soft_prompt(Path(folder), result, model)
            with connected(options.url, options.key) as client:
                pushed = client.publish(task, sorted(Path(folder).iterdir()), activate=False)
        version, where, option = pushed["tasks"][0]["version"], options.url, f" --url {options.url}"
    else:
        from server.registry.objects import open_objects
        from server.registry.registry import Registry
        from server.registry.store import Store

        registry = Registry(Store(open_objects(settings.store_url)), model, settings.max_virtual_tokens)
        published = registry.publish(task, [result], "api", activate=False)
        version, where, option = published.tasks[0].version, settings.store_url, ""
    for line in (
        f"{task}@{version} is staged at {where}. To compare it again: prelude eval {task}@{version}",
        f"To make it live on a running server: prelude prompts activate {task}@{version}{option}",
    ):
        typer.echo(printable(line), err=options.json_file == STDOUT)
    return version
