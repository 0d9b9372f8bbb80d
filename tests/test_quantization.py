"""Q-LoRA on all kinds of packed layers: what they compute, what is saved, merged, quantised and refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import chat
import merge_lora
import quantize
from data_utils.steps import StepDataset
from tests import runs
from tests.conftest import CONVERSATIONS, ROOT, needs
from tests.library_logits import Library
from tests.runs import MAX_LENGTH, NF4, probe_logits
from tests.test_chaos import kill_and_resume, words
from tuning.checkpoint.adapter import load_lora
from tuning.errors import MachineError, SettingsError
from tuning.model import quantized_linear
from tuning.model.loading import load_model as load
from tuning.model.lora import add_lora, find_lora_targets
from tuning.model.packing import enable_packing
from tuning.model.quantization import (
    Quantization,
    choose_quantization,
    dequantize,
    quantize_meta_model,
    read_quantization,
)
from tuning.model.quantized_linear import GptqLinear, QuantizedLinear
from tuning.model.training_model import TrainingModel, count_parameters
from tuning.planning.memory import MicroBatchShape, estimate_memory

KINDS = {
    "nf4": NF4,
    "fp4": Quantization("bitsandbytes", 4, "fp4", double=True, dtype="float32"),
    "int8": Quantization("bitsandbytes", 8, dtype="float32"),
    "gptq4": None,
    "gptq8": None,
}  # at loading
IDS = [1022, 40, 41, 1023, 5, 1022, 7, 8, 1023, 1021]


@pytest.fixture(scope="session")
def source(checkpoints, request):
    """Kind -> (checkpoint, quantisation at loading). Skips the test where the kind's library is not installed."""

    def get(kind):
        if kind.startswith("gptq"):
            return request.getfixturevalue("gptq")[int(kind[4:])], None
        needs("bitsandbytes")
        return checkpoints["untied"], KINDS[kind]

    return get


