"""Standalone model -> GPTQ checkpoint, measured before and after."""

import argparse
import math
import random
import shutil
import time
from pathlib import Path

import torch

from commands.loading import keep_system_message
from commands.original import find_loadable
from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tuning.checkpoint import gptq
from tuning.checkpoint.adapter_base import copy_tokenizer
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.output_directory import check_result_directory
from tuning.checkpoint.ownership import new_result
from tuning.errors import SettingsError
from tuning.model.loading import Trust, find_quantization, load_model, local_directory
from tuning.model.lora_experts import find_experts

_HELD_BACK = 64  # rows to measure on, or a fifth of all


def run(args: argparse.Namespace) -> None:
    """Measure, quantise, load again, measure. args: of quantize.py.

    Raises: DataError, SettingsError: the user's mistakes, or no result.
    """
    out, allow = Path(args.out), Trust(args.trust_remote_code, args.allow_pickle)
    trust = args.trust_remote_code
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = find_loadable(args.model, args.cache_dir, allow_pickle=args.allow_pickle)
    try:
        path = local_directory(found, args.cache_dir)
    except (OSError, ValueError):
        raise SettingsError(f"{args.model}: no such model") from None

    def check() -> None:
        check_result_directory(out, [path, *map(Path, args.data)], overwrite=args.overwrite, mark="quantized_from")

    check()
    if own := find_quantization(str(path), cache_dir=None, trust_remote_code=trust):
        raise SettingsError(f"{path}: is quantised already ({own.describe()})")
    if not (path / "config.json").is_file():
        raise SettingsError(f"{path}: no config.json, so no model; an adapter is merged first (merge_lora.py)")
    meta_model = load_model(str(path), dtype="auto", meta=True, trust_remote_code=trust)
    if experts := find_experts(meta_model):
        raise SettingsError(
            f"{path}: a mixture of experts: transformers keeps the weights of {next(iter(experts))} as 3-D parameters, "
            "and could not load them again once they are quantised"
        )
    gptq.check_group_size(meta_model, args.group_size)
    tokenizer = load_tokenizer(str(path), trust_remote_code=trust)
    options = DataOptions(max_length=args.model_max_length)
    rows, account = load_rows(args.data, ChatTemplate(tokenizer), options)
    print("data: " + account.describe()[0])
    chosen = random.Random(args.seed).sample(range(len(rows)), min(len(rows), args.num_rows + _HELD_BACK))
    examples = [rows[index][:2] for index in chosen]
    num_held_back = min(_HELD_BACK, len(examples) // 5)
    if not num_held_back:
        raise SettingsError(f"--data: {len(rows)} rows; at least 5 are needed, to calibrate on and to measure on")
    held_back, calibration = examples[:num_held_back], examples[num_held_back:]

    started = time.perf_counter()
    with new_result(out, check=check) as unfinished:
        model = load_model(str(path), dtype="auto", **vars(allow)).to(device)
        before = gptq.measure_perplexity(model, held_back)
        del model
        if not math.isfinite(before):
            raise SettingsError(f"{path}: its perplexity is {before}, so its weights are damaged: copy them again")
        print(f"quantising to {args.bits} bits, calibrated on {len(calibration):,} rows; large models take long")
        gptq.quantize_gptq(
            path,
            unfinished,
            [input_ids.tolist() for input_ids, _ in calibration],
            bits=args.bits,
            group_size=args.group_size,
            device=device,
            trust=allow,
        )
        copy_tokenizer(path, unfinished)
        for file in [*path.glob("generation_config.json"), *(path.glob("*.py") if trust else ())]:
            shutil.copy2(file, unfinished / file.name)
        model = load_model(str(unfinished), dtype="auto", device=device, trust_remote_code=trust).to(device)
        after = gptq.measure_perplexity(model, held_back)
        if not math.isfinite(after):
            raise SettingsError(f"{out}: the quantised model's perplexity is {after}, so it is of no use; try --bits 8")
        measured = {"before": before, "after": after}
        write_manifest(unfinished, quantized_from=str(path), perplexity=measured, **keep_system_message(path))
    print(f"perplexity of {len(held_back):,} held-back rows: before {before:.3f}, after {after:.3f}")
    print(f"quantised: {out} ({time.perf_counter() - started:.0f} s)")
