"""The optimizer's state inside DeepSpeed's: flat partitions of all parameters, read and written by parameter."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tuning.distributed.sharding import partition, shape_of


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer, as the Trainer holds it, is DeepSpeed's."""
    return hasattr(_zero(optimizer), "loss_scaler")


def state_of(optimizer: Any, parameter: Any) -> Iterator[tuple[str, Tensor]]:
    """(key, full value) of a parameter's state; nothing before the first step. All processes must iterate alike."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = _zero(optimizer)
    flat = _partitions(zero)[0]
    _link(zero)
    for key, value in zero.optimizer.state.get(flat, {}).items():
        if torch.is_tensor(value) and value.shape == flat.shape:
            yield key, safe_get_full_optimizer_state(parameter, key).view(shape_of(parameter))
        else:  # the number of steps
            yield key, torch.as_tensor(value, dtype=torch.float32).clone()


def load(optimizer: Any, state: Iterable[tuple[str, Any, Tensor]]) -> None:
    """Put (key, parameter, full value) into a fresh optimizer. All processes must call this."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    zero = _zero(optimizer)
    inner = zero.optimizer.state
    counts_in_python = hasattr(zero.optimizer, "ds_opt_adam")
    on_device = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for key, parameter, value in state:
        by_parameter = value.shape == shape_of(parameter) and value.ndim > 0
        for flat in _partitions(zero):
            if not by_parameter:
                steps = value.clone()  # each its own: they are counted up in place
                inner[flat][key] = int(steps) if counts_in_python else steps.to(flat.device) if on_device else steps
            elif key not in inner[flat]:
                inner[flat][key] = torch.zeros_like(flat)
        if by_parameter:
            _link(zero)
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, partition(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(flat.device, torch.float32), key)


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """The loss scale of fp16 training, as plain values."""
    values = vars(_zero(optimizer).loss_scaler)
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float)}


def load_scaler(optimizer: Any, saved: dict[str, Any]) -> None:
    """Restore what scaler_state returned; from a torch GradScaler's state (run without DeepSpeed) only the scale."""
    vars(_zero(optimizer).loss_scaler).update(saved if "cur_scale" in saved else {"cur_scale": saved["scale"]})


def _zero(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # inside accelerate's


def _link(zero: Any) -> None:
    """Link parameters to their optimizer state. DeepSpeed (ZeRO-1, ZeRO-2) does so only if group 0 has a state."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _partitions(zero: Any) -> list[Tensor]:
    """This process's flat fp32 partitions, one or more for each group of parameters."""
    flat: list[Tensor] | None = getattr(zero, "fp32_partitioned_groups_flat", None)
    return zero.single_partition_of_fp32_groups if flat is None else flat
