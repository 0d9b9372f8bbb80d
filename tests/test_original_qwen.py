"""Original Qwen checkpoints: converted to the letter, taken by every script, or refused in one line."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import chat
import commands.chat
import commands.convert
import commands.original
import merge_lora
import quantize
from commands.original import find_model
from data_utils.qwen_tiktoken import SPECIAL_TOKENS, read_ranks
from data_utils.sources import DataError
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS, SHARED, run_python
from tests.original_checkpoint import (
    CHAT,
    CONFIG,
    END,
    GOLDEN,
    IM_END,
    RAW,
    packed_state,
    random_state,
    read_all,
    reference_logits,
    write_golden,
    write_original,
)
from tests.test_cli import flags
from tuning import convert
from tuning.checkpoint.manifest import find_fault
from tuning.errors import SettingsError
from tuning.model.loading import load_model
from tuning.model.quantization import dequantize

IDS = torch.tensor([[5, 300, 17, 801, 44, 900, 2, 2, 650, 9]])


@pytest.fixture(scope="session")
def golden(tokenizer, tmp_path_factory):
    """(the golden checkpoint with a vocabulary, input ids, the original's logits)."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden original checkpoint is not beside the project")
    expected = load_file(GOLDEN / "expected.safetensors")
    directory = write_golden(tmp_path_factory.mktemp("golden") / "Qwen-tiny-Chat", tokenizer)
    return directory, expected["input_ids"], expected["logits"]


@pytest.fixture
def original(tokenizer, tmp_path):
    """Writes a checkpoint in the original layout, with random weights."""
    return partial(write_original, tmp_path / "Qwen-small-Chat", tokenizer)


def convert_to(source, out, *more):
    convert.main([str(source), str(out), *more])
    return out


@torch.no_grad()
def logits_of(directory, ids, **options):
    return load_model(str(directory), dtype=torch.float32, **options).eval()(input_ids=ids).logits


# ---- the vocabulary ----


def test_real_vocabulary_gives_the_golden_ids(tmp_path):
    if not (SHARED / "qwen_tokenizer").is_dir():
        pytest.skip("the real Qwen vocabulary is not beside the project")
    shutil.copy(SHARED / "qwen_tokenizer" / "qwen.tiktoken", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151643, 151851))
    for case in json.loads((SHARED / "golden" / "qwen_v1_tokens.json").read_text()):
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
        assert tokenizer(case["text"], split_special_tokens=True)["input_ids"] == case["ids_plain"]
    theirs = json.loads((SHARED / "qwen_tokenizer" / "hf" / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == theirs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.text(alphabet="The license's 你 é\n\t 12!|<>_imstart", max_size=60))
def test_ids_are_tiktokens(small_tokenizer, text):
    import unicodedata

    ours, theirs = small_tokenizer
    normal = unicodedata.normalize("NFC", text)
    if normal.isprintable():  # tables of new characters differ between the libraries
        assert ours(text)["input_ids"] == theirs.encode(normal, allowed_special="all")
        plain = ours(text, split_special_tokens=True)["input_ids"]
        assert plain == theirs.encode_ordinary(normal)
        assert ours.decode(plain) == normal


@pytest.fixture(scope="session")
def small_tokenizer(tokenizer, tmp_path_factory):
    tiktoken = pytest.importorskip("tiktoken")
    from data_utils.qwen_tiktoken import _SPLIT

    directory = write_original(tmp_path_factory.mktemp("small"), tokenizer, random_state())
    ranks = read_ranks(directory / "qwen.tiktoken")
    special = {text: len(ranks) + number for number, text in enumerate(SPECIAL_TOKENS)}
    return load_tokenizer(str(directory)), tiktoken.Encoding(
        "qwen", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:300] + lines[301:], r"qwen\.tiktoken:301: rank 301, where 300 comes next"),
        (lambda lines: [*lines[:7], b"!!!! 7", *lines[8:]], r"qwen\.tiktoken:8: the token is not base64"),
        (lambda lines: [*lines[:9], b"version https://git-lfs", *lines], r"qwen\.tiktoken:10: expected a token"),
        (lambda lines: [*lines[:5], lines[4][:-1] + b"5", *lines[6:]], r"qwen\.tiktoken:6: the token of rank 4 again"),
        (lambda lines: [*lines[:-1], b"MTIzNDU2Nzg5 799"], r"rank 799 is not made up of two earlier ones"),
        (lambda lines: lines[:100], r"no token for the byte"),
        (lambda lines: lines[:-1], r"<\|endoftext\|> would be token 799, and generation_config\.json says 800"),
        (lambda lines: [*lines, b"ICAgICAgICA= 800"], r"would be token 801|not made up|again"),
    ],
)
def test_a_damaged_vocabulary_is_one_line(original, tmp_path, change, message):
    source = original(random_state())
    file = source / "qwen.tiktoken"
    file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())))
    with pytest.raises(DataError, match=message) as error:
        convert_to(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_size_is_refused(original):
    source = original(random_state())
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 151936}))
    with pytest.raises(DataError, match=r"1,008 tokens with the special ones, and config.json says vocab_size 151,936"):
        load_tokenizer(str(source))


