"""Nothing that comes with a model runs without --trust_remote_code (code) or --allow_pickle (pickles), in any entry."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CONVERSATIONS, run_python
from tests.test_cli import flags
from tests.test_saved import write_result

CODE = "open({ran!r}, 'a').write({name!r} + chr(10))\n"
CLASSES = {
    "AutoConfig": "planted.Config", "AutoModel": "planted.Model", "AutoModelForCausalLM": "planted.Model",
    "AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"], "AutoProcessor": "planted.Processor",
}  # fmt: skip
HUB = {name: f"acme/evil--{value if isinstance(value, str) else value[0]}" for name, value in CLASSES.items()}


class Planted:
    """A pickle that writes a line when it is read."""

    def __init__(self, ran):
        self.ran = str(ran)

    def __reduce__(self):
        return exec, (CODE.format(ran=self.ran, name="pickle"),)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def plant(model, ran, *, auto_map=CLASSES):
    """Put code wherever a library might look for some."""
    modules = ("planted", "modeling", "configuration", "tokenization", "generate", "custom_generate/generate")
    for name in (*modules, "__init__", "conftest", "sitecustomize", "setup", "modeling_qwen3", "tokenizer"):
        file = model / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(CODE.format(ran=str(ran), name=file.name))
    (model / "custom_generate" / "requirements.txt").write_text("")
    (model / "training_args.bin").write_bytes(pickle.dumps(Planted(ran)))
    (model / "optimizer.pt").write_bytes(pickle.dumps(Planted(ran)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (model / name).exists():
            change(model / name, auto_map=auto_map, custom_generate="custom_generate")


def entries(model, adapter, out):
    """The command of every entry that reads a model or an adapter."""
    finetune = flags(model, CONVERSATIONS, out / "run", "--max_steps", 1)
    yield ["finetune.py", *finetune]
    yield ["finetune.py", *finetune[:-4], "--use_lora", "--lora_weight_path", adapter, "--dry_run"]
    yield ["merge_lora.py", adapter, out / "merged", "--base", model]
    yield ["chat.py", model, "--prompt", "Hi", "--max_new_tokens", 2]
    yield ["chat.py", adapter, "--base", model, "--prompt", "Hi", "--max_new_tokens", 2]
    yield ["quantize.py", model, out / "quantised", "--data", CONVERSATIONS, "--group_size", 32, "--num_rows", 8]
    yield ["-m", "data_utils", "check", CONVERSATIONS, "--model", model]
    yield ["-m", "data_utils", "show", CONVERSATIONS, "--model", adapter]
    yield ["serve.py", model, "--port", 0]  # which does not end where nothing is refused


@pytest.fixture
def planted(checkpoints, tmp_path):
    model, adapter, ran = tmp_path / "model", tmp_path / "adapter", tmp_path / "ran"
    shutil.copytree(checkpoints["untied"], model)
    write_result(checkpoints["untied"], "lora", adapter)
    return model, adapter, ran


def run(words, tmp_path):
    done = run_python(*words, check=False, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("index", [pytest.param(i, marks=[] if i in (3, 5) else pytest.mark.slow) for i in range(8)])
@pytest.mark.parametrize("auto_map", [CLASSES, pytest.param(HUB, marks=pytest.mark.slow)], ids=["own", "hub"])
def test_no_code_of_a_model_directory_runs(planted, tmp_path, index, auto_map):
    model, adapter, ran = planted
    plant(model, ran, auto_map=auto_map)
    plant(adapter, ran, auto_map=auto_map)
    done = run(list(entries(model, adapter, tmp_path))[index], tmp_path)
    assert not ran.exists(), ran.read_text()
    assert done.returncode in (0, 2)
    for result in ("merged", "quantised", "run"):
        assert not list((tmp_path / result).rglob("*.py"))


@pytest.mark.parametrize("index", [pytest.param(i, marks=[] if i == 3 else pytest.mark.slow) for i in (0, 3, 5, 8)])
@pytest.mark.parametrize("through_index", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_pickle_of_a_model_directory_is_read(planted, tmp_path, index, through_index):
    model, adapter, ran = planted
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(ran)))
    if through_index:
        weight_map = dict.fromkeys(names, "pytorch_model.bin")
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    done = run(list(entries(model, adapter, tmp_path))[index], tmp_path)
    assert done.returncode == 2 and not ran.exists() and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--allow_pickle True" in done.stderr or (through_index and "pytorch_model.bin" in done.stderr)


@pytest.mark.slow
def test_pickles_of_those_one_trusts_are_read_by_every_entry(planted, tmp_path):
    model, adapter, _ = planted
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    os.remove(model / "model.safetensors")
    for index in (0, 3, 5):
        done = run([*list(entries(model, adapter, tmp_path))[index], "--allow_pickle", "True"], tmp_path)
        assert done.returncode == 0, done.stderr
