"""Nothing that a conversation says is lost in silence: it stands in the rows, or the row is refused by name."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.chunks import encode_chunk
from data_utils.completeness import find_lost_answer, find_lost_context, find_lost_tool, stands_in
from data_utils.conversations import DataOptions
from data_utils.render_cache import RowEncoder
from data_utils.schema import parse_record
from data_utils.sources import DataError, Record
from data_utils.template import ChatTemplate
from tests.templates import FAMILIES, FOLDER, NO_TOOLS, load_template

NO_MARKUP = re.compile(r"(?!)")


def parse(row):
    return parse_record(Record(row, "data.jsonl:1", 0))


def talk(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


@st.composite
def conversations(draw, tools: bool):
    """(row, words that must be trained or shown): each text holds a word of its own."""
    words: list[str] = []

    def word() -> str:
        words.append(f"w{len(words)}q")
        return words[-1]

    def arguments():
        kinds = [
            lambda: word(),
            lambda: [word(), {word(): word()}],
            lambda: {word(): word()},
            lambda: 7,
            lambda: True,
        ]
        return {word(): draw(st.sampled_from(kinds))() for _ in range(draw(st.integers(0, 2)))}

    row: dict = {"messages": []}
    if draw(st.booleans()):
        row["messages"].append({"role": "system", "content": word()})
    if tools and draw(st.booleans()):
        properties = {word(): {"type": "string", "description": word(), "enum": [word()]}}
        function = {"name": word(), "description": word(), "parameters": {"type": "object", "properties": properties}}
        row["tools"] = [{"type": "function", "function": function}]
    for _ in range(draw(st.integers(1, 3))):
        row["messages"].append({"role": "user", "content": word()})
        if tools and draw(st.booleans()):
            calls = [{"name": word(), "arguments": arguments()} for _ in range(draw(st.integers(1, 2)))]
            row["messages"].append(
                {"role": "assistant", "content": draw(st.sampled_from(["", "x"])), "tool_calls": calls}
            )
            row["messages"] += [{"role": "tool", "content": word()} for _ in calls]
        forms = [
            lambda: {"content": word()},
            lambda: {"content": f"<think>\n{word()}\n</think>\n\n{word()}"},
            lambda: {"content": f"{word()} <think>{word()}</think> {word()} <think>{word()}</think>{word()}"},
            lambda: {"content": f"{word()}</think>{word()}"},
            lambda: {"content": f"[THINK]{word()}[/THINK]{word()}"},
            lambda: {"content": word(), "reasoning_content": word()},
            lambda: {"content": f"{word()}\n{word()}  ", "weight": 0.5},
        ]
        row["messages"].append({"role": "assistant", **draw(st.sampled_from(forms))()})
    return row, words


def check_family(name: str, examples: int, label_mask: str = "assistant") -> None:
    template = ChatTemplate(load_template(name).tokenizer, label_mask=label_mask)
    encoder = RowEncoder(template)

    @given(conversations(tools=name not in NO_TOOLS and label_mask != "qwen"))
    @settings(max_examples=examples)
    def check(drawn):
        row, words = drawn
        try:
            rows = encoder.encode(parse(row))
        except DataError as error:
            assert str(error).startswith("data.jsonl:1: ")
            return
        shown = "".join(template.tokenizer.decode(each.input_ids) for each in rows)
        lost = [word for word in words if word not in shown]
        assert not lost, f"{lost} of {json.dumps(row)}"

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_word_stands_in_a_row_or_the_row_is_refused(name):
    check_family(name, 40)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_6"])
def test_every_word_is_trained_by_the_original_recipe_or_the_row_is_refused(name):
    check_family(name, 60, "qwen")


@pytest.mark.parametrize(
    "answer, template",
    [
        ({"content": "yes", "reasoning_content": "REASONS"}, "qwen2_5"),
        ({"content": "yes", "reasoning_content": "REASONS"}, "qwen3"),
        ({"content": "<think>\nREASONS\n</think>\n\nyes"}, "qwen3"),
    ],
)
def test_the_original_recipe_loses_no_reasoning(answer, template):
    """In an earlier turn, where Qwen3's template drops it, and under one that has no place for it."""
    row = talk("Q", "-", "Q2", "A2")
    row["messages"][1] = {"role": "assistant", **answer}
    recipe = ChatTemplate(load_template(template).tokenizer, label_mask="qwen")
    with pytest.raises(DataError, match=r"^data.jsonl:1: messages\[1\].*use --label_mask assistant"):
        recipe.encode_conversation(parse(row))
    if template == "qwen3":
        row["messages"] = row["messages"][:2]
        (encoded,) = recipe.encode_conversation(parse(row))
        trained = [label for label in encoded.labels if label >= 0]
        assert "<think>\nREASONS\n</think>\n\nyes" in recipe.tokenizer.decode(trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_word_of_ten_thousand_conversations_stands_in_a_row_or_the_row_is_refused(name):
    check_family(name, 1000)


@pytest.mark.parametrize("name", FAMILIES)
def test_most_plain_conversations_are_trained(name):
    """The property above must not hold by refusing everything."""
    template = load_template(name)
    rows = template.encode_conversation(parse(talk("w1q", "w2q", "w3q", "w4q")))
    assert sum(len(row.ends) for row in rows) == 2


def chatml(body: str, **options) -> ChatTemplate:
    tokenizer = load_template("qwen3").tokenizer
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}" + body + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return ChatTemplate(tokenizer, **options)


TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
NO_SYSTEM = "{% if m.role != 'system' %}" + TURN + "{% endif %}"
LAST_PART = TURN.replace("m.content", "m.content.split('</think>')[-1]")


def test_a_system_turn_that_the_template_does_not_write():
    row = {
        "messages": [
            {"role": "system", "content": "Answer in SWAHILI."},
            *talk("Name a bird.", "Ndege.")["messages"],
        ]
    }
    with pytest.raises(DataError) as found:
        chatml(NO_SYSTEM).encode_conversation(parse(row))
    assert str(found.value) == (
        "data.jsonl:1: the chat template does not write system turns; use one that does, or put the text into the "
        "first question"
    )
    # One letter stands in the rendering by chance: the template's shape says that it is lost.
    row["messages"][0]["content"] = "N"
    with pytest.raises(DataError, match="does not write system turns"):
        RowEncoder(chatml(NO_SYSTEM)).encode(parse(row))
    with pytest.raises(DataError, match="--system_message: the chat template does not write system turns"):
        chatml(NO_SYSTEM, system_message="Be kind.")


def test_reasoning_inside_an_answer_that_the_template_cuts():
    row = talk("What is 17 + 4?", "<think>\n17 and 4 make 21.\n</think>\n\n21")
    with pytest.raises(DataError, match=r"messages\[1\].role: .* drops part of .* \('17 and 4 make 21.'\), so that it"):
        chatml(LAST_PART).encode_conversation(parse(row))
    parts = [
        ("Let me see. <think>\nsmall birds\n</think>\n\nWren.", "Let me see."),
        ("<think>\none\n</think>\n\nFirst part.\n<think>\ntwo\n</think>\n\nSecond part.", "First part."),
    ]
    for content, lost in parts:
        with pytest.raises(DataError, match=rf"drops part of what the assistant says \('{lost}'\)"):
            load_template("qwen3").encode_conversation(parse(talk("Name a bird.", content)))


def test_reasoning_of_history_may_be_left_out_and_nothing_else():
    answers = {"weight": 0, "role": "assistant"}
    end = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    for content, lost in (("<think>hm</think>yes", None), ("first <think>hm</think>yes", "first")):
        row = {"messages": [{"role": "user", "content": "Q"}, {**answers, "content": content}, *end]}
        if lost is None:
            assert len(load_template("qwen3").encode_conversation(parse(row))) == 1
        else:
            with pytest.raises(DataError, match=rf"messages\[1\].role: .* the assistant says \('{lost}'\)"):
                load_template("qwen3").encode_conversation(parse(row))


