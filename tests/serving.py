"""Servers for the tests: serve.py's own, in a thread, on a free port of the loopback; and a model that calls a tool."""

import contextlib
import json
import shutil
import threading
import time

import openai
import torch

import serve
from commands.loading import load_answering
from commands.serve import bind, build_server
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


class Served:
    """A server in a thread. handler: that of its chat route; loaded: its model."""

    def __init__(self, model, *words):
        self.args = serve.build_parser().parse_args([str(model), "--port", "0", *words])
        serve.check_network(self.args)
        self.args.name = serve.name_model(self.args.model)
        self.loaded = load_answering(self.args)
        self.listener = bind(self.args.host, self.args.port)
        self.handler, self.server = build_server(self.args, self.loaded, self.listener)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.name = self.args.name

    def client(self, key="none", **options):
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def ask(self, *messages, **options):
        """One answer, greedy. messages: texts are the user's."""
        turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        options = {"temperature": 0, "max_tokens": 12} | options
        return self.client().chat.completions.create(model=self.name, messages=turns, **options)

    def close(self):
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(model, *words):
    served = Served(model, *words)
    try:
        yield served
    finally:
        served.close()


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def write_tool_model(tokenizer, directory, turns=None, tools=(TOOL,)):
    """A tiny model trained until it calls a tool, and answers from the result. turns: other ones to learn."""
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


def endless(source, directory):
    """A copy of a model that never stops by itself."""
    shutil.copytree(source, directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    return directory
