"""All kinds of jobs."""

from server.api.evaluations.routes import Evaluations
from server.api.interpretations.routes import ExperimentJobs
from server.api.jobs.job_kind import Jobs
from server.api.training.routes import TrainingJobs

KINDS: tuple[type[Jobs], ...] = (TrainingJobs, Evaluations, ExperimentJobs)
