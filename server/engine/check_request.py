"""Refuses requests that could never run, before they are accepted."""

from server.contracts import GenerationRequest
from server.engine.model.frozen import FrozenModel
from server.errors import EmptyInput, InputTooLong
from server.soft_prompts.soft_prompt import SoftPrompt


def check_request(request: GenerationRequest, soft_prompt: SoftPrompt | None, model: FrozenModel) -> None:
    """Refuse a request that can never run; safe from any thread.

    Raises:
        EmptyInput: no input token.
        InputTooLong: virtual tokens + input + new tokens exceed the context; names the lengths, and the field at
            fault where the input alone would fit.
        UnknownToken: the request contains a token id outside the model's vocabulary.
    """
    virtual = 0 if soft_prompt is None else soft_prompt.num_virtual_tokens
    inputs, new = len(request.input_ids), request.sampling.max_new_tokens
    label = max(map(len, request.labels), default=0)
    if not inputs:
        raise EmptyInput("The input contains no token.")
    if not all(request.labels):
        raise EmptyInput("A label contains no token.", remedy="Send at least one character in each.")
    for token_ids, source in (
        (request.input_ids, "The input"),
        *((label, "A label") for label in request.labels),
        ([token_id for token_id, _ in request.sampling.logit_bias], "logit_bias"),
        (sorted(request.sampling.stop_token_ids), "stop_token_ids"),
    ):
        model.text.check_tokens(token_ids, source)
    limit = model.spec.max_model_len
    needed = virtual + inputs + (label or new)
    if needed <= limit:
        return
    last = f"{label} of the longest label" if label else f"{new} new tokens"
    message = (
        f"The request needs {needed} positions ({virtual} virtual tokens, {inputs} input tokens, {last}); "
        f"the context holds {limit}."
    )
    room = limit - virtual - inputs
    if label:
        raise InputTooLong(message, remedy="Shorten the input or the labels.")
    if room < 1:
        raise InputTooLong(message)
    remedy = f"Ask for at most {room} new tokens, or shorten the input."
    raise InputTooLong(message, remedy=remedy, param="max_new_tokens")
