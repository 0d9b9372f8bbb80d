"""Results on disk: a directory with a valid manifest is complete, one without is not."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuning.checkpoint.adapter import adapter_config, adapter_state
from tuning.checkpoint.base import BaseModel
from tuning.checkpoint.carried import copy_processors, list_kept_names, read_carried_tensors, read_kept_tensors
from tuning.checkpoint.files import write_json
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.older_readers import add_old_names
from tuning.checkpoint.run_record import RunFacts
from tuning.console import is_rank_0
from tuning.distributed.sharding import gather_tensor
from tuning.model.training_model import TrainingModel


class ResultWriter:
    """Writes what was trained so that it stops, serves and loads everywhere.

    base: recorded with the result; a full model's weights are written in its compute_dtype, adapters in float32.
    facts: what else the manifest says of the run.
    """

    def __init__(
        self,
        training_model: TrainingModel,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        *,
        base: BaseModel,
        facts: RunFacts,
    ):
        self._model = training_model
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._base, self._base_directory = base.identity, Path(base.identity["path"])
        self._dtype = base.compute_dtype
        self._facts = facts

    def seal(self, directory: Path, *, step: int) -> None:
        """Write the manifest, with which a directory is complete."""
        write_manifest(directory, step=step, base_model=self._base, **vars(self._facts))

    def collect(self) -> dict[str, torch.Tensor]:
        """What is to be written, on rank 0; nothing on other ranks. All must call this.

        Only what is written: of LoRA training the adapter, never the model it adapts.
        """
        if hasattr(self._model.model, "peft_config"):
            return gather_state(adapter_state(self._model.model, self._model.token_rows), None)
        return gather_full_state(self._model.causal_lm, self._dtype)

    def write(self, directory: Path, collected: dict[str, torch.Tensor]) -> None:
        """Write adapter or model, tokenizer with chat template and generation config."""
        self._tokenizer.save_pretrained(directory)
        add_old_names(directory)
        if hasattr(self._model.model, "peft_config"):
            config = adapter_config(self._model.model, self._model.token_rows)
            config.base_model_name_or_path, config.revision = self._base["name"], self._base["revision"]
            # Whole tied matrices are one tensor under two names; peft asks for both when it loads.
            state = {name: tensor.clone().contiguous() for name, tensor in collected.items()}
            save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
            # Loaders look for the configuration first: with it last, a torn save is no adapter to anyone.
            config.save_pretrained(str(directory))
        else:
            save_full_model(self._model.causal_lm, self._base_directory, directory, collected, dtype=self._dtype)
        self._generation_config.save_pretrained(directory)


def gather_full_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What was trained of a model, for save_full_model, on rank 0; nothing on other ranks. All must call this."""
    kept = list_kept_names(model)
    named = model.state_dict(keep_vars=True)
    return gather_state({name: tensor for name, tensor in named.items() if name not in kept}, dtype)


def gather_state(named: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU of rank 0, cast to a dtype; nothing on other ranks. All processes must call this.

    A tied matrix stays one tensor under its names.
    """
    gathered: dict[int, torch.Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in gathered:
            value = gather_tensor(tensor)
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            gathered[id(tensor)] = value.cpu() if is_rank_0() else value.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if is_rank_0() else {}


def save_full_model(
    model: PreTrainedModel,
    base: Path,
    directory: Path,
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
) -> None:
    """Write a model's safetensors and config.json, and what the base's directory holds beside.

    state: what was trained, by the names of its state_dict, in dtype; a tied matrix is one tensor under its names. The
    rest is the base's, as its files have it.
    """
    state = {**read_carried_tensors(model, base), **read_kept_tensors(model, base), **state}
    model.save_pretrained(directory, state_dict=state, max_shard_size="5GB")
    copy_processors(base, directory)
    # save_pretrained writes the dtype of the model in memory; loaders take the file's word for it.
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    add_old_names(directory)