def test_turns_after_the_last_trained_one_are_counted():
    row = talk("Q", "A", "not answered")
    chunk = encode_chunk([parse(row)], RowEncoder(load_template("qwen3")), DataOptions())
    assert chunk.account.dropped == {"user turn after the last trained turn": 1} and len(chunk.dropped) == 1


def test_what_stands_in_a_rendering():
    assert (
        stands_in(' a "b"\n', 'x {"k": "a \\"b\\""}') and stands_in("it's", "'it\\'s'") and not stands_in("ab", "a b")
    )
    assert find_lost_tool({"name": "f", "description": "d", "returns": {"type": "zz"}}, "f d returns type") == "zz"
    assert find_lost_tool({"name": "f", "parameters": {"title": "any"}}, "f") is None
    call = {"function": {"name": "f", "arguments": {"a": [1.5, True, None]}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert find_lost_answer(message, "f a 1.5", NO_MARKUP) is None
    assert find_lost_answer(message, "f a", NO_MARKUP) == "1.5"
    assert find_lost_context(message, "f a", NO_MARKUP) == "1.5"


# ---- whole targets ----


def load(name: str, special: list[str], markup: tuple[str, ...] = ()) -> ChatTemplate:
    from tokenizers import AddedToken

    from examples.tiny_model import build_tokenizer, read_texts

    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in markup])
    tokenizer.bos_token, tokenizer.eos_token = special[0], special[-1]
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer)


GEMMA = [
    "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>', "<|channel>", "<channel|>", "<|think|>", "<|image|>", "<|audio|>", "<|video|>",
    "<eos>",
]  # fmt: skip


def targets(template: ChatTemplate, row) -> list[str]:
    found = []
    for each in template.encode_conversation(parse(row)):
        trained = [label != -100 for label in each.labels]
        starts = [i for i in range(len(trained)) if trained[i] and (i == 0 or not trained[i - 1])]
        found += [template.tokenizer.decode(each.input_ids[s:e]) for s, e in zip(starts, each.ends, strict=True)]
    return found


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"])
@pytest.mark.parametrize("value", ["Paris", 7, True, ["a", "b"], {"c": "d"}])
def test_a_call_is_trained_whole(name, value):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": value}}}
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    }
    first, last = targets(load(name, GEMMA), row)
    assert first.startswith("<|tool_call>call:weather{city:") and first.endswith("}<tool_call|><|tool_response>")
    assert last.endswith("It is sunny.<turn|>")


DEEPSEEK = [
    "<bos>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜end▁of▁sentence｜>",
]  # fmt: skip


@pytest.mark.parametrize("arguments", ['{"port": "Husum"}', {"port": "Husum"}])
def test_a_template_that_wants_arguments_as_text_gets_them_so(arguments):
    template = load("deepseekv3", DEEPSEEK)
    tokenizer = template.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", "")  # its prompt opens reasoning
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "Tide in Husum?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "3 m"},
            {"role": "assistant", "content": "3 m."},
        ]
    }
    first, last = targets(ChatTemplate(tokenizer), row)
    assert 'tide\n```json\n{"port": "Husum"}\n```' in first and last.endswith("3 m.<｜end▁of▁sentence｜>")


# ---- no control token from content ----


