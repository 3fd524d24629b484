"""Routes for operators: health, readiness, information and metrics."""

from fastapi import APIRouter, Request, Response

from server import __version__
from server.api.auth import ERRORS as AUTH_ERRORS
from server.api.auth import Reads, Scrapes, may_see, visible
from server.api.deps import ExecutorsDep, MetricsDep, RegistryDep, SettingsDep, WorkerDep
from server.api.schemas import Health, Info, Live, PrefixInfo, Ready, responses
from server.api.telemetry.metrics import CONTENT_TYPE
from server.api.tgi.schemas import MAX_BEST_OF, MAX_INPUTS, MAX_STOP
from server.engine.worker import EngineWorker
from server.errors import Forbidden, PreludeError, ServerDraining

NOT_READY = responses(503, on_500="The engine does not run.")

NOT_ALIVE = responses(on_500="The engine has failed.")

router = APIRouter(tags=["operations"])


@router.get("/health", responses=NOT_ALIVE)
async def health(worker: WorkerDep) -> Health:
    """The process answers, and its engine has not failed for good."""
    _check_alive(worker)
    return Health(status="ok")


@router.get("/ready", responses=NOT_READY)
async def ready(worker: WorkerDep) -> Health:
    """The model is loaded, the engine steps, and new requests are taken."""
    _check_ready(worker)
    return Health(status="ready")


@router.get("/ping", responses=NOT_READY)
async def ping(worker: WorkerDep) -> Health:
    """The same as /ready, where Amazon SageMaker looks for it."""
    _check_ready(worker)
    return Health(status="ready")


@router.get("/v2/health/live", responses=NOT_ALIVE)
async def live(worker: WorkerDep) -> Live:
    """The same as /health, in the Open Inference Protocol's words."""
    _check_alive(worker)
    return Live(live=True)


@router.get("/v2/health/ready", responses=NOT_READY)
async def v2_ready(worker: WorkerDep) -> Ready:
    """The same as /ready, in the Open Inference Protocol's words."""
    _check_ready(worker)
    return Ready(ready=True)


def _check_alive(worker: EngineWorker) -> None:
    if worker.has_failed:
        raise PreludeError("The engine has failed for good.", remedy="Restart the server; its log says why.")


def _check_ready(worker: EngineWorker) -> None:
    if worker.draining:
        raise ServerDraining("The server is shutting down.")
    if not worker.responsive:
        raise PreludeError("The engine does not step.", remedy="Restart the server; its log says why.")


@router.get(
    "/metrics",
    response_class=Response,
    responses={**AUTH_ERRORS, 200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}},
    dependencies=[Scrapes],
)
async def metrics(request: Request, metrics: MetricsDep, executors: ExecutorsDep) -> Response:
    """Metrics of requests, tokens, caches and changes, for Prometheus."""
    if not may_see(request, None):
        raise Forbidden(
            "The key is for some tasks only, and the metrics name all tasks.", remedy="Use a key without patterns."
        )
    return Response(await metrics.scrape(executors.scrapes), media_type=CONTENT_TYPE)


@router.get("/info", responses=AUTH_ERRORS, dependencies=[Reads])
async def info(request: Request, worker: WorkerDep, registry: RegistryDep, settings: SettingsDep) -> Info:
    """The frozen model and the server's limits. The number of tasks includes only those that the key may see."""
    model, prefixes, tasks = worker.model, worker.prefixes, registry.num_tasks
    if not may_see(request, None):
        tasks = sum([1 async for _ in visible(request, registry.names_after(None))])
    return Info(
        model=model.name,
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        max_virtual_tokens=settings.max_virtual_tokens,
        dtype=model.dtype,
        device=model.device,
        version=__version__,
        tasks=tasks,
        in_flight=worker.num_in_flight,
        prefixes=PrefixInfo(hits=prefixes.hits, misses=prefixes.misses, budget_bytes=prefixes.budget_bytes),
        model_id=model.name,
        model_sha=None,
        model_dtype=f"torch.{model.dtype}",
        model_device_type=model.device.partition(":")[0],
        model_pipeline_tag="text-generation",
        max_concurrent_requests=settings.max_sequences + settings.max_queue,
        max_best_of=MAX_BEST_OF,
        max_stop_sequences=MAX_STOP,
        max_input_tokens=model.max_model_len - 1,
        max_total_tokens=model.max_model_len,
        validation_workers=worker.threads.most_threads,
        max_client_batch_size=MAX_INPUTS,
        router="prelude",
        sha=None,
        docker_label=None,
    )
