"""Ask a task through litellm, for programs that speak to several providers in one way.

    pip install litellm
    LITELLM_LOCAL_MODEL_COST_MAP=True python examples/litellm_client.py --url http://127.0.0.1:8000 --task sms_spam

`openai/` and the task's name make the model. The variable keeps litellm from fetching a list of prices when it is
imported. It shows a chat, the same token by token, many at once, and that a refusal is one of litellm's own classes.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import litellm

TEXTS = ["URGENT! You have won a prize. Text WIN to 81010", "See you at seven, shall I bring wine?"]


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


async def ask_at_once(model: str, server: dict[str, Any]) -> None:
    """Many texts at once, which the server answers in one batch."""
    replies = await asyncio.gather(*(litellm.acompletion(model, user(text), **server) for text in TEXTS))
    for text, reply in zip(TEXTS, replies, strict=True):
        print(f"{reply.choices[0].message.content!r}: {text}")
    await litellm.close_litellm_async_clients()


def main() -> None:
    """Read the command line and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--task", default="sms_spam", help="one of its tasks")
    parser.add_argument("--key", default="none", help="a key, if the server asks for one")
    arguments = parser.parse_args()
    model, server = f"openai/{arguments.task}", {"api_base": f"{arguments.url}/v1", "api_key": arguments.key}

    reply = litellm.completion(model, user(TEXTS[0]), **server)
    print("chat:", repr(reply.choices[0].message.content), f"({reply.usage.total_tokens} tokens)")
    chunks = litellm.completion(model, user(TEXTS[0]), stream=True, **server)
    print("stream:", [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content])
    asyncio.run(ask_at_once(model, server))
    litellm.suppress_debug_info = True  # an invitation to report a bug, which this is not
    try:
        litellm.completion("openai/no_such_task", user(TEXTS[0]), **server)
    except litellm.NotFoundError as error:
        print("refused:", error.message.splitlines()[0])


if __name__ == "__main__":
    main()
