"""LoRA layers that compute what peft's do with fewer products and passes over memory."""

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from tuning.model.lora_experts import fuse_experts_forward

# Layers of one module that are given the same input, by the names that transformers has for them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_lora_forward(peft_model: PeftModel) -> None:
    """Let every plain LoRA layer add its update to the base layer's output in one product, and experts by group.

    peft scales the update and adds it in passes of their own over [tokens, out], and casts the input to the adapter's
    float32 where autocast casts it back. Layers that are given the same input take their first products in one.
    Variants (DoRA), biases and layers of another kind stay as they are.
    """
    fuse_experts_forward(peft_model)
    for module in peft_model.modules():
        if _is_plain(module):
            module.forward = functools.partial(_forward, module, module.forward, _find_down(module))
    for parent in peft_model.modules():
        for names in _TOGETHER:
            layers: list[Any] = [getattr(parent, name) for name in names if _is_plain(getattr(parent, name, None))]
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                together = _Together(layers)
                for layer in layers:
                    slow = layer.forward.args[1]
                    layer.forward = functools.partial(_forward, layer, slow, functools.partial(together.take, layer))


def _is_plain(layer: Any) -> bool:
    return isinstance(layer, LoraLinear) and not layer.lora_variant and layer.lora_B["default"].bias is None


def _find_down(layer: LoraLinear) -> Any:
    down, dropout = layer.lora_A["default"], layer.lora_dropout["default"]
    return lambda x: down(dropout(x))


class _Together:
    """Layers that are given the same input: the first one that is called takes the product with A for all of them.

    With dropout each has a mask of its own, and so a product of its own.
    """

    def __init__(self, layers: list[LoraLinear]):
        self._layers = layers
        self._input: Any = None  # a weak reference
        self._parts: dict[LoraLinear, Tensor] = {}

    def take(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """The input of a layer's B. Shapes: x [..., in]. Returns: [..., rank]."""
        if not all(_drops_nothing(each) for each in self._layers):
            return _find_down(layer)(x)
        if self._input is None or self._input() is not x or layer not in self._parts:
            weights = [each.lora_A["default"].weight for each in self._layers]
            products = F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)
            self._parts = dict(zip(self._layers, products, strict=True))
            self._input = weakref.ref(x)
        return self._parts.pop(layer)


def _drops_nothing(layer: LoraLinear) -> bool:
    dropout = layer.lora_dropout["default"]
    return isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0


def _forward(layer: LoraLinear, slow: Any, take_down: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    down, up = layer.lora_A["default"], layer.lora_B["default"].weight
    # ZeRO-3 gathers a weight for its own module's forward only; a view saved for backward would keep the whole
    # gathered buffer alive.
    sharded = hasattr(up, "ds_id")
    casts = x.dtype != down.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if sharded or casts or args or options or layer.disable_adapters or layer.merged:
        return slow(x, *args, **options)
    result = layer.base_layer(x)
    update = take_down(x) * layer.scaling["default"]
    return torch.addmm(result.flatten(0, -2), update.flatten(0, -2), up.t()).view(result.shape)
