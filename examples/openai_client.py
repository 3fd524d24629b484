"""OpenAI's own library, talking to a Prelude server: what there is, a task, a chat, a form, log-probabilities.

    pip install openai
    python examples/openai_client.py --url http://127.0.0.1:8000 --model sms_spam --text "Win a prize now!"

Start a server first (`make run`). Where it asks for keys, put one into OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from openai import OpenAI


def main(arguments: Sequence[str] | None = None) -> None:
    """Talk to the server that the options name."""
    parser = argparse.ArgumentParser(description="OpenAI's library against a Prelude server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--model", help="a task, or the frozen model's name; default: the first in the list")
    parser.add_argument("--text", default="I love this film.", help="what to send")
    options = parser.parse_args(arguments)
    with OpenAI(base_url=f"{options.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        models = [model.id for model in client.models.list()]
        print("models:", ", ".join(models))
        model = options.model or models[0]
        chat(client, model, options.text)
        classify(client, model, options.text)
        score(client, model, options.text)


def chat(client: OpenAI, model: str, text: str) -> None:
    """Print an answer as it is made, and what it took."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\ntokens: {chunk.usage.prompt_tokens} in, {chunk.usage.completion_tokens} out")


def classify(client: OpenAI, model: str, text: str) -> None:
    """Let the model say one of two words and nothing else."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        extra_body={"structured_outputs": {"choice": ["good", "bad"]}},
    )
    print("one of two words:", reply.choices[0].message.content)


def score(client: OpenAI, model: str, text: str) -> None:
    """Ask how likely a text is, token by token, without generating any."""
    reply = client.completions.create(model=model, prompt=text, max_tokens=0, echo=True, logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None, "they were asked for"
    for token, logprob in zip(logprobs.tokens or [], logprobs.token_logprobs or [], strict=True):
        print(f"{token!r:>16}", "" if logprob is None else f"{logprob:.2f}")


if __name__ == "__main__":
    main()
