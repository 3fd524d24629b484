"""The work of an evaluation job: a thread reads, checks and tokenises the files, then the engine answers the rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory

from server.api.evaluations.schemas import EvaluationRequest
from server.api.jobs.job_bodies import GivenFile
from server.api.jobs.job_kind import Site
from server.data_dir import resolve_data
from server.evaluation.beside_traffic import labels_at_once, rows_at_once, run_beside
from server.evaluation.card import eval_command, render_card
from server.evaluation.data import EvaluationData, read_evaluation_data, read_rows
from server.evaluation.evaluation import Evaluation, prepare
from server.evaluation.report import Report
from server.evaluation.resource_limits import EvaluationBounds
from server.evaluation.systems import RequestedBaselines, TeacherText
from server.registry.task_views import Resolved
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile

TRAINING = "train.jsonl"

CheckCancelled = Callable[[], None]
Version = tuple[Resolved, SoftPrompt]


@dataclass
class EvaluationWork:
    """One evaluation and its result.

    `versions` are the evaluated version, then those that it is compared with; they are empty after the end. Uploads are
    stored in `folder` until the evaluation is prepared. `total` is rows times systems.
    """

    request: EvaluationRequest
    wanted: RequestedBaselines
    files: Mapping[str, GivenFile]
    folder: TemporaryDirectory[str]
    versions: tuple[Version, ...]
    site: Site
    key_id: str | None
    rows: int = 0
    total: int = 0
    evaluation: Evaluation | None = None
    report: Report | None = None
    card: str | None = None

    def __post_init__(self) -> None:
        """Copy the values that are still shown after the end."""
        self.task, self.version = self.versions[0][0].task, self.versions[0][0].version
        self.data = self.files["data"].name
        alone = self.wanted.names(teacher=self.request.teacher is not None)
        self.systems = [*(_named(*version)[0] for version in self.versions), *alone]
        settings = self.site.settings
        self._limits = settings.max_sequences + settings.max_queue, settings.max_per_task, settings.max_per_key

    def prepare(self, check_cancelled: CheckCancelled) -> None:
        """Read, check and tokenise the files; raises what `evaluation.prepare` raises."""
        request = self.request
        data, shots = self._read(check_cancelled)
        (resolved, soft_prompt), *others = self.versions
        self.evaluation = prepare(
            self.site.worker,
            data,
            _named(resolved, soft_prompt),
            others=[_named(*one) for one in others],
            wanted=self.wanted,
            instruction=request.instruction,
            shots=shots,
            version=resolved.version,
            teacher=None if request.teacher is None else TeacherText(request.teacher, bool(request.teacher_chat)),
            bounds=EvaluationBounds(labels_at_once=labels_at_once(*self._limits)),
            check_cancelled=check_cancelled,
        )
        self.rows, self.total = len(self.evaluation.rows), self.evaluation.num_questions
        self.folder.cleanup()

    async def run(self, on_piece: Callable[[], None]) -> None:
        """Generate the answers of all rows, and write the report; raises what `run_beside` raises."""
        evaluation = self.evaluation
        assert evaluation is not None, "a job is prepared before it runs"
        at_once = rows_at_once(evaluation.questions.choices_per_row - 1, *self._limits)
        threads = self.site.executors.in_server
        report = await run_beside(self.site.worker, evaluation, threads, at_once, on_piece, self.key_id)
        self.report, self.card = report, render_card(report, self.versions[0][1], self._command())

    def release(self) -> None:
        """Free rows, soft prompts and files."""
        self.folder.cleanup()
        self.versions, self.evaluation = (), None

    def _read(self, check_cancelled: CheckCancelled) -> tuple[EvaluationData, DataFile | None]:
        """The rows, and the file that few-shot examples come from: by default train.jsonl beside a named data file."""
        request, files, data_dir = self.request, self.files, self.site.settings.data_dir
        source, references, shots = files["data"], files.get("references"), files.get("shots")
        data = read_evaluation_data(
            source.path,
            references=None if references is None else references.path,
            references_name=None if references is None else references.name,
            limit=request.limit,
            name=source.name,
            inside=data_dir if request.data is not None else source.path.parent,
            check_cancelled=check_cancelled,
        )
        if not self.wanted.shots:
            return data, None
        if shots is None and request.data is not None:
            beside = str(PurePosixPath(request.data).with_name(TRAINING))
            shots = GivenFile(resolve_data(beside, data_dir), beside)
        return data, None if shots is None else read_rows(shots.path, shots.name, check_cancelled)

    def _command(self) -> str:
        request = self.request
        options = {
            "--data": self.data,
            "--baselines": ",".join(request.baselines or ()),
            "--instruction": request.instruction,
            "--limit": request.limit,
            "--teacher": request.teacher and "teacher.txt",
            "--teacher-chat": bool(request.teacher and request.teacher_chat),
            "--compare": request.compare,
        }
        return eval_command(request.task, options)


def _named(resolved: Resolved, soft_prompt: SoftPrompt) -> tuple[str, SoftPrompt]:
    return f"{resolved.task}@{resolved.version}", soft_prompt
