"""What a soft prompt means, as far as that can be said without data: `GET /prompts/{task}/interpretation`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from server.api.auth import GuardedRoute, Publishes, may_see
from server.api.deps import RegistryDep, TaskName
from server.api.generation import find_soft_prompt
from server.api.prompts.routes import ERRORS
from server.api.schemas import responses
from server.engine.worker import EngineWorker
from server.errors import Overloaded, UnknownTask
from server.executors import Executors
from server.interpret.null_cache import NullCache
from server.interpret.results import MOST_TOP, TOP, Interpretation
from server.interpret.static import Interpreter
from server.registry.registry import Registry
from server.settings import Settings
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import declared_start

MOST_KEPT = 64
"""Number of interpretations that stay in memory; each takes some ten kilobytes."""
WAIT_SECONDS = 30.0
"""How long a request waits for an interpretation, which is finished and kept even if the request is not answered."""

router = APIRouter(prefix="/prompts/{task}/interpretation", tags=["soft prompts"], route_class=GuardedRoute)

EXAMPLE = {
    "task": "emotion",
    "digest": "6b0f…",
    "prefix_hash": "9c41…",
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 20,
    "model": "SmolLM2-135M-Instruct",
    "fingerprint": "256b77ed5c8bf47757d67089e86dae81",
    "start_is_known": True,
    "start": "the embeddings, or the keys and values, of vocabulary tokens",
    "verdict": "All 20 virtual tokens are still nearest to the tokens they started from; what training added is near "
    "no word (p = 0.23). Seen through the model, what training added raises the labels (p = 0.002).",
    "notes": ["The lens sees direct paths only, and takes attention as even over the virtual tokens."],
}


class Interpretations:
    """Interprets soft prompts on a thread of its own, and keeps the newest results. Only for the event loop's thread.

    Attributes:
        interpreter: of the served model; only for the pool `executors.interpretation`, which has one thread.
    """

    def __init__(self, settings: Settings, worker: EngineWorker, executors: Executors) -> None:
        self.interpreter = Interpreter(worker.frozen, NullCache(settings.cache_dir / "interpretation"))
        self._threads = executors.interpretation
        self._kept: OrderedDict[tuple[Any, ...], asyncio.Future[Interpretation]] = OrderedDict()

    async def of(
        self, task: str, soft_prompt: SoftPrompt, others: Sequence[SoftPrompt] = (), top: int = TOP
    ) -> Interpretation:
        """The interpretation of a soft prompt; requests for the same one share the work.

        Raises Overloaded if too many wait, or the result takes long; it is kept for a later request.
        """
        manifest = soft_prompt.manifest
        start, labels = declared_start(manifest), tuple(manifest.labels or ())
        key = (soft_prompt.prefix_hash, labels, start, tuple(other.prefix_hash for other in others), top)
        running = self._kept.get(key)
        if running is None:
            work = self._threads.submit(self.interpreter.interpret, task, soft_prompt, tuple(others), top=top)
            running = self._kept[key] = asyncio.wrap_future(work)
            running.add_done_callback(lambda done: self._forget_failed(key, done))
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        try:
            found = await asyncio.wait_for(asyncio.shield(running), WAIT_SECONDS)
        except TimeoutError as exc:
            raise Overloaded(
                f"The interpretation took longer than {WAIT_SECONDS:.0f} seconds, as the first one of a model may.",
                remedy="Send the request again later: the server finishes the work and keeps the result.",
            ) from exc
        return found.model_copy(update={"task": task, "digest": soft_prompt.digest})

    def _forget_failed(self, key: tuple[Any, ...], done: asyncio.Future[Interpretation]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._kept.get(key) is done:
            del self._kept[key]


async def starts_of(request: Request, registry: Registry, soft_prompt: SoftPrompt) -> list[SoftPrompt]:
    """The soft prompt that this one started from, if it did and a task that the request's key may see still has it."""
    start = declared_start(soft_prompt.manifest)
    if start is None or start.prefix_hash is None or not registry.is_referenced(start.prefix_hash):
        return []
    executors: Executors = request.app.state.executors
    may = partial(may_see, request)
    reference = await executors.in_server.run(_version_with, registry, start.prefix_hash, may)
    return [] if reference is None else [(await find_soft_prompt(registry, reference, ""))[1]]


def _version_with(registry: Registry, prefix_hash: str, may: Callable[[str], bool]) -> str | None:
    """`task@version` of the first version of these numbers among the tasks that one may see; for any thread."""
    for name in sorted(filter(may, registry.tasks_with(prefix_hash))):
        task = registry.find(name)
        for number, version in task.versions.items() if task is not None else ():
            if version.content.prefix_hash == prefix_hash:
                return f"{name}@{number}"
    return None


@router.get(
    "",
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE}}, "description": "Results, each beside its null."},
        **ERRORS,
        **responses(
            on_429="Too many interpretations wait, or this one takes long; Retry-After says when to come back.",
            on_503="The version cannot be read or served.",
        ),
    },
    dependencies=[Publishes],
)
async def interpret(
    request: Request,
    task: TaskName,
    registry: RegistryDep,
    version: Annotated[int | None, Query(ge=1, description="Number of a version. Default: the live one.")] = None,
    top: Annotated[int, Query(ge=1, le=MOST_TOP, description="Number of neighbours and of lens tokens.")] = TOP,
) -> Interpretation:
    """What a soft prompt means, by tests that need no data: a verdict, sizes, nearest tokens, value-change lens.

    Nearest tokens are those of the learned value, of its start and of the change, beside random directions.
    """
    if version is None:
        live = registry.task(task).live
        if live is None:
            raise UnknownTask(f"No version of the task {task} is live.", remedy="Name one with ?version=.")
        version = live.number
    _, soft_prompt = await find_soft_prompt(registry, f"{task}@{version}", "")
    interpretations: Interpretations = request.app.state.interpretations
    return await interpretations.of(task, soft_prompt, await starts_of(request, registry, soft_prompt), top)
