"""Any sequence of changes on either of two servers does what dictionaries and a stack per task would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.errors import (
    InvalidRequest,
    NothingToRollBackTo,
    PreconditionFailed,
    PreludeError,
    UnknownTask,
    VersionInUse,
)
from server.registry.commands import Expected
from server.registry.events import Source, Traffic
from tests.registry.shelf import Shelf, content, identity, serving
from tests.registry.test_refusals import is_tidy

CONTENTS = [content(seed) for seed in range(3)]
TASKS = ("a-0", "a-1")  # which are also the rows of `a`
PLACES = ("one:/here", "two:/there")
"""Each server has an inbox of its own."""
View = dict[str, tuple[Traffic, dict[int, str], int]]


@dataclass
class Model:
    """One task: its versions' contents, and a stack of who answered."""

    versions: dict[int, int] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)
    stack: list[Traffic] = field(default_factory=list)
    last: int = 0
    etag: int = 0
    inbox: dict[str, int] = field(default_factory=dict)

    @property
    def traffic(self) -> Traffic:
        return self.stack[-1] if self.stack else ()

    @property
    def alone(self) -> int | None:
        return self.traffic[0][0] if len(self.traffic) == 1 else None

    @property
    def others(self) -> list[Traffic]:
        return [traffic for traffic in self.stack if traffic and traffic != self.traffic]

    def answers(self, seed: int) -> bool:
        return self.alone is not None and self.versions[self.alone] == seed

    def push(self, traffic: Traffic) -> None:
        if traffic != self.traffic:
            self.stack.append(traffic)

    def meets(self, expected: str | None) -> bool:
        return {None: True, "any": bool(self.versions), "none": not self.versions, "now": bool(self.versions)}.get(
            expected, False
        )


servers = st.integers(0, 1)
tasks = st.sampled_from(TASKS)
seeds = st.integers(0, 2)
numbers = st.integers(1, 5)
sources = st.sampled_from(["api", "inbox"])
conditions = st.sampled_from([None, None, None, "any", "none", "now", "old"])


