from __future__ import annotations

from collections.abc import Iterator
from inspect import isclass, iscoroutinefunction, isroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from server.api import ops
from server.api.app import api_routes, create_app
from server.api.auth import GuardedRoute, Publishes, may_see
from server.api.error_format import ErrorFormats
from server.api.errors import install_error_handlers
from server.api.jobs.routes import common_routes
from server.api.jobs.table import KINDS as JOB_KINDS
from server.api.openai import chat, completions, models
from server.api.prompts import routes as prompts
from server.api.prompts import versions
from server.api.tgi import routes as tgi
from server.keys.file import add_key
from server.keys.key import Scope
from server.keys.live import ApiKeys
from server.settings import Settings
from tests.api.live import LiveServer, assert_error


def test_without_keys_everybody_may_do_everything_and_nobody_is_on_record(server: LiveServer) -> None:
    server.publish_random("anonymous", 1)
    assert server.client.get("/prompts/anonymous", headers={"Authorization": "Bearer hf_any"}).status_code == 200
    [version] = server.client.get("/prompts/anonymous/versions").json()["versions"]
    assert "by" not in version


def test_an_app_whose_settings_name_keys_is_not_made_without_them(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="keys"):
        create_app(Settings(api_keys_file=tmp_path / "keys.json"), server.worker, server.registry)


def test_a_route_that_does_not_say_who_may_use_it_cannot_be_made() -> None:
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(AssertionError, match="/x does not say who may use it"):
        router.get("/x")(lambda: None)


def test_every_route_that_reads_a_body_asks_first() -> None:
    modules = (tgi, completions, chat, models, prompts, versions, ops)
    routers = [module.router for module in modules]
    routers += [router for kind in JOB_KINDS for router in (kind.router, common_routes(kind))]
    routes = [route for router in routers for route in router.routes]
    assert len(routes) > 10
    for route in routes:
        assert isinstance(route, GuardedRoute) or (isinstance(route, APIRoute) and route.body_field is None)


async def test_a_handler_that_nobody_guards_fails_closed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "ci", [Scope.PUBLISH], None)
    app = FastAPI()
    app.state.keys = ApiKeys(path)
    install_error_handlers(app, ErrorFormats())

    @app.get("/forgotten")
    async def forgotten(request: Request) -> bool:
        return may_see(request, "anything")

    @app.get("/declared", dependencies=[Publishes])
    async def declared() -> bool:
        return True

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert_error(await client.get("/forgotten"), 500, "internal_error")
        assert_error(await client.get("/declared"), 401, "unauthorized")


def test_no_dependency_runs_on_another_thread() -> None:
    def calls(dependant: Dependant) -> Iterator[Any]:
        yield dependant.call
        for part in dependant.dependencies:
            yield from calls(part)

    routes = [route for route in api_routes() if isinstance(route, APIRoute)]
    found = [(route.path, call) for route in routes for call in calls(route.dependant)]
    assert len(found) > len(routes)
    slow = [
        (path, call)
        for path, call in found
        if not iscoroutinefunction(call if isroutine(call) or isclass(call) else type(call).__call__)
    ]
    assert slow == []
