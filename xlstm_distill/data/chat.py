"""Chats: their messages as they stand in a row, and their text under the template with the assistant's part of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""`role`, `content`, and whatever else the chat template reads: `tool_calls`, `tool_call_id`, `name`, …"""
Messages = Sequence[Message]
TOOLS = "tools"
"""Column of a row in which the tools stand that its chat may call."""
Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Chat(list[Message]):
    """The messages of a chat."""

    tools: Sequence[Mapping[str, Any]] = ()
    """Definitions (JSON schemas) of the tools that it may call."""


def as_tools(place: str, value: Any) -> list[Mapping[str, Any]]:
    """The definitions in the column `tools`, which may be JSON text, as a whole or each; none where nothing is there.

    Raises:
        Mistake: it holds something else; `place` tells where the row is.
    """
    try:
        tools = json.loads(value.strip() or "[]") if isinstance(value, str) else value
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or ()]
    except (TypeError, ValueError):
        tools = [None]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Mistake(f"{place}: column {TOOLS} holds no definitions of tools; expected a list of JSON schemas")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Parquet fills up what is not there with nulls."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def as_messages(place: str, column: str, value: Any, role: str) -> list[Message]:
    """The messages in a column: text as one message of `role`; messages as they are, less the fields that hold nothing.

    Raises:
        Mistake: it holds something else; `place` tells where the row is.
    """
    if value is None or isinstance(value, str):
        return [{"role": role, "content": value}] if value and value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    try:
        return [_as_message(message) for message in value]
    except (TypeError, KeyError, AttributeError) as error:
        raise Mistake(
            f"{place}: column {column} holds no chat; expected a list of messages with role and content"
        ) from error


def _as_message(message: Mapping[str, Any]) -> Message:
    """A message of which templates can tell whether it calls a tool: Parquet fills up what is not there with nulls.

    Arguments that stand there as JSON text become what they say: templates write JSON themselves.
    """
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = kept.get("content") if kept.get("tool_calls") else kept["content"] or ""
    if content is not None and not isinstance(content, str):
        raise TypeError("content is not text")
    if "tool_calls" in kept:
        kept["tool_calls"] = [_tool_call(call) for call in kept["tool_calls"]]
    return {**kept, "role": str(kept["role"]), "content": content}


def _tool_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _tool_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            return call
    return call


def says_something(message: Message) -> bool:
    """Whether there is text or a call of a tool in it."""
    return bool(str(message["content"] or "").strip() or message.get("tool_calls"))


def said(message: Message) -> str:
    """What a message says: its content, and the words in its calls of tools."""
    content = str(message["content"] or "")
    return "\n".join([content, *strings(message["tool_calls"])]) if message.get("tool_calls") else content


def strings(value: Any) -> Iterator[str]:
    """The strings in a value of JSON, keys and numbers included, in their order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
    elif value is not None:
        yield str(value)


def render_chat(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> tuple[str, list[Span]]:
    """The text of a chat, and the spans of it that the assistant wrote, calls of tools and ends of turn included.

    Most templates do not mark the assistant's part (`{% generation %}`). So the chat is rendered up to each of the
    assistant's turns, with the prompt that asks for it, and then with it: what came on top is the turn. That holds only
    where each rendering begins with the one before, which is checked. What users, systems and tools say is outside.

    Args:
        tokenizer: has a chat template.
        chat: `role`, `content` and what else the template reads, of each turn; and the tools.

    Raises:
        Mistake: the template refuses the chat, or rewrites earlier turns when later ones come.
    """
    text = _render(tokenizer, chat, chat.tools, prompt=False)
    turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
    return text, [_span(tokenizer, chat, turn, text) for turn in turns]


def _span(tokenizer: "PreTrainedTokenizerBase", chat: Chat, turn: int, text: str) -> Span:
    """Where in `text` the assistant's turn number `turn` stands."""
    before = _render(tokenizer, chat[:turn], chat.tools, prompt=True) if turn else _opening(tokenizer, chat)
    through = text if turn + 1 == len(chat) else _render(tokenizer, chat[: turn + 1], chat.tools, prompt=False)
    if not (text.startswith(through) and through.startswith(before)):
        raise Mistake(
            f"format=chat: the template changes earlier turns when later ones come, so turn {turn + 1} of a chat of "
            f"{len(chat)} cannot be told apart; use chats of one exchange, or a template without that"
        )
    return len(before), len(through.rstrip())


def _opening(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    """What stands before a chat that the assistant opens."""
    with_it = _render(tokenizer, chat[:1], chat.tools, prompt=False)
    content = str(chat[0]["content"] or "").strip()
    if not content or with_it.count(content) != 1:
        raise Mistake("format=chat: a chat opens with the assistant and its turn cannot be told apart; leave it out")
    return with_it[: with_it.index(content)]


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, tools: Sequence[Mapping[str, Any]], *, prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(f"format=chat: the chat template refuses a chat of the roles {roles} ({reason})") from error
    return str(rendered)
