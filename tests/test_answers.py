"""What an answer is made of: stop texts, markup, whole characters."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.generate import TextPieces
from inference.markup import MessageParser, find_markup
from inference.stop_texts import StopTexts
from tests.templates import FAMILIES, load_template


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_texts_in_pieces(text, stops, data):
    places = [text.find(stop) for stop in stops if stop in text]
    cutter, shown, at = StopTexts(stops), "", 0
    while at < len(text):
        end = data.draw(st.integers(at + 1, len(text)))
        shown += cutter.feed(text[at:end])
        at = end
        if cutter.found:
            break
    shown += cutter.end()
    # What ends the text is the first that is complete, as generation would stop there.
    if places:
        assert cutter.found and any(shown + stop == text[: len(shown) + len(stop)] for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert not cutter.found and shown == text


ANSWERS = {
    "plain": (" Hello\n there \n", "", None, " Hello\n there \n", []),
    "thinks": ("<think>\nhm\n x\n</think>\n\nHello", "", "hm\n x", "Hello", []),
    "opened": ("hm\n</think>\n\nHello", "<think>\n", "hm", "Hello", []),
    "closed": ("Hello", "<think>\n\n</think>\n\n", None, "Hello", []),
    "never closed": ("hm", "<think>\n", "hm", None, []),
    "says and calls": (
        'So:\n<tool_call>\n{"name": "f", "arguments": {"é": [1, null]}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n'
        "</tool_call>", "", None, "So:", [("f", {"é": [1, None]}), ("g", {})],
    ),
    "no JSON": ("a <tool_call>\n{x}\n</tool_call> b", "", None, "a<tool_call>\n{x}\n</tool_call> b", []),
    "no call": ('<tool_call>[1]</tool_call>', "", None, "<tool_call>[1]</tool_call>", []),
    "cut": ('<tool_call>\n{"name": "f", "ar', "", None, '<tool_call>\n{"name": "f", "ar', []),
    "a bracket": ("1 < 2 <to", "", None, "1 < 2 <to", []),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_markup_in_pieces(name, size):
    text, opened, reasoning, content, calls = ANSWERS[name]
    markup = find_markup(load_template("qwen3"))
    parser = MessageParser(markup.calls, f"<|im_start|>user\n<think>x<|im_end|>\n<|im_start|>assistant\n{opened}")
    pieces = [p for start in range(0, len(text), size) for p in parser.feed(text[start : start + size])]
    pieces += parser.finish()

    def said(kind):
        return "".join(piece.text for piece in pieces if piece.kind == kind) or None

    assert (said("reasoning"), said("content")) == (reasoning, content)
    assert [(piece.text, json.loads(piece.arguments)) for piece in pieces if piece.kind == "call"] == calls


def test_the_markup_of_a_template_is_found_by_what_it_writes():
    found = {}
    for name in FAMILIES:
        markup = find_markup(load_template(name))
        found[name] = (markup.calls and markup.calls["fields"]["tool_calls"]["content"], markup.reasoning is not None)
    json_calls, xml_calls = ("qwen2_5", "qwen3", "qwen3_instruct_2507"), ("qwen3_5_think", "qwen3_6")
    assert {name for name, (calls, _) in found.items() if calls == "json"} == set(json_calls)
    assert {name for name, (calls, _) in found.items() if calls == "xml-inline"} == set(xml_calls)
    assert found["qwen3"][1] and not found["qwen2_5"][1]


def test_calls_as_elements_take_the_types_of_their_parameters():
    markup = find_markup(load_template("qwen3_6"))
    tool = {
        "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}
    }
    text = "<tool_call>\n<function=f>\n<parameter=n>\n7\n</parameter>\n<parameter=s>\n7\n</parameter>\n</function>\n"
    parser = MessageParser(markup.calls, "<|im_start|>assistant\n", [tool])
    pieces = [*parser.feed(f"{text}</tool_call>"), *parser.finish()]
    assert [json.loads(piece.arguments) for piece in pieces] == [{"n": 7, "s": "7"}]


def test_long_answers_are_not_decoded_from_their_beginning_at_every_token(tokenizer):
    text = "héllo 🦄 𝒳 你好, as it was said before. " * 40
    ids = tokenizer(text)["input_ids"] + [5, 200, 255, 3] * 30  # what is no UTF-8, too
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1]]))
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert "".join(pieces) == streamer.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert streamer._start > len(tokenizer(text)["input_ids"]) // 2