@pytest.fixture
def packed(source):
    def get(kind, **options):
        path, quantization = source(kind)
        return load(str(path), dtype=torch.float32, quantization=quantization, **options)

    return get


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Plain transformers and peft, in a process of their own."""
    process = Library(ROOT, tmp_path_factory.mktemp("library"))
    yield process
    process.close()


@torch.no_grad()
def our_logits(model):
    return model.eval()(input_ids=torch.tensor([IDS])).logits


# ---- what packed layers compute ----


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_librarys(source, packed, library, kind):
    path, quantization = source(kind)
    theirs = library.logits(path, IDS, kind=kind if quantization else "own")
    # Int8: the library rounds activations to 8 bits as well, and computes in fp16.
    assert (theirs - our_logits(packed(kind))).abs().max() < (0.1 if kind == "int8" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_embedding_and_output_is_packed(packed, kind):
    model = packed(kind)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)} == linear - {"lm_head"}
    assert find_lora_targets(model) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    meta = packed(kind, meta=True)
    described = [
        {name: (t.shape, t.dtype) for name, t in [*m.named_parameters(), *m.named_buffers()]} for m in (model, meta)
    ]
    assert described[0] == described[1]
    assert count_parameters(model) == count_parameters(meta)
    assert count_parameters(model)[1] == count_parameters(dequantize(model))[1]


def gradients(model, *, half, layout, rows):
    """(loss, gradients of all that trains) of one step, behind an evaluation."""
    steps = StepDataset(rows, rows_per_step=6, max_tokens=6 * MAX_LENGTH, packed=layout == "packed", seed=1)
    micro_batch = steps[0]["micro_batches"][0]
    with torch.no_grad():
        model.eval()(**micro_batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = model.train()(**micro_batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_unpacked_weights(checkpoints, packed, kind, half, layout):
    rows, template = runs.example_rows(checkpoints["untied"])
    results = []
    for unpacks in (False, True):
        model = dequantize(packed(kind)) if unpacks else packed(kind)
        torch.manual_seed(1)
        ids = template.encoder.template_ids
        wrapped = TrainingModel(*add_lora(model, r=4, alpha=8, dropout=0.0, embeddings="tokens", token_ids=ids))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if layout == "packed":
            assert enable_packing(wrapped, max_length=MAX_LENGTH, dtype=torch.float32) is None
        results.append(gradients(wrapped, half=half, layout=layout, rows=rows))
    (loss, ours), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert ours.keys() == expected.keys() and len(ours) == 2 * 7 * 2 + 2
    for name, gradient in ours.items():
        assert gradient.norm() > 0
        assert (gradient - expected[name]).norm() <= (2e-2 if half else 1e-5) * expected[name].norm(), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases(tokenizer, tmp_path, kind):
    needs("bitsandbytes")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    plain = Qwen2ForCausalLM(config)
    for name, parameter in plain.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.5)
    plain.save_pretrained(tmp_path)
    model = load(str(tmp_path), dtype=torch.float32, quantization=KINDS[kind])
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, plain.model.layers[0].self_attn.q_proj.bias)
    logits = our_logits(model)
    assert (logits - our_logits(plain)).abs().max() < 0.2
    assert torch.allclose(logits, our_logits(dequantize(model)), atol=1e-5)


def test_half_precision_leaves_scales_alone(packed):
    expected = packed("nf4").model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(packed("nf4").bfloat16().model.layers[0].mlp.up_proj.dequantize(), expected)


def test_layers_that_a_checkpoint_leaves_alone(packed):
    some = Quantization("bitsandbytes", 4, "nf4", double=True, skipped=("down_proj", "model.layers.0.mlp"))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(SettingsError, match="no linear ones"):
        quantize_meta_model(model, some, torch.float32, kept=[])
    model = dequantize(packed("nf4"))
    quantize_meta_model(model, some, torch.float32, kept=[])
    left = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    mlp = {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert left == {"lm_head", "model.layers.1.mlp.down_proj", *mlp}
    assert Quantization(**json.loads(json.dumps(some.to_json()))) == some


@settings(max_examples=30)
@given(
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 4),
    multiple=st.sampled_from([1, 2, 3]),
    outputs=st.sampled_from([8, 16, 24]),
    seed=st.integers(0, 1000),
)
def test_gptq_numbers_are_unpacked_one_by_one_alike(bits, groups, multiple, outputs, seed):
    # Several parts, the last one shorter.
    quantized_linear._DEQUANTIZED_CHANNELS, whole = 64, quantized_linear._DEQUANTIZED_CHANNELS
    torch.manual_seed(seed)
    inputs, per_word = 32 * multiple, 32 // bits
    codes = torch.randint(0, 2**bits, (inputs, outputs))
    zeros = torch.randint(0, 2**bits, (groups, outputs))
    scales = torch.rand(groups, outputs).half()
    group_index = torch.randint(0, groups, (inputs,), dtype=torch.int32)  # in any order, as with desc_act

    def pack(numbers, dim):
        words = (
            torch.zeros_like(numbers.select(dim, 0))
            .unsqueeze(dim)
            .repeat_interleave(numbers.shape[dim] // per_word, dim)
        )
        for index in range(numbers.shape[dim]):
            shifted = numbers.select(dim, index) << (bits * (index % per_word))
            words.select(dim, index // per_word).bitwise_or_(shifted)
        return ((words + 2**31) % 2**32 - 2**31).int()

    layer = GptqLinear(
        inputs, outputs, pack(codes, 0), None, bits=bits, zeros=pack(zeros, 1), scales=scales, group_index=group_index
    )
    weight = layer.dequantize()
    quantized_linear._DEQUANTIZED_CHANNELS = whole
    for i in range(inputs):
        for o in range(outputs):
            group = int(group_index[i])
            assert weight[o, i] == scales[group, o] * (codes[i, o] - zeros[group, o])


# ---- training, saving, going on ----


@pytest.fixture(scope="session")
def trained(forks, source, tmp_path_factory):
    """Kind -> directory of an adapter that finetune.py trained, once."""
    known = {}

    def get(kind):
        if kind not in known:
            base, _ = source(kind)
            out = tmp_path_factory.mktemp("qlora") / kind
            flags = {"fp4": ["--quant_type", "fp4"], "int8": ["--bits", "8"]}.get(kind, [])
            command = words(base, out, "qlora", steps=8, dropout=0.0, eval_steps=8)
            code, stdout, stderr = forks.run(*command, *flags)
            assert code == 0, stderr
            known[kind] = base, out, stdout
        return known[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_trained(source, trained, library, kind):
    base, out, stdout = trained(kind)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    described = {
        "nf4": "bitsandbytes NF4, double quantisation",
        "fp4": "bitsandbytes FP4, double quantisation",
        "int8": "bitsandbytes Int8",
        "gptq4": "GPTQ, 4 bits, groups of 32",
        "gptq8": "GPTQ, 8 bits, groups of 32",
    }[kind]
    assert f"its linear layers: {described}" in stdout and "computing in float32" in stdout
    model = load(str(base), dtype=torch.float32, quantization=source(kind)[1])
    wrapped = TrainingModel(*load_lora(model, out))
    assert wrapped.token_rows is not None, "of a base model"
    rows, _ = runs.example_rows(base)
    with torch.no_grad():
        steps = StepDataset(rows, rows_per_step=8, max_tokens=8 * MAX_LENGTH, packed=False, seed=None)
        total = sum(wrapped.eval()(**b).item() for i in range(len(steps)) for b in steps[i]["micro_batches"])
        targets = sum(steps[i]["num_targets"] for i in range(len(steps)))
    assert total / targets == pytest.approx(log[-1]["eval_loss"], abs=1e-4), "the model in memory, and what is saved"
    theirs = library.logits(base, IDS, kind=kind if source(kind)[1] else "own", adapter=out)
    fresh = our_logits(load(str(base), dtype=torch.float32, quantization=source(kind)[1]))
    ours = our_logits(wrapped.model)
    limit = 0.1 if kind == "int8" else 1e-4
    assert (ours - theirs).abs().max() < limit < (ours - fresh).abs().max()


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow), "gptq4"])
def test_a_kill_changes_nothing(forks, source, tmp_path, kind):
    plan = {"kills": [{"at": 4, "only": "step"}], "steps": 5, "seed": kind, "eval_steps": 2}
    flags = ["--bits", "8"] if kind == "int8" else []
    kill_and_resume(forks, source(kind)[0], tmp_path, "qlora", 1, flags=flags, **plan)


@pytest.mark.parametrize(("kind", "engine"), [("nf4", "zero2"), ("nf4", "fsdp"), ("gptq8", "zero2"), ("gptq4", "fsdp")])
@pytest.mark.slow
def test_a_kill_of_one_of_two_processes_changes_nothing(forks, source, tmp_path, kind, engine):
    plan = {"kills": [{"at": 4, "only": "step", "rank": 1}], "steps": 5, "seed": kind, "eval_steps": 2}
    kill_and_resume(forks, source(kind)[0], tmp_path, "qlora", 2, engine=engine, **plan)


def test_another_quantisation_is_another_run(forks, checkpoints, tmp_path):
    needs("bitsandbytes")
    command = words(checkpoints["untied"], tmp_path / "out", "qlora", steps=2)
    assert forks.run(*command)[0] == 0
    command[command.index("--max_steps") + 1] = 4
    code, _, stderr = forks.run(*command, "--quant_type", "fp4", "--force_resume", "False")
    assert code == 2 and "quantization" in stderr and "fp4" in stderr


def test_a_checkpoint_that_bitsandbytes_quantised(packed, checkpoints, forks, tmp_path):
    needs("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["untied"], quantization_config=config, dtype=torch.float32)
    shutil.copytree(checkpoints["untied"], base := tmp_path / "base")
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(base)
    own = read_quantization(model.config)
    assert own == Quantization("bitsandbytes", 4, "nf4", double=True)
    assert torch.equal(our_logits(load(str(base), dtype=torch.float32)), our_logits(packed("nf4")))
    code, stdout, stderr = forks.run(*words(base, tmp_path / "out", "qlora", steps=2))
    assert code == 0 and "bitsandbytes NF4, double quantisation" in stdout, stderr
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged")])


def test_a_gradient_that_does_not_arrive_is_an_error(checkpoints, tmp_path, monkeypatch):
    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "nf4", template)
    layer = model.causal_lm.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x).detach()
    with pytest.raises(MachineError, match=r"no gradient reached .*layers.0.mlp.down_proj.lora_A.* of 30 trained"):
        runs.train(model, rows, tmp_path, kind="nf4", batch=2, accumulation=2, steps=1)


def test_adapters_go_on_with_another_quantisation_and_say_so(forks, trained, tmp_path):
    base, adapter, _ = trained("nf4")
    command = words(base, tmp_path / "out", "full", steps=2)
    code, stdout, stderr = forks.run(*command, "--use_lora", "--lora_weight_path", adapter)
    assert code == 0, stderr
    assert "adapter: changed since it was trained: bitsandbytes NF4, double quantisation -> no quantisation" in stdout


# ---- merging ----


def merge(capsys, *words):
    merge_lora.main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq4", "gptq8"])
def test_merging_onto_what_it_was_trained_on(source, trained, library, tmp_path, capsys, kind):
    base, adapter, _ = trained(kind)
    said = merge(capsys, adapter, tmp_path / "merged", "--dtype", "fp32")
    assert "merge verified" in said and "top-1 100 %" in said.splitlines()[1]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = library.logits(tmp_path / "merged", IDS)
    model = load(str(base), dtype=torch.float32, quantization=source(kind)[1])
    assert (merged - our_logits(load_lora(model, adapter)[0])).abs().max() < 1e-4


def test_merging_onto_the_unquantised_base(checkpoints, trained, library, tmp_path, capsys):
    base, adapter, _ = trained("nf4")
    said = merge(capsys, adapter, tmp_path / "merged", "--onto", "base")
    assert "merge verified" in said and "from the bitsandbytes NF4, double quantisation model" in said
    expected = probe_logits(base, adapter)
    assert (library.logits(tmp_path / "merged", IDS) - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "merged" / "manifest.json").read_text())["onto"] == "base"
    _, adapter, _ = trained("gptq4")
    merge(capsys, adapter, tmp_path / "second", "--onto", "base", "--base", checkpoints["untied"], "--dtype", "fp32")
    expected = probe_logits(checkpoints["untied"], adapter)
    assert (library.logits(tmp_path / "second", IDS) - expected).abs().max() < 1e-4


def test_merges_that_are_refused(checkpoints, gptq, trained, forks, tmp_path):
    adapter = trained("gptq4")[1]
    for more, message in [
        (["--onto", "base"], "quantised itself; name the unquantised model with --base"),
        (["--onto", "base", "--base", gptq[8]], "is quantised"),
        (["--base", checkpoints["untied"]], "trained on another base model"),
    ]:
        with pytest.raises(SettingsError, match=message):
            merge_lora.main([str(adapter), str(tmp_path / "merged"), *map(str, more)])
        assert not (tmp_path / "merged").exists()
    with pytest.raises(SettingsError, match="was not made from it"):
        merge_lora.main([str(adapter), str(tmp_path / "m"), "--onto", "base", "--base", str(checkpoints["other"])])
    with pytest.raises(SettingsError, match=f"{gptq[4]} is an input"):
        words_ = [str(adapter), str(gptq[4]), "--overwrite", "--onto", "base", "--base", str(checkpoints["untied"])]
        merge_lora.main(words_)
    with pytest.raises(SettingsError, match="is no result of this program"):
        merge_lora.main([str(adapter), str(gptq[8]), "--overwrite"])
    plain = tmp_path / "plain"
    assert forks.run(*words(checkpoints["untied"], plain, "lora", steps=1))[0] == 0
    with pytest.raises(SettingsError, match="--onto dequantized: has no effect"):
        merge_lora.main([str(plain), str(tmp_path / "merged"), "--onto", "dequantized"])


def test_a_plain_adapter_on_a_gptq_checkpoint(checkpoints, trained, tmp_path, capsys):
    _, adapter, _ = trained("gptq4")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, plain)
    assert "from the GPTQ, 4 bits" in merge(capsys, plain, tmp_path / "own")
    more = ["--onto", "base", "--base", checkpoints["untied"]]
    assert "from the GPTQ, 4 bits" in merge(capsys, plain, tmp_path / "base", *more)


# ---- quantize.py ----


def test_one_group_and_a_relative_directory(checkpoints, tmp_path, monkeypatch, capsys):
    needs("gptqmodel", "optimum")
    monkeypatch.chdir(tmp_path)
    words = [str(checkpoints["tied"]), "out", "--data", str(CONVERSATIONS), "--group_size", "-1", "--num_rows", "8"]
    quantize.main(words)
    assert "perplexity of 11 held-back rows" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = load("out", dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.scales.shape == (1, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize.main([*words, "--overwrite"])


def test_quantised_models_load_in_transformers(checkpoints, gptq, library):
    fresh = our_logits(load(str(checkpoints["untied"]), dtype=torch.float32))
    for bits, furthest in ((4, 2.0), (8, 0.1)):
        assert (library.logits(gptq[bits], IDS) - fresh).abs().max() < furthest
        names = {path.name for path in gptq[bits].iterdir()}
        assert {"config.json", "tokenizer.json", "generation_config.json", "manifest.json"} <= names
        assert "quant_log.csv" not in names
        measured = json.loads((gptq[bits] / "manifest.json").read_text())["perplexity"]
        assert abs(measured["after"] / measured["before"] - 1) < (0.2 if bits == 4 else 0.02)
        assert (gptq[bits] / "tokenizer.json").read_bytes() == (checkpoints["untied"] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--group_size", "0"], "invalid choice"),
        (["--group_size", "128"], "has 32 input channels, which it does not divide; choose a smaller"),
        (["--data", "absent.json"], "absent.json"),
        (["--num_rows", "0"], "--num_rows: must be at least 1"),
        (["--bits", "3"], "invalid choice"),
    ],
)
def test_what_cannot_be_quantised(checkpoints, tmp_path, more, message):
    with pytest.raises((SettingsError, ValueError), match=message):
        words = ["--data", str(CONVERSATIONS), "--group_size", "32", *more]
        quantize.main([str(checkpoints["untied"]), str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_quantised(checkpoints, gptq, trained, tmp_path, write_json):
    words = ["--data", str(CONVERSATIONS), "--group_size", "32"]
    with pytest.raises(SettingsError, match="is quantised already"):
        quantize.main([str(gptq[4]), str(tmp_path / "out"), *words])
    with pytest.raises(SettingsError, match="an adapter is merged first"):
        quantize.main([str(trained("nf4")[1]), str(tmp_path / "out"), *words])
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file is a file"):
        quantize.main([str(checkpoints["untied"]), str(tmp_path / "file" / "out"), *words])
    few = write_json([{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(SettingsError, match="4 rows; at least 5 are needed"):
        quantize.main([str(checkpoints["untied"]), str(tmp_path / "out"), *words, "--data", str(few)])


def test_a_mixture_of_experts_is_not_quantised(tokenizer, tmp_path):
    """transformers keeps experts as 3-D parameters, and could not load packed ones again."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), num_experts=4, moe_intermediate_size=32, head_dim=16, **sizes)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SettingsError, match=r"a mixture of experts: .*could not load them again once they are quant"):
        quantize.main([str(tmp_path / "model"), str(tmp_path / "out"), "--data", str(CONVERSATIONS)])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_quantised(checkpoints, tmp_path):
    shutil.copytree(checkpoints["untied"], tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"up_proj.weight has values that are not finite, so it is damaged"):
        words = ["--data", str(CONVERSATIONS), "--group_size", "32"]
        quantize.main([str(tmp_path / "model"), str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


# ---- what is chosen and refused ----


def test_how_a_model_is_quantised_is_decided_by_its_checkpoint():
    own = Quantization("gptq", 4, group_size=128)
    plain = {"path": "p", "q_lora": True, "bits": None, "quant_type": None, "dtype": torch.bfloat16}
    assert choose_quantization(own, **plain) == own
    nf4 = Quantization("bitsandbytes", 4, "nf4", double=True, dtype="bfloat16")
    assert choose_quantization(None, **plain) == nf4
    assert choose_quantization(None, **plain | {"bits": 8}) == Quantization("bitsandbytes", 8, dtype="bfloat16")
    assert choose_quantization(None, **plain | {"q_lora": False}) is None
    for change, message in [
        (
            {"q_lora": False},
            r"is quantised \(GPTQ, 4 bits, groups of 128\); only adapters train on it: pass --q_lora",
        ),
        ({"bits": 4}, "--bits 4: has no effect on p"),
        ({"quant_type": "fp4"}, "--quant_type fp4: has no effect on p"),
    ]:
        with pytest.raises(SettingsError, match=message):
            choose_quantization(own, **plain | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised with awq; bitsandbytes, and GPTQ with 4 or 8 bits, are"),
        ({"quant_method": "fp8"}, "quantised with fp8"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ and 3 bits"),
        ({"quant_method": "gptq", "bits": "4"}, "GPTQ and '4' bits"),
        ("text", "quantization_config is not an object"),
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["x"]]}, "other bits in some layers"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, "other bits in some layers"),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, "its output layer is quantised"),
    ],
)
def test_kinds_that_are_not_supported(config, message):
    with pytest.raises(SettingsError, match=message):
        read_quantization(SimpleNamespace(quantization_config=config))


