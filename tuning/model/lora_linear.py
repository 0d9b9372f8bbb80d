"""LoRA layers that compute what peft's do with fewer products and passes over memory."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuning.model.lora_experts import fuse_experts_forward
from tuning.model.quantized_linear import QuantizedLinear

# Layers of one module that are given the same input, by the names that transformers has for them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_lora_forward(peft_model: PeftModel) -> None:
    """Let every plain LoRA layer add its update to the base layer's output in one product, and experts by group.

    peft scales the update and adds it in passes of their own over [tokens, out], and casts the input to the adapter's
    float32 where autocast casts it back. Without dropout, layers that are given the same input share the product with
    A, and sum its gradient within the products (_LoraProducts); with dropout each has a mask of its own. Variants
    (DoRA), biases of adapters and layers of another kind stay as they are.
    """
    fuse_experts_forward(peft_model)
    for layers in _find_groups(peft_model):
        group = _Group(layers)
        for layer in layers:
            layer.__class__, layer.group = FusedLoraLinear, group


def _find_groups(model: nn.Module) -> list[list[Any]]:
    """Plain LoRA layers: those that are given the same input together, others alone."""
    groups: list[list[Any]] = []
    for parent in model.modules():
        for names in _TOGETHER:
            layers: list[Any] = [getattr(parent, name) for name in names if _is_plain(getattr(parent, name, None))]
            if len({layer.in_features for layer in layers}) == 1:
                groups.append(layers)
    grouped = {layer for group in groups for layer in group}
    return groups + [[module] for module in model.modules() if _is_plain(module) and module not in grouped]


def _is_plain(layer: Any) -> bool:
    return type(layer) is LoraLinear and not layer.lora_variant and layer.lora_B["default"].bias is None


class FusedLoraLinear(LoraLinear):
    """peft's layer, which adds its update in one product. group: layers that are given the same input, itself too."""

    group: "_Group"

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As peft's. Shapes: x [..., in]. Returns: [..., out]."""
        down, up = self.lora_A["default"], self.lora_B["default"].weight
        # ZeRO-3 gathers a weight for its own module's forward only; a view saved for backward would keep the whole
        # gathered buffer alive.
        sharded = hasattr(up, "ds_id")
        casts = x.dtype != down.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if sharded or casts or args or options or self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        if self.group.is_plain_product():
            return self.group.take(self, x)
        rows = x.flatten(0, -2)  # a matrix, since torch gives views of one otherwise, which are copied to be written to
        result = self.base_layer(rows)
        low = down(self.lora_dropout["default"](rows)).to(result.dtype)
        output: Tensor = _AddUpdate.apply(result, low, up.to(result.dtype), self.scaling["default"])
        return output.view(*x.shape[:-1], -1)


class _Group:
    """Layers that are given the same input: the first one that is called computes the outputs of all of them."""

    def __init__(self, layers: list[Any]):
        self._layers = layers
        self._input: Any = None  # a weak reference
        self._outputs: dict[LoraLinear, Tensor] = {}

    def is_plain_product(self) -> bool:
        """Whether each layer is its base's product and its update now: without dropout, and nobody hooked the base."""
        return all(_drops_nothing(layer) and _is_frozen_product(layer.base_layer) for layer in self._layers)

    def take(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """The output of a layer. Shapes: x [..., in]. Returns: [..., out]."""
        if self._input is None or self._input() is not x or layer not in self._outputs:
            self._outputs = dict(zip(self._layers, self._compute(x), strict=True))
            self._input = weakref.ref(x)
        return self._outputs.pop(layer)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        adapters = [part["default"].weight for layer in self._layers for part in (layer.lora_A, layer.lora_B)]
        bases = [layer.base_layer for layer in self._layers]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            scales = [layer.scaling["default"] for layer in self._layers]
            outputs: tuple[Tensor, ...] = _LoraProducts.apply(x.to(dtype), bases, scales, *adapters)
        return outputs


def _drops_nothing(layer: LoraLinear) -> bool:
    dropout = layer.lora_dropout["default"]
    return isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0


def _is_frozen_product(base: nn.Module) -> bool:
    return (
        (type(base) is nn.Linear or isinstance(base, QuantizedLinear))
        and not any(p.requires_grad for p in base.parameters())
        and "forward" not in vars(base)
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )


def _weight_of(base: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = base.dequantize() if isinstance(base, QuantizedLinear) else base.weight
    return weight.to(dtype)


class _AddUpdate(torch.autograd.Function):
    """result + scale * low @ up.T, in place: no base layer needs its output for its gradient.

    Shapes: result [T, out], low [T, rank], up [out, rank].
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
        result.addmm_(low, up.t(), alpha=scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(low, up)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        low, up = ctx.saved_tensors
        return d_output, (d_output @ up).mul_(ctx.scale), (d_output.t() @ low).mul_(ctx.scale), None


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


class _LoraProducts(torch.autograd.Function):
    """x @ W.T + bias + scale * (x @ A.T) @ B.T for several layers; W (dense or quantised) and bias are frozen.

    The products with all A are one. Every sum, of an update and of the gradients of x, is made within a product, so
    that none takes a pass over memory of its own. A quantised W is dequantised in each of both passes.

    Shapes: x [..., in]; adapters A [rank, in], B [out, rank] of each layer in turn. Returns: [..., out] of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: list[Any], scales: list[float], *adapters: Tensor) -> tuple[Tensor, ...]:
        downs, ups = list(adapters[::2]), [up.to(x.dtype) for up in adapters[1::2]]
        down = _join(downs, 0).to(x.dtype)
        low = F.linear(x.flatten(0, -2), down)
        outputs = []
        for base, up, scale, part in zip(bases, ups, scales, low.split([*map(len, downs)], 1), strict=True):
            bias = None if base.bias is None else base.bias.to(x.dtype)
            output = F.linear(x, _weight_of(base, x.dtype), bias)
            output.flatten(0, -2).addmm_(part, up.t(), alpha=scale)
            outputs.append(output)
        ctx.save_for_backward(x, low, down, *ups)
        ctx.bases, ctx.scales, ctx.dtypes = bases, scales, [each.dtype for each in adapters]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        x, low, down, *ups = ctx.saved_tensors
        d_rows, ranks = [each.flatten(0, -2) for each in d_outputs], [up.shape[1] for up in ups]
        layers = list(zip(d_rows, ups, ctx.scales, low.split(ranks, 1), strict=True))
        d_ups = [(d.t() @ part).mul_(scale) for d, _, scale, part in layers]
        d_low = _join([(d @ up).mul_(scale) for d, up, scale, _ in layers], 1)
        d_downs = (d_low.t() @ x.flatten(0, -2)).split(ranks)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_rows[0] @ _weight_of(ctx.bases[0], x.dtype)
            for d, base in zip(d_rows[1:], ctx.bases[1:], strict=True):
                d_x.addmm_(d, _weight_of(base, x.dtype))
            d_x = d_x.addmm_(d_low, down).view(x.shape)
        d_adapters = [each for pair in zip(d_downs, d_ups, strict=True) for each in pair]
        return d_x, None, None, *(d.to(dtype) for d, dtype in zip(d_adapters, ctx.dtypes, strict=True))
