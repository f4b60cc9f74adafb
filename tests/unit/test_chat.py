"""Of chats with tools the assistant's turns and calls are learnt, what users and tools say is not."""

import json
from pathlib import Path

import pytest
from data_support import make_tokenizer

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import encode as encode_module
from xlstm_distill.data.chat import Chat
from xlstm_distill.data.encode import Encoder
from xlstm_distill.data.sources import open_source

TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages -%}
{% if m.role == 'tool' -%}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>{{ m.content }}</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif -%}
{% else %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- if 'tool_calls' in m -%}
{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>
{%- endfor %}{% endif %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Like Qwen2.5's: answers of tools that follow one another share a turn of the user."""


def call(arguments) -> dict:
    return {"type": "function", "id": "c1", "function": {"name": "add", "arguments": arguments}}


CHAT = [
    {"role": "system", "content": "be exact"},
    {"role": "user", "content": "2+2 and 3+3?"},
    {"role": "assistant", "content": None, "tool_calls": [call({"a": 2, "b": 2}), call({"a": 3, "b": 3})]},
    {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
    {"role": "tool", "content": "6", "tool_call_id": "c2", "name": "add"},
    {"role": "assistant", "content": "4 and 6."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "any time"},
]
LEARNT = (
    '<tool_call>add {"a": 2, "b": 2}</tool_call><tool_call>add {"a": 3, "b": 3}</tool_call><|im_end|>'
    "4 and 6.<|im_end|>any time<|im_end|>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=TOOLS)


def read(path: Path, kind: str = "jsonl") -> list:
    return list(open_source("mine", Source(kind=kind, path=str(path), format="chat", field="messages"), path))


def written(path: Path, chat: list) -> Path:
    path.write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    return path


def learnt(folder: Path, chat: list) -> tuple[str, str]:
    encoder = Encoder(folder, "chat")
    (encoded,) = encoder([chat if isinstance(chat, Chat) else Chat(chat)])
    kept = [t for t, m in zip(encoded.tokens, encoded.mask, strict=True) if m]
    return encoder.tokenizer.decode(kept), encoder.tokenizer.decode(encoded.tokens)


def test_calls_and_answers_of_the_assistant_are_learnt_and_those_of_tools_are_not(tmp_path, folder):
    (chat,) = read(written(tmp_path / "a.jsonl", CHAT))
    told, whole = learnt(folder, chat)
    assert told == LEARNT
    assert whole == Encoder(folder, "chat").tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.count("<tool_response>") == 2


def test_arguments_given_as_json_text_are_what_they_say(tmp_path, folder):
    chat = json.loads(json.dumps(CHAT))
    for made in chat[2]["tool_calls"]:
        made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    (read_back,) = read(written(tmp_path / "a.jsonl", chat))
    assert learnt(folder, read_back)[0] == LEARNT


def test_parquet_which_fills_up_what_is_not_there_gives_the_same_chat(tmp_path, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "parquet") == read(written(tmp_path / "a.jsonl", CHAT))


DEFINITION = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}


@pytest.mark.parametrize("form", [[DEFINITION], json.dumps([DEFINITION]), [json.dumps(DEFINITION)]])
def test_a_row_s_definitions_of_tools_reach_the_template_and_are_not_learnt(tmp_path, folder, form):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": form}) + "\n", encoding="utf-8")
    (chat,) = read(path)
    told, whole = learnt(folder, chat)
    assert told == LEARNT
    wanted = Encoder(folder, "chat").tokenizer.apply_chat_template(CHAT, tools=[DEFINITION], tokenize=False)
    assert whole == wanted
    assert '"parameters": {"type": "object"' in whole


def test_definitions_in_parquet_lose_the_nulls_that_fill_them_up(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "required": ["zone"]}}}
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT, "tools": [DEFINITION, other], "id": 1}]), tmp_path / "a")
    (chat,) = read(tmp_path / "a", "parquet")
    assert chat.tools == [DEFINITION, other]


@pytest.mark.parametrize("nothing", [None, "", " ", []])
def test_a_row_without_tools_is_a_chat_without_them(tmp_path, nothing):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": nothing}) + "\n", encoding="utf-8")
    assert [list(chat.tools) for chat in read(path)] == [[]]


@pytest.mark.parametrize("tools", [["add"], "add", 7, [7], {"name": "add"}])
def test_what_defines_no_tool_is_named_with_its_line(tmp_path, tools):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": tools}) + "\n", encoding="utf-8")
    with pytest.raises(Mistake, match=r"a.jsonl, line 1: column tools holds no definitions of tools; expected a list"):
        read(path)


def test_half_a_surrogate_in_a_call_or_a_definition_is_named_too(tmp_path):
    half = "\ud800"
    for row in ({"messages": [*CHAT[:2], {**CHAT[2], "tool_calls": [call({"a": half})]}]},
                {"messages": CHAT, "tools": [{"name": half}]}):  # fmt: skip
        (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
        with pytest.raises(Mistake, match=r"a.jsonl, line 1: holds half of a surrogate pair"):
            read(tmp_path / "a.jsonl")


def test_a_chat_whose_assistant_only_calls_tools_is_not_empty(tmp_path):
    assert len(read(written(tmp_path / "a.jsonl", CHAT[1:4]))) == 1
    assert read(written(tmp_path / "b.jsonl", CHAT[:2])) == []


@pytest.mark.parametrize(
    "message",
    [{"role": "user"}, {"content": "x"}, {"role": "user", "content": 7}, "user: x", {"role": "user", "content": ["x"]}],
)
def test_what_is_no_message_is_named_with_its_line(tmp_path, message):
    with pytest.raises(Mistake, match=r"a.jsonl, line 1: column messages holds no chat; expected a list of messages"):
        read(written(tmp_path / "a.jsonl", [*CHAT, message]))


def test_a_template_that_cannot_render_a_call_is_one_line(tmp_path):
    plain = make_tokenizer(tmp_path, template="{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    with pytest.raises(Mistake, match="the chat template refuses a chat of the roles system, user, assistant, tool"):
        learnt(plain, CHAT)


def test_a_chat_that_is_too_long_to_handle_is_refused_and_not_cut(folder, monkeypatch):
    monkeypatch.setattr(encode_module, "LONGEST_CHAT", 100)
    with pytest.raises(Mistake, match=r"a chat of \d+ characters; at most 100, leave it out"):
        learnt(folder, CHAT)
