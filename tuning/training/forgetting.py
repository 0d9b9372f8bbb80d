"""What a run forgets: loss on general text, and the divergence from the start, at each evaluation and at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuning.errors import SettingsError
from tuning.model.divergence import Start
from tuning.training.step_loader import move_micro_batch

START_FILE = "general_start.safetensors"


class ForgettingMeter:
    """Measures on the same rows on all ranks, so that engines that shard weights can take part.

    steps: of the general rows, in the order of the file: items as StepTrainer has them. has_adapter: the base is the
    model without its adapter; else what the model said when training began is kept, and saved in checkpoints.

    Every process calls its methods alike.
    """

    def __init__(self, steps: Any, device: torch.device, *, has_adapter: bool):
        self._batches = [batch for index in range(len(steps)) for batch in steps[index]["micro_batches"]]
        self._device, self._has_adapter = device, has_adapter
        self._start: list[Start] | None = None

    def begin(self, model: Callable[..., Any]) -> None:
        """Keep what the model says before the first step; not if a checkpoint has given it back. model: as wrapped."""
        if not self._has_adapter and self._start is None:
            found = [model(**self._inputs(batch), general="start") for batch in self._batches]
            self._start = [Start(*(tensor.cpu() for tensor in each)) for each in found]

    @torch.no_grad()
    def measure(self, model: Callable[..., Any]) -> dict[str, float]:
        """Means over the tokens: general_loss, general_base_loss (of the start) and general_kl. model: as wrapped."""
        columns = []
        for index, batch in enumerate(self._batches):
            if self._has_adapter:
                columns.append(model(**self._inputs(batch), general="base"))
                continue
            assert self._start is not None
            start = Start(*(tensor.to(self._device) for tensor in self._start[index]))
            columns.append(model(**self._inputs(batch), general=start))
        loss, base_loss, divergence = torch.cat(columns).double().mean(0).tolist()
        return {"general_loss": loss, "general_base_loss": base_loss, "general_kl": divergence}

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in move_micro_batch(batch, self._device).items() if k not in ("weights", "target_rows")}

    def save(self, directory: Path) -> None:
        """Write what the start said into a checkpoint. On rank 0."""
        if self._start is not None:
            tensors: dict[str, Tensor] = {}
            for index, start in enumerate(self._start):
                tensors |= {f"{index}/{name}": value.contiguous() for name, value in start._asdict().items()}
            save_file(tensors, directory / START_FILE)

    def restore(self, directory: Path) -> None:
        """Take it back from a checkpoint. On all ranks. Raises: SettingsError: the run was begun without a meter."""
        if self._has_adapter:
            return
        file = directory / START_FILE
        if not file.is_file():
            raise SettingsError(f"--forgetting: {directory} does not have what the model said at the start of the run")
        with safe_open(file, "pt") as saved:
            self._start = [
                Start(*(saved.get_tensor(f"{index}/{name}") for name in Start._fields))
                for index in range(len(self._batches))
            ]
