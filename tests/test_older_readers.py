"""Results in transformers 4.57, which much of the field runs: the same configuration, tokens and logits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.conftest import CONVERSATIONS, ROOT
from tests.test_cli import flags
from tuning.checkpoint.older_readers import add_old_names

VERSION = "4.57.6"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {**LLAMA3, "original_max_position_embeddings": 256}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, None),
    "phi3-partial": (
        Phi3ForCausalLM, Phi3Config, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"rope_type": "default", "rope_theta": 1e6}),
}  # fmt: skip
READER = """
import json, os, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
found = {"version": transformers.__version__}
for directory in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    logits = rope = None
    if os.path.exists(directory + "/config.json"):  # else an adapter
        model = AutoModelForCausalLM.from_pretrained(directory)
        logits = model(torch.tensor([range(2, 40)])).logits[0, -1].tolist()
        config = AutoConfig.from_pretrained(directory)
        rope = [getattr(config, "rope_theta", None), getattr(config, "rope_scaling", None)]
    found[directory] = {"ids": ids, "logits": logits, "rope": rope, "eos": tokenizer.eos_token_id}
print("FOUND" + json.dumps(found))
"""


def build(tokenizer, root):
    """A checkpoint of each kind of rotary embedding, completed by add_old_names."""
    directories = {}
    for name, (model, config, rope) in ROPES.items():
        torch.manual_seed(0)
        settings = dict(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.2, max_position_embeddings=1024,
        )  # fmt: skip
        settings |= {"rope_parameters": rope} if rope else {}
        if name == "qwen3-moe":
            settings |= {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
        directories[name] = root / name
        model(config(**settings)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return directories


def test_old_names_change_nothing_for_this_version(tokenizer, tmp_path):
    for directory in build(tokenizer, tmp_path).values():
        before = AutoConfig.from_pretrained(directory).to_dict(), AutoTokenizer.from_pretrained(directory)
        logits = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([range(2, 40)])).logits
        add_old_names(directory)
        written = json.loads((directory / "config.json").read_text())
        assert "rope_theta" in written and "rope_scaling" in written and written["torch_dtype"] == "float32"
        add_old_names(directory)
        assert json.loads((directory / "config.json").read_text()) == written
        after = AutoConfig.from_pretrained(directory).to_dict(), AutoTokenizer.from_pretrained(directory)
        after[0].pop("partial_rotary_factor", None)  # an old name that this version keeps as it is
        assert after[0] == before[0] and after[1].get_vocab() == before[1].get_vocab()
        again = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([range(2, 40)])).logits
        assert torch.equal(again, logits)


def test_special_tokens_keep_their_list_under_its_old_name(tokenizer, tmp_path):
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    add_old_names(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }


@pytest.mark.slow
def test_results_load_in_transformers_4(tokenizer, run_script, checkpoints, tmp_path):
    environment = tmp_path / "environment"
    packages = [f"transformers=={VERSION}", "tokenizers>=0.22,<0.23.1", "huggingface-hub<1.0"]
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", environment, *packages],
        capture_output=True, text=True,
    )  # fmt: skip
    if installed.returncode:
        pytest.skip(f"transformers {VERSION} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    directories = build(tokenizer, tmp_path)
    for directory in directories.values():
        (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        add_old_names(directory)
    for name, more in (("full", []), ("lora", ["--use_lora", "--train_embeddings", "tokens"])):
        directories[name] = tmp_path / name
        words = flags(checkpoints["untied"], CONVERSATIONS, directories[name], "--save_strategy", "no", *more)
        assert run_script("finetune.py", *words)[0] == 0
    directories["merged"] = tmp_path / "merged"
    assert run_script("merge_lora.py", directories["lora"], directories["merged"])[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, directories.values())],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(environment)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    assert found.pop("version") == VERSION
    for name, directory in directories.items():
        there = found[str(directory)]
        here = AutoTokenizer.from_pretrained(directory)
        question = [{"role": "user", "content": "Hi"}]
        ids = here.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert there["ids"] == ids and there["eos"] == here.eos_token_id
        if name == "lora":
            continue
        logits = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([range(2, 40)])).logits[0, -1]
        torch.testing.assert_close(torch.tensor(there["logits"]), logits, rtol=1e-4, atol=1e-4)
        rope = AutoConfig.from_pretrained(directory).rope_parameters
        assert there["rope"][0] == rope.get("full_attention", rope)["rope_theta"], name
