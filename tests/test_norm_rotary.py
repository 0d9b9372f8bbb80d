"""RMS norms and rotary embeddings against transformers' own, with their gradients, for every architecture it has."""

import importlib
import pkgutil
import sys

import pytest
import torch
import transformers.models
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as turn_neighbours
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from tuning.model.norm_rotary import FusedNorm, _Rotary, _turns_halves, fuse_elementwise, rms_norm, rotate

NORMS = [(Qwen3RMSNorm, 0.0), (Gemma2RMSNorm, 1.0), (Qwen3NextRMSNorm, 1.0)]


def own_rotary(module=modeling_qwen3):
    """transformers' own function, also where another test put ours in its place."""
    function = module.apply_rotary_pos_emb
    return function.reference if isinstance(function, _Rotary) else function


def gradients(outputs, inputs):
    weights = [torch.randn(each.shape, generator=torch.Generator().manual_seed(7)).to(each.dtype) for each in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


# ---- RMS norms ----


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), width=st.integers(1, 33), seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]), kind=st.sampled_from(NORMS),
)  # fmt: skip
def test_a_norm_and_its_gradients_are_transformers(shape, width, seed, scale, kind):
    norm_class, offset = kind
    generator = torch.Generator().manual_seed(seed)
    module = norm_class(width, eps=1e-5)
    module.weight.data = torch.randn(width, generator=generator)
    x = (torch.randn(*shape, width, generator=generator) * scale).requires_grad_()
    ours, theirs = rms_norm(x, module.weight, 1e-5, offset), module(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients([ours], [x, module.weight]), gradients([theirs], [x, module.weight]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, other.abs().max().item()))


def test_a_norms_gradients_are_those_of_differences():
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3, 1.0), (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm_class", "offset"), NORMS)
def test_in_half_precision_a_norm_is_no_further_from_the_exact_one(norm_class, offset, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator).to(dtype).requires_grad_()
    module = norm_class(64).to(dtype)
    module.weight.data = torch.rand(64, generator=generator).to(dtype)
    inputs = [x, module.weight]
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    exact = rms_norm(*exact_inputs, 1e-6, offset)
    expected = [exact, *gradients([exact], exact_inputs)]
    errors = []
    for output in (rms_norm(*inputs, 1e-6, offset), module(x)):
        found = [output, *gradients([output], inputs)]
        assert {each.dtype for each in found} == {dtype}
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)])
    assert all(ours <= 1.05 * theirs for ours, theirs in zip(*errors, strict=True)), errors


def test_norms_of_other_kinds_stay_as_they_are():
    class Half(nn.Module):
        """The name and the fields of an RMS norm; computes another thing."""

        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return 0.5 * rms_norm(x, self.weight, 1e-6)

    class Ignores(Half):
        """eps does not count."""

        def forward(self, x):
            return rms_norm(x, self.weight, 1e-12)

    others = [
        Half(),
        Ignores(),
        nn.LayerNorm(8),
        nn.LayerNorm(8, bias=False),
        Qwen3NextRMSNormGated(8),
        nn.Linear(8, 8),
    ]
    patched = Qwen3RMSNorm(8)
    patched.forward = lambda x: x
    model = nn.ModuleList([*others, patched, Qwen3RMSNorm(8)])
    fuse_elementwise(model)
    assert [isinstance(module, FusedNorm) for module in model] == [False] * (len(others) + 1) + [True]
    assert model[-2](3) == 3


class GroupedNorm(nn.Module):
    """Of groups, or of all numbers, as Qwen4's."""

    def __init__(self, width, group=None):
        super().__init__()
        self.weight, self.eps, self.group = nn.Parameter(torch.rand(width)), 1e-6, group

    def forward(self, x):
        grouped = x.unflatten(-1, (-1, self.group or x.shape[-1]))
        return rms_norm(grouped, torch.ones(grouped.shape[-1]), self.eps).flatten(-2) * self.weight


@pytest.mark.parametrize("group", [1, 4, 8, 12, 16, 24])
@pytest.mark.parametrize("first", [False, True])
def test_norms_of_one_class_are_told_apart(group, first):
    norms = [GroupedNorm(48), GroupedNorm(48, group)][:: -1 if first else 1]
    x = torch.randn(3, 48)
    expected = [norm(x) for norm in norms]
    fuse_elementwise(nn.ModuleList(norms))
    assert sorted(isinstance(norm, FusedNorm) for norm in norms) == [False, True]
    torch.testing.assert_close([norm(x) for norm in norms], expected)


def test_what_mixes_dtypes_or_takes_more_is_left_to_the_module():
    norm = Qwen3RMSNorm(8)
    fuse_elementwise(norm)
    torch.testing.assert_close(norm(hidden_states=(named := torch.randn(2, 8))), Qwen3RMSNorm(8)(named))
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.float32 == Qwen3RMSNorm(8)(x).dtype


