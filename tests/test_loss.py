"""The chunked loss against the slow obvious one: all logits at once, by autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.conftest import build_model
from tuning.errors import SettingsError
from tuning.model import loss as loss_module
from tuning.model.loss import LogitChange, OutputHead, chunk_rows, find_logit_change, sum_cross_entropy
from tuning.model.training_model import TrainingModel, check_loss_path

V, H, R = 37, 8, 3
# Relative to the largest entry: rounding of the dtype that products are computed in.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CPU_LOGITS", 5 * V)


def make_inputs(num_rows, *, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    return {
        "hidden": draw(num_rows, H),
        "weight": draw(V, H),
        "bias": draw(V),
        "weights": torch.rand(num_rows, generator=generator) * 2,
        "rows": (torch.tensor([4, 0, 30]), draw(R, H)),
        "low_rank": (draw(num_rows, 2), draw(V, 2)),
        "targets": torch.randint(0, V, (num_rows,), generator=generator),
    }


def reference(hidden, weight, targets, *, bias=None, weights=None, rows=None, low_rank=None, change=(1.0, None)):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if rows is not None:
        logits = logits.index_copy(1, rows[0], hidden @ rows[1].T)
    if low_rank is not None:
        logits = logits + low_rank[0] @ low_rank[1].T
    scale, cap = change
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def trained(inputs):
    """Every tensor that may get a gradient, by name."""
    flat = {"hidden": inputs["hidden"], "weight": inputs["weight"], "bias": inputs.get("bias")}
    flat["rows"] = (inputs.get("rows") or (None, None))[1]
    flat["low_input"], flat["low_weight"] = inputs.get("low_rank") or (None, None)
    return {name: value for name, value in flat.items() if value is not None}


def in_double(inputs):
    def convert(value):
        if isinstance(value, LogitChange):
            return value
        if isinstance(value, tuple):
            return tuple(convert(each) for each in value)
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def assert_equal_to_reference(inputs, *, scale=1.0, tolerance=1e-5):
    expected_inputs = in_double(inputs)
    expected = reference(**expected_inputs)
    actual = sum_cross_entropy(**inputs)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
    (expected * scale).backward()
    (actual * scale).backward()
    for (name, value), reference_value in zip(trained(inputs).items(), trained(expected_inputs).values(), strict=True):
        if not value.requires_grad:
            assert value.grad is None, name
            continue
        assert value.grad.dtype == value.dtype
        largest = reference_value.grad.abs().max().item() if value.numel() else 0.0
        difference = (value.grad.double() - reference_value.grad).abs().max().item() if value.numel() else 0.0
        assert difference <= tolerance * largest + 1e-12, (name, difference, largest)


@settings(max_examples=60)
@given(
    st.integers(0, 23),
    st.sets(st.sampled_from(["bias", "weights", "rows", "low_rank"])),
    st.sets(st.sampled_from(["hidden", "weight", "bias", "rows", "low_input", "low_weight"]), min_size=1),
    st.integers(0, 99),
    st.sampled_from([1.0, 1e-4, 65536.0]),
    st.builds(LogitChange, st.sampled_from([1.0, 0.0625, 3.0]), st.sampled_from([None, 2.0, 30.0])),
)
def test_loss_and_gradients_equal_the_reference(num_rows, options, trains, seed, scale, change):
    inputs = {**make_inputs(num_rows, seed=seed), "change": change}
    for name in {"bias", "weights", "rows", "low_rank"} - options:
        del inputs[name]
    values = trained(inputs)
    if not trains & set(values):
        trains = {"hidden"}
    for name, value in values.items():
        value.requires_grad_(name in trains)
    assert_equal_to_reference(inputs, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", [LogitChange(), LogitChange(0.25), LogitChange(2.0, 5.0)])
def test_half_precision_rounds_products_and_nothing_else(dtype, change):
    inputs = {**make_inputs(23, dtype=dtype), "change": change}
    assert_equal_to_reference(inputs, tolerance=TOLERANCE[dtype] * (2 if change.cap else 1))


def test_fp16_gradients_do_not_vanish_where_tokens_are_many_and_targets_nearly_certain():
    num_logits = 150_000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_logits, 16, generator=generator).half()
    targets = torch.randint(0, num_logits, (4,), generator=generator)
    # Targets of 98 % and more; the rest is spread over all other logits.
    hidden = (weight[targets].float() * torch.tensor([1.2, 1.4, 1.6, 1.8])[:, None]).half().requires_grad_()
    weight.requires_grad_()
    scale = 65536.0 / 1e6  # a loss scale over a step's tokens
    gradients = torch.autograd.grad(sum_cross_entropy(hidden, weight, targets) * scale, (hidden, weight))
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    expected = torch.autograd.grad(reference(*exact, targets) * scale, exact)
    for one, other in zip(gradients, expected, strict=True):
        assert (one.double() - other).norm() / other.norm() < 1e-2


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    inputs = make_inputs(23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_to_reference(inputs, tolerance=TOLERANCE[torch.bfloat16])


def test_certain_and_hopeless_targets_are_finite():
    hidden, weight = torch.eye(4) * 200, torch.eye(4).requires_grad_()
    targets = torch.tensor([0, 0, 2, 3])  # certain, off by 200, certain, certain
    value = sum_cross_entropy(hidden, weight, targets)
    assert value.item() == pytest.approx(200.0)
    value.backward()
    assert weight.grad.isfinite().all()


def test_many_logits_add_up_exactly():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=generator), torch.randn(150_000, 16, generator=generator)
    targets = torch.randint(0, 150_000, (6,), generator=generator)
    expected = reference(hidden.double(), weight.double(), targets)
    assert sum_cross_entropy(hidden, weight, targets).item() == pytest.approx(expected.item(), rel=1e-7)


def test_no_logits_are_kept_and_none_are_differentiated_without_grad():
    inputs = make_inputs(23)
    inputs["weight"].requires_grad_(False)
    value = sum_cross_entropy(inputs["hidden"], inputs["weight"], inputs["targets"])
    kept = [tuple(gradient.shape) for gradient in value.grad_fn.gradients if gradient is not None]
    assert kept == [(23, H)]
    with torch.no_grad():
        again = sum_cross_entropy(inputs["hidden"], inputs["weight"], inputs["targets"])
    assert again.item() == value.item() and again.grad_fn is None


# LoRA on a tied output layer corrupts the embedding when merged: refused elsewhere.
@pytest.mark.parametrize(
    ("kind", "tied"), [("plain", True), ("plain", False), ("whole", True), ("whole", False), ("lora", False)]
)
def test_the_output_head_is_the_cross_entropy_of_its_layers_logits(tokenizer, kind, tied):
    model = build_model(tokenizer, tied=tied)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    if kind == "whole":
        names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=tied)
        model = get_peft_model(model, config)
    training_model = TrainingModel(model)
    layer = training_model.causal_lm.get_output_embeddings()
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(9)
    expected = F.cross_entropy(layer(hidden), targets, reduction="sum")
    actual = training_model._head.sum_loss(hidden, targets, None)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert bool(parameters)
    for one, other in zip(
        torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_output_layers_that_it_would_compute_wrongly_are_refused(tokenizer):
    config = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(SettingsError, match="DoRA"):
        TrainingModel(get_peft_model(build_model(tokenizer, tied=False), config))
    with pytest.raises(SettingsError, match="Identity"):
        OutputHead(nn.Identity(), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_gpu_computes_the_same(dtype):
    inputs = make_inputs(23, dtype=dtype)
    expected = reference(**in_double(inputs))

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(each) for each in value)
        return value.detach().cuda().requires_grad_(value.is_floating_point() and value.requires_grad)

    moved = {name: move(value) for name, value in inputs.items()}
    value = sum_cross_entropy(**moved)
    assert value.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    value.backward()
    sum_cross_entropy(**inputs).backward()
    for on_cpu, on_gpu in zip(trained(inputs).values(), trained(moved).values(), strict=True):
        difference = (on_gpu.grad.cpu() - on_cpu.grad).float().norm()
        assert difference <= TOLERANCE[dtype] * on_cpu.grad.float().norm()


CHANGING = {
    "gemma2": ({"final_logit_softcapping": 3.0}, LogitChange(1.0, 3.0)),
    "cohere": ({"logit_scale": 0.25}, LogitChange(0.25)),
    "cohere2": ({"logit_scale": 0.5}, LogitChange(0.5)),
    "granite": ({"logits_scaling": 4.0}, LogitChange(0.25)),
    "falcon_h1": ({"lm_head_multiplier": 0.5}, LogitChange(0.5)),
    "qwen3": ({}, LogitChange()),
}


@pytest.mark.parametrize("name", ["gemma2", "cohere", "cohere2", "granite", "qwen3"])
def test_the_loss_of_models_that_change_their_logits_is_their_own(name):
    """Loss and gradients of every parameter, against transformers' own forward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.5)  # fmt: skip
    fields, change = CHANGING[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **small, **fields)).eval()
    assert find_logit_change(model.config) == change
    ids = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    training_model = TrainingModel(model)
    check_loss_path(training_model)
    actual = training_model.eval()(ids, torch.arange(11), ids[0, 1:])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(
        torch.autograd.grad(actual, list(model.parameters()), allow_unused=True), wanted, strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_chunks_follow_the_devices_memory():
    """A GPU's buffers (6 bytes a logit) take about 1 % of its memory, however many logits a token has."""
    gib = 2**30
    for memory in (24 * gib, 80 * gib, 141 * gib):
        for num_logits in (32_000, 151_936, 262_144):
            rows = chunk_rows(10**6, num_logits, "cuda", memory)
            assert 0.008 * memory < 6 * rows * num_logits < 0.0101 * memory
    assert chunk_rows(10**6, 151_936, "cuda") == chunk_rows(10**6, 151_936, "cuda", 80 * gib)
    assert chunk_rows(10**6, 151_936, "cuda", 8 * gib) >= 2**25 // 151_936 - 1, "small ones are slow"
    assert chunk_rows(0, 10, "cuda", gib) == 1 == chunk_rows(5, 2**40, "cuda", gib)
    assert chunk_rows(1000, 151_936, "cpu", gib) == chunk_rows(1000, 151_936, "cpu")
