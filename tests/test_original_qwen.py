"""Original Qwen checkpoints: converted to the letter, or refused in one line."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import commands.convert
from data_utils.sources import DataError
from tests.conftest import needs
from tests.original_checkpoint import (
    CHAT,
    CONFIG,
    END,
    IM_END,
    RAW,
    change,
    convert_to,
    logits_of,
    packed_state,
    random_state,
    read_all,
    reference_logits,
    truncate,
    write_original,
)
from tuning import convert
from tuning.checkpoint.manifest import find_fault
from tuning.errors import SettingsError
from tuning.model.loading import load_model
from tuning.model.quantization import dequantize

IDS = torch.tensor([[5, 300, 17, 801, 44, 900, 2, 2, 650, 9]])


def test_golden_logits_through_the_reference(golden):
    directory, ids, expected = golden
    config = json.loads((directory / "config.json").read_text())
    state = load_file(directory / "model.safetensors")
    assert (reference_logits(state, config, ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_are_copied(original, tmp_path, num_shards, dtype):
    flag = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    state = random_state(dtype=dtype)
    source = original(state, config={**CONFIG, "fp32": False, flag: True}, num_shards=num_shards)
    out = convert_to(source, tmp_path / "out")
    found = read_all(out)
    for layer in range(2):
        h, new = f"transformer.h.{layer}", f"model.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [found.pop(f"{new}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            assert torch.equal(torch.cat(parts), state[f"{h}.attn.c_attn.{kind}"])
        names = {
            "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        }  # fmt: skip
        for old, name in names.items():
            assert torch.equal(found.pop(f"{new}.{name}.weight"), state[f"{h}.{old}.weight"])
    for old, name in {"wte": "model.embed_tokens", "ln_f": "model.norm"}.items():
        assert torch.equal(found.pop(f"{name}.weight"), state[f"transformer.{old}.weight"])
    assert torch.equal(found.pop("lm_head.weight"), state["lm_head.weight"])
    assert not found
    assert load_model(str(out), dtype="auto").dtype == dtype
    assert (out / "model.safetensors.index.json").exists() == (num_shards > 1)
    assert find_fault(out) is None


def test_logits_within_and_beyond_seq_length_are_the_originals(original, tmp_path):
    out = convert_to(original(random_state()), tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    for length in (10, 64, 128, 256):  # beyond 64, where a power of two of it meets the original's steps
        ids = torch.randint(0, 1008, (1, length), generator=generator)
        expected = reference_logits(random_state(), CONFIG, ids)
        assert (logits_of(out, ids) - expected).abs().max() < 1e-4 * expected.abs().max(), length
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 64 and config["rope_scaling"]["rope_type"] == "dynamic"


def test_dtype_of_a_config_that_says_none_is_the_files(original, tmp_path):
    config = {**CONFIG, "fp32": False}
    out = convert_to(original(random_state(dtype=torch.bfloat16), config=config), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_old_files_hold_beside_is_left_out(original, tmp_path):
    state = random_state() | {
        "transformer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.mlp.w1.bias": torch.zeros(64),
    }
    assert len(read_all(convert_to(original(state), tmp_path / "out"))) == 3 + 2 * (2 + 3 + 3 + 4)
    state["transformer.h.1.mlp.w1.bias"][3] = 1
    with pytest.raises(SettingsError, match=r"transformer\.h\.1\.mlp\.w1\.bias is unknown"):
        convert_to(original(state), tmp_path / "other")


@pytest.mark.parametrize(
    ("generation", "eos", "more"),
    [
        (CHAT, [IM_END, END], {"do_sample": True, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.1}),
        (RAW, END, {"do_sample": False, "top_p": None}),
        (
            RAW | {"do_sample": True, "temperature": 0.5, "stop_words_ids": [[7], [8, 9]]},
            [END, 7],
            {"temperature": 0.5},
        ),
        (None, END, {"do_sample": False}),
    ],
    ids=["chat", "base", "more", "none"],
)
def test_where_it_stops(original, tmp_path, generation, eos, more):
    source = original(random_state(), generation=generation or {})
    if generation is None:
        (source / "generation_config.json").unlink()
    out = convert_to(source, tmp_path / "out")
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == eos and found.pad_token_id == END
    assert {name: getattr(found, name) for name in more} == more
    tokenizer = AutoTokenizer.from_pretrained(out)
    is_chat = generation is CHAT
    assert tokenizer.eos_token == ("<|im_end|>" if is_chat else "<|endoftext|>")
    turns = [{"role": "user", "content": "Q"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_those_of_the_definition(original, tmp_path, bits):
    needs("gptqmodel", "optimum")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": True, "sym": False}
    config = {**CONFIG, "fp32": False, "fp16": True, "quantization_config": quantization}
    packed, plain = packed_state(config, bits=bits, group_size=16)
    out = convert_to(original(packed, config=config, num_shards=2), tmp_path / "out")
    model = dequantize(load_model(str(out), dtype=torch.float32))
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    expected = reference_logits(plain, CONFIG, IDS)
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    q, k, v = (getattr(model.model.layers[1].self_attn, f"{name}_proj") for name in "qkv")
    assert torch.equal(torch.cat([q.weight, k.weight, v.weight]), plain["transformer.h.1.attn.c_attn.weight"].float())
    assert torch.equal(torch.cat([q.bias, k.bias, v.bias]), plain["transformer.h.1.attn.c_attn.bias"].float())


def test_settings_of_gptq_in_a_file_of_their_own(original, tmp_path):
    config = {**CONFIG, "fp32": False, "fp16": True}
    packed, _ = packed_state(config, bits=4, group_size=16)
    source = original(packed, config=config)
    (source / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": True}))
    out = convert_to(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


# ---- refused, in one line, with nothing written ----


def edit_state(source, edit):
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, source / "model.safetensors")


def write_index(source, weight_map):
    """In the place of the one file: an index, or two files without one."""
    (source / "model.safetensors").unlink()
    if weight_map is not None:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ("one", "other")


REFUSED = {
    "visual": (lambda s: change(s, "config.json", visual={}), r"config\.json: visual: a model with pictures"),
    "rotary_pct": (lambda s: change(s, "config.json", rotary_pct=0.5), "rotary_pct 0.5"),
    "no_bias": (lambda s: change(s, "config.json", no_bias=False), "no_bias False"),
    "two dtypes": (lambda s: change(s, "config.json", bf16=True), "of bf16, fp16 and fp32 only one"),
    "no size": (lambda s: change(s, "config.json", hidden_size="absent"), "hidden_size None: expected a whole number"),
    "odd size": (lambda s: change(s, "config.json", hidden_size=33), "is not hidden_size 33"),
    "layers": (lambda s: change(s, "config.json", num_hidden_layers=3), r"8 tensors are missing, the first: .*h\.2\."),
    "many layers": (lambda s: change(s, "config.json", num_hidden_layers=2**30), "no model has so many"),
    "fewer layers": (lambda s: change(s, "config.json", num_hidden_layers=1), r"transformer\.h\.1\.\S+ is unknown"),
    "inner": (
        lambda s: change(s, "config.json", intermediate_size=64),
        r"has the shape \[32, 64\], and by config.json",
    ),
    "heads": (lambda s: change(s, "config.json", num_attention_heads=2), "kv_channels 8 x 2 heads"),
    "eps": (lambda s: change(s, "config.json", layer_norm_epsilon="small"), "config.json"),
    "base": (lambda s: change(s, "config.json", rotary_emb_base=0), "rotary_emb_base 0"),
    "awq": (lambda s: change(s, "config.json", quantization_config={"quant_method": "awq"}), "only GPTQ"),
    "gptq": (lambda s: change(s, "config.json", quantization_config={"bits": 4}), r"\.weight is unknown"),
    "no json": (lambda s: (s / "config.json").write_text('{"model_type": "qwen",'), "config.json"),
    "chat_format": (lambda s: change(s, "generation_config.json", chat_format="x"), "chat_format 'x'"),
    "eos": (lambda s: change(s, "generation_config.json", eos_token_id="x"), "expected token ids"),
    "top_p": (lambda s: change(s, "generation_config.json", top_p="x"), "top_p 'x': expected a number"),
    "no vocabulary": (lambda s: (s / "qwen.tiktoken").unlink(), r"no qwen\.tiktoken in it"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "no weights in it"),
    "truncated": (lambda s: truncate(s / "model.safetensors"), r"model\.safetensors: cannot be read; copy it again"),
    "lfs": (lambda s: (s / "model.safetensors").write_text("version https://git-lfs\n"), "cannot be read"),
    "missing": (lambda s: edit_state(s, lambda t: t.pop("transformer.ln_f.weight")), r"first: transformer\.ln_f"),
    "unknown": (lambda s: edit_state(s, lambda t: t.update(extra=torch.ones(2))), "extra is unknown"),
    "shape": (
        lambda s: edit_state(s, lambda t: t.update({"lm_head.weight": torch.ones(8, 32)})),
        r"lm_head\.weight has the shape \[8, 32\]",
    ),
    "whole numbers": (
        lambda s: edit_state(s, lambda t: t.update({"transformer.ln_f.weight": torch.ones(32).int()})),
        "has the dtype I32",
    ),
    "absent shard": (
        lambda s: write_index(s, {"a": "b.safetensors"}),
        r"index\.json: names b\.safetensors, which is not there",
    ),
    "another place": (
        lambda s: write_index(s, {"a": "../m.safetensors"}),
        "names ../m.safetensors, which is no weights file beside it",
    ),
    "no index": (
        lambda s: [save_file({"a": torch.ones(1)}, s / f"{name}.safetensors") for name in write_index(s, None)],
        r"2 weights files and no model\.safetensors\.index\.json",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_over_is_one_line(original, tmp_path, kind):
    source = original(random_state())
    damage, message = REFUSED[kind]
    damage(source)
    with pytest.raises((SettingsError, DataError), match=message) as error:
        commands.convert.write_conversion(source, tmp_path, allow_pickle=False)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_pickles_are_read_on_request(original, tmp_path):
    source = original(state := random_state())
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(SettingsError, match="--allow_pickle True"):
        convert_to(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = convert_to(source, tmp_path / "out", "--allow_pickle", "True")
    expected = reference_logits(state, CONFIG, IDS)
    assert (logits_of(out, IDS) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture(scope="session")
def pristine(tokenizer, tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("pristine") / "model", tokenizer, random_state(), num_shards=2)


ODD = st.sampled_from([None, -1, 0, 3, 2**40, 1.5, "x", [], {}, [1], True, "absent"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_gives_a_whole_result_or_one_line(pristine, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(pristine, source := root / "model")
    file = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    kind = data.draw(st.sampled_from(["cut", "bytes", "value", "unlink"]))
    path = source / file
    if kind == "cut":
        truncate(path, data.draw(st.floats(0, 0.99)))
    elif kind == "unlink":
        path.unlink()
    elif kind == "bytes" or path.suffix != ".json":
        content = bytearray(path.read_bytes())
        # In the first part, where a safetensors file has its names and shapes: a changed weight is nobody's to see.
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content))
    else:
        values = json.loads(path.read_text())
        change(source, file, **{data.draw(st.sampled_from(sorted(values))): data.draw(ODD)})
    out = root / "out"
    try:
        convert.main([str(source), str(out)])
    except (SettingsError, DataError) as error:
        assert "\n" not in str(error) and not out.exists()
    else:
        assert find_fault(out) is None
        model = load_model(str(out), dtype="auto")
        assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in random_state().values())
    shutil.rmtree(root)
