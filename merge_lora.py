"""Merge an adapter into its base model: python merge_lora.py ADAPTER OUT.

Writes a standalone checkpoint and checks that it gives the adapter's logits.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from data_utils.sources import DataError
from data_utils.tokenizer import load_tokenizer
from tuning import merge
from tuning.adapters import read_adapter
from tuning.args import SettingsError
from tuning.model import load_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> None:
    """Merge, save, verify. Raises: DataError, SettingsError: the user's mistakes, or a merge that does not verify."""
    args = build_parser().parse_args(argv)
    adapter, out = Path(args.adapter), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.overwrite:
        raise SettingsError(f"{out}: exists and is not empty; choose another directory, or --overwrite deletes it")
    read_adapter(adapter)
    tokenizer = load_tokenizer(str(adapter))
    wanted = "auto" if args.dtype == "auto" else DTYPES[args.dtype]
    training_model, base = merge.load_adapter_model(
        adapter, args.base, dtype=wanted, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    if out.resolve() in (adapter.resolve(), Path(base).resolve()):
        raise SettingsError(f"{out}: is an input of this merge; choose another directory")
    dtype = training_model.causal_lm.dtype
    probes = merge.build_probes(tokenizer)
    expected = None if args.no_verify else merge.compute_probe_logits(training_model.causal_lm, probes)
    model = merge.merge_weights(training_model)
    if out.exists():
        shutil.rmtree(out)
    merge.save_merged(model, adapter, base, out, dtype=dtype, max_shard_size=args.max_shard_size)
    if expected is None:
        print(f"merged, not verified: {out}")
        return
    del model, training_model
    saved = load_model(str(out), dtype=dtype, trust_remote_code=args.trust_remote_code).eval()
    comparison = merge.compare_logits(expected, merge.compute_probe_logits(saved, probes))
    tolerance = merge.TOLERANCES[dtype]
    if not comparison.max_difference <= tolerance * max(1.0, comparison.max_logit):
        shutil.rmtree(out)
        raise SettingsError(
            f"the merged model differs from the adapter by more than {tolerance:g} of the largest logit: "
            f"{comparison.describe()}; {out} was removed. Merge with --dtype fp32, or use the adapter unmerged"
        )
    print(f"merge verified: {comparison.describe()}")
    print(f"merged: {out} ({str(dtype).removeprefix('torch.')})")


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", help="output directory of a LoRA run, or one of its checkpoints")
    parser.add_argument("out", help="directory for the merged model; absent or empty")
    parser.add_argument("--base", help="base model (default: the one the adapter names)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the result (auto: the base's)")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file")
    parser.add_argument("--no-verify", action="store_true", help="skip the check of the merged logits")
    parser.add_argument("--overwrite", action="store_true", help="delete OUT first")
    parser.add_argument("--cache_dir", help="where hub downloads are kept")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return parser


if __name__ == "__main__":
    try:
        main()
    except (DataError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