# ---- weights and configuration ----


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


# ---- GPTQ ----


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_those_of_the_definition(original, tmp_path, bits):
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


@pytest.mark.slow
def test_q_lora_trains_on_it_and_merges(original, forks, tmp_path, monkeypatch):
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    config = {**CONFIG, "seq_length": 512, "fp32": False, "fp16": True, "quantization_config": quantization}
    packed, _ = packed_state(config, bits=4, group_size=16)
    source, out = original(packed, config=config), tmp_path / "out"
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, out, "--q_lora", "--max_steps", 6))
    assert code == 0, stderr
    assert "its linear layers: GPTQ, 4 bits, groups of 16" in stdout
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    merge_lora.main([str(out), str(tmp_path / "merged")])
    assert load_model(str(tmp_path / "merged"), dtype="auto").config.model_type == "qwen2"


# ---- every script ----


def test_plain_transformers_loads_the_result(golden, tmp_path):
    source, ids, expected = golden
    out = convert_to(source, tmp_path / "out")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(input_ids=load_file(sys.argv[2] + '/ids.safetensors')['ids']).logits\n"
        "save_file({'logits': logits}, sys.argv[2] + '/logits.safetensors')\n"
        "print(type(model).__name__, AutoTokenizer.from_pretrained(sys.argv[1]).decode([802]))"
    )
    assert run_python("-c", code, out, tmp_path).stdout.strip() == "Qwen2ForCausalLM <|im_end|>"
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - expected).abs().max() < 1e-4


def test_chat_takes_it_as_it_is(golden, capsys):
    source, ids, expected = golden
    session = commands.chat.Chat(chat.build_parser().parse_args([str(source)]))
    with torch.no_grad():
        assert (session.model(input_ids=ids).logits - expected).abs().max() < 1e-4
    told = capsys.readouterr()
    assert "an original Qwen checkpoint" in told.err and not told.out


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_starts_from_the_golden_logits_and_learns(golden, forks, tmp_path, kind):
    """A run at a rate of nearly zero ends where the original is; one at a real rate learns."""
    source, ids, expected = golden
    still, out = tmp_path / "still", tmp_path / "out"
    more = ["--use_lora", "--lora_r", 4, "--lora_dropout", 0] if kind == "lora" else []
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, still, *more, "--learning_rate", 1e-12))
    assert code == 0 and stdout.count("an original Qwen checkpoint") == 1, stderr
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, out, *more))
    assert code == 0, stderr
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["model"]["model_name_or_path"] == run["base_model"]["name"] == str(source)
    if kind == "lora":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
        session = commands.chat.Chat(chat.build_parser().parse_args([str(out)]))
        with torch.no_grad():
            trained = session.model(input_ids=ids).logits
        for adapter in (still, out):
            merge_lora.main([str(adapter), f"{adapter}-merged"])
        still, out = (Path(f"{each}-merged") for each in (still, out))
        assert (logits_of(out, ids) - trained).abs().max() < 1e-4
    assert (logits_of(still, ids) - expected).abs().max() < 1e-4
    assert (logits_of(out, ids) - expected).abs().max() > 1e-2


