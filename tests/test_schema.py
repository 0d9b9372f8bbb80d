import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.schema import FORMATS, Conversation, parse_record
from data_utils.sources import DataError, Record


def parse(row, **options):
    return parse_record(Record(row, "f.json:7", 0), **options)


def turns(*pairs):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


def messages(*pairs, **more):
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOL = {"name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_every_format_gives_the_same_conversation():
    rows = [
        turns(("human", "Q"), ("gpt", "A")),
        messages(("user", "Q"), ("assistant", "A")),
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
    ]
    parsed = [parse({**row, "id": 3}) for row in rows]
    assert all(each == parsed[0] for each in parsed)
    assert parsed[0].id == "3" and parsed[0].supervised_turns == [1] and parsed[0].where == "f.json:7"
    assert parse({"text": "T"}).text == "T" and parse({"text": "T"}).messages == ()


def test_alpaca_joins_instruction_and_input_and_takes_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]}
    parsed = parse(row)
    assert [(m["role"], m["content"]) for m in parsed.messages] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    assert parsed.supervised_turns == [2, 4]


def test_only_the_completion_of_a_prompt_is_trained():
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, ANSWER], "system": "S"}
    assert parse(row).supervised_turns == [4, 6]


def test_calls_of_tools_in_both_writings():
    old = parse(
        {
            **turns(
                ("user", "Q"),
                ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                ("observation", "R"),
                ("gpt", "A"),
            ),
            "tools": json.dumps([TOOL]),
        }
    )
    openai = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
    new = parse(
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [openai]},
                {"role": "tool", "content": "R"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    )
    assert old == new and old.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert old.tools == ({"type": "function", "function": TOOL},) and old.supervised_turns == [1, 3]
    assert parse({**turns(("user", "Q"), ("gpt", "A")), "tools": "[]"}).tools == ()


@pytest.mark.parametrize(
    ("given_keys", "weight"),
    [({}, 1), ({"train": False}, 0), ({"train": True}, 1), ({"loss": 0}, 0), ({"loss": 1}, 1), ({"weight": 0.5}, 0.5),
     ({"loss_weight": 2}, 2), ({"weight": None}, 1)],
)  # fmt: skip
def test_turns_say_their_weight(given_keys, weight):
    parsed = parse({"messages": [QUESTION, {**ANSWER, **given_keys}, QUESTION, ANSWER]})
    assert parsed.weights == {1: weight, 3: 1} and parsed.supervised_turns == ([1, 3] if weight else [3])


