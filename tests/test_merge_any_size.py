"""A merge that streams: nothing of the base is lost, values are peft's, and a kill or a full disk costs nothing."""

import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

import merge_lora
from tests.architectures import ARCHITECTURES, write
from tests.conftest import build_model, run_python
from tuning.checkpoint.tensor_files import DTYPES, Entry, list_tensors, read_header
from tuning.checkpoint.tensor_writer import TensorFile
from tuning.checkpoint.verify import stream_logits
from tuning.errors import SettingsError
from tuning.model.loading import load_model as meta_model
from tuning.model.other_parts import choose_auto_class

FAST = ("Qwen3", "Qwen3-MoE", "Qwen3.5-MoE, 3.6-MoE (multimodal)")
EXTRA = {
    "mtp.x": torch.arange(7.0),
    "mtp.layers.0.w": torch.ones(3, 2, dtype=torch.bfloat16),
    "odd/名": torch.tensor(True),
}


def load_model(directory: Path):
    return choose_auto_class(AutoConfig.from_pretrained(directory)).from_pretrained(directory, dtype=torch.float32)


def write_adapter(base: Path, out: Path, seed: int = 1, **configuration) -> Path:
    """An adapter with random values, as peft saves it."""
    model = load_model(base)
    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model, LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **configuration})
    )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(out)
    return out


def adapt_everything(base: Path, out: Path) -> Path:
    """On all linear layers, and on all experts."""
    names = [name for name, p in load_model(base).named_parameters() if p.ndim == 3 and ".experts." in name]
    ends = sorted({".".join(name.split(".")[-3:]) for name in names})
    return write_adapter(base, out, target_modules="all-linear", target_parameters=ends or None)


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert len(tensors) == sum(map(len, files)), "each once"
    return tensors


def plant(directory: Path, extra: dict[str, torch.Tensor]) -> None:
    """Put tensors that no class knows into the last of a checkpoint's files."""
    path = sorted(directory.glob("*.safetensors"))[-1]
    save_file({**load_file(path), **extra}, path, {"format": "pt"})


