"""LoRA on experts: the same numbers as peft's whole deltas, without them, in what is trained, saved and merged."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import merge_lora
from benchmarks.receipt_stages.correctness import copy_as_pefts
from tests import architectures, runs
from tests.architectures import ARCHITECTURES
from tests.conftest import CONVERSATIONS, needs, run_python
from tests.test_cli import flags
from tuning.checkpoint.adapter import load_lora
from tuning.errors import SettingsError
from tuning.model.loading import load_model
from tuning.model.lora import add_lora
from tuning.model.lora_experts import compute_experts, count_expert_adapters, find_expert_targets, grouped_product
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing

NAMES = [name for name, (_, fields, *_) in ARCHITECTURES.items() if "num_experts" in fields and "multi" not in name]
NAMES.remove("Qwen3-VL-MoE")  # with a vision tower, as those that are left out by name: tests/test_multimodal.py
FAST = ("Qwen3-MoE", "Qwen3-Next", "gpt-oss")
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def build(name):
    return architectures.build(name, vocab_size=64, pad_token_id=0, eos_token_id=2)


def randomise(peft_model):
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(std=0.2)


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    (loss, found), (expected_loss, expected) = ours, theirs
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


ZERO3 = "finetune/ds_config_zero3.json"
IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("r, use_rslora", [(2, False), (8, True)])
@pytest.mark.parametrize("name", EACH)
def test_products_by_group_are_pefts_whole_deltas(name, r, use_rslora):
    model, _ = add_lora(build(name), r=r, alpha=4, dropout=0.0, use_rslora=use_rslora)
    assert count_expert_adapters(model)
    randomise(model)
    assert_same(gradients(model, IDS), gradients(copy_as_pefts(model), IDS))


@pytest.mark.parametrize("name", EACH)
def test_the_saved_adapter_is_pefts_and_merges(name, tmp_path):
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    ours, _ = add_lora(base, r=4, alpha=8, dropout=0.1)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path / "adapter")
    expected = ours(input_ids=IDS).logits
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (fresh(input_ids=IDS).logits - expected).abs().max() > 0.01
    by_peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert (by_peft(input_ids=IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    attached, _ = load_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert (attached.eval()(input_ids=IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_dropout_is_that_of_every_token_and_expert():
    """Against a loop over tokens and their experts, with a function in dropout's place that the loop can repeat."""
    torch.manual_seed(0)
    model, _ = add_lora(build("Qwen3-MoE"), r=4, alpha=8, dropout=0.5)
    randomise(model)
    outer = next(m for m in model.modules() if isinstance(m, ParamWrapper) and isinstance(m.base_layer, ParamWrapper))
    down, up = outer, outer.base_layer
    experts = up.base_layer
    assert [type(each.lora_dropout["default"]) for each in (down, up)] == [torch.nn.Dropout] * 2

    drop = torch.abs

    for each in (down, up):
        each.lora_dropout["default"].forward = drop
    hidden, index = torch.randn(6, 32), torch.randint(0, 4, (6, 1)).repeat(1, 2)
    index[:, 1] = (index[:, 0] + 1) % 4
    weights = torch.rand(6, 2)

    def project(adapter, weight, e, x):
        a = adapter.lora_A["default"].weight.view(4, 4, -1)[e]
        b = adapter.lora_B["default"].weight.view(-1, 4, 4)[:, :, e]
        return weight[e] @ x + adapter.scaling["default"] * (b @ (a @ drop(x)))

    expected = torch.zeros(6, 32)
    for token in range(6):
        for k in range(2):
            e = index[token, k]
            gate, value = project(up, experts.gate_up_proj, e, hidden[token]).chunk(2)
            inner = experts.act_fn(gate) * value
            expected[token] += weights[token, k] * project(down, experts.down_proj, e, inner)
    found = outer.train()(hidden, index, weights)
    assert torch.allclose(found, expected, atol=1e-5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_grouped_product_is_one_product_a_group(sizes, inside, outside, transposed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), inside, generator=generator, requires_grad=True)
    shape = (len(sizes), outside, inside) if transposed else (len(sizes), inside, outside)
    weight = torch.randn(shape, generator=generator, requires_grad=True)
    stack = weight.transpose(1, 2) if transposed else weight
    ends = torch.tensor(sizes).cumsum(0)
    found = grouped_product(x, stack, ends.to(torch.int32))
    starts = [0, *ends.tolist()]
    expected = torch.cat([x[a:b] @ stack[e] for e, (a, b) in enumerate(itertools.pairwise(starts))])
    assert torch.allclose(found, expected, atol=1e-5)
    direction = torch.randn(expected.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), (x, weight)) for y in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


