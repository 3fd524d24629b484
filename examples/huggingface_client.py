"""Ask a task with huggingface_hub, which speaks to Prelude's native routes and to its chats.

    pip install huggingface_hub
    python examples/huggingface_client.py --url http://127.0.0.1:8000 --task sms_spam

It shows: text for a task, named as an adapter; the same token by token; the same as a chat; many requests at once,
which the server answers in one batch.
"""

from __future__ import annotations

import argparse
import asyncio

from huggingface_hub import AsyncInferenceClient, InferenceClient

TEXTS = ["URGENT! You have won a prize. Text WIN to 81010", "See you at seven, shall I bring wine?"]


def ask(url: str, task: str, text: str) -> None:
    """One text, in three ways."""
    client = InferenceClient(url)
    print("text:", repr(client.text_generation(text, adapter_id=task)))
    print("stream:", list(client.text_generation(text, adapter_id=task, stream=True)))
    # A chat names its task as a model.
    output = client.chat_completion([{"role": "user", "content": text}], model=task)
    print("chat:", repr(output.choices[0].message.content), f"({output.usage.completion_tokens} tokens)")


async def ask_at_once(url: str, task: str, texts: list[str]) -> None:
    """Many texts at once."""
    async with AsyncInferenceClient(url) as client:
        answers = await asyncio.gather(*(client.text_generation(text, adapter_id=task) for text in texts))
    for text, answer in zip(texts, answers, strict=True):
        print(f"{answer!r}: {text}")


def main() -> None:
    """Read the command line and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--task", default="sms_spam", help="one of its tasks")
    arguments = parser.parse_args()
    ask(arguments.url, arguments.task, TEXTS[0])
    asyncio.run(ask_at_once(arguments.url, arguments.task, TEXTS))


if __name__ == "__main__":
    main()
