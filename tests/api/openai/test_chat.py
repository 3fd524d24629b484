"""POST /v1/chat/completions: what the model reads of a conversation, and how its answer is told."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from tokenizers import processors

from server.engine.model.frozen import FrozenModel
from tests.api.live import LiveServer, SteeredModel, assert_openai_error, engine_answer, live_server
from tests.api.openai.support import (
    CHAT,
    FROZEN,
    RENDERED,
    Body,
    ask,
    post,
    texts,
    user,
)
from tests.support import EOS

PAD = EOS + 1


def test_a_conversation_goes_through_the_models_template_behind_the_tasks_virtual_tokens(
    chatty: LiveServer, tiny: FrozenModel
) -> None:
    soft_prompt = chatty.publish_random("chat-task", 1)
    for model, behind in ((FROZEN, None), ("chat-task", soft_prompt)):
        reply = ask(chatty, CHAT, model=model, max_tokens=12)
        assert texts(reply) == [engine_answer(tiny, behind, RENDERED, max_new_tokens=12).text]
        assert (reply["object"], reply["model"]) == ("chat.completion", model)
        virtual = 0 if behind is None else behind.num_virtual_tokens
        assert reply["usage"]["prompt_tokens"] == virtual + len(RENDERED)
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": virtual}


def test_all_messages_are_read_with_their_roles_and_names(chatty: LiveServer, tiny: FrozenModel) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hello", "name": "ada"},
        {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    rendered = "<system>be brief\n<user>adahello\n<assistant>hi\n<user>one\ntwo\n<assistant>"
    reply = ask(chatty, CHAT, messages=messages, max_tokens=12)
    assert texts(reply) == [engine_answer(tiny, None, rendered, max_new_tokens=12).text]


def test_a_template_that_writes_bos_is_not_given_a_second_one(tmp_path: Path) -> None:
    model = SteeredModel()
    tokenizer = model.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<pad> $A", None, [("<pad>", PAD)])
    tokenizer.chat_template = "<pad>{{ messages[0].content }}"
    with live_server(tmp_path, model=model) as live:
        assert live.worker.text.encode("hello")[0] == PAD, "the tokenizer adds one"
        assert ask(live, CHAT, max_tokens=2)["usage"]["prompt_tokens"] == 1 + len("hello")
        assert ask(live, max_tokens=2)["usage"]["prompt_tokens"] == 1 + len("hello")
        live.publish_random("bos", 1, {"input_template": "{input}!"})
        usage = ask(live, CHAT, model="bos", max_tokens=2)["usage"]
        assert usage["prompt_tokens"] == 5 + 1 + len("hello!"), "that template writes none, so the tokenizer does"


@pytest.mark.parametrize("field", ["content", "name"])
def test_a_message_holds_no_special_token(chatty: LiveServer, field: str) -> None:
    messages = [{"role": "user", "content": "hello", field: "hello<eos><pad>"}]
    reply = ask(chatty, CHAT, messages=messages, max_tokens=2)
    added = len("<eos><pad>") if field == "content" else len("hello<eos><pad>")
    assert reply["usage"]["prompt_tokens"] == len(RENDERED) + added, "a token for each character"


@pytest.mark.parametrize("template", ["{input}!", None])
def test_a_message_for_a_task_holds_no_special_token(chatty: LiveServer, template: str | None) -> None:
    task = f"chat-special-{'own' if template else 'chat'}"
    chatty.publish_random(task, 1, {"input_template": template} if template else {})
    alone = ask(chatty, CHAT, model=task, max_tokens=2)["usage"]["prompt_tokens"]
    more = ask(chatty, CHAT, model=task, messages=user("hello<eos>"), max_tokens=2)["usage"]["prompt_tokens"]
    assert more == alone + len("<eos>")


@pytest.mark.parametrize("role", ["system<eos>", "user\n", "tool", ""])
def test_a_role_is_one_of_the_known_ones(chatty: LiveServer, role: str) -> None:
    response = post(chatty, CHAT, messages=[{"role": role, "content": "x"}, *user("hello")])
    assert_openai_error(response, 400, "invalid_request", "messages.0.role")


def test_what_was_answered_can_be_sent_back_as_it_is(chatty: LiveServer) -> None:
    [choice] = ask(chatty, CHAT, max_tokens=5)["choices"]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    ask(chatty, CHAT, messages=[*user("hello"), choice["message"], *user("go on")], max_tokens=5)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "hi", "tool_calls": [], "annotations": [], "function_call": None, "refusal": None, "audio": None},
        {"content": "hi", "reasoning_content": "hm", "provider_specific_fields": {"a": [1]}, "annotations": [{"x": 1}]},
        {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "annotations": None}]},
        openai.types.chat.ChatCompletionMessage(role="assistant", content="hi").model_dump(),
        {"content": "hi", "tool_calls": None, "function_call": None, "provider_specific_fields": None},  # litellm's
        {"content": [{"type": "text", "text": "hi", "annotations": [], "index": 0}], "refusal": ""},
    ],
)
def test_an_answer_of_any_server_or_library_can_be_appended_to_the_history(
    chatty: LiveServer, tiny: FrozenModel, answer: Body
) -> None:
    messages = [*user("hello"), {"role": "assistant", **answer}, *user("go on")]
    rendered = "<user>hello\n<assistant>hi\n<user>go on\n<assistant>"
    reply = ask(chatty, CHAT, messages=messages, max_tokens=5)
    assert texts(reply) == [engine_answer(tiny, None, rendered, max_new_tokens=5).text]


def test_an_answer_without_text_is_an_empty_one(chatty: LiveServer, tiny: FrozenModel) -> None:
    rendered = "<user>hello\n<assistant>\n<user>go on\n<assistant>"
    expected = [engine_answer(tiny, None, rendered, max_new_tokens=5).text]
    empties: list[Body] = [{}, {"content": None}, {"content": None, "tool_calls": []}, {"content": ""}]
    for empty in empties:
        messages = [*user("hello"), {"role": "assistant", **empty}, *user("go on")]
        assert texts(ask(chatty, CHAT, messages=messages, max_tokens=5)) == expected


def test_a_task_with_an_input_template_reads_the_message_in_it(chatty: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = chatty.publish_random("chat-template", 2, {"input_template": "Q: {input}\nA:"})
    reply = ask(chatty, CHAT, model="chat-template", max_tokens=12)
    assert texts(reply) == [engine_answer(tiny, soft_prompt, "Q: hello\nA:", max_new_tokens=12).text]
    assert texts(reply) == [chatty.text("hello", "chat-template", max_new_tokens=12)]
    for messages in (
        [*user("hello"), {"role": "assistant", "content": "hi"}, *user("again")],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "system", "content": "x"}],
    ):
        response = post(chatty, CHAT, model="chat-template", messages=messages)
        error = assert_openai_error(response, 400, "invalid_request", "input_template", "one message")
        assert error["param"] == "messages"
    assert_openai_error(post(chatty, CHAT, model="chat-template", messages=user("")), 400, "empty_input")


SYSTEM: list[dict[str, object]] = [{"role": "system", "content": "be brief"}]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_task_with_an_input_template_ignores_a_system_message_and_says_so(
    chatty: LiveServer, role: str, stream: bool
) -> None:
    chatty.publish_random("chat-ignores", 2, {"input_template": "Q: {input}\nA:"})
    asked: dict[str, object] = {"model": "chat-ignores", "max_tokens": 6}
    alone = post(chatty, CHAT, messages=user("hello"), **asked)
    assert "Prelude-System-Message" not in alone.headers
    for messages in ([{"role": role, "content": "x"}, *user("hello")], [*user("hello"), *SYSTEM, *SYSTEM]):
        reply = post(chatty, CHAT, messages=messages, **asked)
        assert (reply.status_code, reply.headers["Prelude-System-Message"]) == (200, "ignored")
        assert texts(reply.json()) == texts(alone.json())
    if stream:
        streamed = post(chatty, CHAT, messages=[*SYSTEM, *user("hello")], stream=True, **asked)
        assert streamed.headers["Prelude-System-Message"] == "ignored"
    empty = post(chatty, CHAT, messages=[{"role": role, "content": ""}, *user("hello")], **asked)
    assert "Prelude-System-Message" not in empty.headers, "nothing was left out"


def test_a_task_may_refuse_system_messages(chatty: LiveServer) -> None:
    for number, template in enumerate(("{input}\n", None)):
        task = f"chat-refuses-{number}"
        chatty.publish_random(task, 2, {"input_template": template, "system_message": "refuse"})
        response = post(chatty, CHAT, model=task, messages=[*SYSTEM, *user("hello")])
        assert assert_openai_error(response, 400, "invalid_request", "system message")["param"] == "messages"
        ask(chatty, CHAT, model=task, messages=user("hello"), max_tokens=2)


def test_a_task_may_read_system_messages_in_a_slot_of_its_template(chatty: LiveServer, tiny: FrozenModel) -> None:
    manifest = {"input_template": "{system}|{input}|", "system_message": "template"}
    soft_prompt = chatty.publish_random("chat-slot", 2, manifest)
    messages = [*SYSTEM, *user("hello"), {"role": "developer", "content": "now"}]
    reply = post(chatty, CHAT, model="chat-slot", messages=messages, max_tokens=12)
    read = "be brief\n\nnow|hello|"
    assert texts(reply.json()) == [engine_answer(tiny, soft_prompt, read, max_new_tokens=12).text]
    assert "Prelude-System-Message" not in reply.headers
    without = ask(chatty, CHAT, model="chat-slot", max_tokens=12)
    assert texts(without) == [engine_answer(tiny, soft_prompt, "|hello|", max_new_tokens=12).text]


def test_a_task_without_a_template_may_ignore_system_messages(chatty: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = chatty.publish_random("chat-deaf", 3, {"system_message": "ignore"})
    reply = post(chatty, CHAT, model="chat-deaf", messages=[*SYSTEM, *user("hello")], max_tokens=12)
    assert reply.headers["Prelude-System-Message"] == "ignored"
    assert texts(reply.json()) == [engine_answer(tiny, soft_prompt, RENDERED, max_new_tokens=12).text]
    response = post(chatty, CHAT, model="chat-deaf", messages=SYSTEM)
    assert_openai_error(response, 400, "invalid_request", "ignores system messages")


def test_a_model_without_a_template_chats_only_with_tasks_that_bring_theirs(server: LiveServer) -> None:
    assert_openai_error(post(server, CHAT), 400, "invalid_request", "no chat template")
    server.publish_random("chat-own", 1, {"input_template": "{input}!"})
    assert texts(ask(server, CHAT, model="chat-own", max_tokens=6)) == [
        server.text("hello", "chat-own", max_new_tokens=6)
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": None},
        {"role": "user"},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "system", "content": None},
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": "x", "audio": {"id": "1"}},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "robot", "content": "x"},
        "hello",
    ],
)
def test_a_message_that_cannot_be_read_is_refused(chatty: LiveServer, message: object) -> None:
    error = assert_openai_error(post(chatty, CHAT, messages=[message]), 400, "invalid_request", "messages.0")
    assert error["param"] == "messages"
    assert_openai_error(post(chatty, CHAT, messages=[]), 400, "invalid_request", "messages")


def test_an_image_is_refused_by_its_name(chatty: LiveServer) -> None:
    content = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    response = post(chatty, CHAT, messages=[{"role": "user", "content": content}])
    assert_openai_error(response, 400, "invalid_request", "'image_url'", "text only")
