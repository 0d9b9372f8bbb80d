"""Merge an adapter into its base model: python merge_lora.py ADAPTER OUT.

Writes a standalone checkpoint, a tensor at a time, and checks that it gives the adapter's logits. Several adapters of
one base are added up by their weights: python merge_lora.py OUT --adapter A:0.7 B:0.3.
"""

import argparse
import math
import re
from pathlib import Path

from commands.paths import find_adapter_base
from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_hub_flag, add_trust_flags, run_entry
from tuning.errors import SettingsError

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def main(argv: list[str] | None = None) -> None:
    """Merge, save, verify. Raises: DataError, SettingsError: the user's mistakes, or a merge that does not verify."""
    args = build_parser().parse_args(argv)
    args.max_shard_size = None if args.max_shard_size is None else read_size(args.max_shard_size)
    if (args.one is None) == (args.adapter is None):
        raise SettingsError("name ADAPTER and OUT, or OUT and --adapter A:0.7 B:0.3 behind it; see --help")
    args.adapters = [(args.one, 1.0)] if args.adapter is None else [read_weight(text) for text in args.adapter]
    directories = [Path(path).resolve() for path, _ in args.adapters]
    if twice := next((path for path in directories if directories.count(path) > 1), None):
        raise SettingsError(f"--adapter {twice}: is named twice; name it once, with the sum of the weights")
    args.bases = [
        find_adapter_base(path, args.base, args.hub, args.cache_dir, allow_pickle=args.allow_pickle)
        for path, _ in args.adapters
    ]
    from commands import merge  # torch and transformers, once nothing is left to say without them

    merge.run(args)


def read_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MiB. Raises: SettingsError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?)B", text)
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise SettingsError(f"--max_shard_size {text}: expected a size such as 5GB or 500MB")
    return size


def read_weight(text: str) -> tuple[str, float]:
    """Path and weight of PATH:WEIGHT. Raises: SettingsError."""
    path, colon, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not colon or not path or not math.isfinite(value):
        raise SettingsError(f"--adapter {text}: expected a directory and a weight, such as output/a:0.7")
    return path, value


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("one", metavar="ADAPTER", nargs="?", help="output directory of a LoRA run, or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory for the merged model; absent or empty")
    parser.add_argument(
        "--adapter", metavar="PATH:WEIGHT", nargs="+", help="several adapters of one base, added up by their weights"
    )
    parser.add_argument("--base", help="base model (default: the one the adapter names)")
    parser.add_argument(
        "--onto",
        choices=["dequantized", "base"],
        help="of a Q-LoRA adapter: the weights it was trained on, dequantised (default), or the unquantised base",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="of the result (auto: as in the base's files)",
    )
    parser.add_argument("--max_shard_size", help="largest weights file, such as 5GB (default: files as the base's)")
    parser.add_argument("--no-verify", action="store_true", help="skip the check of the merged logits")
    parser.add_argument("--overwrite", action="store_true", help="delete OUT first")
    parser.add_argument("--cache_dir", help="where hub downloads are kept")
    add_hub_flag(parser)
    add_trust_flags(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted: nothing was merged")


if __name__ == "__main__":
    run_script()
