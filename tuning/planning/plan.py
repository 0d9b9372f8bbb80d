"""What a run will do and take, before its weights are loaded: parameters, memory of a device, time of a step."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tuning.errors import SettingsError
from tuning.machine import memory_limit
from tuning.messages import first_line
from tuning.model.attention import NAME
from tuning.model.packing import find_obstacle
from tuning.model.training_model import TrainingModel, count_parameters, enable_gradient_checkpointing
from tuning.planning.memory import Memory, MicroBatchShape, estimate_memory
from tuning.planning.operations import count_operations, measure_matmul_rate
from tuning.planning.survey import Survey
from tuning.settings.arguments import RunArguments

# Estimates were within 15 % of measurements (benchmarks/LOG.md): automatic choices stay below 0.9 of the limit, and
# a run is refused only above 1.15 of it.
_USABLE, _TOLERANCE = 0.9, 1.15

# Measured share of the device's matrix products that a step reaches (benchmarks/results); others are not known.
_MATMUL_SHARE = {"cpu": 0.7}

# Kinds of devices on which benchmarks/bench_memory.py measured runs; the results lie in benchmarks/results.
MEASURED_DEVICES = ("cpu",)
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a run will do and take.

    memory: at the peak, on one device; None where it cannot be told, unknown says why. limit: bytes there are; None
    where nothing says it. largest_micro_batch: tokens that would fit. step_s: None where no rate was measured on such a
    device. checkpointing: whether gradient checkpointing is on.
    """

    trainable: int | None
    total: int | None
    survey: Survey
    memory: Memory | None
    unknown: str | None
    limit: int | None
    largest_micro_batch: int | None
    step_s: float | None
    checkpointing: bool
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """False only where the plan says that the run cannot fit."""
        return self.memory is None or self.limit is None or self.memory.total <= _TOLERANCE * self.limit

    def describe(self) -> list[str]:
        """Lines for the log."""
        survey = self.survey
        lines = [
            f"{survey.steps_per_epoch:,} steps an epoch, {survey.num_steps:,} in all; {survey.micro_batches:.3g} "
            f"micro-batches a step, {survey.fill:.0%} full ({survey.max_tokens:,} tokens each)",
        ]
        if self.trainable is not None:
            again = "; gradient checkpointing on" if self.checkpointing else ""
            lines.append(f"{self.trainable:,} of {self.total:,} parameters train{again}")
        lines.append(self.describe_memory())
        if self.largest_micro_batch is not None:
            lines.append(f"the largest micro-batch that fits: {self.largest_micro_batch:,} tokens")
        if self.step_s is not None:
            lines.append(f"{self.step_s:.3g} s a step, {self.step_s * survey.num_steps / 3600:.2g} h in all")
        else:
            lines.append("time: no rate was measured on such a device")
        return [*lines, *self.notes]

    def describe_memory(self) -> str:
        """One line."""
        if self.memory is None:
            return f"memory: cannot be told for this model ({self.unknown})"
        parts = ", ".join(
            f"{name} {size / _GIB:.2f}" for name, size in self.memory.parts.items() if size > 0.005 * _GIB
        )
        limit = "" if self.limit is None else f" of {self.limit / _GIB:.1f}"
        return f"memory: {self.memory.total / _GIB:.2f}{limit} GiB a device at the peak ({parts})"

    def to_json(self) -> dict[str, Any]:
        """For plan.json and run.json."""
        values = asdict(self)
        values["layout"] = values.pop("survey")
        if self.memory is not None:
            values["memory"] |= {"total": self.memory.total}
        return values


def plan_run(
    base: Any,
    survey: Callable[[int, bool], Survey],
    settings: RunArguments,
    *,
    model_max_length: int,
    longest: int,
) -> Plan:
    """Plan a run before its weights load: what it will do and take.

    base: a checkpoint.base.BaseModel. survey: (tokens of a micro-batch, packed) -> how the data lies in it. longest:
    tokens of the longest conversation.

    Raises: SettingsError: --micro_batch_tokens is too small, or cannot be chosen.
    """
    meta_model = base.meta_model
    packed = meta_model is None or find_obstacle(meta_model, longest) is None
    budget, wanted = settings.per_device_train_batch_size * model_max_length, settings.micro_batch_tokens
    if wanted is not None and wanted != "auto":
        budget = int(wanted)
        if budget < longest:
            raise SettingsError(f"--micro_batch_tokens {wanted}: the longest conversation has {longest} tokens")
    row_tokens = min(model_max_length, longest)
    checkpointing = None if settings.checkpoints_if_needed else bool(settings.gradient_checkpointing)
    plan = make_plan(base, survey(budget, packed), settings, row_tokens=row_tokens, checkpointing=checkpointing)
    if wanted != "auto":
        return plan
    if plan.largest_micro_batch is None:
        raise SettingsError(f"--micro_batch_tokens auto: {plan.unknown or 'the memory of this device is not known'}")
    largest = survey(max(longest, plan.largest_micro_batch), packed)
    # Whether gradient checkpointing is on is settled: the meta model has it on by now.
    return make_plan(base, largest, settings, row_tokens=row_tokens, checkpointing=plan.checkpointing)


