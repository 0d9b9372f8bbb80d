"""What is measured between two log lines: losses, tokens, time; and which conversations a non-finite loss came from."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from tuning.messages import name_conversations
from tuning.planning.operations import StepOperations

_COUNTS = ("num_targets", "num_tokens", "num_positions", "num_pairs")  # of a step


class StepMetrics:
    """Steps since the last log line. Nothing here waits for the GPU until it is asked.

    saved: state() in a checkpoint that was saved between two log lines; the number of processes may have changed.
    """

    def __init__(self, device: torch.device, *, saved: dict[str, Any] | None, rank: int, num_ranks: int):
        saved = saved or {"steps": 0, "counts": dict.fromkeys(_COUNTS, 0), "elapsed_s": 0.0, "loss_sums": [0.0]}
        sums = saved["loss_sums"]
        mine = sums[rank] if len(sums) == num_ranks else math.fsum(sums) / len(sums)
        self.loss_sum = torch.tensor(mine, device=device)
        self._num_steps = saved["steps"]
        self._counts = dict(saved["counts"])
        self._started = time.perf_counter() - saved["elapsed_s"]
        self._losses: list[tuple[int, list[str], Tensor]] = []
        self._gradient_norms: list[tuple[int, list[str], Tensor]] = []
        self._rows: list[str] = []

    def add(self, number: int, step: dict[str, Any], losses: list[Tensor]) -> Tensor:
        """Count one step, given this rank's loss of each micro-batch. Returns: their sum."""
        total = torch.stack(losses).sum()
        self.loss_sum += total
        self._num_steps += 1
        for name in _COUNTS:
            self._counts[name] += step[name]
        self._losses += [(number, rows, loss) for rows, loss in zip(step["row_ids"], losses, strict=True)]
        self._rows = [row for rows in step["row_ids"] for row in rows]
        return total

    def add_gradient_norm(self, number: int, norm: Any) -> None:
        """Note the gradient norm of the step that was added last."""
        if norm is not None:
            self._gradient_norms.append((number, self._rows, torch.as_tensor(norm).detach()))

    def find_non_finite(self, *, gradients: bool) -> str | None:
        """The first loss (or gradient norm) on this rank that is not finite, with its step and conversations."""
        kinds = [("loss", self._losses)] + ([("gradient norm", self._gradient_norms)] if gradients else [])
        found = []
        for kind, entries in kinds:
            values = torch.stack([value.float() for *_, value in entries]).tolist() if entries else []
            bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
            if bad is not None:
                number, rows, _ = entries[bad]
                found.append(
                    (number, f"the {kind} is {values[bad]} at step {number} (conversations {name_conversations(rows)})")
                )
        return min(found)[1] if found else None

    def rates(self, flops: StepOperations | None, peak_flops_per_s: float | None) -> dict[str, float]:
        """Tokens, rates over all ranks without the time that was excluded, and the share of padding.

        flops, peak_flops_per_s: what a step costs and all devices can do; None where that is not known.
        """
        elapsed_s = time.perf_counter() - self._started
        counts = self._counts
        rates = {
            "supervised_tokens": float(counts["num_targets"]),
            "tokens_per_s": round(counts["num_tokens"] / elapsed_s, 1),
            "supervised_tokens_per_s": round(counts["num_targets"] / elapsed_s, 1),
            "padding_share": round(1 - counts["num_tokens"] / counts["num_positions"], 4),
        }
        if flops and peak_flops_per_s:
            rates["matmul_share"] = round(flops.of(counts) / elapsed_s / peak_flops_per_s, 4)
        return rates

    def mean_loss(self, loss_sums: list[float]) -> float:
        """Mean over ranks and steps of the ranks' loss_sum."""
        return math.fsum(loss_sums) / len(loss_sums) / self._num_steps

    def state(self, loss_sums: list[float]) -> dict[str, Any]:
        """What a checkpoint keeps; loss_sums: of all ranks."""
        return {
            "steps": self._num_steps,
            "counts": self._counts,
            "elapsed_s": time.perf_counter() - self._started,
            "loss_sums": loss_sums,
        }

    def exclude(self, elapsed_s: float) -> None:
        """Take time that was not training (evaluating, saving) out of the window."""
        self._started += elapsed_s