def test_a_quantised_checkpoint_is_not_trained_as_a_whole(forks, gptq, tmp_path):
    for kind in ("full", "lora"):
        code, _, stderr = forks.run(*words(gptq[4], tmp_path / "out", kind, steps=1))
        assert code == 2 and "only adapters train on it: pass --q_lora" in stderr and stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


# ---- the plan ----


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq4"])
def test_the_plan_knows_packed_weights(packed, kind):
    def plan(model):
        wrapped = TrainingModel(*add_lora(model, r=4, alpha=8, dropout=0.0))
        return estimate_memory(
            wrapped, MicroBatchShape((64,) * 4, 100, packed=False), dtype=torch.float32, engine="single",
            num_processes=1, optimizer="adamw_torch", device_type="cuda", process_bytes=0, accumulates=False,
        )  # fmt: skip

    meta = packed(kind, meta=True)
    memory = plan(meta)
    model = packed(kind)
    loaded = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    adapters = sum(p.nbytes for p in meta.parameters() if p.requires_grad)
    assert memory.weights == pytest.approx(loaded + adapters, rel=0.01)
    assert memory.activations > 0


# ---- beside it ----


@pytest.mark.parametrize("kind", ["nf4", "gptq4"])
def test_chat_answers_as_the_merged_model(trained, tmp_path, capsys, kind):
    _, adapter, _ = trained(kind)
    merge(capsys, adapter, tmp_path / "merged", "--dtype", "fp32")
    answers = []
    for model in (adapter, tmp_path / "merged"):
        chat.main([str(model), "--prompt", "Who are you?", "--max_new_tokens", "20"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 10


def test_eight_bit_optimizers_go_on_exactly(forks, checkpoints, tmp_path):
    needs("bitsandbytes")
    plan = {"kills": [{"at": 4, "only": "step"}], "steps": 5, "seed": "8", "flags": ["--optim", "adamw_8bit"]}
    kill_and_resume(forks, checkpoints["untied"], tmp_path, "full", 1, **plan)
    names = {name.partition("/")[0] for name in load_file(tmp_path / "calm/checkpoint-5/training_state.safetensors")}
    assert {"state1", "state2", "qmap1"} <= names, "nothing was kept in 8 bits"


def test_zero3_is_refused(forks, checkpoints, tmp_path):
    command = words(checkpoints["untied"], tmp_path / "out", "qlora", steps=1, engine="zero3")
    code, _, stderr = forks.run(*command, processes=2)
    assert code == 2 and "--q_lora and ZeRO-3" in stderr and "ds_config_zero2.json" in stderr
