"""A chat under the tokenizer's template, and which of its tokens the assistant wrote."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xlstm_distill.contract.exitcode import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[int]]:
    """Tokens of a chat and their loss mask: 1 for what the assistant wrote, its end-of-turn token included.

    Most templates do not mark the assistant's part (`{% generation %}`). So the chat is rendered up to each of the
    assistant's turns, with the prompt that asks for it, and then with it: what came on top is the turn. That holds only
    where each rendering begins with the one before, which is checked.

    Args:
        tokenizer: a fast one with a chat template.
        messages: `role` and `content` of each turn.

    Raises:
        Mistake: the template refuses the chat, or rewrites earlier turns when later ones come.
    """
    text = _render(tokenizer, messages, prompt=False)
    spans = [_span(tokenizer, messages, turn, text) for turn, m in enumerate(messages) if m["role"] == "assistant"]
    if not tokenizer.is_fast:
        raise Mistake("format=chat: needs a fast tokenizer (tokenizer.json) to find the assistant's tokens")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    mask = [int(any(start <= offset < end for start, end in spans)) for offset, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def _span(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], turn: int, text: str
) -> tuple[int, int]:
    """Characters [start, end) of `text` that are the assistant's turn number `turn`."""
    before = _render(tokenizer, messages[:turn], prompt=True) if turn else _opening(tokenizer, messages)
    through = _render(tokenizer, messages[: turn + 1], prompt=False)
    if not (text.startswith(through) and through.startswith(before)):
        raise Mistake(
            f"format=chat: the template changes earlier turns when later ones come, so turn {turn + 1} of a chat of "
            f"{len(messages)} cannot be told apart; use chats of one exchange, or a template without that"
        )
    return len(before), len(through.rstrip())


def _opening(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> str:
    """What stands before a chat that the assistant opens."""
    with_it = _render(tokenizer, messages[:1], prompt=False)
    content = messages[0]["content"].strip()
    if not content or with_it.count(content) != 1:
        raise Mistake("format=chat: a chat opens with the assistant and its turn cannot be told apart; leave it out")
    return with_it[: with_it.index(content)]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, ValueError, KeyError) as error:
        roles = ", ".join(m["role"] for m in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(f"format=chat: the chat template refuses a chat of the roles {roles} ({reason})") from error
    return str(rendered)
