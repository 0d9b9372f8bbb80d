"""Standalone model -> GPTQ checkpoint, calibrated on rows as they are rendered in training."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from tuning.checkpoint.files import write_json
from tuning.errors import SettingsError
from tuning.messages import first_line
from tuning.model.loading import Trust, load_model
from tuning.model.quantization import require, silence_gptqmodel
from tuning.model.untrusted import copy_without_code


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, rows: Sequence[tuple[Any, Any]]) -> float:
    """Exp of the mean loss of the supervised tokens, row by row.

    rows: (input_ids, labels), NumPy int64 of equal length; labels are -100 where not supervised.
    """
    total, count = 0.0, 0
    device = model.get_input_embeddings().weight.device
    for input_ids, labels in (map(torch.from_numpy, row) for row in rows):
        logits = model.eval()(input_ids=input_ids[None].to(device)).logits[0, :-1].float().cpu()
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] >= 0).sum())
    return math.exp(total / count)


def check_group_size(model: PreTrainedModel, group_size: int) -> None:
    """Raises: SettingsError: a layer whose input channels do not fall into groups of that size."""
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        quantises = isinstance(module, nn.Linear) and module is not output
        if quantises and group_size > 0 and module.in_features % group_size:
            raise SettingsError(
                f"--group_size {group_size}: {name} has {module.in_features} input channels, which it does not divide; "
                "choose a smaller one that does, or -1 (one group)"
            )


def quantize_gptq(
    path: Path,
    out: Path,
    calibration: list[list[int]],
    *,
    bits: int,
    group_size: int,
    device: torch.device,
    trust: Trust,
) -> None:
    """Write a GPTQ checkpoint's weights and config.json by gptqmodel.

    calibration: token ids of each row.

    Raises: SettingsError: gptqmodel cannot do it.
    """
    path, out = path.resolve(), out.resolve()
    rows: list[dict[str, Any]] = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
    with silence_gptqmodel(), _elsewhere():
        require("gptqmodel", "optimum")
        from gptqmodel import GPTQModel, QuantizeConfig

        try:
            # Its default way of packing compiles an extension, for half a minute. Groups of all channels cannot be
            # put in the order of their activations.
            config = QuantizeConfig(
                bits=bits, group_size=group_size, pack_impl="original", act_group_aware=group_size > 0
            )
            source = _prepare_source(path, Path("source").resolve(), trust)
            model = GPTQModel.load(str(source), config, device=str(device), trust_remote_code=trust.trust_remote_code)
            model.quantize(rows, batch_size=1)
            model.save(str(out))
        except Exception as error:  # it supports some architectures, and says it in many ways
            raise SettingsError(f"{path}: gptqmodel cannot quantise it: {first_line(error)}") from error
    for name in ("quant_log.csv", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).unlink(missing_ok=True)  # a log, and copies that it changes
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((out / name).read_text(encoding="utf-8"))
        values.get("quantization_config", values).get("meta", {}).pop("offload_to_disk_path", None)  # of this machine
        write_json(out / name, values)


def _prepare_source(path: Path, copy: Path, trust: Trust) -> Path:
    """The directory that gptqmodel is given: it imports what auto_map names by itself, whatever it is told."""
    if trust.trust_remote_code:
        return path
    copy_without_code(path, copy)
    if not any(copy.glob("*.safetensors")):  # pickles, which gptqmodel need not read
        load_model(str(path), dtype="auto", **vars(trust)).save_pretrained(copy)
    return copy


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Gptqmodel writes logs into the working directory, and on few cores asks for more threads than it has."""
    before = os.getcwd()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    with tempfile.TemporaryDirectory(prefix="quantize-") as directory:
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)
