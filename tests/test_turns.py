"""What a turn, a call and a tool may say: taken, refused by name, or passed over where it says nothing."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.schema import parse_record
from data_utils.sources import DataError, Record

TIDE = {"name": "tide", "arguments": {"port": "Husum"}}
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def parse(row):
    return parse_record(Record(row, "data.jsonl:1", 0))


def called(**turn):
    return parse({"messages": [QUESTION, {"role": "assistant", **turn}, {"role": "tool", "content": "3"}, ANSWER]})


CALLS = [
    {"tool_calls": [{"name": "tide", "parameters": {"port": "Husum"}}]},
    {"tool_calls": [{"name": "tide", "args": {"port": "Husum"}, "id": None, "type": "tool_call", "index": 0}]},
    {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": '{"port": "Husum"}'}}]},
    {"tool_calls": [{"function": {"name": "tide", "arguments": {"port": "Husum", "n": None}}}]},
    {"tool_calls": '[{"name": "tide", "arguments": {"port": "Husum"}}]'},
    {"function_call": {"name": "tide", "arguments": '{"port": "Husum"}'}, "tool_calls": None},
]


@pytest.mark.parametrize("turn", CALLS, ids=range(len(CALLS)))
def test_every_way_to_write_a_call_gives_the_same(turn):
    message = called(content=None, **turn).messages[1]
    assert message["tool_calls"] == [{"type": "function", "function": TIDE}] and message["content"] == ""


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_calls_as_turns(role):
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": role, "value": '{"name": "tide", "parameters": {"port": "Husum"}}'},
            {"from": "tool_response", "value": "3"},
            {"from": "gpt", "value": "A"},
        ]
    }
    message, result = parse(row).messages[1:3]
    assert message["tool_calls"][0]["function"] == TIDE and result["role"] == "tool"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({**TIDE, "parameters": {"port": "Kiel"}}, r"tool_calls\[0\].parameters: says the same as 'arguments'"),
        ({**TIDE, "extra": 1}, r"tool_calls\[0\].extra: not supported in a call; remove it or convert the row"),
        ({"function": TIDE, "extra": 1}, r"tool_calls\[0\].extra: not supported in a call, beside its function"),
        ({"function": {**TIDE, "extra": 1}}, r"tool_calls\[0\].function.extra: not supported in a call's function"),
        ({"name": "tide", "arguments": 0}, r"tool_calls\[0\].arguments: expected an object, found a number"),
        ({"name": "tide", "arguments": '{"a": 1, "a": 2}'}, "the key 'a' stands twice in one object"),
        ({"name": "tide", "arguments": '{"a": 1e999}'}, "1e999 is too large a number"),
        ({"type": "custom", "name": "tide"}, r"tool_calls\[0\].type: 'custom' is no call of a function"),
    ],
)
def test_calls_that_cannot_be_taken(call, message):
    with pytest.raises(DataError, match=message):
        called(content="", tool_calls=[call])


def test_tools_are_taken_as_they_are_meant():
    parameters = {"type": "object", "properties": {"port": {"type": "string"}}}
    function = {"name": "tide", "description": "d", "parameters": parameters}
    text = '{"type": "object", "properties": {"port": {"type": "string"}}}'
    nulls = {**parameters, "properties": {"port": {"type": "string", "title": None}, "n": None}}
    for tool in (
        {"type": "function", "function": function},
        {"type": "function", **function},
        function,
        {"type": "function", "function": {**function, "parameters": text}},
        {"type": "function", "function": {**function, "parameters": nulls}, "strict": None},
    ):
        row = {"messages": [QUESTION, ANSWER], "tools": [tool]}
        assert parse(row).tools == ({"type": "function", "function": function},)
    for tool, message in (
        ({"type": "web_search"}, "expected a function with a name, found type 'web_search'"),
        ({"type": "function", "function": function, "extra": 1}, r"tools\[0\].extra: not supported in a tool"),
        ({"function": {**function, "parameters": "{"}}, r"tools\[0\].parameters: expected the parameters as JSON"),
    ):
        with pytest.raises(DataError, match=message):
            parse({"messages": [QUESTION, ANSWER], "tools": [tool]})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "text", "text": "x", "train": False}, r"content\[0\].train: not supported in a part"),
        ({"type": "text", "text": "x", "weight": 0}, r"content\[0\].weight: not supported in a part"),
        ({"type": "text", "value": "hi"}, r"content\[0\]: no 'text' in the part"),
        ({"type": "image_url", "image_url": "x"}, r"content\[0\]: image_url: only parts of text are supported"),
        ("hi", r"content\[0\]: expected a part such as .* found text"),
    ],
)
def test_parts_that_cannot_be_taken(part, message):
    with pytest.raises(DataError, match=message):
        parse({"messages": [QUESTION, {"role": "assistant", "content": [part]}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(key):
    message = parse({"messages": [QUESTION, {**ANSWER, key: "hm"}]}).messages[1]
    assert message["reasoning_content"] == message["thinking"] == "hm"
    with pytest.raises(DataError, match="a turn has one reasoning"):
        parse({"messages": [QUESTION, {**ANSWER, "reasoning": "a", "thinking": "b"}]})


def test_turns_of_either_kind_under_either_key():
    expected = parse({"messages": [QUESTION, ANSWER]}).messages
    assert parse({"conversations": [QUESTION, ANSWER]}).messages == expected
    other = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert parse({"messages": other}).messages == expected
    with pytest.raises(DataError, match=r"messages\[0\]: no .content. in the turn"):
        parse({"messages": [{**other[0], "role": "user"}, other[1]]})


# ---- keys that nobody knows ----

WHOLE = {
    "id": "a",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": TIDE}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}], "reasoning_content": "R"},
    ],
    "tools": [{"type": "function", "function": {"name": "tide", "description": "d", "parameters": {"type": "object"}}}],
}
SAYS_NOTHING = [None, "", [], {}]


def objects(value, path=()):
    """The paths of all objects in a JSON value whose keys are this package's, not the user's."""
    if isinstance(value, dict):
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if key not in ("arguments", "parameters"):
            yield from objects(inner, (*path, key))


def check_extra_keys(examples: int) -> None:
    names = st.text(min_size=1, max_size=12).filter(lambda name: name not in _KNOWN)
    says = (
        st.sampled_from(SAYS_NOTHING) | st.integers() | st.booleans() | st.text() | st.lists(st.integers(), max_size=2)
    )

    @given(st.sampled_from(list(objects(WHOLE))), names, says | st.dictionaries(st.text(), st.integers(), max_size=2))
    @settings(max_examples=examples)
    def check(path, name, value):
        row = copy.deepcopy(WHOLE)
        place = row
        for key in path:
            place = place[key]
        place[name] = value
        expected = parse(WHOLE)
        try:
            found = parse(row)
        except DataError as error:
            assert value not in SAYS_NOTHING or any(0xD800 <= ord(c) < 0xE000 for c in name), error
            return
        if value in SAYS_NOTHING:
            assert found.messages == expected.messages
        elif not path:
            assert len(found.unread) == 1 and found.messages == expected.messages
        else:  # a function's own keys are the template's, and have to stand in the rendering
            assert path == ("tools", 0, "function") and found.tools[0]["function"][name] == value

    check()


_KNOWN = {
    "conversations", "messages", "instruction", "output", "input", "history", "query", "response", "prompt",
    "completion", "text", "tools", "system", "chat_template_kwargs", "id", "functions", "train", "weight", "loss",
    "loss_weight", "image", "images", "video", "videos", "audio", "audios", "documents", "chosen", "rejected",
    "rejected_response", "label", "from", "value", "role", "content", "type", "function", "name", "arguments",
    "parameters", "args", "description", "strict", "tool_calls", "function_call", "reasoning_content", "reasoning",
    "thinking", "tool_call_id", "index",
}  # fmt: skip


def test_a_key_that_nobody_knows_is_named_or_refused():
    check_extra_keys(300)


@pytest.mark.slow
def test_ten_thousand_keys_that_nobody_knows_are_named_or_refused():
    check_extra_keys(10_000)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"images": ["cat.jpg"]}, "data.jsonl:1: images: not supported in a row; this trains on texts"),
        ({"train": False}, "data.jsonl:1: train: not supported in a row; write it into the turns"),
        ({"weight": 0.5}, "data.jsonl:1: weight: not supported in a row"),
        (
            {"rejected": "no"},
            "data.jsonl:1: rejected: not supported in a row; this trains on answers, not on preferences",
        ),
        ({"label": False}, "data.jsonl:1: label: not supported in a row"),
        ({"functions": [TIDE]}, "data.jsonl:1: functions: not supported in a row; call it 'tools'"),
    ],
)
def test_keys_of_a_row_that_would_change_what_is_trained(extra, message):
    with pytest.raises(DataError, match=message):
        parse({"messages": [QUESTION, ANSWER], **extra})


def test_formats_have_one_precedence():
    ultrachat = {"prompt": "Name a river.", "prompt_id": "abc1", "messages": [QUESTION, ANSWER]}
    alpaca = {"instruction": "Name a colour.", "input": "", "output": "Blue.", "text": "### Instruction: ..."}
    assert parse(ultrachat).messages == (QUESTION, ANSWER) and parse(ultrachat).unread == ("prompt", "prompt_id")
    assert parse(alpaca).messages[1]["content"] == "Blue." and parse(alpaca).unread == ("text",)
    swift = {"query": "Q2", "response": "A2", "history": [["Q", "A"]], "system": "S"}
    assert [m["content"] for m in parse(swift).messages] == ["S", "Q", "A", "Q2", "A2"]
    empty = {"messages": [{**QUESTION, "annotations": []}, {**ANSWER, "annotations": [], "refusal": None}]}
    assert parse(empty).messages == (QUESTION, ANSWER)
