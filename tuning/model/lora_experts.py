"""LoRA on experts: low-rank products by group of tokens, beside the experts' own products.

transformers keeps the weights of all experts of a layer as 3-D parameters. peft adapts these (`target_parameters`) by
adding the whole low-rank product of every expert to the weights at each forward. Here the low-rank products are taken
with the tokens that an expert gets, as for any other layer. Names and shapes of the parameters are peft's.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuning.errors import SettingsError

_ALIGNMENT = 16  # bytes, of the rows and columns that grouped_mm takes


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Names and modules that hold the weights of several experts as 3-D parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if "expert" in name and any(p.ndim == 3 for p in module.parameters(recurse=False))
    }


def find_expert_targets(model: PreTrainedModel) -> list[str]:
    """What peft's target_parameters holds for all experts of a model.

    Raises: SettingsError: experts of a kind that is not known here.
    """
    targets = set()
    for name, experts in find_experts(model).items():
        if not all(hasattr(experts, each) for each in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
            raise SettingsError(
                f"the experts of {type(model).__name__} ({name}) are of a kind that cannot be adapted yet; "
                "--lora_experts off leaves them as they are"
            )
        for parameter in _projections(experts):
            targets.add(f"{name.rpartition('.')[2]}.{parameter}")
    return sorted(targets)


def _projections(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def count_expert_adapters(peft_model: nn.Module) -> int:
    """Parameters of adapters on experts."""
    wrappers = [module for module in peft_model.modules() if isinstance(module, ParamWrapper)]
    parts = [part for wrapper in wrappers for part in (wrapper.lora_A, wrapper.lora_B)]
    return sum(p.numel() for part in parts for p in part.parameters())


def set_dropout(peft_model: PeftModel, dropout: float) -> None:
    """Dropout before every adapter. peft itself allows none where it adapts parameters."""
    for module in peft_model.modules():
        if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
            module.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()


def fuse_experts_forward(peft_model: PeftModel) -> None:
    """Let experts that are adapted take their low-rank products by group of tokens."""
    inner = {id(module.base_layer) for module in peft_model.modules() if isinstance(module, ParamWrapper)}
    for module in peft_model.modules():
        if isinstance(module, ParamWrapper) and id(module) not in inner:
            adapters, experts = _unwrap(module)
            if hasattr(experts, "has_gate") and all(name in _projections(experts) for name in adapters):
                module.forward = functools.partial(_forward, module, module.forward)


def _unwrap(outer: ParamWrapper) -> tuple[dict[str, ParamWrapper], Any]:
    """The adapters of a module by the names of its parameters, and the module."""
    adapters, module = {}, outer
    while isinstance(module, ParamWrapper):
        adapters[module.parameter_name] = module
        module = module.base_layer
    return adapters, module


def _forward(outer: ParamWrapper, slow: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    adapters, experts = _unwrap(outer)
    if any(adapter.disable_adapters or adapter.merged for adapter in adapters.values()):
        result: Tensor = slow(hidden, index, weights)
        return result
    return compute_experts(experts, hidden, index, weights, adapters)


def compute_experts(
    experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, adapters: dict[str, ParamWrapper] | None = None
) -> Tensor:
    """What a layer's experts add up to.

    adapters: of the experts' parameters, by name. Shapes: hidden [T, H]; index and weights [T, K], the experts of each
    token and how much each counts. Returns: [T, H].
    """
    top_k = index.shape[1]
    expert_ids, order = torch.sort(index.flatten())
    # groups[e]: where the tokens of expert e end.
    groups = torch.searchsorted(expert_ids, torch.arange(experts.num_experts, device=index.device), right=True)
    groups = groups.to(torch.int32)
    product = functools.partial(_project, experts, adapters or {}, expert_ids, groups)

    first, last = _projections(experts)
    x = product(first, hidden[order // top_k])
    x = product(last, experts._apply_gate(x) if experts.has_gate else experts.act_fn(x))
    if getattr(experts, "has_post_expert_norm", False):
        x = experts.post_expert_norm(x)
    x = x * weights.flatten()[order].unsqueeze(-1)
    # Back to the tokens' order and added up there: index_add would add in another order each time on a GPU.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return x[back].unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


def _project(
    experts: Any, adapters: dict[str, ParamWrapper], expert_ids: Tensor, groups: Tensor, name: str, x: Tensor
) -> Tensor:
    """Each row times the weight of its expert, with that one's bias and adapter.

    Shapes: x [S, in]; expert_ids [S], ascending. Returns: [S, out].
    """
    weight = getattr(experts, name)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    result = grouped_product(x.to(dtype), _in_first(experts, weight).to(dtype), groups)
    if experts.has_bias:
        result.add_(getattr(experts, f"{name}_bias")[expert_ids].to(dtype))
    if (adapter := adapters.get(name)) is None:
        return result
    x = adapter.lora_dropout["default"](x).to(dtype)
    down, up = split_experts(adapter)
    update = grouped_product(x, down.to(dtype), groups) * adapter.scaling["default"]
    return result.add_(grouped_product(update, up.to(dtype), groups))


def _in_first(experts: Any, weight: Tensor) -> Tensor:
    """A stack of weights as [E, in, out]."""
    return weight if experts.is_transposed else weight.transpose(1, 2)


def split_experts(adapter: ParamWrapper) -> tuple[Tensor, Tensor]:
    """An adapter's matrices by expert: [E, in, r] and [E, r, out].

    peft keeps A expert by expert, [E * r, in]; in B the experts of a rank stand side by side, [out, r * E].
    """
    down, up = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    num_experts = adapter.num_experts
    by_expert = up.reshape(-1, num_experts).t().contiguous()  # [E, out * r]: as one matrix it is transposed fast
    by_expert = by_expert.unflatten(1, (len(up), -1)).transpose(1, 2)
    return down.unflatten(0, (num_experts, -1)).transpose(1, 2), by_expert


def grouped_product(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """x[start:end] @ weight[e] for each group of rows.

    Shapes: x [S, in]; weight [E, in, out]; groups [E] int32, where each group ends. Returns: [S, out].
    """
    inside, outside = (-n % (_ALIGNMENT // x.element_size()) for n in weight.shape[1:])
    if inside or outside:  # a rank of 2 or 12, say
        x, weight = F.pad(x, (0, inside)), F.pad(weight, (0, outside, 0, inside))
    result = F.grouped_mm(x, weight, offs=groups)
    return result[:, : result.shape[1] - outside] if outside else result
