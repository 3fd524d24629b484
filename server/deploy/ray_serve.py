"""Prelude as a Ray Serve application: replicas on one store, behind Ray's HTTP proxies.

    serve run server.deploy.ray_serve:app min_replicas=2 max_replicas=8

Each replica is the server of `prelude serve` without its listener, with the settings of its environment. A change on
one replica is announced to all others, which read it from the store at once; each also looks at the store every
PRELUDE_SYNC_SECONDS, so that a lost announcement delays a change and loses nothing.
"""

import asyncio
import logging
from typing import Any

from prometheus_client.metrics_core import Metric
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.app import FORMATS
from server.api.browsers import is_loopback
from server.api.error_format import ErrorFormats
from server.api.telemetry.tracing import open_tracing
from server.deploy.ray_environment import prepare
from server.deploy.replica_metrics import Gathered
from server.engine.engine import Engine
from server.errors import Forbidden, PreludeError
from server.openmp import share_cores
from server.serve import allow_many_connections, assemble, keep_for_good, open_keys, start_engine
from server.settings import Settings

log = logging.getLogger(__name__)

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

BROADCAST_SECONDS = 10.0
"""How long an announcement, or a collection of metrics, waits for the slowest replica."""

STOP_SECONDS = 10.0
"""After the drain, how long a replica may take to end."""


class Options(BaseModel):
    """Arguments of `serve run server.deploy.ray_serve:app`, written NAME=VALUE; settings come from the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests of a replica, running or waiting, that autoscaling aims at. Default: 3/4 of PRELUDE_MAX_SEQUENCES."""
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    upscale_seconds: float = Field(30.0, ge=0)
    downscale_seconds: float = Field(600.0, ge=0)


class Replica:
    """One server. Ray makes it, asks after its health, and ends it."""

    async def __init__(self) -> None:  # type: ignore[misc] # Ray awaits it
        """Load the model and open the store; raises what `prelude serve` raises at its start."""
        settings = Settings.load()
        keys, tracing = open_keys(settings), open_tracing(settings)
        allow_many_connections()
        self._built, self._worker, self._registry = await asyncio.to_thread(
            assemble, settings, keys, tracing, self.start_engine
        )
        is_open = keys is not None or settings.allow_anonymous
        self._front: ASGIApp = self._built if is_open else LoopbackOnly(self._built, FORMATS)
        self._loop = asyncio.get_running_loop()
        self._name = serve.get_replica_context().replica_tag
        self._newest = self._announced = 0
        self._announcing: asyncio.Task[None] | None = None
        self._registry.on_change = self._note_change
        self._built.state.metrics.gather = self._gather
        keep_for_good()

    def start_engine(self, settings: Settings) -> Engine:
        """Load the engine and run its first steps."""
        return start_engine(settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app; Ray runs its lifespan, which starts the engine's thread and the services."""
        return self._front

    async def check_health(self) -> None:
        """Raise if the engine has failed for good, so that Ray replaces this replica."""
        if self._worker.has_failed:
            raise PreludeError("The engine has failed for good.")

    async def follow(self, event: int) -> None:
        """Read the store up to another replica's event."""
        if self._registry.last_event < event:
            await asyncio.to_thread(self._registry.sync)

    async def own_metrics(self) -> tuple[str, list[Metric]]:
        """This replica's name and metrics."""
        metrics = self._built.state.metrics
        return self._name, await asyncio.to_thread(lambda: list(metrics.collect()))

    async def _gather(self) -> Gathered:
        """The metrics of all replicas; one that does not answer in time is left out."""
        return Gathered(dict(await self._broadcast("own_metrics")))

    def _note_change(self, event: int) -> None:
        """Announce an event that this replica has added; called on any thread."""
        self._loop.call_soon_threadsafe(self._announce, event)

    def _announce(self, event: int) -> None:
        self._newest = max(self._newest, event)
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._announce_all())

    async def _announce_all(self) -> None:
        """Announce until the newest event is announced; changes that come meanwhile share one announcement."""
        while self._announced < self._newest:
            event = self._newest
            await self._broadcast("follow", event)
            self._announced = event

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all replicas, this one included, and return the answers of those that give one in time."""
        try:
            answers = (
                await _own_handle()
                .broadcast(method, *arguments)
                .results_async(timeout_s=BROADCAST_SECONDS, return_exceptions=True)
            )
        except Exception as exc:  # noqa: BLE001 - Ray has many; the store has the change in any case
            log.warning("not all replicas were reached: %s", exc)
            return []
        for answer in answers:
            if isinstance(answer, BaseException):
                log.warning("a replica was not reached: %s", answer)
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class LoopbackOnly:
    """Refuses requests from a network where there are no API keys, as `prelude serve` refuses to listen there."""

    def __init__(self, app: ASGIApp, formats: ErrorFormats) -> None:
        self._app, self._formats = app, formats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; `server` is the address at which Ray's proxy took the request."""
        server = scope.get("server")
        if scope["type"] == "http" and not (server and is_loopback(server[0])):
            error = Forbidden(
                "Without API keys, the server answers only requests to a loopback address.",
                remedy="Set PRELUDE_API_KEYS_FILE, or let everybody in: PRELUDE_ALLOW_ANONYMOUS=1.",
            )
            body, status = self._formats.render(scope["path"], error)
            await JSONResponse(body, status)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _own_handle() -> DeploymentHandle:
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


def application(options: Options, replica: type = Replica) -> serve.Application:
    """The application of one deployment; `replica` may be a subclass."""
    settings = Settings.load()
    share_cores()
    prepare()
    room = settings.max_sequences
    router = RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 1000})
    deployment = serve.deployment(
        serve.ingress()(replica),
        name="prelude",
        # Beyond this, the request overflows to the next replica on the ring; if all are full, Ray's proxy holds it.
        max_ongoing_requests=room,
        max_queued_requests=settings.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            initial_replicas=options.min_replicas,
            max_replicas=max(options.min_replicas, options.max_replicas),
            target_ongoing_requests=options.target_ongoing_requests or max(1.0, room * 0.75),
            upscale_delay_s=options.upscale_seconds,
            downscale_delay_s=options.downscale_seconds,
        ),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds + STOP_SECONDS,
        health_check_period_s=5,
        request_router_config=router,
    )
    return deployment.bind()


def app(options: Options) -> serve.Application:
    """What `serve run` and a Serve config import."""
    return application(options)
