"""Jobs in real processes: they publish through the one path, end when asked to, and survive whoever is killed."""

from __future__ import annotations

from server.jobs.job import ActivateIf, JobState
from tests.jobs.support import Yard, running, spec


def test_a_job_publishes_through_the_one_path_and_answers_if_its_bound_is_kept(yard: Yard) -> None:
    kept = ActivateIf(metric="validation_exact_match", at_least=0.9)
    missed = ActivateIf(metric="validation_loss", at_most=-1.0)
    with running(yard):
        first = yard.submit(spec(activate=kept), by="key1")
        second = yard.submit(spec(activate=missed, description="stricter"), by="key1")
        assert yard.board.job(second.id).queue_position in (1, 2)
        job = yard.ended(first)
        assert (job.status.state, job.status.version, job.status.live) == (JobState.SUCCEEDED, 1, True), job.status
        assert job.status.metrics is not None
        assert job.status.metrics["validation_exact_match"] == 1.0
        other = yard.ended(second)
    assert (other.status.state, other.status.version, other.status.live) == (JobState.SUCCEEDED, 2, False)
    task = yard.registry.task("mood")
    assert task.traffic == ((1, 100),)
    assert [(version.source, version.by) for version in task.versions.values()] == [("api", "key1")] * 2
    assert yard.steps(job)[-1] == 160
    assert job.progress.validation is not None
    assert (job.progress.validation["step"], job.progress.validation["exact_match"]) == (160, 1.0)
    files = yard.files(job)
    assert not files.data.exists()
    assert not files.checkpoint.exists()
