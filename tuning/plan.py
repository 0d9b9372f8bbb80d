"""What a run will do and take, before its weights are loaded: parameters, memory of a device, time of a step."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tuning.attention import NAME
from tuning.errors import SettingsError, first_line
from tuning.flops import count_flops, measure_matmul_flops
from tuning.machine import memory_limit
from tuning.memory import Memory, MicroBatchShape, estimate_memory, largest_micro_batch, rows_of
from tuning.model import TrainingModel, count_parameters, enable_gradient_checkpointing

# Estimates were within 15 % of what was measured (benchmarks/LOG.md): what is chosen stays below the limit by some of
# it, and only what lies beyond all of it is refused.
_USABLE, _TOLERANCE = 0.9, 1.15
# Measured share of the device's matrix products that a step reaches (benchmarks/results); others are not known.
_MATMUL_SHARE = {"cpu": 0.7}
_GIB = 2**30


@dataclass(frozen=True)
class Survey:
    """How rows lie, over the steps that were looked at.

    steps_per_epoch, num_steps: of the run. micro_batches: of a step on each process, on average. fill: tokens over the
    positions that micro-batches have (max_tokens each). num_tokens, num_targets, num_pairs: of a step, on average, over
    all processes (steps.Step). largest: the micro-batch of most positions.
    """

    steps_per_epoch: int
    num_steps: int
    micro_batches: float
    fill: float
    num_tokens: float
    num_targets: float
    num_pairs: float
    max_tokens: int
    largest: MicroBatchShape


@dataclass(frozen=True)
class Plan:
    """What a run will do and take.

    memory: at the peak, on one device; None where it cannot be told, unknown says why. limit: bytes there are; None
    where nothing says it. largest_micro_batch: tokens that would fit. step_s: None where no rate was measured on such a
    device. checkpointing: whether activations are computed again.
    """

    trainable: int | None
    total: int | None
    layout: Survey
    memory: Memory | None
    unknown: str | None
    limit: int | None
    largest_micro_batch: int | None
    step_s: float | None
    checkpointing: bool
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """False only where it is known."""
        return self.memory is None or self.limit is None or self.memory.total <= _TOLERANCE * self.limit

    def describe(self) -> list[str]:
        """Lines for the log."""
        layout = self.layout
        lines = [
            f"{layout.steps_per_epoch:,} steps an epoch, {layout.num_steps:,} in all; {layout.micro_batches:.3g} "
            f"micro-batches a step, {layout.fill:.0%} full ({layout.max_tokens:,} tokens each)",
        ]
        if self.trainable is not None:
            again = "; activations are computed again" if self.checkpointing else ""
            lines.append(f"{self.trainable:,} of {self.total:,} parameters train{again}")
        lines.append(self.describe_memory())
        if self.largest_micro_batch is not None:
            lines.append(f"the largest micro-batch that fits: {self.largest_micro_batch:,} tokens")
        if self.step_s is not None:
            lines.append(f"{self.step_s:.3g} s a step, {self.step_s * layout.num_steps / 3600:.2g} h in all")
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
        if self.memory is not None:
            values["memory"] |= {"total": self.memory.total}
        return values


def make_plan(
    skeleton: TrainingModel | None,
    survey: Survey,
    *,
    settings: Any,
    dtype: torch.dtype,
    row_tokens: int,
    checkpointing: bool | None,
    process_bytes: int,
    outlook: bool,
    unknown: str | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan a run of a model without storage.

    settings: RunArguments. dtype: of the computation. row_tokens: of rows that fill the largest micro-batch.
    checkpointing: whether activations are computed again; None: where it is needed. process_bytes: of this process
    before the plan. outlook: also the time of a step and the micro-batch that would fit, which takes seconds to find
    out. skeleton None: the model cannot be built without storage, unknown says why.
    """
    device = settings.device
    limit = memory_limit(device) if settings.device_memory_gib is None else int(settings.device_memory_gib * _GIB)
    plan = Plan(
        trainable=None,
        total=None,
        layout=survey,
        memory=None,
        unknown=unknown,
        limit=limit,
        largest_micro_batch=None,
        step_s=None,
        checkpointing=bool(checkpointing),
        notes=notes,
    )
    if skeleton is None:
        return plan

    def estimate(shape: MicroBatchShape, *, accumulates: bool = survey.micro_batches > 1) -> Memory:
        if shape.packed:
            skeleton.causal_lm.set_attn_implementation(NAME)
        return estimate_memory(
            skeleton,
            shape,
            dtype=dtype,
            engine=settings.engine,
            num_processes=settings.world_size,
            optimizer=str(settings.optim.value),
            device_type=device.type,
            process_bytes=process_bytes if device.type == "cpu" else 0,
            accumulates=accumulates,
            keeps_whole="shard_grad_op" in (settings.fsdp or ""),
            offloaded=_offloaded(settings),
        )

    trainable, total = count_parameters(skeleton)
    plan = replace(plan, trainable=trainable, total=total)
    try:
        if checkpointing:
            enable_gradient_checkpointing(skeleton.causal_lm)
        memory = estimate(survey.largest)
        if checkpointing is None and limit is not None and memory.total > _USABLE * limit:
            enable_gradient_checkpointing(skeleton.causal_lm)
            memory, plan = estimate(survey.largest), replace(plan, checkpointing=True)
        plan = replace(plan, memory=memory)
        if not outlook:
            return plan
        fitting = None if limit is None else _find_largest(estimate, survey, row_tokens, int(_USABLE * limit))
        step_s = _step_seconds(skeleton, plan, device, dtype, settings.world_size)
    except Exception as error:  # a model may do anything with tensors that have no values
        return replace(plan, unknown=first_line(error)[:200])
    return replace(plan, largest_micro_batch=fitting, step_s=step_s)


