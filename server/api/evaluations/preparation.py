"""The part of an evaluation before its first row is asked: its files are read, checked and tokenised, on a thread."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from starlette.datastructures import UploadFile

from server.api.evaluations.schemas import FILES, Order
from server.api.prompts.uploads import upload_not_kept
from server.data_dir import resolve_data
from server.engine.worker import EngineWorker
from server.errors import ServerDraining
from server.evaluation.bounds import Bounds
from server.evaluation.data import EvaluationData, read_evaluation_data, read_rows
from server.evaluation.evaluation import Evaluation, prepare
from server.evaluation.systems import TeacherText, Wanted
from server.registry.snapshot_views import Resolved
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile

TRAINING = "train.jsonl"

GoOn = Callable[[], None]
Version = tuple[Resolved, SoftPrompt]


@dataclass(frozen=True)
class Source:
    """A data file: where it lies, and what the client calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Sources:
    """Every file of an order by its field, and the folder of those that were uploaded."""

    files: Mapping[str, Source]
    folder: Path | None = None

    def discard(self) -> None:
        """Remove what was uploaded."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def find_sources(order: Order, uploads: Mapping[str, UploadFile], data_dir: Path | None) -> Sources:
    """Keep what was uploaded in a folder of its own, and find what is named.

    Raises:
        InvalidRequest: there is no such data file.
        StoreError: the server has no place for the files.
    """
    named = {field: name for field in FILES if (name := getattr(order, field)) is not None}
    found = {field: Source(resolve_data(name, data_dir), name) for field, name in named.items()}
    if not uploads:
        return Sources(found)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="prelude-evaluation-"))
        for field, file in uploads.items():
            path = folder / f"{field}.jsonl"
            with path.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            name = PurePosixPath(file.filename or "").name[:100]
            found.setdefault(field, Source(path, name if name and name.isprintable() else f"{field}.jsonl"))
    except OSError as exc:
        Sources({}, folder).discard()
        raise upload_not_kept(exc) from exc
    return Sources(found, folder)


@dataclass(frozen=True)
class Preparation:
    """What an evaluation is made of.

    Attributes:
        order: what was asked for.
        wanted: its baselines.
        sources: its files.
        data_dir: the folder of files that may be named.
        versions: the version that it is about, then those that it is compared with.
        bounds: how much it may be.
    """

    order: Order
    wanted: Wanted
    sources: Sources
    data_dir: Path | None
    versions: tuple[Version, ...]
    bounds: Bounds

    @property
    def contestants(self) -> tuple[str, ...]:
        """Names of all who will be asked."""
        alone = self.wanted.names(teacher=self.order.teacher is not None)
        return (*(_named(*version)[0] for version in self.versions), *alone)

    def run(self, worker: EngineWorker, go_on: GoOn) -> Evaluation:
        """Read and check everything; asks between its pieces whether to go on.

        Raises:
            InvalidRequest, InvalidTrainingData, ConfigurationError: what `prepare` raises.
            ServerDraining: the server shuts down.
        """

        def go_on_unless_draining() -> None:
            go_on()
            if worker.draining:
                raise ServerDraining("The server is shutting down.")

        order = self.order
        data, shots = self._read(go_on_unless_draining)
        (resolved, soft_prompt), *others = self.versions
        return prepare(
            worker,
            data,
            _named(resolved, soft_prompt),
            others=[_named(*one) for one in others],
            wanted=self.wanted,
            instruction=order.instruction,
            shots=shots,
            version=resolved.version,
            teacher=None if order.teacher is None else TeacherText(order.teacher, bool(order.teacher_chat)),
            bounds=self.bounds,
            go_on=go_on_unless_draining,
        )

    def _read(self, go_on: GoOn) -> tuple[EvaluationData, DataFile | None]:
        """The rows, and the training data if examples are wanted: by default train.jsonl beside a named file."""
        order, files = self.order, self.sources.files
        source, references, shots = files["data"], files.get("references"), files.get("shots")
        data = read_evaluation_data(
            source.path,
            references=None if references is None else references.path,
            references_name=None if references is None else references.name,
            limit=order.limit,
            name=source.name,
            inside=self.data_dir if order.data is not None else source.path.parent,
            go_on=go_on,
        )
        if not self.wanted.shots:
            return data, None
        if shots is None and order.data is not None:
            beside = str(PurePosixPath(order.data).with_name(TRAINING))
            shots = Source(resolve_data(beside, self.data_dir), beside)
        return data, None if shots is None else read_rows(shots.path, shots.name, go_on)


def _named(resolved: Resolved, soft_prompt: SoftPrompt) -> tuple[str, SoftPrompt]:
    return f"{resolved.task}@{resolved.version}", soft_prompt
