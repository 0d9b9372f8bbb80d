"""Merge an adapter into its base model: python merge_lora.py ADAPTER OUT.

Writes a standalone checkpoint and checks that it gives the adapter's logits.
"""

import argparse
import re

from commands.paths import find_adapter_base
from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_hub_flag, add_trust_flags, run_entry
from tuning.errors import SettingsError


def main(argv: list[str] | None = None) -> None:
    """Merge, save, verify. Raises: DataError, SettingsError: the user's mistakes, or a merge that does not verify."""
    args = build_parser().parse_args(argv)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", args.max_shard_size):
        raise SettingsError(f"--max_shard_size {args.max_shard_size}: expected a size such as 5GB or 500MB")
    args.base = find_adapter_base(args.adapter, args.base, args.hub, args.cache_dir, allow_pickle=args.allow_pickle)
    from commands import merge  # torch and transformers, once nothing is left to say without them

    merge.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", help="output directory of a LoRA run, or one of its checkpoints")
    parser.add_argument("out", help="directory for the merged model; absent or empty")
    parser.add_argument("--base", help="base model (default: the one the adapter names)")
    parser.add_argument(
        "--onto",
        choices=["dequantized", "base"],
        help="of a Q-LoRA adapter: the weights it was trained on, dequantised (default), or the unquantised base",
    )
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="of the result (auto: the base's)"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file")
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