def check_plan(plan: Plan, settings: Any) -> None:
    """Raises: SettingsError: the run cannot fit."""
    if not plan.fits:
        budget = "--per_device_train_batch_size" if settings.micro_batch_tokens is None else "--micro_batch_tokens"
        what = f"lower {budget} or --model_max_length"
        if settings.engine in ("single", "ddp"):
            what += ", spread it by --fsdp or --deepspeed"
        if not plan.checkpointing:
            what += ", pass --gradient_checkpointing True"
        raise SettingsError(f"{plan.describe_memory()}: too much; {what}. --ignore_memory_plan True tries all the same")


def _find_largest(estimate: Callable[..., Memory], survey: Survey, row_tokens: int, limit: int) -> int:
    supervised = survey.num_targets / survey.num_tokens

    def total_of(tokens: int) -> int:
        lengths = tuple(rows_of(row_tokens, tokens))
        shape = MicroBatchShape(lengths, max(1, int(supervised * sum(lengths))), survey.largest.packed)
        return estimate(shape, accumulates=True).total

    return largest_micro_batch(total_of, row=row_tokens, limit=limit)


def _step_seconds(
    skeleton: TrainingModel, plan: Plan, device: torch.device, dtype: torch.dtype, num_processes: int
) -> float | None:
    share, flops = _MATMUL_SHARE.get(device.type), count_flops(skeleton)
    if share is None or flops is None:
        return None
    rate = measure_matmul_flops(device, dtype, size=1024) * share * num_processes
    counts = {name: getattr(plan.layout, name) for name in ("num_tokens", "num_targets", "num_pairs")}
    again = 2 * plan.layout.num_tokens * (plan.total or 0) if plan.checkpointing else 0
    return (flops.of(counts) + again) / rate


def _offloaded(settings: Any) -> tuple[str, ...]:
    zero = settings.deepspeed["zero_optimization"] if settings.deepspeed else {}
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")}
    return tuple(name for name, device in devices.items() if device == "cpu")
