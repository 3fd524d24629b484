"""Renders choices as text-generation-inference's replies and events."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.generation import Prepared
from server.api.outputs import Choice
from server.api.tgi.schemas import (
    ChoiceBody,
    DetailsBody,
    GenerateParameters,
    GenerateReply,
    InputTokenBody,
    SequenceBody,
    TokenBody,
)
from server.contracts import Delta, Token
from server.engine.text.choice_scoring import judge
from server.engine.worker import EngineWorker

IN_STREAMS = set(DetailsBody.model_fields) - {"prefill", "tokens", "top_tokens", "best_of_sequences", "influence"}
"""Fields of `details` in a stream's last event."""


@dataclass(frozen=True)
class Writer:
    """Renders the choices of a request for one text."""

    worker: EngineWorker
    prepared: Prepared
    parameters: GenerateParameters
    text: str

    def reply(self, choices: Sequence[Choice]) -> GenerateReply:
        """Render choices that have ended; of equally likely ones, the first is the answer."""
        if self.parameters.choices is not None:
            return self._chosen(choices, self.parameters.choices)
        best, *others = sorted(choices, key=lambda choice: -choice.mean_logprob)
        reply = GenerateReply(generated_text=self._front + best.text)
        if self.parameters.wants_details:
            # The engine reports the input's tokens, which all choices share, once: with the first choice.
            prefill = [
                InputTokenBody(id=scored.id, text=self.worker.text.tokens.text_of(scored.id), logprob=scored.logprob)
                for scored in choices[0].scored
            ]
            reply.details = self._details(best, prefill)
            if others:
                reply.details.best_of_sequences = [
                    SequenceBody(generated_text=self._front + other.text, **self._fields(other, prefill))
                    for other in others
                ]
        return reply

    async def events(self, first: Delta, deltas: AsyncGenerator[Delta]) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event per token; the last one has the whole text and, if requested, details."""
        choice, delta = Choice(0), first
        try:
            while True:
                assert delta.token is not None, "every delta of a stream that continues has a token"
                choice.take(delta)
                ended = delta.finish_reason is not None
                event: dict[str, Any] = {
                    "index": len(choice.tokens),
                    "token": self._token(delta.token).model_dump(),
                    "generated_text": self._front + choice.text if ended else None,
                    "details": None,
                }
                if self.parameters.top_n_tokens:
                    event["top_tokens"] = [token.model_dump() for token in self._top(delta.token)]
                if ended and self.parameters.details:
                    event["details"] = self._details(choice, []).model_dump(include=IN_STREAMS)
                yield event
                if ended:
                    return
                delta = await anext(deltas)
        finally:
            await deltas.aclose()

    @property
    def _front(self) -> str:
        return self.text if self.parameters.return_full_text else ""

    def _chosen(self, choices: Sequence[Choice], labels: Sequence[str]) -> GenerateReply:
        normalized = bool(self.parameters.length_normalized)
        judged = judge(labels, [choice.scored for choice in choices], length_normalized=normalized)
        best = max(judged, key=lambda label: label.probability)  # of equal labels, the first wins
        bodies = [
            ChoiceBody(text=it.text, probability=it.probability, logprob=it.logprob, tokens=it.num_tokens)
            for it in judged
        ]
        return GenerateReply(generated_text=best.text, choices=bodies)

    def _details(self, choice: Choice, prefill: list[InputTokenBody]) -> DetailsBody:
        assert choice.usage is not None, "a choice that has ended has its usage"
        return DetailsBody(
            input_length=choice.usage.input_tokens,
            prompt_tokens=choice.usage.input_tokens,
            virtual_tokens=choice.usage.virtual_tokens,
            cached_tokens=choice.usage.cached_tokens,
            **self._fields(choice, prefill),
        )

    def _fields(self, choice: Choice, prefill: list[InputTokenBody]) -> dict[str, Any]:
        sampling = self.prepared.request.sampling
        fields = {
            "finish_reason": str(choice.finish_reason),
            "generated_tokens": len(choice.tokens),
            "seed": None if sampling.is_greedy else sampling.seed,
            "prefill": prefill,
            "tokens": [self._token(token) for token in choice.tokens],
        }
        # Fields that are not set are left out of the reply.
        return fields | ({"top_tokens": list(map(self._top, choice.tokens))} if self.parameters.top_n_tokens else {})

    def _token(self, token: Token) -> TokenBody:
        """Render a token. A special token is not part of the text; its `text` is its name."""
        text = self.worker.text.tokens.text_of(token.id) if token.special else token.text
        return TokenBody(id=token.id, text=text, logprob=token.logprob, special=token.special)

    def _top(self, token: Token) -> list[TokenBody]:
        tokens = self.worker.text.tokens
        return [
            TokenBody(id=it.id, text=tokens.text_of(it.id), logprob=it.logprob, special=it.id in tokens.special_ids)
            for it in token.top
        ]