class _Largest(TorchDispatchMode):
    """The largest storage that is made meanwhile, in elements."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result


def test_no_delta_of_all_experts_is_ever_made():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=32, num_experts_per_tok=2, moe_intermediate_size=64,
    )  # fmt: skip
    model, _ = add_lora(Qwen3MoeForCausalLM(config), r=4, alpha=8, dropout=0.1)
    whole = 32 * 64 * 64  # of the smaller of the two stacks
    sizes = []
    for each in (model, copy_as_pefts(model)):
        with _Largest(each.parameters()) as mode:
            each(input_ids=IDS, labels=IDS).loss.backward()
        sizes.append(mode.largest)
    assert sizes[0] < whole <= sizes[1]


def test_packed_and_recomputed_experts_train_alike():
    model = TrainingModel(*add_lora(build("Qwen3-MoE"), r=4, alpha=8, dropout=0.0))
    randomise(model.model)
    rows = [torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 14)]
    targets = torch.cat(rows).roll(1)
    index = torch.arange(28)

    def measure(run):
        model.zero_grad()
        loss = run()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def alone():
        starts = torch.tensor([0, 5, 14, 28])
        parts = [targets[a:b] for a, b in itertools.pairwise(starts)]
        return sum(model(r[None], torch.arange(len(r)), t) for r, t in zip(rows, parts, strict=True))

    expected = measure(alone)
    assert enable_packing(model, max_length=64, dtype=torch.float32) is None
    packed = {
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "lengths": [5, 9, 14],
        "row_starts": torch.tensor([0, 5, 14, 28], dtype=torch.int32),
    }
    together = lambda: model(torch.cat(rows)[None], index, targets, **packed)  # noqa: E731
    assert_same(measure(together), expected)
    enable_gradient_checkpointing(model.causal_lm)
    model.train()
    assert_same(measure(together), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype):
    model, _ = add_lora(build("Qwen3-MoE"), r=4, alpha=8, dropout=0.0)
    randomise(model)
    exact = model(input_ids=IDS).logits
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        half = model(input_ids=IDS).logits
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_what_experts_compute_without_adapters_is_transformers():
    model = build("gpt-oss")
    experts = model.model.layers[0].mlp.experts
    hidden, index, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    assert torch.allclose(compute_experts(experts, hidden, index, weights), experts(hidden, index, weights), atol=1e-5)


# ---- what is adapted, and what is refused ----


def test_experts_are_adapted_unless_layers_are_named():
    def adapted(**options):
        return count_expert_adapters(add_lora(build("Qwen3-MoE"), r=2, alpha=4, dropout=0.0, **options)[0])

    expected = 2 * 4 * 2 * (32 + 32 + 16 + 32)  # layers x experts x rank x what goes in and out
    assert adapted() == adapted(experts="on") == adapted(experts="on", target_modules=["q_proj"]) == expected
    assert adapted(experts="off") == adapted(target_modules=["q_proj"]) == 0


def test_the_router_stays_frozen():
    model, _ = add_lora(build("Qwen3-MoE"), r=2, alpha=4, dropout=0.0)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".gate." in name]


def test_experts_that_are_not_there_or_unknown_are_refused(tokenizer):
    dense = architectures.build("Qwen3", vocab_size=64)
    with pytest.raises(SettingsError, match="--lora_experts on: the model has no experts"):
        add_lora(dense, r=2, alpha=4, dropout=0.0, experts="on")
    with pytest.raises(SettingsError, match=r"--use_dora: not available for experts; .* --lora_experts off"):
        add_lora(build("Qwen3-MoE"), r=2, alpha=4, dropout=0.0, use_dora=True)
    unknown = build("Qwen3-MoE")
    for module in unknown.modules():
        vars(module).pop("has_gate", None)
    with pytest.raises(SettingsError, match="of a kind that cannot be adapted yet; --lora_experts off"):
        find_expert_targets(unknown)


def test_zero3_is_refused_by_name(checkpoints, tmp_path):
    needs("deepspeed")
    words = flags(checkpoints["moe"], CONVERSATIONS, tmp_path / "out", "--use_lora", "--deepspeed", ZERO3)
    done = run_python("-m", "torch.distributed.run", "--nproc_per_node", 1, "finetune.py", *words, check=False)
    assert done.returncode
    assert "ZeRO-3: gathers a layer's weights for that layer only" in done.stderr


def test_experts_cannot_be_quantised_and_the_size_is_said(checkpoints, tmp_path):
    needs("bitsandbytes")
    with pytest.raises(SettingsError, match=r"unquantised they take 0.0 GiB in bf16 \(24,576 parameters\)"):
        load_model(str(checkpoints["moe"]), dtype=torch.float32, quantization=runs.NF4)


# ---- a run, from the command line to the merged model ----


def test_a_run_trains_saves_and_merges_experts(run_script, checkpoints, tmp_path):
    words = flags(checkpoints["moe"], CONVERSATIONS, tmp_path / "out", "--use_lora", "--lora_r", 4)
    code, stdout, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    assert "of them adapt experts" in stdout and "batches: packed" in stdout
    assert "adapters of experts" in stdout, "where it can be served"
    adapted = runs.probe_logits(checkpoints["moe"], tmp_path / "out")
    fresh = runs.probe_logits(checkpoints["moe"], checkpoints["moe"])
    assert (adapted - fresh).abs().max() > 1e-3
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged")])
    merged = runs.probe_logits(checkpoints["moe"], tmp_path / "merged")
    assert (merged - adapted).abs().max() < 1e-4


def test_a_reference_of_peft_alone_has_the_same_losses(checkpoints, tmp_path):
    rows, template = runs.example_rows(checkpoints["moe"])
    fresh = runs.build(checkpoints["moe"], "lora", template)
    assert count_expert_adapters(fresh)
    expected = runs.reference(checkpoints["moe"], "lora", fresh, rows, steps=3)
    trainer = runs.train(fresh, rows, tmp_path, kind="lora", batch=4, accumulation=2, steps=3)
    for (loss, norm), (expected_loss, expected_norm) in zip(runs.measured(trainer), expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_peft_itself_makes_the_same_names(tmp_path):
    ours, _ = add_lora(build("Qwen3-MoE"), r=2, alpha=4, dropout=0.0, experts="on", target_modules=["q_proj"])
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = get_peft_model(build("Qwen3-MoE"), config)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
