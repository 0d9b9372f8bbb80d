"""The variables of a chat template: what a caller can set, and nothing else."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_utils.sources import DataError
from data_utils.template_source import find_variables, list_literals
from data_utils.tokenizer import load_tokenizer
from tests.templates import FAMILIES, FOLDER, load_template

EXPECTED = {
    "qwen2_5": set(),
    "qwen3": {"enable_thinking"},
    "qwen3_6": {"add_vision_id", "enable_thinking", "preserve_thinking"},
    "llama3_1": {"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"},
    "gptoss": {"builtin_tools", "model_identity", "reasoning_effort"},
    "deepseekv3": set(),
    "nemotron_3_super": {"enable_thinking", "low_effort", "truncate_history_thinking"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_variables_of_known_templates(name):
    assert find_variables((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")) == EXPECTED[name]


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{% set x = messages[0] %}{{ x }}", set()),
        ("{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}", {"x"}),
        ("{% set x = x or 1 %}{{ x }}", {"x"}),
        ("{% set x = x | default(1) %}{{ x }}", {"x"}),
        ("{% for x in xs %}{{ x }}{% endfor %}", {"xs"}),
        ("{% for x in x %}{{ x }}{% endfor %}", {"x"}),
        ("{% if a %}{% set x = 1 %}{% else %}{% set x = 2 %}{% endif %}{{ x }}", {"a"}),
        ("{% macro f(x) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}", {"y"}),
        ("{{ raise_exception('no') }}{{ strftime_now('%d') }}{{ range(3) }}{{ bos_token }}{{ documents }}", set()),
        ("{% generation %}{{ x }}{% endgeneration %}", {"x"}),
        ("{{ messages[0].thinking }} thinking {{ 'thinking' }}", set()),
    ],
)
def test_a_variable_is_what_is_read_before_it_is_assigned(template, expected):
    assert find_variables(template) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_every_variable_is_read_when_it_is_set(name):
    """By running the template: it asks its surroundings for the name."""
    source = load_template(name).tokenizer.chat_template
    code = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).compile(source, raw=True)
    assert all(f"resolve('{variable}')" in code for variable in find_variables(source))


def test_literals_are_what_is_written_and_what_is_looked_for():
    assert list_literals("a{{ 'b' }}{% if 'c' in messages %}{# d #}e{% endif %}") == ["a", "e", "b", "c"]


@pytest.mark.parametrize("kwargs", ['{"thinking": false}', '{"content": 1}', '{"eos_token": "x"}', '{"no name": 1}'])
def test_defaults_that_the_template_does_not_read_are_refused(kwargs, checkpoints):
    template = FOLDER / "qwen3.jinja"
    with pytest.raises(DataError, match=r"the chat template has no variable .*; it has enable_thinking$"):
        load_tokenizer(str(checkpoints["untied"]), chat_template=str(template), chat_template_kwargs=kwargs)


def test_a_switch_is_found_by_what_it_does():
    assert {name: load_template(name).thinking_switch for name in ("qwen2_5", "qwen3", "qwen3_6", "gptoss")} == {
        "qwen2_5": None,
        "qwen3": "enable_thinking",
        "qwen3_6": "enable_thinking",
        "gptoss": None,
    }
