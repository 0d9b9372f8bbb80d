"""LoRA layers against peft's own, with the same random numbers."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tuning.model.lora_linear import fuse_lora_forward


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
        joined = torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        return self.o_proj(self.q_proj(x) * joined.sigmoid())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [NAMES, ["q_proj", "v_proj"], ["k_proj", "up_proj"]], ids=len)
def test_layers_of_one_input_take_their_first_product_together(targets, dropout, checkpointing):
    results, products = [], []
    for fast in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, rank_pattern={"v_proj": 3}
        )
        model = get_peft_model(nn.Sequential(Block(), Block()), config).train()
        model.double()  # one product of several layers adds in another order than one of each
        if fast:
            fuse_lora_forward(model)
        x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        counted = CountProducts(12)
        for _ in range(2):
            torch.manual_seed(2)
            with counted:
                output = x
                for block in model.base_model.model:
                    output = checkpoint(block, output, use_reentrant=False) if checkpointing else block(output)
            (output.cumsum(-1).sum()).backward()
        results.append([output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        products.append(counted.number)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    saved = {7: 3, 2: 1 if targets[0] == "q_proj" else 0}[len(targets)] if not dropout else 0
    assert products[0] - products[1] == saved * 2 * 2, "two blocks, two passes"


class CountProducts(TorchFunctionMode):
    """Counts products of inputs of some width with low-rank matrices."""

    def __init__(self, width):
        super().__init__()
        self.width, self.number = width, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            out, width = args[1].shape
            self.number += width == self.width and (out <= 4 or out in (7, 8, 11))
        return function(*args, **(kwargs or {}))


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
