"""Quantise a model with GPTQ: python quantize.py MODEL OUT --data DATA.

Calibrates on conversations rendered as in training, and prints the perplexity of held-back ones before and after.
"""

import argparse

from commands.paths import find_model
from data_utils.hub_data import find_data
from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_hub_flag, add_trust_flags, run_entry
from tuning.errors import SettingsError

_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # gptqmodel's


def main(argv: list[str] | None = None) -> None:
    """Measure, quantise, load again, measure. Raises: DataError, SettingsError: the user's mistakes, or no result."""
    args = build_parser().parse_args(argv)
    if args.num_rows < 1 or args.model_max_length < 2:
        raise SettingsError("--num_rows: must be at least 1, and --model_max_length at least 2")
    args.model = find_model(args.model, args.hub, args.cache_dir, allow_pickle=args.allow_pickle)
    find_data(args.data)
    from commands import quantize  # torch and transformers, once nothing is left to say without them

    quantize.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("model", help="a standalone model: of full training, or merged")
    parser.add_argument("out", help="directory for the quantised model; absent or empty")
    parser.add_argument("--data", nargs="+", required=True, help="conversations to calibrate and to measure on")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="bits a weight (default 4)")
    parser.add_argument(
        "--group_size",
        type=int,
        default=128,
        choices=_GROUP_SIZES,
        help="input channels that share a scale (default 128); -1: all",
    )
    parser.add_argument("--num_rows", type=int, default=256, help="rows to calibrate on, at most (default 256)")
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens a row may have (default 2048)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of rows (default 42)")
    parser.add_argument("--overwrite", action="store_true", help="delete OUT first")
    parser.add_argument("--cache_dir", help="where hub downloads are kept")
    add_hub_flag(parser)
    add_trust_flags(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted: nothing was quantised")


if __name__ == "__main__":
    run_script()