def make_plan(
    base: Any, survey: Survey, settings: RunArguments, *, row_tokens: int, checkpointing: bool | None
) -> Plan:
    """Plan a run whose data lies in micro-batches as surveyed.

    row_tokens: of rows that fill the largest micro-batch. checkpointing: whether gradient checkpointing is on; None:
    turn it on if needed. The time of a step and the micro-batch that would fit take seconds to find out: they are for
    dry runs and for --micro_batch_tokens auto.
    """
    device, dtype, meta_model = settings.device, base.compute_dtype, base.meta_model
    limit = memory_limit(device) if settings.device_memory_gib is None else int(settings.device_memory_gib * _GIB)
    notes: tuple[str, ...] = (base.evidence.describe(),)
    if base.quantization:
        notes += (f"linear layers: {base.quantization.describe()}",)
    plan = Plan(
        trainable=None,
        total=None,
        survey=survey,
        memory=None,
        unknown=base.unknown,
        limit=limit,
        largest_micro_batch=None,
        step_s=None,
        checkpointing=bool(checkpointing),
        notes=notes,
    )
    if meta_model is None:
        return plan

    def estimate(shape: MicroBatchShape, *, accumulates: bool = survey.micro_batches > 1) -> Memory:
        if shape.packed:
            meta_model.causal_lm.set_attn_implementation(NAME)
        return estimate_memory(
            meta_model,
            shape,
            dtype=dtype,
            engine=settings.engine,
            num_processes=settings.world_size,
            optimizer=settings.optimizer_name,
            device_type=device.type,
            process_bytes=base.process_bytes if device.type == "cpu" else 0,
            accumulates=accumulates,
            keeps_whole="shard_grad_op" in (settings.fsdp or ""),
            offloaded=_offloaded(settings),
            device_memory=limit,
        )

    trainable, total = count_parameters(meta_model)
    plan = replace(plan, trainable=trainable, total=total)
    try:
        if checkpointing:
            enable_gradient_checkpointing(meta_model.causal_lm)
        memory = estimate(survey.largest)
        if checkpointing is None and limit is not None and memory.total > _USABLE * limit:
            enable_gradient_checkpointing(meta_model.causal_lm)
            memory, plan = estimate(survey.largest), replace(plan, checkpointing=True)
        plan = replace(plan, memory=memory)
        if not settings.dry_run and settings.micro_batch_tokens != "auto":
            return plan
        fitting = None if limit is None else _find_largest(estimate, survey, row_tokens, int(_USABLE * limit))
        step_s = _step_seconds(meta_model, plan, device, dtype, settings.world_size)
    except Exception as error:  # a model may do anything with tensors that have no values
        return replace(plan, unknown=first_line(error)[:200])
    return replace(plan, largest_micro_batch=fitting, step_s=step_s)


def check_plan(plan: Plan, settings: RunArguments) -> str | None:
    """Refuse a run that cannot fit, on kinds of devices where the plan was compared with measurements.

    Returns: a warning on other kinds; None where the run fits, or with --ignore_memory_plan.

    Raises: SettingsError: the run cannot fit.
    """
    if plan.fits or settings.ignore_memory_plan:
        return None
    budget = "--per_device_train_batch_size" if settings.micro_batch_tokens is None else "--micro_batch_tokens"
    what = f"lower {budget} or --model_max_length"
    if settings.engine in ("single", "ddp"):
        what += ", shard it with --fsdp or --deepspeed"
    if not plan.checkpointing:
        what += ", pass --gradient_checkpointing True"
    line = f"{plan.describe_memory()}: too much; {what}"
    kind = settings.device.type
    if kind not in MEASURED_DEVICES:
        return f"warning: {line}. The run continues: no plan was compared with measurements on a {kind} device"
    raise SettingsError(f"{line}. --ignore_memory_plan True tries all the same")


def _find_largest(estimate: Callable[..., Memory], survey: Survey, row: int, limit: int) -> int:
    """Tokens of the largest micro-batch of full rows that stays below a limit (bytes); 0 where not even one row fits.

    row: tokens of each. Memory grows with tokens as a straight line, so two estimates tell.
    """
    supervised = survey.num_targets / survey.num_tokens

    def total_of(num_rows: int) -> int:
        shape = MicroBatchShape((row,) * num_rows, max(1, int(supervised * (num_rows * row))), survey.largest.packed)
        return estimate(shape, accumulates=True).total

    few, many = 2 * row, 6 * row
    low, high = total_of(2), total_of(6)
    slope = (high - low) / (many - few)
    if slope <= 0:
        return many
    return max(0, math.floor((few + (limit - low) / slope) / row)) * row


def _step_seconds(
    meta_model: TrainingModel, plan: Plan, device: torch.device, dtype: torch.dtype, num_processes: int
) -> float | None:
    share, flops = _MATMUL_SHARE.get(device.type), count_operations(meta_model)
    if share is None or flops is None:
        return None
    rate = measure_matmul_rate(device, dtype, size=1024) * share * num_processes
    counts = {name: getattr(plan.survey, name) for name in ("num_tokens", "num_targets", "num_pairs")}
    again = 2 * plan.survey.num_tokens * (plan.total or 0) if plan.checkpointing else 0
    return (flops.of(counts) + again) / rate


def _offloaded(settings: Any) -> tuple[str, ...]:
    zero = settings.deepspeed["zero_optimization"] if settings.deepspeed else {}
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")}
    return tuple(name for name, device in devices.items() if device == "cpu")