def merge_with_peft(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """The slow reference: the whole model in float32."""
    PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().save_pretrained(out)
    return read_tensors(out)


def check_result(base: Path, merged: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> int:
    """Hold every tensor of a base's files against the result's. Returns: how many were changed."""
    before, after = read_tensors(base), read_tensors(merged)
    assert before.keys() == after.keys()
    changed = 0
    for name, old in before.items():
        new, wanted = after[name], expected.get(name)
        assert new.shape == old.shape, name
        assert new.dtype == (dtype if dtype and old.is_floating_point() and wanted is not None else old.dtype), name
        if wanted is None or torch.equal(wanted, old.float()):
            assert torch.equal(new, old.to(new.dtype)), name
            continue
        changed += 1
        eps = torch.finfo(new.dtype).eps
        assert (new.float() - wanted).abs().max() <= 1.5 * eps * wanted.abs().max(), name
        if eps > 1e-6:
            assert (new == wanted.to(new.dtype)).float().mean() > 0.98, name
    return changed


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_architecture_keeps_all_of_its_base(tokenizer, tmp_path, name):
    base = write(name, tokenizer, tmp_path / "base", torch.bfloat16)
    plant(base, EXTRA)
    adapter = adapt_everything(base, tmp_path / "adapter")
    merge_lora.main([str(adapter), str(tmp_path / "merged")])
    changed = check_result(base, tmp_path / "merged", merge_with_peft(base, adapter, tmp_path / "expected"))
    assert changed >= 8


def shard(base: Path, out: Path, size: str = "20KB") -> Path:
    """A copy of a checkpoint in several files."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    model = load_model(base).to(next(iter(load_file(base / "model.safetensors").values())).dtype)
    model.save_pretrained(out, max_shard_size=size)
    return out


def list_files(directory: Path) -> dict[str, str]:
    """The file of each tensor, as files and index agree on it."""
    paths = sorted(directory.glob("*.safetensors"))
    names = {tensor.name: path.name for path in paths for tensor in read_header(path)}
    if (directory / "model.safetensors.index.json").is_file():
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == names
        tensors = read_tensors(directory).values()
        assert index["metadata"]["total_size"] == sum(each.numel() * each.itemsize for each in tensors)
    return names


@pytest.fixture(scope="module")
def moe(tokenizer, tmp_path_factory):
    """A base with experts in float32 with tensors unknown to its class, and an adapter of all layers."""
    root = tmp_path_factory.mktemp("moe")
    base = write("Qwen3-MoE", tokenizer, root / "base")
    plant(base, EXTRA)
    adapter = adapt_everything(base, root / "adapter")
    return base, adapter, merge_with_peft(base, adapter, root / "expected")


def test_a_base_in_several_files_keeps_them(tokenizer, tmp_path):
    base = shard(write("Qwen3-MoE", tokenizer, tmp_path / "one", torch.bfloat16), tmp_path / "base")
    plant(base, EXTRA)
    index = base / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    last = sorted(values["weight_map"].values())[-1]
    values["weight_map"] |= dict.fromkeys(EXTRA, last)
    values["metadata"]["total_size"] += sum(each.numel() * each.itemsize for each in EXTRA.values())
    index.write_text(json.dumps(values))
    adapter = adapt_everything(base, tmp_path / "adapter")
    merge_lora.main([str(adapter), str(tmp_path / "merged")])
    assert len(set(list_files(base).values())) > 3
    assert list_files(tmp_path / "merged") == {t.name: t.file.name for t in list_tensors(base).values()}
    assert check_result(base, tmp_path / "merged", merge_with_peft(base, adapter, tmp_path / "expected")) > 20


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dtype_of_the_result(moe, tmp_path, dtype):
    base, adapter, expected = moe
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[dtype]
    words = ["--dtype", dtype, *(["--no-verify"] if dtype == "fp32" else [])]
    merge_lora.main([str(adapter), str(tmp_path / "merged"), *words])
    check_result(base, tmp_path / "merged", expected, wanted)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == {
        "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"
    }[dtype]  # fmt: skip


def test_files_of_a_largest_size(moe, tmp_path):
    base, adapter, expected = moe
    merge_lora.main([str(adapter), str(tmp_path / "merged"), "--max_shard_size", "20KB"])
    check_result(base, tmp_path / "merged", expected)
    by_file = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        by_file[path] = [tensor.num_bytes for tensor in read_header(path)]
    assert len(by_file) > 4 and all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in by_file.values())
    assert list_files(tmp_path / "merged").keys() == list_files(base).keys()


def test_every_tensor_keeps_its_own_dtype(tokenizer, tmp_path):
    """Also where the experts of one stack are stored in different ones: none loses bits."""
    base = write("Qwen3-MoE", tokenizer, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    mixed = {name: t.to(kinds[i % 3]) if "experts" not in name else t for i, (name, t) in enumerate(tensors.items())}
    narrow = next(name for name in mixed if "experts.0." in name)
    mixed[narrow] = mixed[narrow].bfloat16()
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    adapter = adapt_everything(base, tmp_path / "adapter")
    merge_lora.main([str(adapter), str(tmp_path / "merged")])
    after, expected = read_tensors(tmp_path / "merged"), merge_with_peft(base, adapter, tmp_path / "expected")
    for name, old in mixed.items():
        assert after[name].dtype == (torch.float32 if name == narrow else old.dtype), name
        eps = torch.finfo(after[name].dtype).eps
        assert (after[name].float() - expected[name]).abs().max() <= 1.5 * eps * expected[name].abs().max(), name


# ---- several adapters ----

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SEVERAL = {
    "other ranks": ({"target_modules": "all-linear", "r": 2}, {**ATTENTION, "r": 7, "use_rslora": True}, 0.7, 0.3),
    "negative and zero": ({"target_modules": "all-linear"}, {**ATTENTION, "r": 2}, -0.5, 0.0),
    "both zero": (ATTENTION, {"target_modules": ["up_proj"]}, 0.0, 0.0),
    "rows and a matrix": (
        {**ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
        {**ATTENTION, "modules_to_save": ["lm_head", "norm"], "r": 5},
        0.6,
        -1.5,
    ),
    "kinds": ({**ATTENTION, "use_dora": True}, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, 0.4, 1.2),
    "biases": ({**ATTENTION, "bias": "all"}, {**ATTENTION, "lora_bias": True}, 0.5, 2.0),
    "the weight alone": (ATTENTION, None, 0.25, 0.0),
}


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory):
    return write("Qwen2, Qwen2.5", tokenizer, tmp_path_factory.mktemp("dense") / "base")


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize("name", SEVERAL)
def test_adapters_add_up_by_their_weights(dense, tmp_path, name):
    first, second, *weights = SEVERAL[name]
    plain = read_tensors(dense)
    expected = {name: tensor.double() for name, tensor in plain.items()}
    words = []
    for number, (configuration, weight) in enumerate(zip((first, second), weights, strict=True)):
        if configuration is not None:
            adapter = write_adapter(dense, tmp_path / f"a{number}", seed=number, **configuration)
            alone = merge_with_peft(dense, adapter, tmp_path / f"alone{number}")
            for key in plain:
                expected[key] += weight * (alone[key].double() - plain[key].double())
            words.append(f"{adapter}:{weight}")
    merge_lora.main([str(tmp_path / "merged"), "--adapter", *words])
    merged = read_tensors(tmp_path / "merged")
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (merged[key] - tensor).abs().max() <= 2e-6 * max(1.0, float(tensor.abs().max())), key


def test_tied_matrices_that_one_adapter_takes_apart(tokenizer, tmp_path):
    """The other adapter's rows are those of both."""
    base = build_model(tokenizer, tied=True)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    plain = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    configurations = ({**ATTENTION, "modules_to_save": ["lm_head"]}, {**ATTENTION, "trainable_token_indices": [3, 5]})
    words, expected = [], {name: plain.clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for number, (configuration, weight) in enumerate(zip(configurations, (0.5, 0.8), strict=True)):
        adapter = write_adapter(tmp_path / "base", tmp_path / f"a{number}", seed=number, **configuration)
        words.append(f"{adapter}:{weight}")
        alone = merge_with_peft(tmp_path / "base", adapter, tmp_path / f"alone{number}")
        for name in expected:
            expected[name] += weight * (alone.get(name, alone["model.embed_tokens.weight"]) - plain)
    merge_lora.main([str(tmp_path / "merged"), "--adapter", *words])
    merged = read_tensors(tmp_path / "merged")
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    assert not torch.equal(merged["model.embed_tokens.weight"], merged["lm_head.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_experts_add_up_too(moe, tmp_path):
    base, adapter, expected = moe
    other = write_adapter(base, tmp_path / "b", seed=3, **ATTENTION, r=9)
    alone, plain = merge_with_peft(base, other, tmp_path / "alone"), read_tensors(base)
    merge_lora.main([str(tmp_path / "merged"), "--adapter", f"{adapter}:0.5", f"{other}:-2"])
    merged = read_tensors(tmp_path / "merged")
    for name, tensor in expected.items():
        wanted = plain[name] + 0.5 * (tensor - plain[name]) - 2 * (alone[name] - plain[name])
        assert torch.allclose(merged[name], wanted, atol=1e-5), name
    assert all(torch.equal(merged[name], tensor) for name, tensor in EXTRA.items())


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another base", "belongs to another base model"),
        ("another copy of the base", None),
        ("twice", "is named twice"),
        ("another template", "was trained with another chat template"),
        ("another token", "token 1040 is '<b>', in"),
        ("not finite", "becomes no finite numbers in torch.float16"),
    ],
)
def test_adapters_that_cannot_be_added_up(dense, tokenizer, tmp_path, case, message):
    other = dense
    if "another" in case and "base" in case:
        other = shutil.copytree(dense, tmp_path / "other")
    if case == "another base":
        tensors = load_file(other / "model.safetensors")
        save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other / "model.safetensors")
    adapters = [write_adapter(dense, tmp_path / "a", **ATTENTION), write_adapter(other, tmp_path / "b", **ATTENTION)]
    words = [f"{adapter}:{1e30 if case == 'not finite' else 0.5}" for adapter in adapters]
    for text, adapter in zip("ab", adapters, strict=True):
        if case == "another template":
            (adapter / "chat_template.jinja").write_text(text)
        if case == "another token":
            tokenizer.save_pretrained(adapter)
            token = {"id": 1040, "content": f"<{text}>"}
            change_json(adapter / "tokenizer.json", lambda v, token=token: v["added_tokens"].append(token))
    if case == "twice":
        words[1] = f"{tmp_path}/b/../a:0.2"
    words = [str(tmp_path / "merged"), "--adapter", *words, *(["--dtype", "fp16"] if case == "not finite" else [])]
    if message is None:
        return merge_lora.main(words)
    with pytest.raises(SettingsError, match=message) as refused:
        merge_lora.main(words)
    assert "\n" not in str(refused.value) and not (tmp_path / "merged").exists()


# ---- other tools' adapters ----

NOTES = {
    "unsloth_version": "2026.1", "unsloth_fixed": True, "peft_version": "0.18.0", "llamafactory_version": "0.9.4",
    "enable_lora": None, "merge_weights": False, "use_sparkles": False, "sparkles": [], "more": {},
    "auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True},
}  # fmt: skip
OTHERS = {
    "Unsloth": r"(?:.*?(?:language|text).*?)?(?:.*?\.)?(?:self_attn|mlp)\.(?:q_proj|k_proj|v_proj|o_proj|down_proj)",
    "LLaMA-Factory": ["q_proj", "k_proj", "gate_proj"],
    "TRL": "all-linear",
}


@pytest.mark.parametrize("tool", OTHERS)
def test_what_tools_note_in_an_adapter_changes_nothing(dense, tmp_path, tool):
    adapter = write_adapter(dense, tmp_path / "adapter", target_modules=OTHERS[tool])
    expected = merge_with_peft(dense, adapter, tmp_path / "expected")
    change_json(adapter / "adapter_config.json", lambda values: values.update(NOTES))
    for name in ("trainer_state.json", "training_args.yaml", "README.md", "optimizer.pt"):
        (adapter / name).write_text("{}")
    merge_lora.main([str(adapter), str(tmp_path / "merged")])
    assert check_result(dense, tmp_path / "merged", expected) >= 6
    assert not {"trainer_state.json", "optimizer.pt"} & {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3", "GLM-4-MoE"])
def test_an_adapter_of_every_expert_as_transformers_4_had_them(tokenizer, tmp_path, name):
    base = write(name, tokenizer, tmp_path / "base")
    adapter, tensors = tmp_path / "adapter", read_tensors(base)
    write_adapter(base, adapter, target_modules=["q_proj" if "Qwen" in name else "o_proj"])
    state, expected = load_file(adapter / "adapter_model.safetensors"), dict(tensors)
    torch.manual_seed(2)
    for full, weight in tensors.items():
        if ".experts." in full:
            key = f"base_model.model.{full.removesuffix('.weight')}"
            down, up = torch.randn(3, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 3) * 0.1
            state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            expected[full] = weight + up @ down * 5 / 3
    save_file(state, adapter / "adapter_model.safetensors")
    experts = [f"experts.{i}.{kind}_proj" for i in range(4) for kind in ("gate", "up", "down")]
    change_json(adapter / "adapter_config.json", lambda values: values["target_modules"].extend(experts))
    merge_lora.main([str(adapter), str(tmp_path / "merged")])
    merged = read_tensors(tmp_path / "merged")
    attention = [name for name in tensors if "_proj" in name and "self_attn" in name]
    for key in tensors.keys() - set(attention):
        assert torch.allclose(merged[key], expected[key], atol=1e-6), key
    assert any(not torch.equal(merged[key], tensors[key]) for key in attention)


@pytest.mark.parametrize("name", ["use_sparkles", "lora_gamma", "version_of_math"])
def test_what_may_change_the_result_is_refused_by_name(dense, tmp_path, name):
    adapter = write_adapter(dense, tmp_path / "adapter", **ATTENTION)
    change_json(adapter / "adapter_config.json", lambda values: values.update({name: 2}))
    with pytest.raises(SettingsError, match=f"{name} is not known to peft"):
        merge_lora.main([str(adapter), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


# ---- kills, and room ----


def list_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_kill(forks, words: list[str], out: Path, at: int, whole: dict[str, bytes]) -> int:
    """Kill a merge at an event, and start it again. Returns: how many files it did not write again."""
    assert forks.run(*words, module="merge_lora", at=at, do="SIGKILL")[0] == 137
    unfinished = out / ".unfinished.tmp"
    if not (unfinished / "manifest.json").is_file() and not (out / "manifest.json").is_file():
        assert not list(out.glob("*.json")) and not list(out.glob("*.safetensors"))
    finished = {}
    if (unfinished / ".finished.json").is_file():
        finished = json.loads((unfinished / ".finished.json").read_text())
    before = {name: (unfinished / name).stat() for name in finished if (unfinished / name).is_file()}
    code, stdout, stderr = forks.run(*words, module="merge_lora")
    assert code in (0, 2), stderr
    assert code == 0 or "exists and is not empty" in stderr  # it was complete, but for what nobody misses
    assert list_bytes(out) == whole
    if code == 0 and before and "goes on with" in stdout:
        assert f"{len(before)} of" in stdout
        after = {name: (out / name).stat() for name in before}
        assert all((after[n].st_ino, after[n].st_mtime_ns) == (s.st_ino, s.st_mtime_ns) for n, s in before.items())
    shutil.rmtree(out)
    return len(before)


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_merge_goes_on_with_its_finished_files(forks, moe, tmp_path, step):
    _, adapter, _ = moe
    words = [str(adapter), str(tmp_path / "out"), "--max_shard_size", "40KB"]
    code, _, stderr = forks.run(*words, module="merge_lora")
    assert code == 0, stderr
    num_events, whole = forks.num_events[0], list_bytes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    kept = [check_kill(forks, words, tmp_path / "out", at, whole) for at in range(3, num_events, step)]
    assert max(kept) >= 2


@pytest.mark.parametrize("change", ["adapter", "dtype", "files"])
def test_another_merge_does_not_go_on_with_the_leftovers(forks, moe, tmp_path, change):
    base, adapter, _ = moe
    out, size = tmp_path / "out", ["--max_shard_size", "40KB"]
    assert forks.run(adapter, out, *size, module="merge_lora", at=8, do="SIGKILL")[0] == 137
    assert json.loads((out / ".unfinished.tmp" / ".finished.json").read_text())
    words = [adapter, out, *size]
    if change == "adapter":
        words[0] = write_adapter(base, tmp_path / "b", seed=5, target_modules="all-linear")
    elif change == "dtype":
        words += ["--dtype", "bf16"]
    else:
        words = [adapter, out]
    code, stdout, stderr = forks.run(*words, module="merge_lora")
    assert code == 0 and "goes on" not in stdout, stderr
    words[1] = tmp_path / "fresh"
    assert forks.run(*words, module="merge_lora")[0] == 0
    assert list_bytes(out) == list_bytes(tmp_path / "fresh")


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(moe, tmp_path, monkeypatch):
    _, adapter, _ = moe
    opened = []
    monkeypatch.setattr("tuning.checkpoint.tensor_writer.TensorFile.__init__", lambda *_: opened.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(SettingsError, match=r"the result takes 0\.1 GB, and 0\.0 GB are free there"):
        merge_lora.main([str(adapter), str(tmp_path / "some" / "merged")])
    assert not opened and not (tmp_path / "some").exists()


def test_a_disk_that_fills_up_leaves_nothing(forks, moe, tmp_path):
    out = tmp_path / "some" / "merged"
    plan = {"at": 2, "do": "full", "bytes": 30_000}
    code, _, stderr = forks.run(moe[1], out, "--max_shard_size", "40KB", module="merge_lora", **plan)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "File too large; make room, then run the command again" in lines[0]
    assert "Traceback" not in stderr and not (tmp_path / "some").exists()


# ---- memory ----

# VmHWM, as getrusage's peak begins with that of the process that forked.
_MEASURE = """
import sys
import commands.merge, transformers.models.qwen3.modeling_qwen3
import merge_lora
def read_mib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) >> 10
before = read_mib("VmRSS")
merge_lora.main(sys.argv[1:])
print("MIB", before, read_mib("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True])
def test_memory_is_a_matrix_and_not_the_model(tokenizer, tmp_path, verify):
    sizes = dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, max_position_embeddings=512, vocab_size=2048, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="80MB")
    tokenizer.save_pretrained(base)
    files = list(base.glob("*.safetensors"))
    assert len(files) >= 3 and sum(path.stat().st_size for path in files) > 280e6
    del model
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    words = [adapter, tmp_path / "merged", *([] if verify else ["--no-verify"])]
    # A layer has 45 MiB in float32. The C library keeps freed blocks below 32 MiB, which here are all of them.
    done = run_python("-c", _MEASURE, *words, MALLOC_MMAP_THRESHOLD_="1000000")
    before, peak = map(int, done.stdout.split("MIB ")[1].split())
    assert peak - before < (170 if verify else 100), done.stdout


# ---- the check ----


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_model_block_by_block_has_the_whole_models_logits(tokenizer, tmp_path, name):
    """Prompts of several lengths in one batch, linear attention included."""
    base = write(name, tokenizer, tmp_path / "base")
    model = load_model(base).eval()
    weights = model.state_dict()
    probes = [[5, 9, 30, 2, 11, 77, 300] * 5, [44, 3], [9], [100, 200, 300, 400], [5] * 70]
    on_meta = meta_model(str(base), dtype=torch.float32, meta=True, buffers=True)
    streamed = stream_logits(on_meta, weights.__getitem__, probes)
    assert all(parameter.is_meta for parameter in on_meta.parameters()), "and nothing stays"
    for ids, logits in zip(probes, streamed, strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert (logits - whole).abs().max() <= 1e-5 * whole.abs().max()


# ---- files ----


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors_of_files(draw) -> dict[str, torch.Tensor]:
    """Any dtypes, shapes (of no elements and no dimensions too), bit patterns and names."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
    tensors = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = dtype.itemsize * math.prod(shape)
        content = draw(st.binary(min_size=size, max_size=size))
        if dtype == torch.bool:
            content = bytes(byte % 2 for byte in content)
        buffer = torch.tensor(list(content), dtype=torch.uint8)
        tensors[name] = buffer.view(dtype).view(shape)
    return tensors


def write_ourselves(path: Path, tensors: dict[str, torch.Tensor]) -> TensorFile:
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    with TensorFile(path, [Entry.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]) as file:
        for tensor in tensors.values():
            file.write(tensor)
    return file


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(actual[name]) == as_bytes(tensor)


@settings(max_examples=60)
@given(tensors_of_files())
def test_files_are_what_the_library_reads_and_writes(tensors):
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs, copied = (Path(directory) / name for name in ("ours", "theirs", "copied"))
        file = write_ourselves(ours, tensors)
        assert file.facts == {
            "bytes": ours.stat().st_size,
            "sha256": hashlib.sha256(ours.read_bytes()).hexdigest(),
        }
        assert_equal(load_file(ours), tensors)
        save_file(tensors, theirs)
        for path in (ours, theirs):
            stored = read_header(path)
            assert_equal({each.name: each.read() for each in stored}, tensors)
        with TensorFile(copied, [Entry(each.name, each.dtype, each.shape, each.num_bytes) for each in stored]) as file:
            for each in stored:
                file.copy(each)
        assert_equal(load_file(copied), tensors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(2**40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def damaged_files(draw) -> bytes:
    """A small file, damaged: cut, bytes replaced, or another value somewhere in its header."""
    entries = {
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [14, 15]},
    }
    kind = draw(st.sampled_from(["value", "deep value", "bytes", "cut"]))
    if kind == "value":
        entries[draw(st.sampled_from("abc"))] = draw(JSON)
    elif kind == "deep value":
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value = draw(JSON | st.lists(st.sampled_from([-1, 0, 1, 2, 8, 2.0, True, 2**32, 2**63]), max_size=4))
        entries[draw(st.sampled_from("abc"))][field] = value
    text = json.dumps(entries).encode()
    file = bytearray(len(text).to_bytes(8, "little") + text + bytes(15))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            file[draw(st.integers(0, len(file) - 1))] = draw(st.integers(0, 255))
    return bytes(file[: draw(st.integers(0, len(file)))] if kind == "cut" else file)


@settings(max_examples=300)
@given(damaged_files())
def test_a_damaged_header_is_a_mistake_in_one_line_or_reads(content):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(content)
        try:
            stored = read_header(path)
            for tensor in stored:
                tensor.read()
        except SettingsError as error:
            assert str(path) in str(error)
            return
        assert load_file(path).keys() == {tensor.name for tensor in stored}, "the library reads it, too"


def test_a_name_that_no_file_can_hold_is_refused(tmp_path):
    text = b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_header(tmp_path / "model.safetensors")
