"""Training jobs: threads read and write the job folders, and a separate process trains."""

import asyncio
from collections.abc import Sequence
from functools import partial

from fastapi import Request, Response
from typing_extensions import override

from server.api.deps import JobQueueDep, KeyIdDep, RegistryDep, SettingsDep
from server.api.jobs.job_bodies import read_order
from server.api.jobs.job_kind import Jobs, Line, News, Site, job_router
from server.api.jobs.routes import MISSING, JobId, start_route
from server.api.schemas import Responses
from server.api.sse import unless_disconnected
from server.api.training.job_requests import FILES, find_candidates, find_start, parse_body, submit
from server.api.training.schemas import JOBS, job_body, request_body
from server.errors import UnknownJob
from server.jobs.job import Job
from server.jobs.progress_log import last_line_end, read_lines
from server.long_work import Lane
from server.replies import JobBody, JobList

LOG_BYTES = 2**16
MOST_CHECKS = 8
"""Maximum number of jobs that wait for the check of their data."""
CANCEL_SECONDS, CANCEL_LOOKS = 5.0, 100

LOG: Responses = {**MISSING, 200: {"description": "Text.", "content": {"text/plain": {}}}}

router = job_router(JOBS, "training")


class TrainingJobs(Jobs):
    """The training jobs in a folder, which several servers may share."""

    router, word, noun, unknown, outlives_server = router, "job", "training job", UnknownJob, True
    body, listing = JobBody, JobList

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.checks = Lane(site.executors.jobs, "training jobs", MOST_CHECKS)

    @override
    def show(self, job: Job, *, with_result: bool = True) -> JobBody:
        return job_body(job)

    @override
    async def all(self) -> Sequence[Job]:
        return await self._site.executors.jobs.run(self._site.job_queue.jobs)

    @override
    async def get(self, job_id: str) -> Job:
        return await self._site.executors.jobs.run(self._site.job_queue.job, job_id)

    @override
    async def cancel(self, job_id: str) -> None:
        await self._site.executors.jobs.run(self._site.job_queue.cancel, job_id)
        for _ in range(CANCEL_LOOKS):  # another server on the same folder may run it
            if (await self.get(job_id)).state.is_over:
                return
            await asyncio.sleep(CANCEL_SECONDS / CANCEL_LOOKS)

    @override
    async def delete(self, job_id: str) -> None:
        await self._site.executors.jobs.run(self._site.job_queue.delete, job_id)

    @override
    async def news(self, job_id: str, offset: int | None) -> News:
        def look() -> News:
            # Read the job before its record, so that a finished job's record is complete.
            job = self._site.job_queue.files.job(job_id)
            record = self._site.job_queue.files.folder(job_id).record
            since = last_line_end(record) if offset is None else offset
            lines, until = read_lines(record, since)
            return News(job, since, until, lines)

        return await self._site.executors.jobs.run(look)

    @override
    async def read(self, job_id: str, offset: int, most: int) -> tuple[Sequence[Line], int]:
        record = self._site.job_queue.files.folder(job_id).record
        return await self._site.executors.jobs.run(read_lines, record, offset, most)

    async def log(self, job_id: str) -> bytes:
        """The last part of the output of a job's process."""

        def read() -> bytes:
            try:
                with self._site.job_queue.files.folder(job_id).log.open("rb") as file:
                    file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
                    return file.read()
            except FileNotFoundError:  # it has not begun yet
                return b""

        return await self._site.executors.jobs.run(read)


@router.post("", **start_route(JobBody, request_body()))
async def create_job(
    request: Request,
    response: Response,
    job_queue: JobQueueDep,
    registry: RegistryDep,
    settings: SettingsDep,
    key_id: KeyIdDep,
) -> JobBody:
    """Check the data and queue a training job. Its result becomes a version of its task."""
    async with read_order(request, FILES, parse_body) as order:
        start = await find_start(request, order.fields.spec, registry, key_id)
        candidates = await find_candidates(request, order.fields.spec, registry)
        jobs: TrainingJobs = TrainingJobs.of(request)
        work = partial(submit, job_queue, order, settings.data_dir, key_id, start, candidates)
        job = await unless_disconnected(request, jobs.checks.run(work))
    response.headers["Location"] = f"{JOBS}/{job.id}"
    return job_body(job)


@router.get("/{job}/log", response_class=Response, responses=LOG)
async def get_log(request: Request, job: JobId) -> Response:
    """The last part of the output of a job's process."""
    jobs: TrainingJobs = TrainingJobs.of(request)
    await jobs.find(request, job)
    return Response(await jobs.log(job), media_type="text/plain; charset=utf-8")
