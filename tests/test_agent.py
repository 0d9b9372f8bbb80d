"""examples/agent.py against serve.py: two tools, each called once, then an answer."""

import datetime

import pytest

from tests.conftest import needs

needs("openai")


from examples import agent
from tests.serving import serving
from tests.tool_model import write_tool_model

QUESTION = "How old is the Eiffel Tower?"


def calls(function, **arguments):
    called = {"name": function, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}


@pytest.mark.slow
def test_the_agent_calls_both_tools_and_answers(tokenizer, tmp_path, capsys, monkeypatch):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2026, 12, 1)

    monkeypatch.setattr(agent, "date", Day)
    turns = [
        {"role": "system", "content": "Today is 2026-12-01."},
        {"role": "user", "content": QUESTION},
        calls("year_built", name="Eiffel Tower"),
        {"role": "tool", "content": "1889"},
        calls("subtract", a=2026, b=1889),
        {"role": "tool", "content": "137"},
        {"role": "assistant", "content": "It is 137 years old."},
    ]
    model = write_tool_model(tokenizer, tmp_path / "agent", turns, agent.TOOLS)
    with serving(model) as served:
        said = agent.answer(served.client(), "agent", QUESTION)
    shown = capsys.readouterr().out.splitlines()
    assert said == "It is 137 years old."
    assert shown[-2:] == [
        'year_built({"name": "Eiffel Tower"}) -> 1889',
        'subtract({"a": 2026, "b": 1889}) -> 137',
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("subtract", '{"a": 3, "b": 1}', "2"),
        ("year_built", '{"name": "x"}', "not known"),
        ("divide", "{}", "error: KeyError: 'divide'"),
        ("subtract", "{", "error: JSONDecodeError: "),
        ("subtract", '{"a": 3}', "error: TypeError: "),
    ],
)
def test_a_wrong_call_tells_the_model_its_error(name, arguments, result):
    from types import SimpleNamespace

    call = SimpleNamespace(function=SimpleNamespace(name=name, arguments=arguments))
    assert agent.run_call(call).startswith(result)
