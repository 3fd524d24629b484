"""The work of the job: a thread plans the variants and reads the rows, then the engine answers them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from server.api.interpretations.schemas import ExperimentRequest
from server.api.jobs.job_bodies import GivenFile
from server.api.jobs.job_kind import Site
from server.errors import InvalidRequest
from server.evaluation.beside_traffic import ask_all_beside, labels_at_once, rows_at_once
from server.evaluation.data import read_evaluation_data
from server.evaluation.resource_limits import EvaluationBounds
from server.interpret.causal import MEASURES, NECESSITY, Experiments, conclude, plan
from server.interpret.results import CausalInterpretation
from server.interpret.static import Interpreter
from server.registry.task_views import Resolved
from server.soft_prompts.soft_prompt import SoftPrompt

MOST_VARIANT_BYTES = 512 * 2**20
"""Memory of all changed soft prompts of one job."""
MOST_STEPS = 20
"""More variants than sufficiency has."""


@dataclass
class ExperimentWork:
    """Experiments with one soft prompt, and their result. `soft_prompts` are empty after the end: it, and its start."""

    request: ExperimentRequest
    files: Mapping[str, GivenFile]
    folder: TemporaryDirectory[str]
    resolved: Resolved
    soft_prompts: tuple[SoftPrompt, ...]
    interpreter: Interpreter
    site: Site
    key_id: str | None
    rows: int = 0
    total: int = 0
    experiments: Experiments | None = None
    result: CausalInterpretation | None = None

    def __post_init__(self) -> None:
        """Copy the values that are still shown after the end."""
        self.task, self.version = self.resolved.task, self.resolved.version
        self.data = self.files["data"].name
        self.measures = list(dict.fromkeys(self.request.measures or MEASURES))
        settings = self.site.settings
        self._limits = settings.max_sequences + settings.max_queue, settings.max_per_task, settings.max_per_key

    def prepare(self, check_cancelled: Callable[[], None]) -> None:
        """Read the rows and plan the variants; raises what `plan` raises, and InvalidRequest for too many variants."""
        subject, *others = self.soft_prompts
        check_size(subject, self.measures)
        source = self.files["data"]
        inside = self.site.settings.data_dir if self.request.data is not None else source.path.parent
        data = read_evaluation_data(
            source.path, limit=self.request.limit, name=source.name, inside=inside, check_cancelled=check_cancelled
        )
        # The interpreter belongs to the one thread of its pool.
        planning = self.site.executors.interpretation.submit(
            plan,
            self.interpreter,
            self.site.worker,
            data,
            (f"{self.task}@{self.version}", subject),
            others=others,
            measures=self.measures,
            version=self.version,
            bounds=EvaluationBounds(labels_at_once=labels_at_once(*self._limits)),
            check_cancelled=check_cancelled,
        )
        self.experiments = planning.result()
        self.rows, self.total = len(data.rows), self.experiments.evaluation.num_questions
        self.folder.cleanup()

    async def run(self, on_piece: Callable[[], None]) -> None:
        """Have all variants answer all rows, and conclude; raises what `ask_all_beside` raises."""
        experiments = self.experiments
        assert experiments is not None, "a job is prepared before it runs"
        evaluation, threads = experiments.evaluation, self.site.executors.in_server
        at_once = rows_at_once(evaluation.questions.choices_per_row - 1, *self._limits)
        answers, _ = await ask_all_beside(self.site.worker, evaluation, threads, at_once, on_piece, self.key_id)
        self.result = await threads.run(conclude, experiments, answers)

    def release(self) -> None:
        """Free rows, soft prompts and files."""
        self.folder.cleanup()
        self.soft_prompts, self.experiments = (), None


def check_size(soft_prompt: SoftPrompt, measures: list[str]) -> None:
    """Refuse (InvalidRequest) a soft prompt whose variants would take too much memory."""
    tensor = soft_prompt.tensor
    variants = MOST_STEPS + (soft_prompt.num_virtual_tokens if NECESSITY in measures else 0)
    needed = variants * tensor.numel() * tensor.element_size()
    if needed > MOST_VARIANT_BYTES:
        raise InvalidRequest(
            f"{variants} variants of {soft_prompt.num_virtual_tokens} virtual tokens would take {needed:,} bytes; "
            f"the server gives them {MOST_VARIANT_BYTES:,}.",
            remedy="Ask for `sufficiency` alone, or run `prelude inspect --data` beside the server.",
            param="measures",
        )
