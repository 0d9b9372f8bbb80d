"""Servers for the tests: serve.py's own, in a thread, on a free port of the loopback."""

import contextlib
import json
import shutil
import threading

import pytest

import serve
from commands.loading import load_answering
from commands.serve import bind, build_server
from tests.conftest import needs, wait_until

needs("openai")
pytest.importorskip("transformers.cli.serving.server", reason="this transformers has no such server")

import openai


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


def endless(source, directory):
    """A copy of a model that never stops by itself."""
    shutil.copytree(source, directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    return directory
