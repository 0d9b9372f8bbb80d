"""LoRA layers that compute what peft's do with fewer passes over memory."""

import functools
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from tuning.model.lora_experts import fuse_experts_forward


def fuse_lora_forward(peft_model: PeftModel) -> None:
    """Let every plain LoRA layer add its update to the base layer's output in one product, and experts by group.

    peft scales the update and adds it in passes of their own over [tokens, out], and casts the input to the adapter's
    float32 where autocast casts it back. Variants (DoRA), biases and layers of another kind stay as they are.
    """
    fuse_experts_forward(peft_model)
    for layer in peft_model.modules():
        if isinstance(layer, LoraLinear) and not layer.lora_variant and layer.lora_B["default"].bias is None:
            layer.forward = functools.partial(_forward, layer, layer.forward)


def _forward(layer: LoraLinear, slow: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    down, up = layer.lora_A["default"], layer.lora_B["default"].weight
    # ZeRO-3 gathers a weight for its own module's forward only; a view saved for backward would keep the whole
    # gathered buffer alive.
    sharded = hasattr(up, "ds_id")
    casts = x.dtype != down.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if sharded or casts or args or options or layer.disable_adapters or layer.merged:
        return slow(x, *args, **options)
    result = layer.base_layer(x)
    update = down(layer.lora_dropout["default"](x)) * layer.scaling["default"]
    return torch.addmm(result.flatten(0, -2), update.flatten(0, -2), up.t()).view(result.shape)
