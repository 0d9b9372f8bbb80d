"""How the data lies in micro-batches, over the first steps of a run."""

import math
from dataclasses import dataclass
from typing import Any

from tuning.planning.memory import MicroBatchShape
from tuning.settings.arguments import RunArguments

_SURVEYED_STEPS = 1000  # enough to know how the data lies; a million conversations take minutes


@dataclass(frozen=True)
class Survey:
    """How conversations lie in micro-batches, over the steps that were surveyed.

    steps_per_epoch, num_steps: of the run. micro_batches: of a step on each process, on average. fill: tokens over the
    positions that micro-batches have (max_tokens each). num_tokens, num_targets, num_pairs: of a step, on average, over
    all processes (data_utils' Step). largest: the micro-batch of most positions.
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


def survey_steps(steps: Any, settings: RunArguments) -> Survey:
    """How conversations lie in the micro-batches of the run's first steps. steps: a data_utils StepDataset."""
    num_steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * len(steps))
    found = steps.survey(min(_SURVEYED_STEPS, num_steps))
    lengths, num_targets = found["largest"]
    max_tokens = steps.layout.max_tokens
    return Survey(
        steps_per_epoch=len(steps),
        num_steps=num_steps,
        micro_batches=found["micro_batches"],
        fill=found["num_tokens"] / (found["micro_batches"] * settings.world_size * max_tokens),
        num_tokens=found["num_tokens"],
        num_targets=found["num_targets"],
        num_pairs=found["num_pairs"],
        max_tokens=max_tokens,
        largest=MicroBatchShape(tuple(lengths), num_targets, steps.layout.packed),
    )
