"""Evaluation jobs, and the routes that only they have."""

from typing import Any

from fastapi import Request, Response
from typing_extensions import override

from server.api.deps import KeyIdDep, RegistryDep
from server.api.evaluations.evaluation_work import EvaluationWork
from server.api.evaluations.job_requests import make_work
from server.api.evaluations.schemas import EvaluationBody, EvaluationList, EvaluationRequest
from server.api.jobs.in_process import InServerJob, InServerJobs, accept
from server.api.jobs.job_bodies import read_order
from server.api.jobs.job_kind import job_router
from server.api.jobs.routes import MISSING, JobId, start_route
from server.api.schemas import responses
from server.errors import EvaluationNotDone, UnknownEvaluation

router = job_router("/evaluations", "evaluations")


class Evaluations(InServerJobs[EvaluationWork]):
    """The evaluations of a server."""

    router, word, noun, unknown = router, "evaluation", "evaluation", UnknownEvaluation
    body, listing = EvaluationBody, EvaluationList

    @override
    def show(self, job: InServerJob[EvaluationWork], *, with_result: bool = True) -> EvaluationBody:
        work = job.work
        return EvaluationBody(
            **self.fields_of(job),
            version=work.version,
            data=work.data,
            rows=work.rows,
            contestants=work.systems,
            result=work.report.as_dict() if with_result and work.report is not None else None,
        )


@router.post("", **start_route(EvaluationBody, EvaluationRequest.both_bodies()))
async def start_evaluation(request: Request, response: Response, registry: RegistryDep, key_id: KeyIdDep) -> Any:
    """Measure a task on a data file, beside live traffic; `GET /evaluations/{job}` reports the progress.

    At any time, at most one evaluation is prepared (its rows are read, checked and tokenised) and at most one runs;
    further evaluations wait. An error within the first second is the reply; a later error becomes the evaluation's
    `error`.
    """

    async def make() -> EvaluationWork:
        async with read_order(request, EvaluationRequest.files, EvaluationRequest.parse) as order:
            return await make_work(order, registry, request.app.state.site, key_id)

    return await accept(Evaluations.of(request), request, response, key_id, make)


@router.get(
    "/{job}/card",
    response_class=Response,
    responses={
        200: {"content": {"text/markdown": {}}, "description": "The card."},
        **responses(on_409="It is not done."),
        **MISSING,
    },
)
async def get_card(request: Request, job: JobId) -> Response:
    """The result as Markdown, for the README.md beside a soft prompt."""
    jobs: Evaluations = Evaluations.of(request)
    found = await jobs.find(request, job)
    if found.work.card is None:
        raise EvaluationNotDone(f"The evaluation is {jobs.state_of(found)}, so there is no card.")
    return Response(found.work.card, media_type="text/markdown")
