"""Measures a task's quality against the number of trained parameters, for several methods on the embedded model.

All methods train on the same rows in the same order, with a searched learning rate, and are measured on the same test
rows with the serving engine: classification by the likeliest label, text by BLEU.

    zero-shot, 4-shot                   no training
    prompt_tuning-1 … prompt_tuning-100 virtual tokens (Lester et al. 2021)
    prefix_tuning-20                    keys and values of every layer (Li and Liang 2021)
    lora, full                          PEFT's LoRA of rank 8 on all linear layers; every weight

A run takes hours. Each figure is written to quality.jsonl at once, and figures in the file are not measured again: an
interrupted run can be resumed, and further seeds or tasks can be added.

    python benchmarks/quality.py DATA                 DATA holds rotten_tomatoes/train.jsonl, test.jsonl and so on
    python benchmarks/quality.py DATA --ways lora prompt_tuning-20 --tasks banking77 --seeds 0 1
    python benchmarks/quality_plot.py                 draws docs/images/quality.svg, and prints the table
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter
from quality_weights import PEAKS, WAYS
from tqdm import tqdm

from server.engine.build_engine import build_engine
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.evaluation.data import EvaluationData, read_evaluation_data, read_rows
from server.evaluation.evaluation import Evaluation
from server.evaluation.intervals import Estimate
from server.evaluation.metrics import ACCURACY, BLEU
from server.evaluation.questions import Questions
from server.evaluation.report import EvaluationSubject
from server.evaluation.standalone import OwnEngine, run
from server.evaluation.systems import RequestedBaselines, System, baselines
from server.settings import Settings
from server.soft_prompts.manifest import GenerationDefaults, Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.config import TrainingConfig
from server.train.data import encode_examples, labels_of, read_data
from server.train.dtype import training_settings
from server.train.initial import initial_values
from server.train.learning_rate import Tried, find_learning_rate
from server.train.methods import LearnedPrefix, build_prefix
from server.train.objectives import Lesson, Targets
from server.train.run_history import TrainingProgress
from server.train.trainer import TrainingProblem, train

TASKS = ("rotten_tomatoes", "e2e_nlg")
UNTRAINED = ("zero-shot", "4-shot")
TRAINED = (*(f"prompt_tuning-{count}" for count in (1, 5, 20, 50, 100)), "prefix_tuning-20", "lora", "full")
POINTS = Path(__file__).with_name("quality.jsonl")
TEMPLATE = Manifest(input_template="{input}\n")
SLACK = 8


@dataclass(frozen=True)
class Point:
    """One measured point."""

    task: str
    way: str
    seed: int
    steps: int
    rows: int
    metric: str
    value: float
    low: float
    high: float
    parameters: int
    learning_rate: float | None
    train_seconds: float
    dtype: str

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """The identity of the measurement."""
        return self.task, self.way, self.seed, self.steps, self.rows


@dataclass(frozen=True)
class Learned:
    """The result of training."""

    parameters: int = 0
    learning_rate: float | None = None
    seconds: float = 0.0


class Bar:
    """A progress bar of a run and its learning-rate search."""

    def __init__(self, name: str) -> None:
        self._bar = tqdm(desc=name, unit="step", dynamic_ncols=True)

    def on_step(self, progress: TrainingProgress) -> None:
        """Count a step."""
        self._bar.set_postfix(loss=f"{progress.loss:.3f}", refresh=False)
        self._bar.update()

    def on_tried(self, tried: Tried) -> None:
        """Show the result of a learning rate."""
        self._bar.write(f"learning rate {tried.learning_rate:g}: validation loss {tried.loss:.4f}")

    def close(self) -> None:
        """Close the bar at the end of the run."""
        self._bar.close()


class Task:
    """A data set, prepared for training and evaluation."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.name = folder.name
        self.training = read_data(folder / "train.jsonl")
        self.validation = read_data(folder / "validation.jsonl")
        self.shots = read_rows(folder / "train.jsonl")
        self.test: EvaluationData = read_evaluation_data(folder / "test.jsonl", limit=rows)
        self.labels = labels_of(self.training.rows)

    def work(self, model: FrozenModel, prefix: LearnedPrefix, num_virtual_tokens: int) -> TrainingProblem:
        """The input of the training loop."""
        lessons = [
            [Lesson((example,)) for example in encode_examples(data, model, TEMPLATE, num_virtual_tokens)]
            for data in (self.training, self.validation)
        ]
        return TrainingProblem(model, prefix, Targets(), *lessons)

    def measure(self, engine: Engine, system: System) -> Estimate:
        """Evaluate all test rows."""
        host = OwnEngine(engine)
        questions = Questions(self.test, self.labels or (), host)
        about = EvaluationSubject(
            self.name, None, system.name, "", host.model.name, host.model.dtype, self.test.name,
            self.test.sha256, len(self.test.rows), tuple(self.labels or ()),
        )  # fmt: skip
        system = questions.checked(system, lambda: None)
        with tqdm(total=len(self.test.rows), unit="row", desc=system.name, leave=False) as bar:

            def count(name: str) -> None:
                bar.update()

            report = run(engine, Evaluation(about, (system,), questions), count)
        return report.scores[system.name].figures[ACCURACY if self.labels else BLEU]

    def longest(self, model: FrozenModel) -> int:
        """Maximum number of new tokens of an answer."""
        return SLACK + max(len(model.text.encode(row.target)) for row in self.test.rows)


