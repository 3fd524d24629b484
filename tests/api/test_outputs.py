"""Deltas become choices; requests that run at once end together, or are all aborted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from server.api.outputs import Choice, collect, collect_all, merge
from server.contracts import Delta, FinishReason, Scored, Token, Usage
from server.errors import GenerationFailed

A, B, END = Token(1, "a", 0, -1.0), Token(2, "b", 1, -3.0), Token(9, "", 2, -0.5, special=True)


def delta(token: Token | None, reason: FinishReason | None = None, index: int = 0) -> Delta:
    return Delta("r", token, reason, None if reason is None else Usage(2, 3, 4), index=index)


class Engine:
    """Requests that yield what they are told, as the worker's do, and remember how they ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.started = 0

    async def run(self, deltas: Sequence[Delta | Exception], *, forever: bool = False) -> AsyncGenerator[Delta]:
        self.started += 1
        try:
            for item in deltas:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
            if forever:
                await asyncio.Event().wait()
            self.ended.append("ended")
        except Exception:
            self.ended.append("failed")
            raise
        except BaseException:
            self.ended.append("aborted")
            raise


async def test_a_choice_has_the_text_of_its_tokens() -> None:
    deltas = [delta(A), delta(Token(5, "", 1, -2.0, special=True)), delta(B), delta(END, FinishReason.EOS_TOKEN)]
    (choice,) = await collect(Engine().run(deltas))
    assert choice.text == "ab"
    assert [token.id for token in choice.tokens] == [1, 5, 2, 9]
    assert choice.finish_reason is FinishReason.EOS_TOKEN
    assert choice.usage == Usage(2, 3, 4)
    assert choice.mean_logprob == (-1.0 - 2.0 - 3.0 - 0.5) / 4


async def test_interleaved_choices_are_told_apart() -> None:
    deltas = [delta(A, index=1), delta(B), delta(B, FinishReason.LENGTH, 1), delta(A, FinishReason.LENGTH)]
    choices = await collect(Engine().run(deltas), 2)
    assert [(choice.index, choice.text) for choice in choices] == [(0, "ba"), (1, "ab")]


async def test_scored_tokens_are_kept_from_the_delta_that_brings_them() -> None:
    scored = (Scored(1, None), Scored(2, -1.0))
    first = Delta("r", A, scored=scored)
    (choice,) = await collect(Engine().run([first, delta(B, FinishReason.LENGTH)]))
    assert choice.scored == scored
    (nothing,) = await collect(Engine().run([Delta("r", None, FinishReason.LENGTH, Usage(0, 2, 0), scored=scored)]))
    assert (nothing.text, nothing.tokens, nothing.scored) == ("", [], scored)


def test_a_choice_of_no_tokens_is_ranked_last() -> None:
    assert Choice(0).mean_logprob < Choice(0, tokens=[B]).mean_logprob < Choice(0, tokens=[A]).mean_logprob


def test_a_choice_ends_once() -> None:
    choice = Choice(0)
    choice.take(delta(A, FinishReason.LENGTH))
    with pytest.raises(AssertionError, match="ends once"):
        choice.take(delta(B))


async def test_requests_run_at_once_and_are_answered_in_their_order() -> None:
    engine = Engine()
    requests = [engine.run([delta(A)] * (9 - i) + [delta(B, FinishReason.LENGTH)]) for i in range(9)]
    answers = await collect_all(requests)
    assert [choices[0].text for choices in answers] == ["a" * (9 - i) + "b" for i in range(9)]
    assert engine.ended == ["ended"] * 9


async def test_if_one_fails_the_others_are_aborted_and_the_error_is_the_callers() -> None:
    engine = Engine()
    requests = [
        engine.run([delta(A)], forever=True),
        engine.run([delta(A), GenerationFailed("It broke.")]),
        engine.run([], forever=True),
    ]
    with pytest.raises(GenerationFailed, match="It broke"):
        await collect_all(requests)
    assert sorted(engine.ended) == ["aborted", "aborted", "failed"]


async def test_whoever_stops_waiting_aborts_all() -> None:
    engine = Engine()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect_all([engine.run([delta(A)], forever=True) for _ in range(3)]), 0.01)
    assert engine.ended == ["aborted"] * 3


@pytest.mark.parametrize("count", [1, 3])
async def test_merged_requests_yield_all_deltas_each_in_its_order(count: int) -> None:
    engine = Engine()
    wanted = [[delta(A)] * (i + 1) + [delta(B, FinishReason.LENGTH)] for i in range(count)]
    got: list[list[Delta]] = [[] for _ in range(count)]
    async for number, item in merge([engine.run(deltas) for deltas in wanted]):
        got[number].append(item)
    assert got == wanted
    assert engine.ended == ["ended"] * count


@pytest.mark.parametrize("count", [1, 3])
async def test_merged_requests_fail_together(count: int) -> None:
    engine = Engine()
    others = [engine.run([delta(A)], forever=True) for _ in range(count - 1)]
    with pytest.raises(GenerationFailed, match="It broke"):
        async for _ in merge([*others, engine.run([delta(A), GenerationFailed("It broke.")])]):
            pass
    assert sorted(engine.ended) == ["aborted"] * (count - 1) + ["failed"]


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_merged_requests_aborts_all(count: int) -> None:
    engine = Engine()
    merged = merge([engine.run([delta(A)], forever=True) for _ in range(count)])
    await anext(merged)
    await merged.aclose()
    assert engine.ended == ["aborted"] * engine.started
