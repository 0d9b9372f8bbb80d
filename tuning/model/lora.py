"""LoRA: which layers it adapts, and fresh adapters for a model."""

import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.errors import SettingsError
from tuning.messages import first_line
from tuning.model.loading import hide_gptqmodel
from tuning.model.lora_experts import find_expert_targets, find_experts, set_dropout
from tuning.model.lora_linear import fuse_lora_forward
from tuning.model.other_parts import find_other_parts, freeze_other_parts
from tuning.model.token_rows import TokenRows, find_module_name, is_tied

_ROUTERS = ("gate", "router", "shared_expert_gate")
_PASSED_BY = ("dt_proj",)  # Mamba multiplies by its weight without calling the layer: an adapter there does nothing


def find_lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers to adapt: all of the language model's, never the output layer or a router."""
    output = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in _list_modules(model).items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    return sorted(name for name in names - {*_ROUTERS, *_PASSED_BY} if _why_peft_refuses(model, name) is None)


def _why_peft_refuses(model: PreTrainedModel, target: str) -> str | None:
    """What peft says of a layer that it adapts in no model of this architecture (Mamba's out_proj)."""
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)  # peft's own list, where it has one
    if check is None:
        return None
    try:
        check(LoraConfig(), model, target)
    except ValueError as error:
        return first_line(error)
    return None


def _list_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of the language model, by their names in the model."""
    others = tuple(f"{name}." for name in find_other_parts(model))
    return {name: module for name, module in model.named_modules() if not f"{name}.".startswith(others)}


def check_lora_targets(model: PreTrainedModel, targets: list[str] | str) -> None:
    """Check the names of layers, or the regular expression for them.

    Raises: SettingsError: it matches no linear layer, a router, or the output layer.
    """
    layers = _list_modules(model)
    output = model.get_output_embeddings()
    for target in [targets] if isinstance(targets, str) else targets:
        matched = [name for name in layers if _matches(name, target, is_pattern=isinstance(targets, str))]
        names = {name.rpartition(".")[2] for name in matched}
        if names & {*_ROUTERS} and find_experts(model):
            raise SettingsError(f"--lora_target_modules {target}: a router; adapting it unbalances the experts")
        if why := next((why for name in sorted(names) if (why := _why_peft_refuses(model, name))), None):
            raise SettingsError(f"--lora_target_modules {target}: {why}")
        if not matched:
            linear = sorted({n.rpartition(".")[2] for n, m in layers.items() if isinstance(m, (nn.Linear, Conv1D))})
            raise SettingsError(f"--lora_target_modules {target}: no such layer; the model has {', '.join(linear)}")
        if other := next((name for name in matched if not isinstance(layers[name], (nn.Linear, Conv1D))), None):
            kind = type(layers[other]).__name__
            raise SettingsError(f"--lora_target_modules {target}: {other} is a {kind}, not a linear layer")
        if any(layers[name] is output for name in matched):
            hint = "the output layer; --train_embeddings full trains it"
            raise SettingsError(f"--lora_target_modules {target}: {hint}")


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    """Whether a layer is meant, as peft decides it."""
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    bias: str = "none",
    use_dora: bool = False,
    use_rslora: bool = False,
    target_modules: list[str] | str | None = None,
    experts: str = "auto",
    embeddings: str = "off",
    token_ids: list[int] | None = None,
) -> tuple[PeftModel, TokenRows | None]:
    """Freeze a model and give it fresh LoRA adapters.

    embeddings: "off", "tokens" (rows of token_ids train) or "full" (both matrices train).
    target_modules: layer names, or a regular expression for whole names; None: every linear layer but the output.
    experts: "on", "off", or "auto": on where the model has experts and target_modules is None.

    Raises: SettingsError: no such layer, or one that cannot be adapted.
    """
    targets = find_lora_targets(model) if target_modules is None else target_modules
    check_lora_targets(model, targets)
    expert_targets = _choose_expert_targets(model, experts, named=target_modules is not None, use_dora=use_dora)
    matrices_to_train: dict[str, Any] = {}
    if embeddings == "full":
        matrices = [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()])
        matrices_to_train = {
            "modules_to_save": [find_module_name(model, matrix).rpartition(".")[2] for matrix in matrices],
            "ensure_weight_tying": is_tied(model),
        }
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0 if expert_targets else dropout,  # peft refuses other values beside target_parameters
        bias=bias,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=targets,
        target_parameters=expert_targets or None,
        exclude_modules=_exclude_other_parts(model),
        task_type="CAUSAL_LM",
        **matrices_to_train,
    )
    if embeddings == "tokens" and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise SettingsError(
            "--train_embeddings tokens: peft drops the output layer's bias beside rows; use full or off"
        )
    ids = token_ids or []
    rows = TokenRows(model, {"embedding": ids, "output": ids}) if embeddings == "tokens" else None
    tied = is_tied(model)
    hide_gptqmodel()
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    if embeddings == "full" and tied and not _trains_one_matrix(peft_model):
        raise SettingsError(
            "--train_embeddings full: peft cannot keep this model's tied matrices tied; use tokens or off"
        )
    if expert_targets:
        set_dropout(peft_model, dropout)
    freeze_other_parts(model)  # peft lets every bias train, wherever it is
    fuse_lora_forward(peft_model)
    if bias != "none" and not any("bias" in name for name, p in peft_model.named_parameters() if p.requires_grad):
        raise SettingsError(f"--lora_bias {bias}: the model has no biases")
    return peft_model, rows


def _exclude_other_parts(model: PreTrainedModel) -> str | None:
    """What peft's exclude_modules holds, so that names mean layers of the language model alone."""
    others = find_other_parts(model)
    return rf"({'|'.join(map(re.escape, others))})(\..*)?" if others else None


def _choose_expert_targets(model: PreTrainedModel, experts: str, *, named: bool, use_dora: bool) -> list[str]:
    """Parameters of experts to adapt. named: whether the layers to adapt were named."""
    if experts == "off" or (experts == "auto" and named):
        return []
    targets = find_expert_targets(model)
    if experts == "on" and not targets:
        raise SettingsError("--lora_experts on: the model has no experts")
    if targets and use_dora:
        raise SettingsError("--use_dora: not available for experts; leave them as they are with --lora_experts off")
    return targets


def _trains_one_matrix(peft_model: PeftModel) -> bool:
    model = peft_model.get_base_model()
    weights = [
        (module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module).weight
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    return weights[0] is weights[1]
