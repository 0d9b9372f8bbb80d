import pytest

from data_utils.schema import parse_record
from data_utils.sources import DataError, Record


def parse(row):
    return parse_record(Record(row, "f.json:7", 0))


def test_both_formats_give_the_same_conversation():
    old = parse({"id": 3, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]})
    new = parse({"id": "3", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert old == new
    assert old.id == "3" and old.supervised_turns == [1] and old.where == "f.json:7"


def turns(*pairs):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["x"], "f.json:7: a row must be an object"),
        ({"text": "x"}, "f.json:7: no 'conversations' or 'messages' in the row (its keys: 'text')"),
        ({"conversations": [], "messages": []}, "both 'conversations' and 'messages'"),
        ({"conversations": []}, "f.json:7: conversations: expected a list of turns, found an empty list"),
        ({"messages": "hi"}, "messages: expected a list of turns, found text"),
        ({"conversations": ["hi"]}, "conversations[0]: a turn must be an object"),
        ({"conversations": [{"from": "user"}]}, "conversations[0]: no 'value' in the turn"),
        (turns(("user", "Q"), ("robot", "A")), "f.json:7: conversations[1].from: 'robot' is not a role (user, human,"),
        (turns(("user", 3)), "conversations[0].value: expected text, found a number"),
        (turns(("user", "Q"), ("gpt", " \n")), "conversations[1].value: empty assistant turn"),
        (turns(("gpt", "A")), "conversations[0].from: a conversation cannot begin with the assistant"),
        (turns(("system", "S"), ("gpt", "A")), "conversations[1].from: a conversation cannot begin"),
        (turns(("user", "Q"), ("system", "S")), "conversations[1].from: a system turn can only be the first"),
        (turns(("user", "\ud800")), "conversations[0].value: holds half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "Q", "tool_calls": []}]}, "messages[0].tool_calls: not supported"),
        ({**turns(("user", "Q")), "tools": [{}]}, "f.json:7: tools: not supported"),
    ],
)
def test_mistakes_are_named_with_file_line_and_field(row, message):
    with pytest.raises(DataError) as error:
        parse(row)
    assert message in str(error.value)
