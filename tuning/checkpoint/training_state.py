"""What a bit-equal resume needs beside what is saved for users: exact weights, optimizer, counters.

    training_state*.safetensors   "weight/NAME" and "KEY/NAME": every trained parameter and its optimizer's tensors
    training_state.json           the optimizer's plain values, the scheduler, the loss scale, counters

Keyed by parameter name, so that they do not depend on the order of parameters or the number of processes.
Hyperparameters are not in them: those are the settings' business.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tuning.checkpoint.files import write_json
from tuning.console import is_rank_0
from tuning.distributed import zero_optimizer
from tuning.distributed.sharding import assign, gather_tensor, master_dtype, reshard, scatter, shape_of
from tuning.errors import SettingsError

STATE_FILE = "training_state.json"
_TENSORS = "training_state{suffix}.safetensors"
_FILE_BYTES = 5 * 10**9  # what rank 0 holds at a time
_WEIGHT = "weight"


def save_training_state(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    *,
    write: Callable[[Callable[[], None]], None] = lambda function: function(),
) -> None:
    """Write the trained parameters and the optimizer's state as they are, and counters (JSON values).

    All processes must call it: shards are gathered tensor by tensor. write: runs what rank 0 writes.

    Raises: SettingsError: an optimizer whose state is not made of tensors and plain values.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged optimizer states (unified memory) are read by the CPU
    number, size = 1, 0
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named_state(model, optimizer):
        if size + tensor.nbytes > _FILE_BYTES and tensors:
            write(partial(_write_tensors, directory, number, tensors))
            number, size, tensors = number + 1, 0, {}
        size += tensor.nbytes
        tensors[name] = tensor.cpu() if is_rank_0() else tensor.new_empty(0)
    write(partial(_write_tensors, directory, number, tensors))
    state = {"optimizer_kind": _kind(optimizer), "optimizer": _plain_values(model, optimizer)}
    write(lambda: write_json(directory / STATE_FILE, {**counters, **state}))


def read_counters(directory: Path) -> dict[str, Any]:
    """The counters that were saved."""
    return json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))


@torch.no_grad()
def load_weights(directory: Path, model: nn.Module) -> None:
    """Put the saved parameters into a model.

    Raises: SettingsError: other parameters, shapes or dtypes than the model trains.
    """
    missing = trained_parameters(model)
    for key, name, value in _read_tensors(directory):
        if key != _WEIGHT:
            continue
        parameter = missing.pop(name, None)
        if parameter is None or shape_of(parameter) != value.shape or master_dtype(parameter) != value.dtype:
            here = "no such trained parameter"
            if parameter is not None:
                here = _describe(master_dtype(parameter), shape_of(parameter))
            there = _describe(value.dtype, value.shape)
            raise SettingsError(f"{directory}: holds {name} ({there}); this run has {here}")
        assign(parameter, value)
    if missing:
        raise SettingsError(f"{directory}: lacks {next(iter(missing))}, which this run trains")


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved state into a fresh optimizer of the same model.

    Raises: SettingsError: it is the state of another kind of optimizer.
    """
    kind, saved = _kind(optimizer), read_counters(directory)
    if kind != saved["optimizer_kind"]:
        raise SettingsError(
            f"{directory}: holds the state of {saved['optimizer_kind']}, and this run has {kind}; "
            "give it the same --optim"
        )
    parameters = trained_parameters(model)
    state = ((key, name, value) for key, name, value in _read_tensors(directory) if key != _WEIGHT)
    if zero_optimizer.is_zero(optimizer):
        zero_optimizer.load(optimizer, ((key, parameters[name], value) for key, name, value in state))
        return
    # Not load_state_dict: it casts to the parameter's dtype, which loses what Adafactor keeps in float32.
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, values in saved["optimizer"].items():
        optimizer.state[parameters[name]].update(values)
    for key, name, value in state:
        parameter = parameters[name]
        group = groups[parameter]
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            optimizer.state[parameter][key] = scatter(value, parameter)
            continue
        stays = key == "step" and not (group.get("capturable") or group.get("fused"))  # torch's own rule for steps
        optimizer.state[parameter][key] = value if stays else _place(optimizer, parameter, value)


def _place(optimizer: Any, parameter: nn.Parameter, value: Tensor) -> Tensor:
    """On the parameter's device; bitsandbytes' paged optimizers keep large states where both sides reach them."""
    optimizer = _innermost(optimizer)
    if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name; a tied one once."""
    reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield weight/NAME and KEY/NAME of every trained parameter. All processes iterate alike."""
    stored: set[int] = set()
    for name, parameter in trained_parameters(model).items():
        yield f"{_WEIGHT}/{name}", gather_tensor(parameter)
        if zero_optimizer.is_zero(optimizer):
            yield from ((f"{key}/{name}", value) for key, value in zero_optimizer.state_of(optimizer, parameter))
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                yield f"{key}/{name}", value.full_tensor()
            elif type(value) is Tensor:
                # One tensor of several parameters (the tables of 8-bit optimizers) would be written for one of them.
                yield f"{key}/{name}", value.clone() if value.data_ptr() in stored else value
                stored.add(value.data_ptr())
            elif value is not None and not isinstance(value, bool | int | float | str):
                raise SettingsError(
                    f"--optim: {_kind(optimizer)} keeps a {type(value).__name__} that cannot be saved exactly; "
                    "use adamw_torch, or --save_only_model True (checkpoints without resuming)"
                )


def _plain_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    if zero_optimizer.is_zero(optimizer):
        return {}
    plain = {}
    for name, parameter in trained_parameters(model).items():
        state = optimizer.state.get(parameter, {})
        if values := {key: value for key, value in state.items() if not isinstance(value, Tensor)}:
            plain[name] = values
    return plain


def _write_tensors(directory: Path, number: int, tensors: dict[str, Tensor]) -> None:
    suffix = "" if number == 1 else f"-{number}"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / _TENSORS.format(suffix=suffix), metadata={"format": "pt"})


def _kind(optimizer: Any) -> str:
    """The optimizer's class, behind accelerate's and DeepSpeed's; offloaded, its state is the same."""
    name = type(_innermost(optimizer)).__name__
    return "AdamW" if name == "DeepSpeedCPUAdam" else name


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _read_tensors(directory: Path) -> Iterator[tuple[str, str, Tensor]]:
    for path in sorted(directory.glob(_TENSORS.format(suffix="*"))):
        with safe_open(path, "pt") as file:
            for full_name in file.keys():  # noqa: SIM118
                key, _, name = full_name.partition("/")
                yield key, name, file.get_tensor(full_name)


def _describe(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
