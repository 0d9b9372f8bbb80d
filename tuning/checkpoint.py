"""Results on disk: a directory with a valid manifest is complete, one without is not."""

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuning.adapters import adapter_config, adapter_state
from tuning.errors import SettingsError
from tuning.model import TrainingModel, list_eos_ids
from tuning.processes import is_first_process
from tuning.record import MANIFEST_FILE, METRICS_FILE, RUN_FILE, replace_file, write_json, write_manifest
from tuning.sharding import whole
from tuning.token_rows import TokenRows

PLAN_FILE = "plan.json"  # of a dry run; a run may begin beside it
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Not run.json: the new one takes its place, so that a directory never holds files of a run without it.
_RUN_FILES = (MANIFEST_FILE, METRICS_FILE, PLAN_FILE, "adapter_config.json", "config.json")


class ResultWriter:
    """Writes what was trained so that it stops, serves and loads everywhere.

    base: path and fingerprint of the base model (model.identify_checkpoint), recorded with the result.
    dtype: of a full model's weights on disk; adapters are float32.
    facts: what else the manifest says of the run.
    """

    def __init__(
        self,
        training_model: TrainingModel,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        *,
        base: dict[str, str],
        dtype: torch.dtype,
        facts: dict[str, Any],
    ):
        self._model = training_model
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._base = base
        self._dtype = dtype
        self._facts = facts

    def seal(self, directory: Path, *, step: int) -> None:
        """Write the manifest, with which a directory is complete."""
        write_manifest(directory, step=step, base_model=self._base, **self._facts)

    def collect(self) -> dict[str, torch.Tensor]:
        """What is to be written, on the first process; nothing on others, all of which must call this.

        Only what is written: of LoRA training the adapter, never the model it adapts.
        """
        if hasattr(self._model.model, "peft_config"):
            return gather_state(adapter_state(self._model.model, self._rows), None)
        return gather_state(self._model.causal_lm.state_dict(keep_vars=True), self._dtype)

    @property
    def _rows(self) -> TokenRows | None:
        rows = self._model.token_rows
        assert rows is None or isinstance(rows, TokenRows)
        return rows

    def write(self, directory: Path, collected: dict[str, torch.Tensor]) -> None:
        """Write adapter or model, tokenizer with chat template and generation config."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        self._tokenizer.save_pretrained(directory)
        if hasattr(self._model.model, "peft_config"):
            config = adapter_config(self._model.model, self._rows)
            config.base_model_name_or_path = self._base["path"]
            # Whole tied matrices are one tensor under two names; peft asks for both when it loads.
            state = {name: tensor.clone().contiguous() for name, tensor in collected.items()}
            save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
            # Loaders look for the configuration first: with it last, a torn save is no adapter to anyone.
            config.save_pretrained(str(directory))
        else:
            save_full_model(self._model.causal_lm, directory, collected, dtype=self._dtype)
        self._generation_config.save_pretrained(directory)


def gather_state(named: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Full values on the CPU of the first process, cast to a dtype; nothing on others. All processes must call this.

    A tied matrix stays one tensor under its names.
    """
    gathered: dict[int, torch.Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in gathered:
            value = whole(tensor)
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            gathered[id(tensor)] = value.cpu() if is_first_process() else value.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if is_first_process() else {}


def save_full_model(
    model: PreTrainedModel,
    directory: Path,
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model's safetensors and config.json.

    state: by the names of its state_dict, in dtype; a tied matrix is one tensor under its names.
    """
    model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    # save_pretrained writes the dtype of the model in memory; loaders take the file's word for it.
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def align_stop_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stop_id: int, is_base: bool
) -> GenerationConfig:
    """Make the saved result stop on the token it was trained to stop on. Returns its generation config.

    The stop token comes first in eos_token_id; what the checkpoint had stays. A base model's tokenizer and config
    take it as their eos token too: converters and servers read it from there.
    """
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    others = list_eos_ids(config)
    ids = [stop_id, *(token_id for token_id in others if token_id != stop_id)]
    config.eos_token_id = ids if len(ids) > 1 else stop_id
    if tokenizer.pad_token_id is None or (is_base and tokenizer.pad_token_id == stop_id):
        tokenizer.pad_token_id = others[0] if others else stop_id
    config.pad_token_id = tokenizer.pad_token_id
    if is_base:
        eos_token, rendered = tokenizer.eos_token, _render_probe(tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_id)
        if _render_probe(tokenizer) != rendered:  # a template that writes {{ eos_token }} would say something else
            tokenizer.eos_token = eos_token
        model.config.get_text_config().eos_token_id = stop_id
    if not config.do_sample:
        for name in _SAMPLING:  # void without sampling, and transformers refuses to save them
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise SettingsError(f"the checkpoint's generation_config.json cannot be saved again: {error}") from None
    model.generation_config = config
    return config


def _render_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q"},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_output_directory(directory: Path, *, overwrite: bool, resume: bool, inputs: list[str]) -> None:
    """Refuse a directory that holds anything but an earlier run that may be deleted or gone on with.

    Raises: SettingsError.
    """
    if holder := next((path for path in inputs if lies_in(Path(path), directory)), None):
        raise SettingsError(f"--output_dir {directory}: {holder} is an input of this run; choose another directory")
    check_writable(directory, "--output_dir")
    found = [p.name for p in directory.iterdir() if not _is_temporary(p)] if directory.exists() else []
    found = [name for name in found if name != PLAN_FILE]
    if not found:
        return
    if not (directory / RUN_FILE).is_file():
        raise SettingsError(
            f"--output_dir {directory}: is not empty ({found[0]}) and holds no run; choose another directory"
        )
    if not overwrite and not resume:
        raise SettingsError(
            f"--output_dir {directory}: holds another run ({RUN_FILE}); choose another directory, or "
            "--resume_from_checkpoint auto goes on with that run, or --overwrite_output_dir deletes it"
        )


def holds_results(directory: Path) -> bool:
    """Whether a complete result or checkpoint may be in a directory."""
    return any((path / MANIFEST_FILE).is_file() for path in (directory, *list_checkpoints(directory)))


def check_writable(directory: Path, flag: str) -> None:
    """Raises: SettingsError: no directory can be made or written to there."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise SettingsError(
            f"{flag} {directory}: {'' if existing == directory.absolute() else f'{existing} '}is a file"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"{flag} {directory}: cannot be written to ({existing} is read-only)")


def lies_in(path: Path, directory: Path) -> bool:
    """Whether path is the directory or something inside it."""
    return directory.resolve() in (path.resolve(), *path.resolve().parents)


def prepare_output_directory(directory: Path, *, overwrite: bool, checkpoint: Path | None) -> None:
    """Make the directory; go on from a checkpoint's metrics, or delete an earlier run. Anything else in it stays."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            (directory / MANIFEST_FILE).unlink(missing_ok=True)  # what is there is about to be replaced
            metrics = checkpoint / METRICS_FILE
            replace_file(directory / METRICS_FILE, metrics.read_bytes() if metrics.exists() else b"")
    except OSError as error:
        raise SettingsError(f"--output_dir {directory}: cannot be written to: {error.strerror}") from None
    if not overwrite:
        return
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    for path in [*_run_files(directory), *weights, *filter(_is_temporary, directory.iterdir())]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """checkpoint-N directories, oldest step first."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.partition("-")[2])


def rotate_checkpoints(newest: Path, limit: int | None, *, keep: Path | None) -> None:
    """Delete the checkpoints beyond a limit, and what is left of torn ones.

    newest: what was just saved, and is complete. Later ones are of no account: the run passed them over.
    keep: a checkpoint that stays whatever its age.
    """
    if limit is None:
        return
    until_now = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    complete = [path for path in until_now if (path / MANIFEST_FILE).is_file()]
    kept = {path.resolve() for path in [*complete[-limit:], *([keep] if keep else [])]}
    for path in until_now:
        if path.resolve() not in kept:
            remove_checkpoint(path)


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, its manifest first: a deletion that is cut short leaves nothing that looks complete."""
    with contextlib.suppress(OSError):
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _run_files(directory: Path) -> list[Path]:
    named = [directory / name for name in _RUN_FILES if (directory / name).exists()]
    return named + list_checkpoints(directory)
