"""RMS norms and rotary embeddings with fewer passes over memory than transformers takes.

What a model's own modules and functions compute is found by trying them on random numbers, not by their names alone:
Gemma's norms add one to their weights, some rotary embeddings turn neighbours instead of halves, and so on. What is
not one of the kinds here stays as it is.
"""

import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_elementwise(model: nn.Module) -> None:
    """Let a model's RMS norms and rotary embeddings be computed here. Twice does no harm."""
    with torch.no_grad(), torch.device("cpu"):  # for the trials; a caller may be building on the meta device
        _fuse_norms(model)
        _fuse_rotary(model)


def _fuse_norms(model: nn.Module) -> None:
    kinds: dict[tuple[type, float, float], type] = {}
    for module in model.modules():
        if (eps := _read_eps(module)) is None or isinstance(module, FusedNorm):
            continue
        # Each by itself: two modules of one class may compute different things (Qwen4's, with and without groups).
        if (offset := _find_offset(module, eps)) is not None:
            key = (type(module), eps, offset)
            if key not in kinds:
                kinds[key] = _make_class(*key)
            module.__class__ = kinds[key]


def _fuse_rotary(model: nn.Module) -> None:
    """The functions of the files in which the model's classes are: transformers' models find theirs by name there."""
    for name in {type(module).__module__ for module in model.modules()} & sys.modules.keys():
        namespace = vars(sys.modules[name])
        function = namespace.get("apply_rotary_pos_emb")
        if inspect.isfunction(function) and _turns_halves(function):
            namespace["apply_rotary_pos_emb"] = _Rotary(function)


# ---- RMS norms ----


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """X / sqrt(mean(x ** 2) + eps) * (weight + offset), over the last dimension, computed in float32.

    torch's own kernel where it has one: on GPUs, where x and weight are of one dtype.

    Shapes: x [..., H], weight [H]. Returns: [..., H] in x's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype == weight.dtype and offset == 0.0:
            return F.rms_norm(x, weight.shape, weight, eps)
        result: Tensor = _RmsNorm.apply(x, weight, eps, offset)
        return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return (x * inverse).mul_(_shift(weight, offset, dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            products = (d_output.to(inverse.dtype) * x).flatten(0, -2)
            d_weight = products.t().mv(inverse.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            d_normal = d_output * _shift(weight, ctx.offset, inverse.dtype)
            along = torch.linalg.vecdot(d_normal, x.to(inverse.dtype)).unsqueeze(-1)
            along = along.mul_(inverse.pow(3)).div_(-x.shape[-1])
            d_x = d_normal.mul_(inverse).addcmul_(x, along).to(x.dtype)
        return d_x, d_weight, None, None


def _shift(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype)
    return weight + offset if offset else weight


class FusedNorm(nn.Module):
    """A model's RMS norm, computed here. eps_used, offset: what its own class was found to do."""

    eps_used: float
    offset: float
    weight: Tensor

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As its own class's. Shapes: x [..., H]. Returns: [..., H]."""
        # What comes of two dtypes differs between models; a compiler fuses what it sees by itself.
        usual = len(inputs) == 1 and not named and inputs[0].dtype == self.weight.dtype
        if not usual or torch.compiler.is_compiling():
            result: Tensor = super().forward(*inputs, **named)
            return result
        return rms_norm(inputs[0], self.weight, self.eps_used, self.offset)


def _read_eps(module: nn.Module) -> float | None:
    """Of what may be an RMS norm; None of other modules, and of those whose forward somebody replaced."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    is_one = [*parameters] == ["weight"] and parameters["weight"].ndim == 1 and not [*module.buffers()]
    return eps if is_one and isinstance(eps, float) and "forward" not in vars(module) else None


def _find_offset(module: nn.Module, eps: float) -> float | None:
    """What a norm adds to its weight (Gemma's adds 1); None where it is no RMS norm of a kind that is known here."""
    generator = torch.Generator().manual_seed(0)
    probe, trials = copy.copy(module), []
    for width in (8, 24):  # of which one at most can be a group of a norm that works on groups
        # Small numbers, so that eps counts; another weight, since the module's may be in shards or have no values.
        x, weight = torch.randn(5, width, generator=generator) * 0.01, torch.rand(width, generator=generator) + 0.5
        vars(probe)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
        trials.append((x, weight, _try(functools.partial(type(module).forward, probe), x)))
    for offset in (0.0, 1.0):
        if all(_same(found, rms_norm(x, weight, eps, offset)) for x, weight, found in trials):
            return offset
    return None


def _make_class(own: type, eps: float, offset: float) -> type:
    return type(own.__name__, (FusedNorm, own), {"eps_used": eps, "offset": offset, "__doc__": own.__doc__})


def _try(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    """What a function gives; None where it wants other arguments."""
    try:
        return function(*inputs, **options)
    except Exception:
        return None


def _same(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    rtol, atol = (1e-5, 1e-6) if found.dtype == torch.float32 else (3e-2, 3e-2)
    return torch.allclose(found, expected, rtol=rtol, atol=atol)


# ---- rotary embeddings ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate: x * cos + (-x's second half, its first half) * sin, over the last dimension.

    Shapes: x [..., D]; cos, sin broadcast to it. Returns: [..., D], in the dtype that x and cos promote to.
    """
    result: Tensor = _Rotation.apply(x, cos, sin)
    return result


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        first, second = sin.chunk(2, -1)
        return _turn(x, cos, first, second, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turn(d_output, cos, second, first, -1).to(ctx.dtype), None, None


def _turn(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    result, (x_first, x_second) = x * cos, x.chunk(2, -1)
    result_first, result_second = result.chunk(2, -1)
    result_first.addcmul_(x_second, first, value=-sign)
    result_second.addcmul_(x_first, second, value=sign)
    return result


class _Rotary:
    """transformers' apply_rotary_pos_emb. reference: its own."""

    def __init__(self, reference: Callable[..., tuple[Tensor, Tensor]]):
        self.reference = reference
        functools.update_wrapper(self, reference)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """(q, k, cos, sin), and unsqueeze_dim by name: rotated q and k. Whatever else: what reference gives."""
        usual = len(inputs) == 4 and options.keys() <= {"unsqueeze_dim"} and not torch.compiler.is_compiling()
        if not usual or inputs[2].requires_grad or len({each.shape[-1] for each in inputs}) > 1:
            return self.reference(*inputs, **options)
        q, k, *angles = inputs
        cos, sin = (each.unsqueeze(options.get("unsqueeze_dim", 1)) for each in angles)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def _turns_halves(function: Callable[..., Any]) -> bool:
    """Whether a function is what rotate computes: in one dtype and in two, with the heads first or not."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1, 1, 1)]
    for dtype, other in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        q, k, cos, sin = (x.to(kind) for x, kind in zip(numbers, (dtype, dtype, other, other), strict=True))
        angles, expected = (cos[:, 0], sin[:, 0]), [rotate(q, cos, sin), rotate(k, cos, sin)]
        found = _try(function, q, k, *angles)
        turned = _try(function, *(each.transpose(1, 2) for each in (q, k)), *angles, unsqueeze_dim=2)
        for pair, expects in ((found, expected), (turned, [each.transpose(1, 2) for each in expected])):
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_same, pair, expects)):
                return False
    # Some leave out positions for which there are no angles: the first ones, or those that only keys have.
    return _try(function, q[:, :, 1:], k, *angles) is None
