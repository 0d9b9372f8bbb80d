"""What a run says of itself before it begins: what it trains, how long, what it writes, and what may not teach."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from tuning.planning.plan import Plan
from tuning.settings.arguments import Arguments, RunArguments

_FEW_STEPS = 50
_LARGE = 1_000_000_000  # parameters, from where on training all of them is seldom what was meant
_GIB = 2**30


def describe_training(arguments: Arguments, plan: Plan, rows_per_step: int) -> list[str]:
    """Lines for the log: what is trained, steps, schedule. rows_per_step: over all processes."""
    lora, survey = arguments.lora, plan.survey
    run: Any = arguments.run
    kind = "Q-LoRA" if lora.q_lora else "LoRA" if lora.use_lora else "full training"
    if lora.lora_weight_path:
        kind += f", going on from {lora.lora_weight_path}"
    elif lora.use_lora:
        targets = lora.lora_target_modules or "every linear layer"
        named = targets if isinstance(targets, str) else ", ".join(targets)
        variant = "".join(f", {name}" for name, on in (("DoRA", lora.use_dora), ("rsLoRA", lora.use_rslora)) if on)
        kind += f" r {lora.lora_r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout:g}{variant}, on {named}"
    elif (plan.total or 0) >= _LARGE:
        kind += f" of {plan.total:,} parameters (--use_lora was not given)"
    batch, accumulation = run.per_device_train_batch_size, run.gradient_accumulation_steps
    made_of = f"{batch} x {accumulation} x {run.world_size}"
    rows = f"{rows_per_step:,} rows a step"
    if rows_per_step == batch * accumulation * run.world_size:
        rows += f" ({made_of}: batch size x accumulation x processes)"
    epochs = survey.num_steps / survey.steps_per_epoch
    warmup = run.get_warmup_steps(survey.num_steps)
    return [
        kind,
        f"{rows}; {survey.steps_per_epoch:,} steps an epoch, {epochs:.3g} epochs: {survey.num_steps:,} steps",
        f"{run.optimizer_name}, learning rate {run.learning_rate:g} at its highest, {run.lr_scheduler_type.value}, "
        f"{warmup:,} warm-up steps",
    ]


def describe_checkpoints(arguments: Arguments, plan: Plan, result_dtype: torch.dtype) -> list[str]:
    """A line on checkpoints and disk, and a warning where they cannot fit. result_dtype: of a full model's weights."""
    run, survey = arguments.run, plan.survey
    count = count_checkpoints(run, survey.num_steps, survey.steps_per_epoch)
    if not count:
        return ["checkpoints: none (--save_strategy no); a run that is killed begins anew"]
    how_many = f"{count:,}"
    if run.save_total_limit and run.save_total_limit < count:
        how_many += f", the newest {run.save_total_limit} are kept"
    if plan.trainable is None or plan.total is None:
        return [f"checkpoints: {how_many}"]
    weights = plan.trainable * 4 if arguments.lora.use_lora else plan.total * result_dtype.itemsize
    state = 0 if run.save_only_model else 8 * plan.trainable  # Adam's two float32 values; the largest there is
    kept = min(count, run.save_total_limit + 1 if run.save_total_limit else count)  # the oldest goes when one is whole
    needed = kept * (weights + state) + weights
    directory = Path(run.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    lines = [
        f"checkpoints: {how_many}, of about {_size(weights + state)} each; {_size(needed)} with the result, "
        f"{_size(free)} are free"
    ]
    if needed > free:
        lines.append(
            "warning: they will not fit on this disk; lower --save_total_limit, or choose another --output_dir"
        )
    return lines


def count_checkpoints(run: Any, num_steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints a run writes, the last step's included; for "best" the most there can be.

    run: RunArguments.
    """
    strategy = run.save_strategy.value
    evaluates = run.eval_strategy.value
    interval = {"steps": run.save_steps, "epoch": steps_per_epoch, "no": 0}.get(strategy)
    if interval is None:  # best
        interval = run.eval_steps if evaluates == "steps" else steps_per_epoch
    if interval and interval < 1:
        interval = math.ceil(num_steps * interval)
    return math.ceil(num_steps / interval) if interval else 0


def find_doubts(arguments: Arguments, plan: Plan, rates: list[float]) -> list[str]:
    """Warnings where a run cannot teach much. rates: the learning rate at every step."""
    run: Any = arguments.run
    steps = plan.survey.num_steps
    warmup = 0 if run.lr_scheduler_type.value == "constant" else run.get_warmup_steps(steps)
    doubts = []
    if not any(rates):
        doubts.append("schedule: the learning rate is 0 at every step, so nothing is learnt; lower --warmup_steps")
    elif warmup >= steps:
        doubts.append(
            f"schedule: the warm-up of {warmup:,} steps is no shorter than the run of {steps:,}; the learning rate "
            f"only reaches {max(rates) / run.learning_rate:.0%} of --learning_rate; lower --warmup_steps"
        )
    elif warmup > steps / 3:
        doubts.append(f"schedule: the warm-up takes {warmup:,} of {steps:,} steps; lower --warmup_steps")
    if any(rates) and steps < _FEW_STEPS:
        way_out = "raise --num_train_epochs, or lower --gradient_accumulation_steps"
        doubts.append(
            f"schedule: {steps:,} steps at {run.learning_rate:g} teach little; {way_out}, or raise --learning_rate"
        )
    return doubts


def find_rates(run: RunArguments, num_steps: int) -> list[float]:
    """The learning rate at every step; of a long run at some of them."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    kwargs: Any = run.lr_scheduler_kwargs or {}
    warmup = run.get_warmup_steps(num_steps)
    schedule: Any = get_scheduler(run.lr_scheduler_type, optimizer, warmup, num_steps, dict(kwargs))
    steps = range(0, num_steps, max(1, num_steps // 1000))
    return [run.learning_rate * schedule.lr_lambdas[0](step) for step in steps]


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", _GIB), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"
