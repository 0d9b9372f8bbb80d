"""Adapters of others: what peft itself merges, merge_lora.py merges to the same weights; the rest is one line."""

import itertools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import merge_lora
from tests.conftest import CONVERSATIONS
from tuning.checkpoint.adapter import load_lora
from tuning.errors import SettingsError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build_bases(tokenizer):
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48, "bos_token_id": None}
    moe = {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "decoder_sparse_step": 1,
    }
    return {
        "untied": lambda: Qwen2ForCausalLM(Qwen2Config(**vocabulary, **SIZES, tie_word_embeddings=False)),
        "tied": lambda: Qwen2ForCausalLM(Qwen2Config(**vocabulary, **SIZES, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**vocabulary, **gpt2)),
        "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**vocabulary, **SIZES, **moe, tie_word_embeddings=False)),
    }


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, build in build_bases(tokenizer).items():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
CONFIGURATIONS = {
    "plain": ALL,
    "regular expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "rank and alpha patterns": {
        **ALL,
        "rank_pattern": {"q_proj": 2, r".*1\.mlp\.up_proj": 7},
        "alpha_pattern": {"v_proj": 3, "^model.layers.0.mlp.up_proj": 5},
    },
    "rslora": {**ALL, "use_rslora": True},
    "dora": {**ALL, "use_dora": True},
    "dora and rslora": {**ATTENTION, "use_dora": True, "use_rslora": True},
    "bias all": {**ALL, "bias": "all"},
    "bias of adapted layers": {**ATTENTION, "bias": "lora_only"},
    "lora bias": {**ATTENTION, "lora_bias": True},
    "lora bias without a bias": {"target_modules": ["down_proj"], "lora_bias": True},
    "matrices": {**ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding matrix": {**ATTENTION, "modules_to_save": ["embed_tokens"]},
    "output matrix": {**ATTENTION, "modules_to_save": ["lm_head"]},
    "norms": {**ATTENTION, "modules_to_save": ["norm", "input_layernorm"]},
    "a layer in full": {**ATTENTION, "modules_to_save": ["down_proj"]},
    "tied matrices": {**ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied rows": {**ATTENTION, "trainable_token_indices": [3, 5], "ensure_weight_tying": True},
    "rows": {**ATTENTION, "trainable_token_indices": [3, 5]},
    "rows of the embedding": {**ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "rows of the output": {**ATTENTION, "trainable_token_indices": {"lm_head": [3, 5]}},
    "rows of both": {**ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "other rows in each": {**ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 9, 2]}},
    "rows of the output, a whole embedding": {
        **ATTENTION,
        "trainable_token_indices": {"lm_head": [3, 5]},
        "modules_to_save": ["embed_tokens"],
    },
    "rows of the output, an adapted embedding": {
        "target_modules": ["q_proj", "embed_tokens"],
        "trainable_token_indices": {"lm_head": [3, 5]},
    },
    "rows of the embedding, a whole output": {
        **ATTENTION,
        "trainable_token_indices": [3, 5],
        "modules_to_save": ["lm_head"],
    },
    "rows of the embedding, an adapted output": {
        "target_modules": ["q_proj", "lm_head"],
        "trainable_token_indices": [3, 5],
    },
    "an adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "an adapted output": {"target_modules": ["lm_head", "q_proj"]},
    "both adapted": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "both adapted and tied": {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "one layer": {**ATTENTION, "layers_to_transform": [1]},
    "one layer by its pattern": {**ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {**ALL, "exclude_modules": ["up_proj", "k_proj"]},
    "excluded by expression": {**ALL, "exclude_modules": r".*layers\.0.*"},
    "gaussian": {**ATTENTION, "init_lora_weights": "gaussian"},
    "pissa": {**ATTENTION, "init_lora_weights": "pissa"},
    "olora": {**ATTENTION, "init_lora_weights": "olora"},
    "orthogonal": {**ATTENTION, "init_lora_weights": "orthogonal"},
    "no initialisation": {**ATTENTION, "init_lora_weights": False},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "parameters and layers": {**ATTENTION, "target_parameters": ["mlp.experts.down_proj"]},
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "conv1d with dora": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    "conv1d and all": {**ALL, "fan_in_fan_out": True, "bias": "all"},
    "activated": {**ATTENTION, "alora_invocation_tokens": [3, 4]},
}
OF = {
    "moe": ("plain", "parameters", "parameters and layers", "rows of both"),
    "gpt2": tuple(name for name in CONFIGURATIONS if name.startswith("conv1d")),
}
# Of tied matrices these say two things of one matrix; peft cannot build some of them.
OF_UNTIED = {name for name in CONFIGURATIONS if name.startswith("rows of the ") and ", a" in name}
CASES = [
    (base, name)
    for base, name in itertools.product(("untied", "tied"), CONFIGURATIONS)
    if "parameters" not in name and "conv1d" not in name and (base == "untied" or name not in OF_UNTIED)
] + [(base, name) for base, names in OF.items() for name in names]
REFUSED = {
    *((base, name) for base in ("untied", "tied") for name in ("lora bias without a bias", "activated")),
    *(("tied", name) for name in ("rows of the output", "other rows in each")),
    *(("tied", name) for name in ("an adapted embedding", "an adapted output", "both adapted")),
    ("tied", "both adapted and tied"),
}  # by peft, or merged by it to another model
WEIGHTS = "adapter_model.safetensors"
EXAMPLE = torch.tensor([[3, 5, 9, 2, 11, 30, 5, 2]])


def write_adapter(base, configuration, out):
    """An adapter with random values, as peft saves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **configuration))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1 * (1 if "lora_" in name else parameter.std()))
    peft_model.save_pretrained(out)


@torch.no_grad()
def logits(model):
    return model.eval()(EXAMPLE).logits


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize(("base", "name"), CASES)
def test_what_peft_merges_is_merged_alike(bases, tmp_path, base, name):
    write_adapter(bases / base, CONFIGURATIONS[name], tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / base), tmp_path / "adapter")
    adapted = logits(peft_model)
    try:
        expected = logits(peft_model.merge_and_unload(safe_merge=True))
    except (RuntimeError, NotImplementedError):
        expected = None
    words = [str(tmp_path / "adapter"), str(tmp_path / "merged")]
    if expected is None or not torch.allclose(expected, adapted, atol=1e-3):  # peft cannot merge it, or not rightly
        with pytest.raises(SettingsError) as refused:
            merge_lora.main(words)
        assert "\n" not in str(refused.value) and not (tmp_path / "merged").exists()
        assert (base, name) in REFUSED
        return
    assert (base, name) not in REFUSED
    attached, _ = load_lora(AutoModelForCausalLM.from_pretrained(bases / base), tmp_path / "adapter")
    assert torch.allclose(logits(attached), adapted, atol=1e-5), "chat.py and --lora_weight_path"
    merge_lora.main(words)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5), (logits(merged) - expected).abs().max()
    one_matrix = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == one_matrix


# ---- adapters that fit nothing: one line from every entry that reads one ----


def change_config(**changes):
    def change(adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v != ""}))

    return change


def change_tensors(change):
    def rewrite(adapter):
        path = adapter / WEIGHTS
        save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)

    return rewrite


def write_text(text, name="adapter_config.json"):
    return lambda adapter: (adapter / name).write_bytes(text)


def resize(adapter):
    """As a user who added tokens, and saved the adapter alone."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 10)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    peft_model.save_pretrained(adapter, save_embedding_layers=True)


def pickle_weights(adapter):
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def first(function):
    return lambda state: {name: function(value) if i == 0 else value for i, (name, value) in enumerate(state.items())}


def rows(*shape):
    def write(adapter):
        change_config(trainable_token_indices=[3, 5])(adapter)
        name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        change_tensors(lambda state: {**state, name: torch.ones(shape)})(adapter)

    return write


FAULTS = {
    "resized vocabulary": (resize, ["the adapter has 1,", "the base model 1,", "resize_token_embeddings(1"]),
    "no JSON": (write_text(b'{"r": 4,\n'), ["adapter_config.json:2: invalid JSON"]),
    "empty": (write_text(b""), ["adapter_config.json:1: invalid JSON"]),
    "a list": (write_text(b"[]"), ["expected a JSON object"]),
    "binary": (write_text(b"\xff\xfe\x00"), ["adapter_config.json: cannot be read"]),
    "not a number": (change_config(lora_alpha=float("nan")), ["NaN is not a number that can be used"]),
    "no peft_type": (change_config(peft_type=""), ["no peft_type"]),
    "another kind": (change_config(peft_type="IA3"), ["a IA3 adapter; only LoRA adapters are supported"]),
    "replicated layers": (change_config(layer_replication=[[0, 2], [1, 2]]), ["layer_replication", "cannot merge"]),
    "activated": (change_config(alora_invocation_tokens=[3]), ["alora_invocation_tokens", "cannot merge"]),
    "a newer peft": (change_config(use_sparkles=True), ["use_sparkles is not known to peft", "install a newer peft"]),
    "odd rank": (change_config(r="four"), ["cannot apply it to this model"]),
    "negative rank": (change_config(r=-1), ["cannot apply it to this model"]),
    "another rank": (change_config(r=3), ["has the shape [4, 32], the base model needs [3, 32]"]),
    "no such layers": (change_config(target_modules=["nothing"]), ["cannot apply it to this model"]),
    "token without a row": (change_config(trainable_token_indices=[10**6]), ["token ids below"]),
    "rows of a layer": (change_config(trainable_token_indices={"q_proj": [1]}), ["neither the embedding nor"]),
    "one row for two": (rows(1, 32), ["has the shape [1, 32], [2, 32] is needed"]),
    "no rows": (change_config(trainable_token_indices=[3, 5]), ["does not fit this model: base_model"]),
    "rows that the configuration does not name": (
        lambda adapter: (rows(2, 32)(adapter), change_config(trainable_token_indices=None)(adapter)),
        ["its configuration names no trainable_token_indices"],
    ),
    "gathered nowhere": (change_tensors(first(lambda value: value[:0])), ["no elements: it was saved by ZeRO-3"]),
    "not finite": (change_tensors(first(lambda value: value / 0)), ["values that are not finite"]),
    "whole numbers": (change_tensors(first(lambda value: value.long())), ["has the dtype torch.int64"]),
    "a tensor less": (change_tensors(lambda state: dict([*state.items()][1:])), ["does not fit this model: it has no"]),
    "a tensor more": (change_tensors(lambda state: {**state, "x.y": torch.ones(1)}), ["it has x.y"]),
    "pickled": (pickle_weights, ["adapter_model.bin: a pickle", "save_pretrained writes adapter_model.safetensors"]),
    "cut": (lambda a: write_text((a / WEIGHTS).read_bytes()[:-9], WEIGHTS)(a), [f"{WEIGHTS}: cannot be read"]),
    "pointer": (write_text(b"version https://git-lfs.github.com/spec/v1", WEIGHTS), [f"{WEIGHTS}: cannot be read"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_adapter_that_fits_nothing_is_one_line_in_every_entry(bases, tmp_path, run_script, name):
    change, texts = FAULTS[name]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write_adapter(bases / "untied", ATTENTION, adapter)
    change(adapter)
    finetune = ["--model_name_or_path", bases / "untied", "--data_path", CONVERSATIONS, "--use_lora", "--use_cpu"]
    entries = [
        ["merge_lora.py", adapter, out],
        ["chat.py", adapter],
        ["finetune.py", *finetune, "--output_dir", out, "--lora_weight_path", adapter, "--report_to", "none"],
    ]
    for words in entries:
        code, _, stderr = run_script(*words)
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and all(text in lines[0] for text in texts), (words[0], stderr)
        assert not out.exists()