def learn(task: Task, model: FrozenModel, prefix: LearnedPrefix, config: TrainingConfig, way: str) -> Learned:
    """Search a learning rate, then train; the prefix ends in its best state."""
    work = task.work(model, prefix, config.num_virtual_tokens if way not in WAYS else 0)
    bar = Bar(f"{task.name} {way}")
    try:
        rate = find_learning_rate(work, config, bar.on_step, bar.on_tried, PEAKS.get(way))
        started = time.perf_counter()
        train(work, config, rate, bar.on_step)
    finally:
        bar.close()
    count = sum(parameter.numel() for parameter in prefix.parameters())
    return Learned(count, rate, time.perf_counter() - started)


def soft_prompt_point(task: Task, settings: Settings, way: str, config: TrainingConfig) -> tuple[Learned, Estimate]:
    """Train and measure a soft prompt."""
    model = FrozenModel.load(settings)
    prefix = build_prefix(config, initial_values(model, config, task.labels), 1)
    learned = learn(task, model, prefix, config, way)
    generation = GenerationDefaults(max_new_tokens=task.longest(model))
    manifest = TEMPLATE.model_copy(update={"generation": generation})
    soft_prompt = SoftPrompt(prefix.peft_type, prefix.saved()["prompt_embeddings"], manifest)
    return learned, task.measure(build_engine(settings, model), System(way, soft_prompt, manifest))


def weights_point(task: Task, settings: Settings, way: str, config: TrainingConfig) -> tuple[Learned, Estimate]:
    """Train weights and measure the changed model, in float32, so that small changes of large weights are not lost."""
    settings = settings.model_copy(update={"dtype": "float32"})
    model = FrozenModel.load(settings)
    tuned = WAYS[way](model, config.seed)
    learned = learn(task, model, tuned.weights, config, way)
    tuned.finish()
    asked = System(way, template=TEMPLATE, longest=task.longest(model))
    return learned, task.measure(build_engine(settings, model), asked)


def untrained_point(task: Task, settings: Settings, way: str, seed: int) -> tuple[Learned, Estimate]:
    """Measure the frozen model alone."""
    engine = build_engine(settings, FrozenModel.load(settings))
    [asked] = baselines(
        RequestedBaselines.parse([way]),
        task.test,
        OwnEngine(engine),
        TEMPLATE,
        shots=task.shots,
        labels=task.labels or (),
        seed=seed,
    )
    return Learned(), task.measure(engine, asked)


def find(task: Task, settings: Settings, way: str, options: argparse.Namespace, seed: int) -> Point:
    """Measure one point."""
    method, _, count = way.partition("-")
    fields = {"steps": options.steps, "seed": seed, "evaluations": options.evaluations}
    if way in UNTRAINED:
        learned, estimate = untrained_point(task, settings, way, seed)
    elif way in WAYS:
        learned, estimate = weights_point(task, settings, way, TrainingConfig(**fields))
    else:
        config = TypeAdapter(TrainingConfig).validate_python(
            {**fields, "method": method, "num_virtual_tokens": int(count)}
        )
        learned, estimate = soft_prompt_point(task, settings, way, config)
    return Point(
        task.name, way, seed, options.steps if learned.parameters else 0, len(task.test.rows),
        (ACCURACY if task.labels else BLEU).key, estimate.value, estimate.low, estimate.high,
        learned.parameters, learned.learning_rate, round(learned.seconds, 1), settings.dtype,
    )  # fmt: skip


def read_points(path: Path) -> list[Point]:
    """The points of earlier runs."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Point(**json.loads(line)) for line in lines]


def main() -> None:
    """Measure all missing points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--ways", nargs="+", default=(*UNTRAINED, *TRAINED), choices=(*UNTRAINED, *TRAINED))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--steps", type=int, default=300, help="of 16 rows, for every way")
    parser.add_argument("--evaluations", type=int, default=3, help="measurements on the way; the best state counts")
    parser.add_argument("--rows", type=int, default=500, help="of the test split")
    parser.add_argument("--points", type=Path, default=POINTS)
    options = parser.parse_args()
    settings = Settings.load()
    settings = training_settings(settings)
    known = {point.key for point in read_points(options.points)}
    for seed in options.seeds:
        for name in options.tasks:
            task = Task(options.data / name, options.rows)
            for way in options.ways:
                steps = 0 if way in UNTRAINED else options.steps
                if (name, way, seed, steps, len(task.test.rows)) in known:
                    continue
                point = find(task, settings, way, options, seed)
                with options.points.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(point)) + "\n")
                print(f"{name} {way}: {point.metric} {point.value:.3f} ({point.low:.3f} to {point.high:.3f})")


if __name__ == "__main__":
    main()
