"""A checkpoint -> a GGUF file, by llama.cpp's converter."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from inference.pre_tokenizer import find_pre_tokenizer
from tuning.checkpoint.tensor_files import list_tensors
from tuning.errors import MachineError, SettingsError, read_json_object

_PROGRAM = Path(__file__).parent / "run_converter.py"
_LINKED = (".safetensors", ".json", ".txt", ".model")
_DESCRIPTIONS = ("config.json", "tokenizer_config.json")
_WITH_MTP = ("qwen3_next", "qwen3_5")
_SHADOWED = ("chat_template.json", "chat_template.jinja")


def convert(
    checkpoint: Path, file: Path, *, dtype: str, tokenizer: PreTrainedTokenizerBase, name: str, llama_cpp: Path
) -> None:
    """Write a GGUF file of a checkpoint. dtype: of the converter's, not auto. llama_cpp: directory of the converter.

    Raises: SettingsError: the converter refuses the checkpoint. MachineError: no room for the file.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as directory:
        stage(checkpoint, tokenizer, Path(directory))
        words = [directory, "--outfile", str(file), "--outtype", dtype, "--model-name", name]
        words += ["--no-mtp"] if lacks_mtp(checkpoint) else []
        done = subprocess.run(
            [sys.executable, str(_PROGRAM), str(llama_cpp), find_pre_tokenizer(tokenizer) or "", *words],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode == 0 and file.is_file():
        return
    if "No space left on device" in done.stderr:
        raise MachineError(f"{file}: could not be written: No space left on device; make room, then run it again")
    why = find_reason(done.stderr).replace(directory, str(checkpoint))
    raise SettingsError(f"{checkpoint}: llama.cpp's converter ({llama_cpp}) fails: {why}")


def stage(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Fill a directory with what the converter reads: no code, no pickles, and the chat template that is used here.

    A few of its classes load tokenizers with trust_remote_code: without auto_map there is no code to find.
    """
    for path in checkpoint.iterdir():
        if path.suffix in _LINKED and path.name not in (*_DESCRIPTIONS, *_SHADOWED):
            (directory / path.name).symlink_to(path.resolve())
    for name in _DESCRIPTIONS:
        values = read_json_object(checkpoint / name) if (checkpoint / name).is_file() else {}
        for key in ("auto_map", "chat_template"):
            values.pop(key, None)
        if name == "tokenizer_config.json":
            values.setdefault("add_bos_token", False)  # for gguf_file.set_ends to be written at all
        (directory / name).write_text(json.dumps(values), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(tokenizer.get_chat_template(), encoding="utf-8")


def lacks_mtp(checkpoint: Path) -> bool:
    """Whether a Qwen3-Next or Qwen3.5 is without the layers that predict further tokens: the converter expects them."""
    model_type = str(read_json_object(checkpoint / "config.json").get("model_type"))
    return model_type.startswith(_WITH_MTP) and not any(name.startswith("mtp.") for name in list_tensors(checkpoint))


def find_reason(log: str) -> str:
    """The line of the converter's log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip(" ^~")]
    errors = [i for i, line in enumerate(lines) if re.match(r"ERROR:|[\w.]*(Error|Exception)\b", line)]
    at = errors[-1] if errors else -1
    if not lines:
        return "it says nothing"
    if "BPE pre-tokenizer was not recognized" in lines[at]:
        return "it does not know how this tokenizer splits text (BPE pre-tokenizer was not recognized)"
    if lines[at] == "AssertionError" and len(lines) > 1:
        return f"{lines[at]}: {lines[at - 1]}"
    return lines[at].removeprefix("ERROR:hf-to-gguf:")
