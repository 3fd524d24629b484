"""ExperimentJobs with a soft prompt as a kind of job, and the routes that start one."""

from typing import Any

from fastapi import Request, Response
from typing_extensions import override

from server.api.bodies import Body
from server.api.deps import KeyIdDep, RegistryDep
from server.api.generation import find_soft_prompt
from server.api.interpretations.schemas import ExperimentBody, ExperimentList, ExperimentRequest
from server.api.interpretations.work import ExperimentWork
from server.api.jobs.in_process import InServerJob, InServerJobs, accept
from server.api.jobs.job_bodies import find_files, keep_uploads, read_order
from server.api.jobs.job_kind import job_router
from server.api.jobs.routes import start_route
from server.api.prompts.interpretation import starts_of
from server.errors import InvalidRequest, UnknownInterpretation
from server.registry.registry import Registry

router = job_router("/interpretations", "interpretations")


class ExperimentJobs(InServerJobs[ExperimentWork]):
    """The experiments of a server."""

    router, word, noun, unknown = router, "interpretation", "interpretation", UnknownInterpretation
    body, listing = ExperimentBody, ExperimentList

    @override
    def show(self, job: InServerJob[ExperimentWork], *, with_result: bool = True) -> ExperimentBody:
        work = job.work
        return ExperimentBody(
            **self.fields_of(job),
            version=work.version,
            data=work.data,
            rows=work.rows,
            measures=work.measures,
            result=work.result if with_result else None,
        )


@router.post("", **start_route(ExperimentBody, ExperimentRequest.both_bodies()))
async def start_interpretation(request: Request, response: Response, registry: RegistryDep, key_id: KeyIdDep) -> Any:
    """Experiment with a soft prompt on rows, beside live traffic: what keeps its effect, which virtual tokens it needs.

    Every variant of the soft prompt answers all rows. `GET /interpretations/{job}` reports the progress, then the
    result. It waits and runs like an evaluation.
    """
    return await start(request, response, registry, key_id, None)


async def start(request: Request, response: Response, registry: Registry, key_id: str | None, task: str | None) -> Any:
    """Handle POST; `task` is that of the path, if it has one."""

    async def make() -> ExperimentWork:
        async with read_order(request, ExperimentRequest.files, lambda body: parse_body(body, task)) as order:
            site = request.app.state.site
            resolved, soft_prompt = await find_soft_prompt(registry, order.fields.task, key_id or "")
            starts = await starts_of(request, registry, soft_prompt)
            files, folder = await site.executors.in_server.run(
                lambda: keep_uploads(find_files(order, order.fields.files, site.settings.data_dir))
            )
            interpreter = request.app.state.interpretations.interpreter
            prompts = (soft_prompt, *starts)
            return ExperimentWork(order.fields, files, folder, resolved, prompts, interpreter, site, key_id)

    return await accept(ExperimentJobs.of(request), request, response, key_id, make)


def parse_body(body: Body, task: str | None) -> ExperimentRequest:
    """Parse the fields of a body, and the task of the path; raises ValidationError or InvalidRequest."""
    fields = body.value
    if task is not None and isinstance(fields, dict):
        named = fields.setdefault("task", task) or task
        if str(named).partition("@")[0] != task:
            raise InvalidRequest(
                f"The path names {task} and the body {str(named)[:80]!r}.", remedy="Leave out `task`.", param="task"
            )
        fields["task"] = named
    return ExperimentRequest.parse(body)
