"""What the losses of a run say, in words: whether it goes on falling, and what happened in the end."""

import math
from collections.abc import Sequence
from typing import Any

from tuning.training.row_recorder import EpochRows

_EPOCHS_TOLD = 10
_LITTLE = 0.01  # of a loss: less is no change
_FORGOTTEN = 0.05  # of the loss on general text, that it may rise before something counts as forgotten
_FAR = 0.3  # nats a token


def count_stale(losses: Sequence[float], threshold: float) -> int:
    """How many of the last losses are none that fell: by more than threshold below the lowest that counted before.

    Example: [3.0, 2.0, 2.1, 1.95], threshold 0.1 -> 2
    """
    lowest, stale = math.inf, 0
    for loss in losses:
        if loss < lowest - threshold:
            lowest, stale = loss, 0
        else:
            stale += 1
    return stale


def describe_outcome(log: Sequence[dict[str, Any]], general: dict[str, float] | None) -> list[str]:
    """What happened in a run, a line each: what it learnt, whether it overfitted or stopped falling, what it forgot.

    log: entries with "step" and "loss" or "eval_loss". general: as ForgettingMeter.measure has it.
    """
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    lines = []
    if len(losses) == 1:
        lines.append(f"the training loss was {losses[0]:.4f}")
    if len(losses) > 1:
        first, last = losses[0], _mean(losses[-max(1, len(losses) // 10) :])
        if last < first * (1 - _LITTLE):
            lines.append(f"learnt: the training loss fell from {first:.4f} to {last:.4f}")
        else:
            way_out = "; lower --learning_rate, or look at the data" if last > first else ""
            lines.append(f"learnt nothing: the training loss went from {first:.4f} to {last:.4f}{way_out}")
    if len(evaluations) > 1:
        lines.append(_describe_evaluations(evaluations))
    if general is not None:
        lines.append(describe_general(general))
    return lines


def describe_epoch(epoch: int, num_epochs: int, log: Sequence[dict[str, Any]], rows: EpochRows | None) -> list[str]:
    """What an epoch did, in up to three lines: its loss, the evaluation, the rows with the highest losses.

    epoch: from 1. log: as describe_outcome has it. rows: None: not recorded.
    """
    lines = []
    if rows is not None:
        since = ""
        if rows.before is not None:
            since = f", before {rows.before:.4f}; {rows.fell:,} of {rows.compared:,} rows fell"
        lines.append(f"epoch {epoch:,} of {num_epochs:,}: loss {rows.loss:.4f}{since}")
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    if evaluations:
        best_step, best = min(evaluations, key=_by_loss)
        lines.append(f"  evaluation: loss {evaluations[-1][1]:.4f}, best {best:.4f} at step {best_step:,}")
    if rows is not None:
        lines.append("  highest: " + ", ".join(f"{source} ({loss:.2f})" for source, loss in rows.highest))
    return lines


def is_told(epoch: int, num_epochs: int) -> bool:
    """Whether an epoch, from 1, gets its lines: of many epochs some ten do, and the last."""
    return epoch % math.ceil(num_epochs / _EPOCHS_TOLD) == 0 or epoch == num_epochs


def _describe_evaluations(evaluations: Sequence[tuple[int, float]]) -> str:
    best_step, best = min(evaluations, key=_by_loss)
    last_step, last = evaluations[-1]
    if not math.isfinite(last):
        return f"diverged: the evaluation loss is {last:.4f}; it was lowest at step {best_step:,}, {best:.4f}"
    if last > best * (1 + _LITTLE):
        return f"overfitted: the evaluation loss rose since step {best_step:,}, from {best:.4f} to {last:.4f}"
    near = next(step for step, loss in evaluations if loss <= best * (1 + _LITTLE))
    if near < last_step and len([step for step, _ in evaluations if step > near]) > 1:
        return f"stopped falling: the evaluation loss is {last:.4f}, and was within 1 % of it at step {near:,}"
    return f"still learning: the evaluation loss was lowest near the end, {best:.4f} at step {best_step:,}"


def describe_general(general: dict[str, float]) -> str:
    """One line of what a model forgot. general: as ForgettingMeter.measure has it."""
    before, after = general["general_base_loss"], general["general_loss"]
    verdict = "kept what it knew"
    if after > before * (1 + _FORGOTTEN):
        verdict = "forgot"
    elif general["general_kl"] > _FAR:
        verdict = "moved far from the start"
    return f"{verdict}: general text: loss {before:.2f} -> {after:.2f}, KL {general['general_kl']:.2g}"


def _by_loss(evaluation: tuple[int, float]) -> float:
    return math.inf if math.isnan(evaluation[1]) else evaluation[1]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
