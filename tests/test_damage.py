"""Damaged and odd files of every kind, through every entry that reads them: it works, or it is one line and no result.

Texts in place of a file in `make test`; each value of each JSON file in `make test-all`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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
ADAPTER = [
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "manifest.json",
    "run.json",
]


JSON = [
    *("model/config.json", "model/generation_config.json", "model/tokenizer_config.json"),
    *("adapter/adapter_config.json", "adapter/run.json"),
]


@pytest.fixture(scope="module")
def sound(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    write_result(checkpoints["untied"], "lora", root / "adapter")
    run = {"program": "finetune.py", "settings": {"data": {"system_message": "You are terse."}}}
    (root / "adapter" / "run.json").write_text(json.dumps(run))
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
    if code == 1:  # training began; its run.json says how it ended
        assert json.loads((files / "out" / "run" / "run.json").read_text())["status"].startswith("failed: ")
        shutil.rmtree(files / "out")
    assert sorted(files.rglob("*")) == before, "something was written"
    return code


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", [f"model/{n}" for n in MODEL] + [f"adapter/{n}" for n in ADAPTER])
def test_a_file_that_holds_something_else(files, run_script, file, text):
    (files / file).write_bytes(TEXTS[text])
    for entry in READERS[file.split("/")[0]]:
        assert_works_or_one_line(files, run_script, entry)


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "undefined": "{{ x.y.z }}",
    "a long loop": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "no end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no template": "{% if %}",
    "writes nothing": "{{ '' }}",
    "writes one text": "{{ 'x' * 20000 }}",
    "adds a number": "{{ messages + 1 }}",
    "a method": "{{ messages[0]['content'].foo() }}",
    "a format": "{{ '%d' % 'x' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_be_used(files, run_script, name):
    for directory in ("model", "adapter"):
        (files / directory / "chat_template.jinja").write_text(TEMPLATES[name])
        for entry in READERS[directory]:
            code = assert_works_or_one_line(files, run_script, entry)
            assert code == 2 or entry == "merge", "which renders questions, no answers"


def break_weights(change):
    def apply(files):
        path = files / "model" / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def change_one(name, function):
    return break_weights(lambda state: {**state, name: function(state[name])})


LAYER = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {
    "one is missing": (break_weights(lambda state: {n: t for n, t in state.items() if n != LAYER}), "missing"),
    "one too many": (
        break_weights(lambda state: {**state, "v_head.weight": torch.ones(2)}),
        "v_head.weight; they would",
    ),
    "another shape": (change_one(LAYER, lambda tensor: tensor[:, :-1].contiguous()), "of another shape"),
    "whole numbers": (change_one(LAYER, lambda tensor: tensor.long()), "has the dtype I64"),
    "not finite": (change_one(LAYER, lambda tensor: tensor.index_fill(0, torch.tensor([3]), torch.nan)), "not finite"),
    "cut": (lambda f: cut(f / "model" / "model.safetensors"), "cannot"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_models(files, run_script, name):
    """None is trained, merged, answered with or quantised."""
    damage, text = WEIGHTS[name]
    damage(files)
    for entry in ("finetune", "merge", "chat", "quantise"):
        assert assert_works_or_one_line(files, run_script, entry) == 2, entry
    code, _, stderr = run_script(*entries(files)["chat"])
    assert code == 2 and text in stderr, stderr


GENERATION = {
    "eos_token_id": [1021, 1020], "pad_token_id": 1021, "bos_token_id": 1021, "do_sample": True, "temperature": 0.7,
    "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05, "max_length": 100, "num_beams": 1,
    "suppress_tokens": [5], "no_repeat_ngram_size": 3, "stop_strings": ["x"], "num_return_sequences": 1,
}  # fmt: skip


def paths(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.slow
@pytest.mark.parametrize("file", JSON)
def test_every_value_of_a_file_may_be_another(files, run_script, file):
    content = GENERATION if "generation" in file else json.loads((files / file).read_text())
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
