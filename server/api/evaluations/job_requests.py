"""Turns a request body into an evaluation that is ready to be prepared."""

from server.api.evaluations.evaluation_work import EvaluationWork
from server.api.evaluations.schemas import EvaluationRequest
from server.api.generation import find_soft_prompt
from server.api.jobs.job_bodies import Order, find_files, keep_uploads
from server.api.jobs.job_kind import Site
from server.errors import InvalidRequest
from server.evaluation.systems import RequestedBaselines
from server.registry.registry import Registry
from server.soft_prompts.names import split_version


async def make_work(
    order: Order[EvaluationRequest], registry: Registry, site: Site, key_id: str | None
) -> EvaluationWork:
    """Find the soft prompts and files of an evaluation; slower work is left to the evaluation itself.

    Raises PreludeError if a version, a baseline or a file does not exist, or the server cannot store the files.
    """
    request = order.fields
    wanted = RequestedBaselines.parse(request.baselines or ())
    task, version = split_version(request.task)
    others = list(wanted.versions)
    if request.compare is not None:
        if version is not None:
            raise InvalidRequest(f"{request.task} names a version, and so does `compare`.", remedy=f"Name {task}.")
        version = request.compare[1]
        others.insert(0, request.compare[0])
    subject = await find_soft_prompt(registry, task if version is None else f"{task}@{version}", key_id or "")
    numbers = [number for number in dict.fromkeys(others) if number != subject[0].version]
    against = [await find_soft_prompt(registry, f"{task}@{number}", "") for number in numbers]
    files, folder = await site.executors.in_server.run(
        lambda: keep_uploads(find_files(order, request.files, site.settings.data_dir))
    )
    return EvaluationWork(request, wanted, files, folder, (subject, *against), site, key_id)