def test_an_adapters_base_is_found_again_when_the_cache_is_gone(golden, forks, tmp_path, monkeypatch):
    source, *_ = golden
    shutil.copytree(source, mine := tmp_path / "mine")
    words = flags(mine, CONVERSATIONS, tmp_path / "out", "--use_lora", "--cache_dir", tmp_path / "cache")
    code, _, stderr = forks.run(*words)
    assert code == 0, stderr
    first = next((tmp_path / "cache" / "finetune" / "converted").glob("mine-*/manifest.json")).read_bytes()
    shutil.rmtree(tmp_path / "cache")
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged"), "--cache_dir", str(tmp_path / "cache")])
    again = next((tmp_path / "cache" / "finetune" / "converted").glob("mine-*/manifest.json")).read_bytes()
    assert again == first
    # One that was converted by hand is the same base; a moved original is named by --base, another one refused.
    by_hand = convert_to(mine, tmp_path / "by-hand")
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-2"), "--base", str(by_hand)])
    mine.rename(tmp_path / "moved")
    with pytest.raises(SettingsError, match="name it with --base"):
        merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-3")])
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-3"), "--base", str(tmp_path / "moved")])
    one, *others = (read_all(tmp_path / f"merged{end}") for end in ("", "-2", "-3"))
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_data_utils_needs_the_vocabulary_only(original, tokenizer, tmp_path):
    source = original(random_state())
    (source / "model.safetensors").unlink()
    done = run_python("-m", "data_utils", "check", CONVERSATIONS, "--model", source)
    assert "targets that end with the stop token: 100 %" in done.stdout
    assert not list(tmp_path.glob("**/converted"))


def test_a_system_message_becomes_the_templates_own(original, tmp_path):
    out = convert_to(original(random_state()), tmp_path / "out")
    written = load_tokenizer(str(out), system_message="Be kind.").apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False
    )
    assert written.startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_rows_beyond_seq_length_are_warned_of(original, forks, tmp_path):
    words = flags(original(random_state()), CONVERSATIONS, tmp_path / "out", "--use_lora", "--dry_run")
    code, stdout, stderr = forks.run(*words)
    assert code == 0, stderr
    assert "was made for 64 tokens (seq_length)" in stdout
    code, stdout, _ = forks.run(*words, "--model_max_length", 64)
    assert code == 0 and "(seq_length)" not in stdout


@pytest.mark.slow
def test_quantize_takes_it_as_it_is(golden, tmp_path):
    source, ids, expected = golden
    words = ["--data", str(CONVERSATIONS), "--bits", "8", "--group_size", "32"]
    quantize.main([str(source), str(tmp_path / "int8"), *words])
    assert (logits_of(tmp_path / "int8", ids) - expected).abs().max() < 0.2


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_convert_once(golden, forks, tmp_path):
    source, *_ = golden
    words = flags(source, CONVERSATIONS, tmp_path / "out", "--cache_dir", tmp_path / "cache", "--max_steps", 1)
    code, stdout, stderr = forks.run(*words, processes=2)
    assert code == 0, stderr
    assert stdout.count("an original Qwen checkpoint; converted once") == 1
    assert len(list((tmp_path / "cache" / "finetune" / "converted").glob("*/manifest.json"))) == 1


@pytest.mark.slow
def test_a_hub_name_is_converted_and_recorded(original, tmp_path, monkeypatch):
    """As the hub's cache lies, without the hub."""
    source = original(random_state(), num_shards=2)
    repository = tmp_path / "hub" / "models--Qwen--Qwen-small-Chat"
    shutil.copytree(source, repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    done = run_python(
        "-c",
        "import sys; from commands.original import _find\nprint(_find('Qwen/Qwen-small-Chat', sys.argv[1]))\n"
        "from data_utils.tokenizer import load_tokenizer\n"
        "print(len(load_tokenizer('Qwen/Qwen-small-Chat', cache_dir=sys.argv[1])))",
        tmp_path / "hub",
        HF_HUB_OFFLINE="1",
    )
    assert f"name='Qwen/Qwen-small-Chat', revision='{'c' * 40}'" in done.stdout
    assert done.stdout.splitlines()[-1] == "1008"


# ---- refused, in one line, with nothing written ----


def change(source, name, **values):
    path = source / name
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))