def test_the_last_turn_alone():
    parsed = parse({"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "weight": 0.5}]}, supervise="last")
    assert parsed.weights == {1: 0, 3: 0.5}


def test_a_format_can_be_forced():
    row = {"messages": [QUESTION, ANSWER], "text": "T"}
    assert parse(row).messages == (QUESTION, ANSWER) and parse(row).unread == ("text",)
    assert parse(row, data_format="text").text == "T"
    with pytest.raises(DataError, match="no 'instruction' in the row, which alpaca rows have"):
        parse(row, data_format="alpaca")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["x"], "f.json:7: a row must be an object"),
        ({"txt": "x"}, "f.json:7: no 'conversations' or 'messages' in the row (its keys: 'txt')"),
        ({"conversations": [], "messages": []}, "both 'conversations' and 'messages'"),
        ({"conversations": []}, "f.json:7: conversations: expected a list of turns, found an empty list"),
        ({"messages": "hi"}, "messages: expected a list of turns as JSON: Expecting value"),
        ({"messages": "7"}, "messages: expected a list of turns, found a number"),
        ({"conversations": ["hi"]}, "conversations[0]: a turn must be an object"),
        ({"conversations": [{"from": "user"}]}, "conversations[0]: no 'value' in the turn"),
        (turns(("user", "Q"), ("robot", "A")), "f.json:7: conversations[1].from: 'robot' is not a role (user, human,"),
        (turns(("user", 3)), "conversations[0].value: expected text, found a number"),
        (turns(("user", "Q"), ("gpt", " \n")), "conversations[1].value: empty assistant turn"),
        (turns(("gpt", "A")), "conversations[0].from: a conversation cannot begin with the assistant"),
        (turns(("system", "S"), ("gpt", "A")), "conversations[1].from: a conversation cannot begin"),
        (turns(("user", "Q"), ("system", "S")), "conversations[1].from: a system turn can only be the first"),
        (turns(("user", "\ud800")), "conversations[0].value: holds half a surrogate pair"),
        ({"messages": [{**QUESTION, "tool_calls": [CALL]}]}, "messages[0].tool_calls: only the assistant calls tools"),
        ({"messages": [{**QUESTION, "mood": "x"}]}, "messages[0].mood: not supported in a turn"),
        ({"messages": [{**QUESTION, "weight": 1}]}, "messages[0].weight: only assistant turns are trained"),
        ({"messages": [QUESTION, {**ANSWER, "train": 1}]}, "messages[1].train: expected true or false"),
        ({"messages": [QUESTION, {**ANSWER, "weight": -1}]}, "messages[1].weight: expected 0, or a number up to 1000"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 10**400}]}, "messages[1].weight: expected 0, or a number up to"),
        ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f", "x": Decimal(1)}]}, "x: a Decimal is no JSON value"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 1, "loss": 1}]}, "messages[1].weight: says the same as 'loss'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0]: image_url: only parts of"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}]}, "expected a call with"),
        (
            {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "messages[1].tool_calls[0].arguments: expected the arguments as JSON",
        ),
        (turns(("user", "Q"), ("function_call", "f()")), "conversations[1].value: expected a call as JSON"),
        ({**turns(("user", "Q")), "tools": [{}]}, "f.json:7: tools[0]: expected a function with a name"),
        ({**turns(("user", "Q")), "tools": "no"}, "f.json:7: tools: expected a list of tools as JSON"),
        ({**turns(("user", "Q")), "functions": [TOOL]}, "functions: not supported in a row; call it 'tools'"),
        ({**turns(("system", "S"), ("user", "Q")), "system": "T"}, "f.json:7: system: the turns begin with a system"),
        ({**turns(("user", "Q")), "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object"),
        ({"instruction": "Q", "output": "A", "history": [["a"]]}, "history: expected a list of [question, answer]"),
        ({"instruction": "Q", "output": ""}, "f.json:7: output: empty assistant turn"),
        ({"instruction": "Q"}, "f.json:7: no 'output' in the row, which alpaca rows have"),
        ({"text": "T", "system": "S"}, "f.json:7: system: has no effect on plain text"),
        ({"text": " "}, "f.json:7: text: empty"),
    ],
)
def test_mistakes_are_named_with_file_line_and_field(row, message):
    with pytest.raises(DataError) as error:
        parse(row)
    assert message in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON,
        "content": st.text(max_size=5) | JSON,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation"]) | JSON,
        "value": st.text(max_size=5) | JSON,
        "tool_calls": st.lists(st.just(CALL) | JSON, max_size=2) | JSON,
        "reasoning_content": JSON,
        "weight": JSON,
        "train": JSON,
    },
)
ROW = JSON | st.fixed_dictionaries(
    {},
    optional={
        **{key: st.lists(TURN, max_size=4) | JSON for key in ("conversations", "messages", "prompt", "completion")},
        **{key: st.text(max_size=5) | JSON for key in ("instruction", "input", "output", "text", "system")},
        **{key: JSON for key in ("history", "tools", "chat_template_kwargs", "id")},
    },
)


def never_a_traceback(row, data_format):
    try:
        parsed = parse(row, data_format=data_format)
    except DataError as error:
        assert str(error).startswith("f.json:7: ")
    else:
        assert isinstance(parsed, Conversation)


@given(ROW, st.none() | st.sampled_from(sorted(FORMATS)))
@settings(max_examples=300)
def test_no_row_gives_a_traceback(row, data_format):
    never_a_traceback(row, data_format)


@pytest.mark.slow
@given(ROW, st.none() | st.sampled_from(sorted(FORMATS)))
@settings(max_examples=10_000)
def test_no_row_at_all_gives_a_traceback(row, data_format):
    never_a_traceback(row, data_format)
