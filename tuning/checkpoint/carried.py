"""What a result takes over from its base as it is: tensors that transformers does not load, and processors' files."""

import re
import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tuning.errors import explain_bad_files

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


def copy_processors(base: Path, out: Path) -> None:
    """Copy the files of image and video processors."""
    for name in _PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copy2(base / name, out / name)
