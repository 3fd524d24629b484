"""POST /v1/chat/completions: a conversation, in the model's chat template or the task's own."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from server.api.auth import Generates, GuardedRoute
from server.api.deps import CallDep
from server.api.openai.completions import ERRORS
from server.api.openai.logprobs import chat_logprobs, prompt_logprobs
from server.api.openai.messages import chat_text
from server.api.openai.replies import ChatReply, usage_of
from server.api.openai.schemas import ChatBody
from server.api.openai.stream import Body, stream
from server.api.openai.translate import FINISH_REASONS, encode_all, find_target, prepare_all, start_all
from server.api.outputs import Choice, collect
from server.api.sse import OR_STREAM, unless_disconnected
from server.contracts import ChatEnd, Delta, Token
from server.engine.worker import EngineWorker

router = APIRouter(tags=["openai"], responses=ERRORS, route_class=GuardedRoute, dependencies=[Generates])


@dataclass(frozen=True)
class _Form:
    """Renders the choices of a request as parts of replies and chunks."""

    worker: EngineWorker
    body: ChatBody

    def choice(self, choice: Choice) -> Body:
        """Render a choice that has ended."""
        assert choice.finish_reason is not None, "the request has ended"
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": FINISH_REASONS[choice.finish_reason],
        }

    def chunk(self, number: int, choices: Sequence[Choice], delta: Delta) -> list[Body]:
        """Render a delta as chunk choices: the role first, then text, then the finish reason."""
        choice = choices[delta.index]
        found: list[Body] = []
        if len(choice.tokens) <= 1:
            found.append(self._part(choice, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs([] if delta.token is None else [delta.token])
        piece = "" if delta.token is None else delta.token.text
        if piece or (logprobs is not None and logprobs["content"]):
            found.append({**self._part(choice, {"content": piece}), "logprobs": logprobs})
        if delta.finish_reason is not None:
            found.append({**self._part(choice, {}), "finish_reason": FINISH_REASONS[delta.finish_reason]})
        return found

    def _part(self, choice: Choice, delta: Body) -> Body:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[Token]) -> Body | None:
        return (
            chat_logprobs(self.worker.text.tokens, tokens, self.body.top_logprobs or 0) if self.body.logprobs else None
        )


@router.post("/v1/chat/completions", response_model=ChatReply, responses=OR_STREAM)
async def chat(body: ChatBody, call: CallDep) -> Response:
    """Answer the last message of a conversation; with `stream: true` as server-sent events."""
    request, worker = call.request, call.worker
    target = await find_target(call, body, "chatcmpl")
    read = chat_text(worker, target.manifest, body.messages, body.end)
    inputs = await encode_all(worker, [read.text], add_special_tokens=read.add_special_tokens)
    n = body.n or 1
    (prepared,) = prepare_all(worker, target, inputs, body, choices=n, continues_text=body.end is ChatEnd.CONTINUE)
    headers = prepared.headers(worker) | read.headers
    form = _Form(worker, body)
    running = start_all(request, worker, [prepared], n)
    if body.stream:
        head = target.head("chat.completion.chunk", worker)
        return await stream(request, running, n, headers, form.chunk, head, body.include_usage)
    ended = await unless_disconnected(request, collect(running[0], n))
    reply = {
        **target.head("chat.completion", worker),
        "choices": [form.choice(choice) for choice in ended],
        "usage": usage_of([ended]),
        **prompt_logprobs(worker.text.tokens, ended[0].scored, body.prompt_logprobs),
    }
    return JSONResponse(reply, headers=headers)
