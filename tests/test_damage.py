"""Damaged and odd files of every kind, through every entry that reads them: it works, or it is one line and no result.

Texts in place of a file in `make test`; each value of each JSON file in `make test-all`.
"""

import json
import shutil

import pytest

from tests.conftest import CONVERSATIONS
from tests.test_cli import flags
from tests.test_saved import write_result

TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "page": b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "nested": b"[" * 100_000,
}
VALUES = [None, "x", -1, 0, 10**30, 0.5, True, [], {}, ["x"], {"x": 1}, float("inf"), float("nan")]
MODEL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
ADAPTER = ["adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"]


@pytest.fixture(scope="module")
def sound(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    write_result(checkpoints["untied"], "lora", root / "adapter")
    shutil.copytree(checkpoints["untied"], root / "model")
    return root


@pytest.fixture
def files(sound, tmp_path):
    """A model and an adapter of it, to be damaged."""
    for name in ("model", "adapter"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path


def entries(files):
    model, adapter, out = files / "model", files / "adapter", files / "out"
    finetune = [*flags(model, CONVERSATIONS, out / "run"), "--max_steps", 1, "--save_strategy", "no", "--no_cache"]
    return {
        "finetune": ["finetune.py", *finetune],
        "finetune further": ["finetune.py", *finetune, "--use_lora", "--lora_weight_path", adapter],
        "merge": ["merge_lora.py", adapter, out / "merged", "--base", model],
        "chat": ["chat.py", model, "--prompt", "Hi", "--max_new_tokens", 2],
        "chat with adapter": ["chat.py", adapter, "--base", model, "--prompt", "Hi", "--max_new_tokens", 2],
        "quantise": ["quantize.py", model, out / "q", "--data", CONVERSATIONS, "--group_size", 32, "--num_rows", 8],
        "check": ["data_utils/__main__.py", "check", CONVERSATIONS, "--model", model],
    }


READERS = {
    "model": ["finetune", "merge", "chat", "check"],
    "adapter": ["finetune further", "merge", "chat with adapter"],
}


def assert_works_or_one_line(files, run_script, entry):
    """Run an entry. Returns: its exit code."""
    before = sorted(files.rglob("*"))
    code, _, stderr = run_script(*entries(files)[entry])
    if code == 0:
        shutil.rmtree(files / "out", ignore_errors=True)
        return code
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and len(lines) == 1, (entry, code, stderr)
    assert len(lines[0]) < 2000
    assert sorted(files.rglob("*")) == before, "something was written"
    return code


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", [f"model/{n}" for n in MODEL] + [f"adapter/{n}" for n in ADAPTER])
def test_a_file_that_holds_something_else(files, run_script, file, text):
    (files / file).write_bytes(TEXTS[text])
    for entry in READERS[file.split("/")[0]]:
        assert_works_or_one_line(files, run_script, entry)


def paths(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer_config.json",
        "adapter/adapter_config.json",
        "adapter/run.json",
    ],
)
def test_every_value_of_a_file_may_be_another(files, run_script, file):
    content = json.loads((files / file).read_text())
    for path in paths(content):
        for value in VALUES:
            changed = json.loads(json.dumps(content))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (files / file).write_text(json.dumps(changed))
            for entry in READERS[file.split("/")[0]]:
                assert_works_or_one_line(files, run_script, entry)
