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

    peft scales the update and adds it in passes of their own over [tokens, out], casts the input to the adapter's
    float32 where autocast casts it back, and keeps what dropout left of the input. Layers that are given the same
    input go together (_LoraProducts). Variants (DoRA), biases of adapters and layers of another kind stay as they are.
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
        other = sharded or casts or args or options or self.disable_adapters or self.merged or x.ndim < 2
        if other or not self.group.is_plain_product():
            return super().forward(x, *args, **options)
        return self.group.take(self, x)


class _Group:
    """Layers that are given the same input: the first one that is called computes the outputs of all of them."""

    def __init__(self, layers: list[Any]):
        self._layers = layers
        self._input: Any = None  # a weak reference
        self._state: Any = None  # of the input, when the outputs were computed
        self._outputs: dict[LoraLinear, Tensor] = {}

    def is_plain_product(self) -> bool:
        """Whether each layer is its base's product and its update: nobody hooked the base, and it does not train."""
        return all(_is_frozen_product(layer.base_layer) for layer in self._layers)

    def take(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """The output of a layer. Shapes: x [..., in]. Returns: [..., out]."""
        if torch.compiler.is_compiling():  # which cannot follow a weak reference
            return _compute([layer], x)[0]
        # An input that was written to in between is another one, and what was computed without a graph has none.
        state = (None if x.is_inference() else x._version, torch.is_grad_enabled())
        same = self._input is not None and self._input() is x and self._state == state
        if not same or layer not in self._outputs:
            self._outputs = dict(zip(self._layers, _compute(self._layers, x), strict=True))
            self._input, self._state = weakref.ref(x), state
        return self._outputs.pop(layer)


def _compute(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that are given the same input."""
    adapters = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    constants = [(layer.base_layer, layer.scaling["default"], _dropout_of(layer)) for layer in layers]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        outputs: tuple[Tensor, ...] = _LoraProducts.apply(x.to(dtype), constants, *adapters)
    return outputs


def _dropout_of(layer: LoraLinear) -> float:
    dropout = layer.lora_dropout["default"]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


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


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


class _LoraProducts(torch.autograd.Function):
    """x @ W.T + bias + scale * (dropout(x) @ A.T) @ B.T for several layers; W (dense or quantised) and bias are frozen.

    Every sum, of an update and of the gradients of x, is made within a product, so that none takes a pass over memory
    of its own. Without dropout the products with all A are one. With it each layer has a mask of its own, which is
    kept for the backward pass in place of what it left of x. A quantised W is dequantised in each of both passes.

    layers: (base layer, scale, dropout) of each. Shapes: x [..., in]; adapters A [rank, in], B [out, rank] of each
    layer in turn. Returns: [..., out] of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[tuple[Any, float, float]], *adapters: Tensor) -> tuple[Tensor, ...]:
        rows, downs = x.flatten(0, -2), [down.to(x.dtype) for down in adapters[::2]]
        ups, masks = [up.to(x.dtype) for up in adapters[1::2]], []
        if any(dropout for _, _, dropout in layers):
            lows = []
            for (_, _, dropout), down in zip(layers, downs, strict=True):
                kept, mask = torch.native_dropout(rows, dropout, train=True)
                lows.append(F.linear(kept, down))
                masks.append(mask)
        else:
            downs = [_join(downs, 0)]
            lows = list(F.linear(rows, downs[0]).split([up.shape[1] for up in ups], 1))
        outputs = []
        for (base, scale, _), low, up in zip(layers, lows, ups, strict=True):
            bias = None if base.bias is None else base.bias.to(x.dtype)
            output = F.linear(x, _weight_of(base, x.dtype), bias)
            output.flatten(0, -2).addmm_(low, up.t(), alpha=scale)
            outputs.append(output)
        ctx.save_for_backward(x, *lows, *ups, *downs, *masks)
        ctx.layers, ctx.dtypes = layers, [each.dtype for each in adapters]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        (x, *saved), layers = ctx.saved_tensors, ctx.layers
        lows, ups, rest = saved[: len(layers)], saved[len(layers) : 2 * len(layers)], saved[2 * len(layers) :]
        rows, d_rows = x.flatten(0, -2), [each.flatten(0, -2) for each in d_outputs]
        d_ups, d_lows = [], []
        for (_, scale, dropout), d, low, up in zip(layers, d_rows, lows, ups, strict=True):
            d_ups.append((d.t() @ low).mul_(scale))
            d_lows.append((d @ up).mul_(scale / (1 - dropout)))
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_rows[0] @ _weight_of(layers[0][0], x.dtype)
            for (base, _, _), d in zip(layers[1:], d_rows[1:], strict=True):
                d_x.addmm_(d, _weight_of(base, x.dtype))
        if len(rest) == 1:
            d_low = _join(d_lows, 1)
            d_downs = (d_low.t() @ rows).split([up.shape[1] for up in ups])
            if d_x is not None:
                d_x.addmm_(d_low, rest[0])
        else:
            downs, masks = rest[: len(layers)], rest[len(layers) :]
            d_downs = [d_low.t() @ (rows * mask) for d_low, mask in zip(d_lows, masks, strict=True)]
            if d_x is not None:
                for d_low, down, mask in zip(d_lows, downs, masks, strict=True):
                    d_x.addcmul_(d_low @ down, mask)
        d_adapters = [each for pair in zip(d_downs, d_ups, strict=True) for each in pair]
        d_adapters = [d.to(dtype) for d, dtype in zip(d_adapters, ctx.dtypes, strict=True)]
        return None if d_x is None else d_x.view(x.shape), None, *d_adapters