def edit_state(source, edit):
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, source / "model.safetensors")


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


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
        lambda s: (s / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}})),
        r"index\.json: names b\.safetensors, which is not there",
    ),
    "another place": (
        lambda s: (s / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../m.safetensors"}})
        ),
        "names ../m.safetensors, which is no weights file beside it",
    ),
    "no index": (
        lambda s: save_file({"a": torch.ones(1)}, s / "other.safetensors"),
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


def test_the_command(original, tmp_path, run_script):
    source, out = original(random_state()), tmp_path / "out"
    code, stdout, stderr = run_script("tuning/convert.py", source, out)
    assert (code, stdout, stderr) == (0, f"converted: {out}\n", "")
    code, _, stderr = run_script("tuning/convert.py", source, out)
    assert code == 2 and stderr.count("\n") == 1 and "use --overwrite" in stderr
    assert run_script("tuning/convert.py", source, out, "--overwrite")[0] == 0
    code, _, stderr = run_script("tuning/convert.py", out, tmp_path / "other")
    assert code == 2 and "is no original Qwen checkpoint" in stderr
    assert run_script("tuning/convert.py", source, source / "inside")[0] == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    assert run_script("tuning/convert.py", source, tmp_path / "theirs", "--overwrite")[0] == 2
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "mine"


# ---- killed, and two at once ----


def fork(function):
    """Call a function in a forked process. Returns: its number."""
    if not (number := os.fork()):
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return number


def convert_killed(source, cache, at):
    """Convert, and die at one of the moments when a file gets its name."""
    replaced, whole = [], Path.replace

    def replace(self, target):
        replaced.append(target)
        if len(replaced) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, target)

    Path.replace = replace
    find_model(str(source), str(cache))


def test_a_killed_conversion_is_never_taken_as_complete(original, tmp_path):
    source = original(random_state(), num_shards=2)
    expected = find_model(str(source), str(tmp_path / "whole"))
    files = {path.name: path.read_bytes() for path in Path(expected).iterdir()}
    for at in range(1, 100):
        cache = tmp_path / f"killed-{at}"
        _, status = os.waitpid(fork(partial(convert_killed, source, cache, at)), 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = Path(find_model(str(source), str(cache)))
        assert {path.name: path.read_bytes() for path in found.iterdir()} == files, at
        shutil.rmtree(cache)
    assert at > len(files)


def test_two_at_once_convert_once(original, tmp_path, monkeypatch):
    source, log = original(random_state()), tmp_path / "log"
    write = commands.original.write_conversion

    def slow(*args, **options):
        with open(log, "a") as file:
            file.write("begun\n")
        time.sleep(0.3)
        write(*args, **options)

    monkeypatch.setattr(commands.original, "write_conversion", slow)
    numbers = [fork(partial(find_model, str(source), str(tmp_path / "cache"))) for _ in range(3)]
    assert [os.waitpid(number, 0)[1] for number in numbers] == [0, 0, 0]
    assert log.read_text() == "begun\n"


def test_a_damaged_conversion_is_made_again_and_a_changed_original_anew(original, tmp_path):
    source = original(random_state())
    cache = str(tmp_path / "cache")
    first = Path(find_model(str(source), cache))
    content = (first / "model.safetensors").read_bytes()
    truncate(first / "model.safetensors")
    assert Path(find_model(str(source), cache)) == first and (first / "model.safetensors").read_bytes() == content
    change(source, "generation_config.json", top_p=0.5)
    assert Path(find_model(str(source), cache)) != first


def test_a_cache_that_cannot_be_written_to_is_one_line(original, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot keep converted checkpoints here"):
        find_model(str(original(random_state())), str(tmp_path / "file"))
    monkeypatch.setattr(commands.original, "default_root", lambda *_: None)
    with pytest.raises(SettingsError, match="no home directory"):
        find_model(str(original(random_state())))


def test_other_models_are_left_alone(checkpoints, tmp_path):
    assert find_model(str(checkpoints["untied"]), str(tmp_path)) == str(checkpoints["untied"])
    assert find_model(str(tmp_path / "absent"), str(tmp_path)) == str(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
