"""LoRA layers against peft's own, with the same random numbers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

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