class TwoServers(RuleBasedStateMachine):
    """Registries on one store, what they should show, and what is so in truth."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf()
        self.registries = [self.shelf.open(), self.shelf.open()]
        self.models = {task: Model() for task in TASKS}
        self.num_events = 0
        self.views: list[View] = [{}, {}]

    # What people do

    @rule(server=servers, task=tasks, seed=seeds, source=sources, activate=st.booleans(), expected=conditions)
    def publish(self, server: int, task: str, seed: int, source: Source, activate: bool, expected: str | None) -> None:
        self._publish(server, task, {task: seed}, source, activate, expected)

    @rule(server=servers, seeds=st.tuples(seeds, seeds), source=sources, activate=st.booleans())
    def publish_rows(self, server: int, seeds: Sequence[int], source: Source, activate: bool) -> None:
        self._publish(server, "a", dict(zip(TASKS, seeds, strict=True)), source, activate, None)

    @rule(server=servers, task=tasks, number=numbers, expected=conditions)
    def activate(self, server: int, task: str, number: int, expected: str | None) -> None:
        model = self.models[task]
        error = None if number in model.versions else UnknownTask
        if self._do(server, task, "activate", [number], expected, error) and model.alone != number:
            self._note(model)
            model.push(((number, 100),))
        self._look(server)

    @rule(server=servers, task=tasks, one=numbers, other=numbers, share=st.sampled_from([0, 1, 50, 100, 101]))
    def share(self, server: int, task: str, one: int, other: int, share: int) -> None:
        model = self.models[task]
        weights = {one: share} | {other: 100 - share}
        error: type[PreludeError] | None = None if weights.keys() <= model.versions.keys() else UnknownTask
        if error is None and (sum(weights.values()) != 100 or share > 100):
            error = InvalidRequest
        traffic = tuple(sorted((number, weight) for number, weight in weights.items() if weight))
        if self._do(server, task, "set_traffic", [weights], None, error) and traffic != model.traffic:
            self._note(model)
            model.push(traffic)
        self._look(server)

    @rule(server=servers, task=tasks, expected=conditions)
    def roll_back(self, server: int, task: str, expected: str | None) -> None:
        model = self.models[task]
        error = None if model.others else NothingToRollBackTo
        if self._do(server, task, "roll_back", [], expected, error):
            self._note(model)
            now = model.traffic
            while model.traffic in ((), now):
                model.stack.pop()
        self._look(server)

    @rule(server=servers, task=tasks, number=numbers)
    def delete_version(self, server: int, task: str, number: int) -> None:
        model = self.models[task]
        error: type[PreludeError] | None = None if number in model.versions else UnknownTask
        if number in dict(model.traffic):
            error = VersionInUse
        if self._do(server, task, "delete_version", [number], None, error):
            self._note(model)
            del model.versions[number]
            model.stack = [traffic for traffic in model.stack if number not in dict(traffic)]
        self._look(server)

    @rule(server=servers, task=tasks, expected=conditions)
    def delete(self, server: int, task: str, expected: str | None) -> None:
        if self._do(server, task, "delete", [], expected, None):
            self._note(self.models[task])
            self.models[task].versions, self.models[task].stack = {}, []
        self._look(server)

    @rule(server=servers, held=st.dictionaries(st.sampled_from([*TASKS, "unheard-of"]), seeds))
    def retire(self, server: int, held: dict[str, int]) -> None:
        place = PLACES[server]
        gone = [name for name in held if name in TASKS and self.models[name].inbox.get(place) == held[name]]
        wish = {name: identity(CONTENTS[seed]) for name, seed in held.items()}
        assert self.registries[server].retire(wish, by=place) == tuple(gone)
        if gone:
            self._note(*(self.models[name] for name in gone))
        for name in gone:
            model, seed = self.models[name], self.models[name].inbox.pop(place)
            is_live = model.alone and model.sources[model.alone] == "inbox" and model.answers(seed)
            if is_live and seed not in model.inbox.values():
                model.push(())
        self._look(server)

    # What servers do

    @rule(server=servers)
    def sync(self, server: int) -> None:
        self.registries[server].sync()
        self._look(server)

    @precondition(lambda self: self.num_events)
    @rule(server=servers)
    def reopen(self, server: int) -> None:
        self.registries[server] = self.shelf.open()
        self._look(server)

    # What must hold

    @invariant()
    def each_server_shows_what_was_so_when_it_looked(self) -> None:
        for registry, view in zip(self.registries, self.views, strict=True):
            assert view == {
                task.name: (task.traffic, {n: v.content.digest for n, v in task.versions.items()}, task.etag)
                for task in registry.tasks()
            }
            assert is_tidy(registry)

    @invariant()
    def the_store_has_what_there_is_and_no_more(self) -> None:
        assert self.shelf.num_events() == self.num_events
        assert self.shelf.digests() == sorted(
            CONTENTS[seed].digest for model in self.models.values() for seed in model.versions.values()
        )

    @invariant()
    def what_is_there_can_be_served(self) -> None:
        for server, view in enumerate(self.views):
            if view == self._truth():
                for task, (_, versions, _) in view.items():
                    for number, digest in versions.items():
                        assert serving(self.registries[server], f"{task}@{number}").digest == digest

    # Within

    def _publish(
        self, server: int, name: str, rows: dict[str, int], source: Source, activate: bool, expected: str | None
    ) -> None:
        wished, by = {task: self.models[task] for task in rows}, PLACES[server] if source == "inbox" else None
        registry, contents = self.registries[server], [CONTENTS[seed] for seed in rows.values()]
        condition = self._condition(self.models[next(iter(rows))], expected)
        if not all(model.meets(expected) for model in wished.values()):
            with pytest.raises(PreconditionFailed):
                registry.publish(name, contents, source, by=by, activate=activate, expected=condition)
            self._look(server)
            return
        new = [task for task, seed in rows.items() if not wished[task].answers(seed)]
        unseen = source == "inbox" and any(
            wished[task].inbox.get(PLACES[server]) != seed for task, seed in rows.items()
        )
        if new or unseen:
            self._note(*wished.values())
        versions: list[int | None] = []
        for task, model in wished.items():
            if source == "inbox":
                model.inbox[PLACES[server]] = rows[task]
            if task in new:
                model.last += 1
                model.versions[model.last], model.sources[model.last] = rows[task], source
                if activate:
                    model.push(((model.last, 100),))
            versions.append(model.last if task in new else model.alone)
        published = registry.publish(name, contents, source, by=by, activate=activate, expected=condition)
        assert published.created == bool(new)
        assert [item.version for item in published.tasks] == versions
        first = next(iter(wished.values()))
        assert published.live == (versions[0] in dict(first.traffic))
        assert published.etag == first.etag
        self._look(server)

    def _do(
        self,
        server: int,
        task: str,
        method: str,
        args: list[Any],
        expected: str | None,
        error: type[Exception] | None,
    ) -> bool:
        """Wish for a change, and answer whether it had to be made: then the caller makes it in the model."""
        model = self.models[task]
        call: Callable[..., object] = getattr(self.registries[server], method)
        if not model.versions:
            error = UnknownTask
        elif not model.meets(expected):
            error = PreconditionFailed
        if error is None:
            call(task, *args, expected=self._condition(model, expected))
        else:
            with pytest.raises(error):
                call(task, *args, expected=self._condition(model, expected))
        return error is None

    @staticmethod
    def _condition(model: Model, expected: str | None) -> Expected:
        beliefs: dict[str, Expected] = {"any": "any", "none": "none", "now": model.etag, "old": model.etag - 1}
        return None if expected is None else beliefs[expected]

    def _note(self, *models: Model) -> None:
        self.num_events += 1
        for model in models:
            model.etag = self.num_events

    def _truth(self) -> View:
        return {
            task: (model.traffic, {n: CONTENTS[seed].digest for n, seed in model.versions.items()}, model.etag)
            for task, model in self.models.items()
            if model.versions
        }

    def _look(self, server: int) -> None:
        self.views[server] = self._truth()


TwoServers.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, database=None)
TestTwoServers = TwoServers.TestCase