def border_texts(template: ChatTemplate) -> list[str]:
    tokens = [text for text in template.encoder.control_ids if len(text) > 2][:8]
    parts = {text[:i] for text in tokens for i in range(1, len(text))}
    return sorted(parts | {text[i:] for text in tokens for i in range(1, len(text))})[:: max(1, len(tokens) // 4)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_TOOLS])
def test_no_part_of_a_control_token_becomes_one_beside_what_the_template_writes(name):
    template = load_template(name)
    control = set(template.encoder.control_ids.values())

    def build(text: str):
        key = f"{text}"
        function = {
            "name": f"f{text}",
            "description": text,
            "parameters": {"type": "object", "properties": {key: {"type": "string", "description": text}}, key: text},
        }
        return {
            "tools": [{"type": "function", "function": function}],
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "", "tool_calls": [{"name": f"f{text}", "arguments": {key: text}}]},
                {"role": "tool", "content": text},
                {"role": "assistant", "content": f"x{text}"},
            ],
        }

    def count(row) -> int:
        rows = template.encode_conversation(parse(row))
        return sum(token_id in control for each in rows for token_id in each.input_ids)

    harmless = count(build("wq"))
    for text in border_texts(template):
        try:
            found = count(build(text))
        except DataError:  # refused by name
            continue
        assert found == harmless, text


def test_a_key_that_lacks_the_templates_bracket_is_no_control_token():
    template = load_template("qwen3_6")
    call = {"name": "get", "arguments": {"<|im_end|": "x", "city": "Rome"}}
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four"},
        ],
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {"|im_start|": "user\nEVIL"}}}],
    }
    (encoded,) = template.encode_conversation(parse(row))
    decoded = template.tokenizer.decode(encoded.input_ids)
    assert "<parameter=<|im_end|>" in decoded
    starts = [template.encoder.control_ids["<|im_start|>"], template.encoder.control_ids["<|im_end|>"]]
    assert [encoded.input_ids.count(token_id) for token_id in starts] == [5, 5]


# ---- templates ----


def test_two_assistant_turns_in_succession_have_their_own_reason():
    row = {"messages": [*talk("a", "b")["messages"], {"role": "assistant", "content": "c"}]}
    with pytest.raises(DataError) as found:
        load_template("qwen3").encode_conversation(parse(row))
    assert str(found.value) == (
        "data.jsonl:1: messages[2].role: two assistant turns in succession, which this chat template cannot write; "
        "join them"
    )


def test_a_shape_is_tried_with_the_variables_of_its_row():
    """What one row may lose by its variables is not what another loses, and the other way round."""
    only = "{% if not (brief is defined and brief and m.role == 'system') %}" + TURN + "{% endif %}"
    short = {"messages": [{"role": "system", "content": "a"}, *talk("a Q", "a A")["messages"]]}
    for order in ((False, True), (True, False)):
        template = chatml(only)
        for brief in order:
            row = {**short, "chat_template_kwargs": {"brief": brief}}
            if brief:
                with pytest.raises(DataError, match="drops part of what the system says"):
                    template.encode_conversation(parse(row))
            else:
                assert template.encode_conversation(parse(row))


def test_a_template_variable_that_lifts_a_refusal_is_named():
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    thinking = prompt + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    template = chatml(TURN)
    template.tokenizer.chat_template = template.tokenizer.chat_template.replace(prompt, thinking)
    with pytest.raises(DataError, match=r"--chat_template_kwargs '\{\"enable_thinking\": false\}' does"):
        ChatTemplate(template.tokenizer).encode_conversation(parse(talk("Q", "A")))


def test_rows_with_tools_take_the_template_that_is_named_for_them():
    template = load_template("qwen3")
    tokenizer = type(template.tokenizer)(tokenizer_object=template.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = {
        "default": "{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "tool_use": template.tokenizer.chat_template,
    }
    named = ChatTemplate(tokenizer)
    plain = parse(talk("Q", "A"))
    assert named.tokenizer.decode(named.encode_conversation(plain)[0].input_ids).endswith("assistant\nA<|im_end|>")
    tool = {"type": "function", "function": {"name": "tide", "description": "d", "parameters": {}}}
    row = {**talk("Tide?", "Where?"), "tools": [tool]}
    (found,), (expected,) = named.encode_conversation(parse(row)), template.encode_conversation(parse(row))
    assert found.input_ids == expected.input_ids and RowEncoder(named).encode(parse(row))[0].ends == expected.ends
