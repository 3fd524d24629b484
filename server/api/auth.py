"""Authorisation: a request's key, its scopes and its tasks, checked before the body is read.

    router = APIRouter(route_class=GuardedRoute, dependencies=[Publishes])

A server without keys lets everybody do everything; it then listens on loopback only, see serve.py.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security
from fastapi.params import Security as SecurityParameter
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer, SecurityScopes
from starlette.types import Scope as ASGIScope

from server.api.bodies import BoundedRequest
from server.api.deadline import in_time
from server.api.deps import check_query
from server.api.openai.errors import MODELS, OPENAI_ERRORS
from server.api.schemas import responses
from server.api.telemetry.record import record_of
from server.errors import Forbidden, Unauthorized, UnknownTask
from server.keys.key import ApiKey, Scope
from server.keys.live import ApiKeys

ERRORS = responses(401, 403)

LOOKED_AT_ONCE = 1000
"""Names that a list looks at before other requests have a turn; a key may be for few of a million tasks."""

# Declared only for the OpenAPI document. If FastAPI enforced it, the check would come after the body, with FastAPI's
# own error message.
_bearer = HTTPBearer(
    scheme_name="API key",
    bearerFormat="prelude_ID_SECRET",
    description="Made by `prelude keys create`. A server without keys asks for none.",
    auto_error=False,
)


async def _check(request: Request, security: SecurityScopes, _: Annotated[object, Depends(_bearer)]) -> None:
    authorise(request, *map(Scope, security.scopes))


Reads = Security(_check)
"""Any key; where the path names a task, one that is for it."""
Generates = Security(_check, scopes=[Scope.GENERATE])
"""A key that may generate. The body may name the task, so the handler calls `allow_task`."""
Publishes = Security(_check, scopes=[Scope.PUBLISH])
"""A key that may publish, for the task that the path names."""
Scrapes = Security(_check, scopes=[Scope.METRICS])
"""A key that may read metrics. They name all tasks, so the handler calls `may_see` for none in particular."""


class GuardedRoute(APIRoute):
    """Checks the key and the query before FastAPI reads the body, which is read within bounds.

    FastAPI runs dependencies only after it has read the body: a stranger's upload would lie on the server's disk by
    then. They check the key again, so a key that was revoked during a long upload is refused.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """A route with `Reads`, `Generates` or `Publishes` among its dependencies or its router's."""
        options["responses"] = {**ERRORS, **(options.get("responses") or {})}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, after the checks."""
        handle = super().get_route_handler()
        guards = [item for item in self.dependencies if isinstance(item, SecurityParameter)]
        assert guards, f"{self.path} does not say who may use it"
        scopes = [Scope(scope) for guard in guards for scope in guard.scopes or ()]

        async def handle_if_allowed(request: Request) -> Response:
            authorise(request, *scopes)
            check_query(request)
            with _discreet(request):
                request = BoundedRequest(request.scope, request.receive)
                if Scope.GENERATE not in scopes:
                    return await handle(request)
                async with in_time(request):
                    return await handle(request)

        return handle_if_allowed


def authorise(request: Request, *scopes: Scope) -> None:
    """Find a request's key and set `request.state.key_id`; raises Unauthorized, or Forbidden for a scope or a task."""
    record_of(request).generates = Scope.GENERATE in scopes
    keys: ApiKeys | None = request.app.state.keys
    key = None if keys is None else _presented(request, keys)
    request.state.key = key
    request.state.key_id = None if key is None else key.id
    needed = _needed(request.scope)
    needed.scopes.update(scopes)
    if key is None:
        return
    for scope in scopes:
        if not key.may(scope):
            raise Forbidden(f"The key {key.id} lacks the scope {scope}; it has {', '.join(key.scopes)}.")
    if "task" in request.path_params:
        allow_task(request, request.path_params["task"])


def allow_task(request: Request, task: str | None) -> None:
    """Refuse (Forbidden) a task that the request's key is not for; None is the frozen model alone.

    A key with task patterns is only for these tasks; the frozen model alone would answer anything.
    """
    key = _key_of(request)
    if key is None or key.tasks is None:
        return
    if task is None:
        raise Forbidden(
            f"The key {key.id} may only use tasks named {', '.join(key.tasks)}, not for the frozen model alone.",
            remedy="Name one of them (?task=, or `model` under /v1), or use a key without task patterns.",
        )
    name = task.partition("@")[0]
    if not key.is_for(name):
        raise Forbidden(
            f"The key {key.id} may only use tasks named {', '.join(key.tasks)}, not for {name[:80]!r}.",
            remedy="Name a task that it is for, or use another key.",
        )
    _needed(request.scope).tasks.add(name)


@dataclass
class _Needed:
    """The scopes and tasks that a request needed: if its key loses one of them, the request ends."""

    scopes: set[Scope] = field(default_factory=set)
    tasks: set[str] = field(default_factory=set)


def _needed(scope: ASGIScope) -> _Needed:
    needed: _Needed = scope.setdefault("state", {}).setdefault("needed", _Needed())
    return needed


def has_key(scope: ASGIScope) -> bool:
    """Whether a request came with a key, which may be revoked."""
    return scope.get("state", {}).get("key") is not None


def why_no_longer(scope: ASGIScope) -> str | None:
    """Why the key of a request that was allowed no longer allows it, as a sentence; None if it does."""
    key: ApiKey | None = scope.get("state", {}).get("key")
    keys: ApiKeys | None = None if key is None else scope["app"].state.keys
    if key is None or keys is None:
        return None
    needed = _needed(scope)
    return keys.why_not(key.id, needed.scopes, needed.tasks)


def may_see(request: Request, task: str | None) -> bool:
    """Whether lists may show a task, a broken entry of the inbox, or (None) the frozen model to this key."""
    key = _key_of(request)
    if task is None:
        return key is None or key.tasks is None
    return key is None or key.is_for(task)


async def visible(request: Request, names: Iterable[str]) -> AsyncIterator[str]:
    """Those of the names that lists may show to this key; other requests have a turn now and then."""
    for looked, name in enumerate(names, 1):
        if may_see(request, name):
            yield name
        if not looked % LOOKED_AT_ONCE:
            await asyncio.sleep(0)


@contextmanager
def _discreet(request: Request) -> Iterator[None]:
    """Remove the names of other tasks from a 404 if the key is limited to some tasks."""
    try:
        yield
    except UnknownTask as exc:
        key = _key_of(request)
        if key is None or key.tasks is None:
            raise
        if OPENAI_ERRORS.is_for(request.url.path):
            raise UnknownTask(exc.message, remedy=MODELS) from None
        raise UnknownTask("There is no task or version of that name.") from None


def _key_of(request: Request) -> ApiKey | None:
    key: ApiKey | None = request.state.key  # missing if `authorise` has not run: an error, not access
    return key


def _presented(request: Request, keys: ApiKeys) -> ApiKey:
    headers = request.headers.getlist("authorization")
    if not headers:
        raise Unauthorized("This server requires a key, and the request carries none.")
    scheme, _, presented = headers[0].partition(" ")
    key = keys.find(presented.strip()) if len(headers) == 1 and scheme.lower() == "bearer" else None
    if key is None:
        raise Unauthorized("The request's key is not one of this server's, or it was revoked.")
    return key
