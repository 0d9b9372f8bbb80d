"""What a result takes over from its base as it is: tensors that transformers does not load, and processors' files."""

import re
import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tuning.checkpoint.base_tensors import BaseTensors
from tuning.errors import explain_bad_files
from tuning.model.loading import load_model
from tuning.model.other_parts import find_other_parts

_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def read_carried_tensors(model: PreTrainedModel, base: Path) -> dict[str, Tensor]:
    """Tensors of a base's files that its class passes by when it loads (`mtp.*`), with their names there."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    carried = {}
    for file in sorted(base.glob("*.safetensors")) if patterns else []:
        with explain_bad_files(f"{file}: cannot be read; copy it again"), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if any(re.search(pattern, name) for pattern in patterns):
                    carried[name] = opened.get_tensor(name)
    return carried


def list_kept_names(model: PreTrainedModel) -> set[str]:
    """Names of what is beside the language model (a vision tower), which no training touches."""
    parts = find_other_parts(model)
    return {f"{part}.{name}" for part, module in parts.items() for name in module.state_dict(keep_vars=True)}


def read_kept_tensors(model: PreTrainedModel, base: Path) -> dict[str, Tensor]:
    """These tensors as the base's files have them: in memory they may have another dtype, or be sharded."""
    if not (names := list_kept_names(model)):
        return {}
    tensors = BaseTensors(load_model(str(base), dtype="auto", meta=True), base)
    return {name: tensors.read(name, None) for name in sorted(names)}


def copy_processors(base: Path, out: Path) -> None:
    """Copy the files of image and video processors."""
    for name in _PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copy2(base / name, out / name)
