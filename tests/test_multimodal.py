"""Checkpoints with a vision tower, trained on text: nothing of them is lost, under the same names, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import architectures
from tests.architectures import ARCHITECTURES
from tests.conftest import CONVERSATIONS, needs
from tests.test_cli import flags
from tuning.errors import SettingsError
from tuning.model.loading import load_model
from tuning.model.lora import add_lora, check_lora_targets, find_lora_targets
from tuning.model.other_parts import find_other_parts

NAMES = [name for name, (*_, tower, _) in ARCHITECTURES.items() if tower is not None]
QWEN = "Qwen3.5, 3.6 (multimodal)"
FAST = (QWEN, "Gemma 3 (multimodal)")
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
PROBE = torch.tensor([[1022, 40, 41, 1023, 5, 1022, 7, 8, 1023, 1021]])
MTP = {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.ones(32, dtype=torch.bfloat16)}


def write_base(name: str, tokenizer, out: Path, dtype=torch.float32) -> Path:
    architectures.write(name, tokenizer, out, dtype=dtype)
    if name.startswith("Qwen3.5"):  # as real checkpoints do
        save_file({**load_file(out / "model.safetensors"), **MTP}, out / "model.safetensors", {"format": "pt"})
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (out / file).write_text(json.dumps({"size": {"shortest_edge": 64}}))
    return out


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("multimodal")
    return {name: write_base(name, tokenizer, root / name) for name in NAMES}


def read_all(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def is_other(name):
    return any(part in name for part in ("visual", "vision_tower", "multi_modal_projector", "mtp."))


def assert_whole(base, out):
    """OUT holds every tensor of the base under its name, and what is beside the language model byte for byte."""
    before, after = read_all(base), read_all(out)
    assert after.keys() == before.keys()
    others = [name for name in before if is_other(name)]
    assert others
    for name in others:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    changed = [name for name in before if not torch.equal(after[name].float(), before[name].float())]
    assert changed and not any(map(is_other, changed))
    was, now = (json.loads((each / "config.json").read_text()) for each in (base, out))
    assert now["architectures"] == was["architectures"]
    assert {**now["vision_config"], "dtype": 0} == {**was["vision_config"], "dtype": 0}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=PROBE).logits.float()


@pytest.mark.parametrize("name", EACH)
def test_lora_from_the_command_line_to_the_merged_model(bases, run_script, tmp_path, name):
    words = flags(bases[name], CONVERSATIONS, tmp_path / "out", "--use_lora", "--lora_r", 4)
    code, stdout, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    assert "stays as it is" in stdout and "batches: packed" in stdout
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as opened:
        assert not [key for key in opened.keys() if is_other(key)]  # noqa: SIM118
    base = AutoModelForImageTextToText.from_pretrained(bases[name])
    fresh = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    assert (adapted - fresh).abs().max() > 1e-3
    code, _, stderr = run_script("merge_lora.py", tmp_path / "out", tmp_path / "merged")
    assert code == 0, stderr
    merged = logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"))
    assert (merged - adapted).abs().max() < 1e-4
    assert_whole(bases[name], tmp_path / "merged")


@pytest.mark.parametrize("name", FAST)
def test_full_training_keeps_what_is_beside_the_language_model(bases, run_script, tmp_path, name):
    code, stdout, stderr = run_script("finetune.py", *flags(bases[name], CONVERSATIONS, tmp_path / "out"))
    assert code == 0, stderr
    assert "stays as it is" in stdout
    assert_whole(bases[name], tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_training_of_a_half_precision_base(tokenizer, run_script, tmp_path, dtype):
    """Weights train in fp32 and are written in bf16; the tower keeps its dtype."""
    base = write_base(QWEN, tokenizer, tmp_path / "base", dtype)
    code, _, stderr = run_script("finetune.py", *flags(base, CONVERSATIONS, tmp_path / "out", "--bf16"))
    assert code == 0, stderr
    assert_whole(base, tmp_path / "out")


def test_full_training_keeps_a_tower_of_a_wider_dtype(tokenizer, run_script, tmp_path):
    """In memory all weights are bf16, which is less than the tower's files hold."""
    base = write_base(QWEN, tokenizer, tmp_path / "base", torch.bfloat16)
    torch.manual_seed(3)
    wider = {name: torch.randn(t.shape) if is_other(name) else t for name, t in read_all(base).items()}
    save_file(wider, base / "model.safetensors", {"format": "pt"})
    code, _, stderr = run_script("finetune.py", *flags(base, CONVERSATIONS, tmp_path / "out", "--pure_bf16"))
    assert code == 0, stderr
    assert_whole(base, tmp_path / "out")


def test_q_lora_leaves_the_tower_alone(bases, run_script, tmp_path):
    needs("bitsandbytes")
    words = flags(bases[QWEN], CONVERSATIONS, tmp_path / "out", "--q_lora", "--lora_r", 4)
    code, _, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    code, _, stderr = run_script("merge_lora.py", tmp_path / "out", tmp_path / "merged")
    assert code == 0, stderr
    assert_whole(bases[QWEN], tmp_path / "merged")


@pytest.mark.parametrize("name", EACH)
def test_targets_are_layers_of_the_language_model(bases, name):
    model = load_model(str(bases[name]), dtype=torch.float32)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    others = tuple(f"base_model.model.{part}." for part in find_other_parts(model))
    assert others and not {"qkv", "linear_fc1", "out_proj", "fc1"} & {*find_lora_targets(model)} - {"out_proj"}
    adapted, _ = add_lora(model, r=2, alpha=4, dropout=0.0)
    trained = [key for key, p in adapted.named_parameters() if p.requires_grad]
    assert trained and not [key for key in trained if key.startswith(others)]
    fresh = load_model(str(bases[name]), dtype=torch.float32)
    with pytest.raises(SettingsError, match="no such layer"):
        check_lora_targets(fresh, ["fc2" if name.startswith("Gemma") else "qkv"])


def test_biases_of_the_tower_stay(bases):
    model = load_model(str(bases["Qwen2.5-VL"]), dtype=torch.float32)
    adapted, _ = add_lora(model, r=2, alpha=4, dropout=0.0, bias="all")
    assert not [key for key, p in adapted.named_parameters() if p.requires_grad and is_other(key)]


def test_images_are_refused_by_name(bases, run_script, write_json, tmp_path):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    code, _, stderr = run_script("finetune.py", *flags(bases[QWEN], write_json([row]), tmp_path / "out"))
    assert code == 2 and "image" in stderr and "Traceback" not in stderr
