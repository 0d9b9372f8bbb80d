"""No control token is made of what users wrote, whatever a template cuts out of their texts."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.schema import parse_record
from data_utils.sources import DataError, Record
from data_utils.template import ChatTemplate
from tests.templates import FAMILIES, NO_TOOLS, load_template

CUT = ["<think>", "</think>", "<think>\nhm\n</think>\n\n", "<|channel|>", "<tool_call>", "\n", " ", "a", "</thi", "nk>"]


@st.composite
def broken(draw, template: ChatTemplate):
    """A text with a control token in two or three parts, and what a template might cut out between them."""
    everywhere = sorted(template.encoder.control_ids)
    written = [text for text in everywhere if template.encoder.control_ids[text] in template.encoder.template_ids]
    control = draw(st.sampled_from(written))
    cuts = sorted(draw(st.lists(st.integers(1, max(1, len(control) - 1)), min_size=1, max_size=2)))
    parts = [control[a:b] for a, b in zip([0, *cuts], [*cuts, len(control)], strict=True)]
    one = st.one_of(st.sampled_from(CUT), st.sampled_from(CUT), st.sampled_from(everywhere))
    between = st.lists(one, min_size=1, max_size=2).map("".join)
    text = parts[0] + "".join(draw(between) + part for part in parts[1:])
    return draw(st.sampled_from(["", "say ", "<think>"])) + text + draw(st.sampled_from(["", " it", "</think>x"]))


def count_control(template: ChatTemplate, ids: list[int]) -> Counter[str]:
    """Control tokens that are no markup; markup in an answer is what generation produces."""
    names = {i: text for text, i in template.encoder.control_ids.items() if text not in template.encoder.markup}
    return Counter(names[i] for i in ids if i in names)


def conversation(text: str, place: str) -> dict:
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": text}}}
    messages = {
        "user": [{"role": "user", "content": text}, answer],
        "system": [{"role": "system", "content": text}, question, answer],
        "answer": [question, {"role": "assistant", "content": text}],
        "history": [question, {"role": "assistant", "content": text, "weight": 0}, question, answer],
        "reasoning": [question, {**answer, "reasoning_content": text}],
        "call": [question, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "result": [
            question,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": text},
            answer,
        ],
    }
    return {"messages": messages[place]}


PLACES = ("user", "system", "answer", "history", "reasoning", "call", "result")


def check(template: ChatTemplate, examples: int, places: tuple[str, ...]) -> None:
    def encode(text: str, place: str) -> list[Counter[str]]:
        rows = template.encode_conversation(parse_record(Record(conversation(text, place), "f:1", 1)))
        return [count_control(template, row.input_ids) for row in rows]

    expected = {}
    for place in places:
        try:
            expected[place] = encode("plain", place)
        except DataError:  # nothing of this kind can be written with it
            continue

    @settings(max_examples=examples)
    @given(broken(template), st.sampled_from(sorted(expected)))
    def nothing_joins(text, place):
        try:
            found = encode(text, place)
        except DataError as error:
            assert str(error).startswith("f:1: ")
            return
        assert found == expected[place], (text, place)
        messages = conversation(text, place)["messages"][:-1]
        if messages[-1]["role"] == "user":
            wanted = conversation("plain", place)["messages"][:-1]
            prompts = [count_control(template, template.encode_prompt(each)) for each in (messages, wanted)]
            assert prompts[0] == prompts[1], (text, place)

    nothing_joins()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_control_token_is_left_of_what_a_template_cuts(name):
    check(load_template(name), 50, PLACES[:5] if name in NO_TOOLS else PLACES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_control_token_is_left_of_ten_thousand_cut_texts(name):
    check(load_template(name), 1000, PLACES[:5] if name in NO_TOOLS else PLACES)


CUTS = [
    "m.content.split('<think>')[0] + m.content.split('</think>')[-1]",
    "m.content.split('</think>')[-1]",
    "m.content | replace('<think>', '') | replace('</think>', '')",
    "m.content | replace('\\n', '')",
    "m.content.split(' ') | join('')",
    "m.content.split('\\n')[0].strip() + m.content.split('\\n')[-1].strip()",
]


@pytest.mark.parametrize("cut", CUTS)
def test_no_control_token_is_left_by_templates_that_cut_any_text(cut):
    tokenizer = load_template("qwen3").tokenizer
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (" + cut + ") + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    check(ChatTemplate(tokenizer), 200, ("user", "system", "answer", "history"))


def test_borders_do_not_change_the_ids_of_a_text():
    template = load_template("qwen2_5")
    text = "if a < b: print('|'), im_end|> of a_b"
    assert template.encoder.needs_escape(text)
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    (found,) = template.encode_conversation(parse_record(Record(row, "f:1", 1)))
    rendered = template.tokenizer.apply_chat_template(row["messages"], tokenize=False).rstrip("\n")
    assert found.input_ids == template.tokenizer(rendered, add_special_tokens=False).input_ids
