"""A server's jobs: adding, listing, cancelling, from any thread. `supervisor.py` runs them."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from server.contracts import ModelSpec
from server.durable import sync
from server.errors import JobRuns, Overloaded
from server.jobs.check import Frame, check_data, check_spec
from server.jobs.folder import JobFolder, JobsFolder, job_not_kept
from server.jobs.job import DataNames, Job, JobSpec, JobState
from server.keys.live import ApiKeys
from server.settings import Settings
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import CanFit, Encode, always
from server.train.initial import check_start

log = logging.getLogger(__name__)

MOST_QUEUED = 100


class JobQueue:
    """All jobs of a folder.

    Attributes:
        files: where they lie.
        changed: set whenever there is news for the runner.
        keys: the server's API keys: a job ends when its key is revoked. None if the server requires no keys.
    """

    def __init__(self, settings: Settings, model: ModelSpec, encode: Encode, can_fit: CanFit = always) -> None:
        """Nothing is read yet; the folder is made with the first job. For `encode` and `can_fit` see `Frame`."""
        self.files = JobsFolder(settings.jobs_folder)
        self.changed = threading.Event()
        self.keys: ApiKeys | None = None
        self._frame = Frame(model, settings.max_virtual_tokens, encode, can_fit)
        self._checking = threading.Lock()  # checks run one at a time, because a large data file takes much memory

    def check(self, spec: JobSpec) -> None:
        """Refuse what can be refused without its data: as `check_spec`, or Overloaded if the queue is full."""
        check_spec(spec, self._frame)
        if len(self._queue()) >= MOST_QUEUED:
            raise Overloaded(
                f"{MOST_QUEUED} jobs are waiting.", remedy="Cancel one, or send it again after one has ended."
            )

    def submit(
        self,
        draft: JobFolder,
        spec: JobSpec,
        names: DataNames,
        by: str | None,
        start: SoftPrompt | None = None,
        candidates: Mapping[str, SoftPrompt] | None = None,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> Job:
        """Check a draft's data and queue it.

        Args:
            start: the soft prompt that `config.init_from` names, if any.
            candidates: with `init=nearest-task`, the soft prompts to choose from, by task.
            check_cancelled: called between pieces of the work; if it raises, the work ends, and nothing is queued.

        Raises:
            InvalidTrainingData: nothing is queued then.
            OSError: it cannot be written.
        """
        if start is not None:
            check_start(spec.config, start)
            save_soft_prompt(draft.start, start, self._frame.model)
        for task, candidate in (candidates or {}).items():
            save_soft_prompt(draft.candidates / task, candidate, self._frame.model)
        with self._checking:
            check_cancelled()
            check_data(spec, draft, names, self._frame, check_cancelled)
        job = self.files.add(draft, spec, names, by)
        log.info("training job %s for %s is queued", job.id, spec.task)
        self.changed.set()
        return self.job(job.id)

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        positions = self._queue()
        return [replace(job, queue_position=positions.get(job.id)) for job in reversed(self.files.jobs())]

    def job(self, job_id: str) -> Job:
        """The job with this id, with its position in the queue; raises UnknownJob if there is none."""
        job = self.files.job(job_id)
        if job.status.state != JobState.QUEUED:
            return job
        return replace(job, queue_position=self._queue().get(job_id))

    def _queue(self) -> dict[str, int]:
        """Position of each waiting job in the queue; 1 is the next."""
        waiting = [job_id for job_id, state in self.files.states().items() if state == JobState.QUEUED]
        return {job_id: place for place, job_id in enumerate(waiting, 1)}

    def cancel(self, job_id: str) -> None:
        """Cancel a job; an ended job stays as it is.

        A result whose publish has not started will not be published.

        Raises:
            UnknownJob: there is none of that id.
            StoreError: that cannot be written down.
        """
        if not self.files.job(job_id).status.state.is_over:
            folder = self.files.folder(job_id)
            try:
                folder.cancel.touch()
                sync(folder.path)
            except OSError as exc:
                raise job_not_kept(exc) from exc
            self.changed.set()

    def delete(self, job_id: str) -> None:
        """Delete a job (UnknownJob) that has ended (else JobRuns); what it published stays."""
        if not self.files.job(job_id).status.state.is_over:
            raise JobRuns(f"The training job {job_id} has not ended.")
        self.files.remove(job_id)