# ---- rotary embeddings ----


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 5), half=st.integers(1, 6),
    seed=st.integers(0, 99), transposed=st.booleans(),
)  # fmt: skip
def test_a_rotation_and_its_gradients_are_transformers(batch, heads, length, half, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, 2 * half) if transposed else (batch, heads, length, 2 * half)
    q, k = (torch.randn(shape, generator=generator) for _ in range(2))
    if transposed:  # as they come from their layers
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = q.requires_grad_(), k.requires_grad_()
    cos, sin = (torch.randn(batch, length, 2 * half, generator=generator) for _ in range(2))
    theirs = own_rotary()(q, k, cos, sin)
    ours = [rotate(each, cos[:, None], sin[:, None]) for each in (q, k)]
    torch.testing.assert_close(ours, list(theirs))
    torch.testing.assert_close(gradients(ours, [q, k]), gradients(theirs, [q, k]))


def test_a_rotations_gradient_is_that_of_differences():
    x, cos, sin = (torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x.requires_grad_(),))


@pytest.mark.slow
def test_every_architecture_of_transformers_keeps_what_it_computes():
    """What is replaced equals what was there, also where the name is the same and the function is not."""
    replaced = []
    for found in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{found.name}.modeling_{found.name}")
        except Exception:  # it needs what is not installed, or has no such file
            continue
        if not hasattr(module, "apply_rotary_pos_emb") or not _turns_halves(function := own_rotary(module)):
            continue
        replaced.append(found.name)
        q, k, cos, sin = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 1, 1))
        for angles in ((cos, sin), (cos[..., :8], sin[..., :8])):  # of the second pair only half of a head is turned
            try:
                expected = function(q, k, *(each[:, 0] for each in angles))
            except RuntimeError:
                continue
            torch.testing.assert_close(_Rotary(function)(q, k, *(each[:, 0] for each in angles)), expected)
    assert {"llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "qwen3_5"} <= set(replaced)


def test_functions_of_other_kinds_stay_as_they_are():
    assert _turns_halves(own_rotary())
    assert not _turns_halves(turn_neighbours)
    assert not _turns_halves(lambda q, k, cos, sin: (q, k))
    assert not _turns_halves(lambda x, angles: x)
    assert not _turns_halves(own_rotary(modeling_dinov3_vit)), "it leaves out the first positions"

    def turn_last(q, k, cos, sin, unsqueeze_dim=1):  # Muse Glimmer's assistant: keys of which there are no queries
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos[..., -q.shape[-2] :, :], sin[..., -q.shape[-2] :, :]), rotate(k, cos, sin)

    assert not _turns_halves(turn_last)
    # The right numbers, and another dtype.
    assert not _turns_halves(lambda q, k, cos, sin: tuple(x.float() for x in own_rotary()(q, k, cos, sin)))


def test_what_is_turned_in_part_is_left_to_transformers():
    calls = []

    def reference(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(unsqueeze_dim)
        return q, k

    rotary = _Rotary(reference)
    q, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    assert rotary(q, q, cos, cos) == (q, q) and calls == [1]
    assert rotary(q, k=q, cos=cos, sin=cos) == (q, q) and calls == [1, 1]
    q = torch.randn(1, 3, 2, 8)
    cos = torch.randn(1, 3, 8)
    torch.testing.assert_close(rotary(q, q, cos, cos, unsqueeze_dim=2), own_rotary()(q, q, cos, cos, unsqueeze_dim=2))
    assert calls == [1, 1]


def test_what_is_called_in_another_way_is_left_to_transformers():
    def reference(q, k=None, cos=None, sin=None, unsqueeze_dim=1):  # Qwen4's
        result = own_rotary()(q, q if k is None else k, cos, sin, unsqueeze_dim)
        return result[0] if k is None else result

    assert _turns_halves(reference)
    rotary = _Rotary(reference)
    q, cos = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
    expected = own_rotary()(q, q, cos, cos, unsqueeze_dim=2)
    torch.testing.assert_close(rotary(q, cos=cos, sin=cos, unsqueeze_dim=2), expected[0])
    torch.testing.assert_close(rotary(q=q, k=q, cos=cos, sin=cos, unsqueeze_dim=2), expected)
    torch.testing.assert_close(rotary(q, q, cos, cos, 2), expected)


# ---- models ----

COMMON = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=50, max_position_embeddings=64,
)  # fmt: skip


class CountNumbers(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.number += sum(each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        return result


def build_qwen3_5():
    linear = dict(
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**COMMON, **linear))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, query_pre_attn_scalar=8)),
        build_qwen3_5,
    ],
    ids=["qwen3", "gemma2", "qwen3_5"],
)
def test_a_model_gives_the_same_logits_and_gradients_and_writes_less(build):
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_()
    module = sys.modules[type(model).__module__]
    module.apply_rotary_pos_emb = own_rotary(module)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    results, counts = [], []
    for fast in (False, True):
        if fast:
            fuse_elementwise(model)
            fuse_elementwise(model)
        model.zero_grad()
        with CountNumbers() as counter:
            logits = model(input_ids=ids).logits
            logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
        counts.append(counter.number)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item()))
    assert counts[1] < counts[0]
