"""Between log lines a step never waits for the device: nothing in it reads a tensor's values on the host.

On a GPU each such read waits for all that was started. A dispatch mode sees every operation of forward, backward and
optimizer, whatever library calls it, and refuses those that bring values to the host or whose result's shape depends
on values. What a CPU does in place of a GPU's kernels is not seen (attention of packed rows, quantised products).
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import runs
from tuning.training.row_recorder import RowRecorder
from tuning.training.trainer import StepTrainer

READS = {
    "_local_scalar_dense",  # .item(), .tolist(), int(), float(), bool()
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "bincount",
    "histc",
}


class HostRead(Exception):
    """An operation that waits for the device."""


class NoHostCopies(TorchFunctionMode):
    """Refuses what copies a tensor to the host; on a CPU no operation tells of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu", "__array__", "__dlpack__"):
            raise HostRead(function.__name__)
        return function(*args, **(kwargs or {}))


class NoHostReads(TorchDispatchMode):
    """Refuses operations that wait for the device."""

    def __enter__(self):
        self._copies = NoHostCopies()
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or masked or repeats:
            raise HostRead(f"{name}{' by a mask' if masked else ''}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.long)),
        lambda x: float(x.sum()),
        lambda x: x.bincount(),
        lambda x: torch.where(x > 0),
    ],
)
def test_the_mode_sees_reads(read):
    x = torch.arange(3)
    read(x)
    with NoHostReads(), pytest.raises(HostRead):
        read(x)


class Watch:
    """An observer: the mode is on from the second step to the log line at the end, the trainer's own part included."""

    def __init__(self):
        self.mode, self.steps = None, 0

    def __call__(self, event, trainer):
        if event == "step":
            self.steps += 1
            if trainer.state.global_step == 1:
                self.mode = NoHostReads()
                self.mode.__enter__()
            elif trainer.state.global_step == 4 and self.mode:
                self.close()

    def close(self):
        self.mode.__exit__(None, None, None)
        self.mode = None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora", "tokens", "experts", "nf4"])
def test_steps_between_log_lines_read_nothing(checkpoints, tmp_path, monkeypatch, kind, packed):
    name = "moe" if kind == "experts" else "untied"
    rows, template = runs.example_rows(checkpoints[name])
    model = runs.build(checkpoints[name], {"experts": "lora"}.get(kind, kind), template)
    watch = Watch()
    monkeypatch.setattr(StepTrainer, "observers", [watch])
    args = runs.run_arguments(
        tmp_path, kind={"experts": "lora"}.get(kind, kind), batch=4, accumulation=2, steps=6,
        logging_steps=100, logging_first_step=False, max_grad_norm=1.0,
    )  # fmt: skip
    recorder = RowRecorder(rows.num_targets, rows.describe, 7)
    try:
        runs.train_with(args, model, rows, packed=packed, recorder=recorder)
    finally:
        if watch.mode:
            watch.close()
    assert watch.steps == 6
