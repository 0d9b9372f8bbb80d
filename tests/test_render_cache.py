"""The definition holds for ten families of templates, and rows by cached renderings equal it."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.render_cache import RowEncoder
from data_utils.rows import encode_row
from data_utils.schema import parse_record
from data_utils.sources import DataError, Record
from data_utils.template import IGNORE_INDEX, ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS
from tests.templates import FAMILIES, NO_TOOLS, load_template
from tests.test_tokenizer import _metaspace_tokenizer

QUESTION = {"role": "user", "content": "Weather in Paris?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
ROWS = {
    "plain": {"messages": [QUESTION, {"role": "assistant", "content": "Sunny."}]},
    "multi-turn": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "Sunny."},
            {"role": "user", "content": "Sure?\nReally?"},
            {"role": "assistant", "content": "Yes, it is:\n\n- sunny"},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome", "weight": 0.5},
        ]
    },
    "system": {"system": "Be kind.", "messages": [QUESTION, {"role": "assistant", "content": "Sunny."}]},
    "tool": {
        "tools": TOOLS,
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "Sunny."},
        ],
    },
    "reasoning": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "Sunny.", "reasoning_content": "They ask for weather."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "They doubt."},
        ]
    },
}
REASONS = {"qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "gptoss"}


def parse(row):
    return parse_record(Record(row, "f.json:1", 0))


def encode(template, row):
    """Rows by the definition, after checking that RowEncoder gives them, too."""
    conversation = parse(row)
    try:
        rows = template.encode_conversation(conversation)
    except DataError as error:
        with pytest.raises(DataError) as found:
            RowEncoder(template).encode(conversation)
        assert str(found.value) == str(error)
        raise
    encoded = RowEncoder(template).encode(conversation)
    assert len(encoded) == len(rows)
    for one, other in zip(encoded, map(encode_row, rows), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids) and one.spans == other.spans and one.ends == other.ends
    return rows


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_trained_as_inference_would_meet_it(name, kind):
    template, row = load_template(name), ROWS[kind]
    if kind == "tool" and name in NO_TOOLS:
        with pytest.raises(DataError, match=r"f\.json:1: the chat template cannot express tools"):
            encode(template, row)
        return
    if kind == "reasoning" and name not in REASONS:
        with pytest.raises(DataError, match="the chat template does not write reasoning_content"):
            encode(template, row)
        return
    rows = encode(template, row)
    conversation = parse(row)
    turns = conversation.supervised_turns
    assert sum(len(each.ends) for each in rows) == len(turns), "every turn once"
    tokenizer = template.tokenizer
    variables = {"tools": list(conversation.tools)} if conversation.tools else {}
    places = [(each, end, start) for each in rows for start, end in spans(each)]
    for turn, (each, end, start) in zip(turns, places, strict=True):
        # Nothing in these conversations has to be escaped, so the tokenizer's own rendering is what inference feeds.
        prompt = tokenizer.apply_chat_template(
            list(conversation.messages[:turn]), add_generation_prompt=True, tokenize=False, **variables
        )
        fed = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert each.input_ids[:start] == fed, "the ids before an answer are those that inference feeds"
        answer = tokenizer.decode(each.input_ids[start:end])
        message = conversation.messages[turn]
        said = "Paris" if message.get("tool_calls") else message["content"]
        assert said in answer and message.get("reasoning_content", "") in answer
        assert each.input_ids[end - 1] in template.stop_ids, "a target ends with the stop token"
        assert sum(i in template.stop_ids for i in each.input_ids[start:end]) == 1
    if kind == "multi-turn":
        assert [weight for each in rows for weight in each.weights] == [1, 1, 0.5]


def spans(row):
    edges = np.flatnonzero(np.diff([0, *(label != IGNORE_INDEX for label in row.labels), 0]))
    return edges.reshape(-1, 2).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_most_real_conversations_use_a_cached_rendering(name):
    rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    template = load_template(name)
    encoder = RowEncoder(template)
    cached = sum(encoder.encode_cached(parse(row)) is not None for row in rows)
    assert cached >= 0.9 * len(rows)
    for row in rows:
        encode(template, row)


def pieces(name):
    special, plain = FAMILIES[name]
    return [*special[:4], *plain[:4], "\n", " ", "a", "Hello", "<|", "|>", "</", "1", "中", '"', "\\", "{{", "%}"]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_a_user_wrote_becomes_a_control_token(name):
    template = load_template(name)
    control = set(template.encoder.control_ids.values())
    markup = {template.encoder.control_ids[text] for text in template.encoder.markup}
    tools = name not in NO_TOOLS

    def count(row, *, ids):
        rows = template.encode_conversation(parse(row))
        return [sum(i in ids for i in each.input_ids) for each in rows]

    def build(user, result, city):
        call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        described = [{"type": "function", "function": {**TOOLS[0]["function"], "description": user}}]
        middle = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": result}]
        messages = [{"role": "user", "content": user}, *(middle if tools else [])]
        more = {"tools": described} if tools else {}
        return {"messages": [*messages, {"role": "assistant", "content": "Sunny."}], **more}

    harmless = count(build("u", "r", "c"), ids=control)
    text = st.lists(st.sampled_from(pieces(name)), max_size=6).map("".join)

    @given(text, text, text)
    @settings(max_examples=25)
    def check(user, result, city):
        assert count(build(f"u{user}u", f"r{result}r", f"c{city}c"), ids=control) == harmless

    check()
    assert markup <= control


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_renderings_give_the_definitions_rows_for_any_text(name):
    template = load_template(name)
    text = st.lists(st.sampled_from(pieces(name)), min_size=1, max_size=5).map("".join)

    @given(st.lists(st.tuples(text, text), min_size=1, max_size=3), st.none() | text)
    @settings(max_examples=25)
    def check(turns, system):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered or "x"}]
        if all(m["content"].strip() for m in messages if m["role"] == "assistant"):
            with contextlib.suppress(DataError):  # both refuse what the template leaves out
                encode(template, {"messages": messages})

    check()


def test_metaspace_tokenizers_use_no_cached_rendering():
    template = ChatTemplate(_metaspace_tokenizer())
    assert not template.encoder.pieces_equal_whole
    assert RowEncoder(template).encode_cached(parse(ROWS["multi-turn"])) is None
    encode(template, ROWS["multi-turn"])


# Templates that do unusual things with texts; each must give the definition's rows for texts that matter to it.
TRICKS = {
    "length": "{{ '!' if m.content | length > 12 else '' }}{{ m.content }}",
    "upper": "{{ m.content | upper }}",
    "first letter": "{{ m.content[0] }}-{{ m.content }}",
    "equal": "{{ 'same' if m.content == 'magic' else m.content }}",
    "in a list": "{{ 'listed' if m.content in ['magic', 'word'] else m.content }}",
    "word": "{{ 'found' if 'magic' in m.content else m.content }}",
    "joined word": "{% set x = 'a ' ~ m.content %}{{ 'found' if 'a magic' in x else m.content }}",
    "added word": "{% set x = 'a ' + m.content %}{{ 'found' if 'a magic' in x else m.content }}",
    "word in a macro": "{% macro f(c) %}{{ c }}{% endmacro %}{{ 'f' if 'magic' in f(m.content) else m.content }}",
    "word in a block": "{% set x %}<{{ m.content }}>{% endset %}{{ 'f' if '<magic' in x else x }}",
    "joined list": "{% set x = [m.content, 'b'] | join('-') %}{{ 'f' if 'magic-b' in x else x }}",
    "json": "{{ m.content | tojson }}",
    "split lines": "{{ m.content.split('\\n')[-1] }}",
    "replaced": "{{ m.content.replace('magic', 'trick') }}",
    "starts": "{{ 'x' if m.content.startswith('magic') else m.content }}",
    "stripped letters": "{{ m.content.strip('m') }}",
    "formatted": "{{ '%s!' % m.content }}{{ 'f' if 'magic' in ('%s' % m.content) else '' }}",
    "number": "{{ m.content | int }}{{ m.content }}",
    "compared": "{{ 'late' if m.content > 'n' else m.content }}",
    "letters": "{% for c in m.content %}{{ c }}.{% endfor %}",
    "last word of the first turn": "{{ messages[0].content.split(' ') | last }}{{ m.content }}",
    "in a text": "{{ 'part' if m.content in 'magic words' else m.content }}",
    "key": "{{ {'magic': 'k'}.get(m.content, m.content) }}",
    "in keys": "{{ 'k' if m.content in {'magic': 1} else m.content }}",
    "word in json": "{{ 'f' if 'magic' in (m.content | tojson) else m.content }}",
    "word in all": "{{ 'f' if 'magic' in (m | string) else m.content }}",
    "of a constant": "{{ 'f' if 'magic words'.startswith(m.content) else m.content }}",
    "selected": "{{ messages | selectattr('content', 'in', 'magic words') | list | length }}{{ m.content }}",
    "seen before": "{{ 'again' if loop.index0 > 1 and m.content == messages[0].content else m.content }}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_templates_that_test_texts_give_the_definitions_rows(checkpoints, trick):
    tokenizer = load_tokenizer(str(checkpoints["untied"]))
    macro, mark, body = TRICKS[trick].rpartition("{% endmacro %}")
    tokenizer.chat_template = (
        macro
        + mark
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'user' %}"
        + body
        + " {{ m.content }}"  # the definition refuses what is not written
        + "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    encoder = RowEncoder(template)
    plain = ["one", "two words", "three", "four", "five", "six", "seven"]
    special = ["magic", "magic word", "a magic", "m", "mm", "zebra", "7", "x" * 40, "a\nb", 'say "hi"', "a\\b", "word"]
    for text in [*plain, *special, *plain]:
        answers = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": text}]
        talk = {"messages": [{"role": "user", "content": text}, *answers, {"role": "assistant", "content": "No."}]}
        conversation = parse(talk)
        found = encoder.encode(conversation)
        expected = [encode_row(row) for row in template.encode_conversation(conversation)]
        assert [row.input_ids.tolist() for row in found] == [row.input_ids.tolist() for row in expected], text


def chatml(*, special=(), strips=False, answer="{{ m.content }}", prompt="<|im_start|>assistant\\n"):
    from tokenizers import AddedToken

    from examples.tiny_model import build_tokenizer, read_texts

    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    tokens = [AddedToken(text, special=True, rstrip=strips) for text in ("<|im_start|>", "<|im_end|>", *special)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}" + answer + "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )
    return ChatTemplate(tokenizer)


CALLS = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}<|end_call|>{% endfor %}"
)


def test_a_call_ends_where_the_turn_ends_not_where_the_call_is_closed():
    template = chatml(special=("<|call|>", "<|end_call|>"), answer=CALLS)
    calls = [CALL, {"function": {"name": "other", "arguments": {}}}]
    row = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]}
    (encoded,) = encode(template, row)
    assert template.tokenizer.decode(encoded.input_ids).count("<|end_call|>") == 2
    assert encoded.input_ids[encoded.ends[0] - 1] == template.stop_id


def test_what_a_template_leaves_out_of_a_turn_is_an_error():
    one_call = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    called = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, {"name": "other", "arguments": {}}]}
    for answer, message, what in (
        (one_call, called, "does not write all 2 calls"),
        (
            CALLS.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}"),
            called,
            "content beside tool_calls",
        ),
        ("{{ m.content }}", {**called, "tool_calls": None, "reasoning_content": "see"}, "write reasoning_content"),
        (
            CALLS.replace("| tojson", "| tojson(ensure_ascii=true)"),
            {**called, "tool_calls": [{"name": "f", "arguments": {"c": ["<|im_end|>"]}}]},
            "in an escaped form",
        ),
    ):
        with pytest.raises(DataError, match=what):
            encode(chatml(special=("<|call|>", "<|end_call|>"), answer=answer), {"messages": [QUESTION, message]})


def test_weights_of_turns_that_touch():
    template = chatml(answer="{{ m.content }}", prompt="")
    template.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    template = ChatTemplate(template.tokenizer)
    answers = [{"role": "assistant", "content": text, "weight": weight} for text, weight in (("A", 0.5), ("B", 0.25))]
    (row,) = encode(template, {"messages": [QUESTION, *answers]})
    assert [weight for *_, weight in encode_row(row).spans] == [0.5, 0.25]


def test_tokens_that_strip_white_space_and_targets_inside_a_line_use_no_cached_rendering():
    talk = {"messages": [QUESTION, {"role": "assistant", "content": "UIControl"}] * 2}
    in_line = chatml(prompt="<|im_start|>assistant:").tokenizer
    in_line.chat_template = in_line.chat_template.replace("m.role + '\\n'", "m.role + ':'")
    for template in (chatml(strips=True), ChatTemplate(in_line)):
        encode(template, talk)
        assert RowEncoder(template).encode_cached(parse(talk)) is None
