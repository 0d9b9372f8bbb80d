"""A model that calls a tool, and what it is asked."""

import pytest
import torch

from data_utils.model_path import find_template
from data_utils.schema import parse_record
from data_utils.sources import Record
from data_utils.template import ChatTemplate
from tests.conftest import build_model

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
ASKED = {"role": "user", "content": "How is Zürich?"}
CALL = {"name": "weather", "arguments": {"town": "Zürich"}}
RESULT = {"role": "tool", "content": '{"sky": "rain"}'}
ANSWER = "It rains in Zürich."
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def write_tool_model(tokenizer, directory, turns=None, tools=(TOOL,)):
    """A tiny model trained until it calls a tool, and answers from the result. turns: other ones to learn."""
    pytest.importorskip("inference.markup", reason="this transformers reads no calls of tools", exc_type=ImportError)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = find_template("chatml-tools").read_text()
    template = ChatTemplate(tokenizer)
    turns = turns or [ASKED, CALLED, RESULT, {"role": "assistant", "content": ANSWER}]
    conversation = parse_record(Record({"messages": turns, "tools": list(tools)}, "x", 0))
    (row,) = template.encode_conversation(conversation)
    model = build_model(tokenizer, tied=False, initializer_range=0.02, hidden_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.005:
            break
    assert loss < 0.05, loss
    model.generation_config.eos_token_id = template.stop_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
