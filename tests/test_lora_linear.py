"""LoRA layers against peft's own, with the same random numbers."""

import functools
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tuning.model.lora_linear import fuse_lora_forward
from tuning.model.quantized_linear import Int8Linear


def build(*, fast, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=True), nn.SiLU(), nn.Linear(20, 6, bias=False)).to(dtype)
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.3, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, LoraConfig(**(settings | options))).train()
    if fast:
        fuse_lora_forward(model)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.0}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 12)], ids=str)
def test_outputs_and_gradients_equal_pefts(options, shape):
    results = []
    for fast in (False, True):
        model = build(fast=fast, **options)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.manual_seed(2)  # of dropout
        output = model(x)
        output.cumsum(-1).sum().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in trained)
        results.append([output, x.grad, *trained])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_rounds_no_more_than_peft():
    exact = build(fast=False, lora_dropout=0.0)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    expected, errors = exact(x), []
    for fast in (False, True):
        model = build(fast=fast, lora_dropout=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append((model(x).float() - expected).norm().item())
    assert errors[1] <= 1.2 * errors[0]


def test_adapters_can_still_be_disabled_merged_and_of_another_dtype():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    fast, slow = (build(fast=each, lora_dropout=0.0).eval() for each in (True, False))
    with fast.disable_adapter(), slow.disable_adapter():
        assert torch.equal(fast(x), slow(x))
    with_adapters = fast(x)
    fast.merge_adapter()
    assert torch.allclose(fast(x), with_adapters, atol=1e-5)
    fast.unmerge_adapter()
    assert torch.allclose(fast(x), with_adapters, atol=1e-5)
    fast, slow = (build(fast=each, lora_dropout=0.0, dtype=torch.bfloat16).eval() for each in (True, False))
    assert fast.base_model.model[0].lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(fast(x.bfloat16()), slow(x.bfloat16()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.o_proj = nn.Linear(12, 12)

    def forward(self, x):
        query = self.q_proj(x)
        return self.o_proj(query * torch.cat([self.k_proj(x), self.v_proj(x)], -1).sigmoid())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_blocks(*, fast, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_dropout": 0.0, "target_modules": NAMES, "init_lora_weights": False} | options
    model = get_peft_model(nn.Sequential(Block(), Block()), LoraConfig(**settings)).double().train()
    if fast:
        fuse_lora_forward(model)
    return model


def step(model, *, checkpointing=False):
    """Output, and all gradients, of one step."""
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)  # of dropout
    output = x
    for block in model.base_model.model:
        output = checkpoint(block, output, use_reentrant=False) if checkpointing else block(output)
    output.cumsum(-1).sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def check_equal(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [NAMES, ["q_proj", "v_proj"], ["k_proj", "up_proj"]], ids=len)
def test_layers_of_one_input_equal_pefts(targets, dropout, checkpointing):
    options = {"lora_dropout": dropout, "target_modules": targets}
    if "v_proj" in targets:  # another rank, and so another scale
        options["rank_pattern"] = {"v_proj": 3}
    fast, slow = (build_blocks(fast=each, **options) for each in (True, False))
    for _ in range(2):
        check_equal(step(fast, checkpointing=checkpointing), step(slow, checkpointing=checkpointing))


def test_sums_are_made_within_the_products():
    """Per block: three products with A less in each of both passes and the update, and no pass over memory to add."""
    counts = []
    for fast in (False, True):
        model = build_blocks(fast=fast)
        with CountOperations() as counter:
            step(model)
        counts.append(counter.counts)
    fast = counts[1]
    products = [sum(count[name] for name in ("mm", "addmm", "addmm_", "bmm")) for count in counts]
    # q, k, v and gate, up: of each group one product forward and one for each of the two gradients.
    assert products[0] - products[1] == 2 * (2 + 1) * 3
    assert fast["add"] + fast["add_"] == 2 * (2 + 2), "two residual connections, and their gradients"


class CountOperations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_with_dropout_masks_are_kept_and_not_what_they_left():
    kept = {}
    for fast in (False, True):
        model, saved = build_blocks(fast=fast, lora_dropout=0.3), {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 12, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(x)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        kept[fast] = sum(size for key, size in saved.items() if key not in parameters)
        output.sum().backward()
    widths = 2 * (5 * 12 + 12 + 20)  # of what dropout left, in 8 bytes each
    assert kept[False] - kept[True] >= 64 * widths * 8


def test_a_base_layer_that_somebody_hooked_is_called():
    fast, slow = (build_blocks(fast=each) for each in (True, False))
    for model in (fast, slow):
        base = model.base_model.model[0].attention.q_proj.base_layer
        base.register_forward_hook(lambda module, args, output: output * 2)
        patched = model.base_model.model[1].up_proj.base_layer
        patched.forward = functools.partial(lambda layer, x: F.linear(x, layer.weight) * 3, patched)
    check_equal(step(fast), step(slow))


def test_a_base_layer_that_trains_gets_its_gradient():
    fast, slow = (build_blocks(fast=each) for each in (True, False))
    for model in (fast, slow):
        model.base_model.model[0].attention.k_proj.base_layer.weight.requires_grad_(True)
        model.base_model.model[1].down_proj.base_layer.bias.requires_grad_(True)
    check_equal(step(fast), step(slow))


def test_gradients_of_an_input_that_needs_none_are_not_computed():
    fast, slow = (build_blocks(fast=each) for each in (True, False))
    x = torch.randn(3, 12, dtype=torch.float64)
    for model in (fast, slow):
        model(x).sum().backward()
    trained = [[p.grad for p in model.parameters() if p.requires_grad] for model in (fast, slow)]
    check_equal(*trained)


def test_quantised_bases_are_dequantised_within_the_products():
    exact, model = build_blocks(fast=False), build_blocks(fast=True)
    for which in (exact, model):
        for layer in which.modules():
            if isinstance(layer, LoraLinear):
                base = layer.base_layer
                codes = (base.weight.data * 100).round()
                base.weight.data = codes / 100
                if which is model:
                    scales = torch.full((base.out_features,), 0.01, dtype=torch.float64)
                    layer.base_layer = Int8Linear(base.in_features, base.out_features, codes.to(torch.int8), base.bias,
                                                  scales=scales)  # fmt: skip
    check_equal(step(model), step(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_groups_round_no_more_than_peft(dtype):
    exact, errors = step(build_blocks(fast=False)), []
    for fast in (False, True):
        model = build_blocks(fast=fast).float()
        x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.autocast("cpu", dtype=dtype):
            output = model(x.float().requires_grad_(True))
        output.double().cumsum(-1).sum().backward()
        found = [output, *(p.grad for p in model.parameters() if p.requires_grad)]
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        expected = [exact[0], *exact[2:]]
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)])
    assert sum(errors[1]) <= 1.1 * sum(errors[0])


def test_together_they_hold_no_activation():
    """An input that nobody else needs is freed, though a layer was not called; another input is told apart."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Block()), LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    fuse_lora_forward(model)
    attention = model.base_model.model[0].attention
    x = torch.randn(3, 12)
    with torch.no_grad():
        attention.q_proj(x)
    gone = weakref.ref(x)
    del x
    assert gone() is None
    y = torch.randn(3, 12)
    expected = attention.k_proj.base_layer(y) + attention.k_proj.lora_B["default"](
        attention.k_proj.lora_A["default"](y)
    ) * attention.k_proj.scaling["default"]  # fmt: skip
    assert torch.allclose(attention.k_proj(y), expected, atol=1e-6)


def test_an_input_that_changed_in_between_is_computed_anew():
    model, slow = (build_blocks(fast=each).base_model.model[0].attention for each in (True, False))
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        check_equal([model.k_proj(x)], [slow.k_proj(x)])
        model.q_proj(x)
    assert model.v_proj(x).requires_grad, "the first call kept no graph"
    with torch.inference_mode():
        y = torch.randn(3, 12, dtype=torch.float64)
        check_equal([model.q_proj(y), model.k_proj(y)], [slow.q_proj(y), slow.k_proj(y)])
    check_equal([model.q_proj(x[0])], [slow.q_proj(x[0])])
