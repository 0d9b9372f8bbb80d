"""The optimizer: LoRA+'s groups, and what a checkpoint keeps of learning rate schedule and loss scale."""

from typing import Any

import torch

from tuning.distributed import zero_optimizer
from tuning.distributed.sharding import shape_of


def group_for_loraplus(
    trained: dict[str, torch.nn.Parameter], decaying: set[str], *, rate: float, ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups in which B matrices and vectors learn at `ratio` times the rate.

    trained: by name. decaying: names that weight decay applies to.
    """
    faster = {name for name, parameter in trained.items() if "lora_B" in name or len(shape_of(parameter)) == 1}

    def group(names: set[str], rate: float, decay: float) -> dict[str, Any]:
        return {"params": [p for name, p in trained.items() if name in names], "lr": rate, "weight_decay": decay}

    return [
        group(trained.keys() - faster, rate, weight_decay),
        group(faster & decaying, rate * ratio, weight_decay),
        group(faster - decaying, rate * ratio, 0.0),
    ]


def describe_schedules(optimizer: Any, scheduler: Any, scaler: Any) -> dict[str, Any]:
    """Where the learning rate schedule and the loss scale stand, as JSON values. scaler: torch's, or None."""
    scale = scaler.state_dict() if scaler is not None else None
    if zero_optimizer.is_zero(optimizer):
        scale = zero_optimizer.scaler_state(optimizer)
    steps = {"last_epoch": scheduler.last_epoch, "_step_count": scheduler._step_count}
    return {"scheduler": steps, "scaler": scale}


def restore_schedules(saved: dict[str, Any], optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Restore what describe_schedules saved. Rates are recomputed from the settings; the scale may be DeepSpeed's."""
    vars(scheduler).update(saved["scheduler"])
    for group, rate, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    scale = saved["scaler"]
    if scale is None:
        return
    if zero_optimizer.is_zero(optimizer):
        zero_optimizer.load_scaler(optimizer, scale)
    elif scaler is not None:
        of_deepspeed = "scale" not in scale
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale["cur_scale"]} if of_deepspeed else scale)
