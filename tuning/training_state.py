"""What training needs to go on to the bit, beside what it saves for users: exact weights, optimizer, counters.

    training_state*.safetensors   "weight/NAME" and "KEY/NAME": every trained parameter and its optimizer's tensors
    training_state.json           the optimizer's plain values, the scheduler, the loss scale, counters

Keyed by parameter name, so that they do not depend on the order of parameters or the number of processes.
Hyperparameters are not in them: those are the settings' business.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from tuning.errors import SettingsError
from tuning.record import write_json

STATE_FILE = "training_state.json"
_TENSORS = "training_state{suffix}.safetensors"
_WEIGHT = "weight"


def save_training_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write the trained parameters and the optimizer's state as they are, and counters (JSON values).

    Raises: SettingsError: an optimizer whose state is not made of tensors and plain values.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__  # behind accelerate's
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"{_WEIGHT}/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if type(value) is Tensor:
                # One tensor of several parameters (the tables of 8-bit optimizers) would be written for one of them.
                tensors[f"{key}/{name}"] = value.clone() if value.data_ptr() in stored else value
                stored.add(value.data_ptr())
            elif value is None or isinstance(value, bool | int | float | str):
                plain.setdefault(name, {})[key] = value
            else:
                raise SettingsError(
                    f"--optim: {kind} keeps a {type(value).__name__} that cannot be saved exactly; "
                    "use adamw_torch, or --save_only_model True (checkpoints without resuming)"
                )
    save_torch_state_dict(tensors, directory, filename_pattern=_TENSORS, metadata={"format": "pt"})
    write_json(directory / STATE_FILE, {**counters, "optimizer_kind": kind, "optimizer": plain})


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
        if parameter is None or parameter.shape != value.shape or parameter.dtype != value.dtype:
            here = "no such trained parameter" if parameter is None else _describe(parameter)
            raise SettingsError(f"{directory}: holds {name} ({_describe(value)}); this run has {here}")
        parameter.copy_(value)
    if missing:
        raise SettingsError(f"{directory}: lacks {next(iter(missing))}, which this run trains")


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved state into a fresh optimizer of the same model.

    Raises: SettingsError: it is the state of another kind of optimizer.
    """
    kind, saved = type(getattr(optimizer, "optimizer", optimizer)).__name__, read_counters(directory)
    if kind != saved["optimizer_kind"]:
        raise SettingsError(
            f"{directory}: holds the state of {saved['optimizer_kind']}, and this run has {kind}; "
            "give it the same --optim"
        )
    # Not load_state_dict: it casts to the parameter's dtype, which loses what Adafactor keeps in float32.
    parameters = trained_parameters(model)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, values in saved["optimizer"].items():
        optimizer.state[parameters[name]].update(values)
    for key, name, value in _read_tensors(directory):
        if key == _WEIGHT:
            continue
        parameter = parameters[name]
        group = groups[parameter]
        stays = key == "step" and not (group.get("capturable") or group.get("fused"))  # torch's own rule for steps
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _read_tensors(directory: Path) -> Iterator[tuple[str, str, Tensor]]:
    for path in sorted(directory.glob(_TENSORS.format(suffix="*"))):
        with safe_open(path, "pt") as file:
            for full_name in file.keys():  # noqa: SIM118
                key, _, name = full_name.partition("/")
                yield key, name, file.get_tensor(full_name)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
