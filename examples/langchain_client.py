"""Use a task as a model of LangChain's: in a chain, token by token, in batches, and for an answer in a form.

    pip install langchain-openai
    python examples/langchain_client.py --url http://127.0.0.1:8000 --task sms_spam

The tasks are models of OpenAI's protocol at the server's address with /v1 behind it. A task's answers are as long and
as random as the task says, unless ChatOpenAI is told else.
"""

from __future__ import annotations

import argparse
from typing import Literal

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

TEXTS = ["URGENT! You have won a prize. Text WIN to 81010", "See you at seven, shall I bring wine?"]


class Verdict(BaseModel):
    """Whether a message is wanted."""

    verdict: Literal["ham", "spam"]


def main() -> None:
    """Read the command line and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--task", default="sms_spam", help="one of its tasks")
    parser.add_argument("--key", default="none", help="a key, if the server asks for one")
    arguments = parser.parse_args()

    model = ChatOpenAI(model=arguments.task, base_url=f"{arguments.url}/v1", api_key=SecretStr(arguments.key))
    chain = ChatPromptTemplate.from_messages([("user", "{text}")]) | model
    print("chain:", repr(chain.invoke({"text": TEXTS[0]}).text))
    print("stream:", [chunk.text for chunk in model.stream(TEXTS[0])])
    for text, message in zip(TEXTS, model.batch(list(TEXTS)), strict=True):
        print(f"{message.text!r}: {text}")

    # The server lets the model write only what fits the form, so no answer has to be asked for twice. A form needs more
    # tokens than a label, which the task would stop at.
    longer = ChatOpenAI(
        model=arguments.task,
        base_url=f"{arguments.url}/v1",
        api_key=SecretStr(arguments.key),
        max_completion_tokens=40,
    )
    print("form:", longer.with_structured_output(Verdict, method="json_schema").invoke(TEXTS[0]))


if __name__ == "__main__":
    main()
