"""Convert an original Qwen checkpoint: python -m tuning.convert SOURCE OUT.

SOURCE is a directory of Qwen-1.8B, 7B, 14B or 72B (base, -Chat, -Chat-Int4, -Chat-Int8) of 2023. OUT gets the same
weights as a Qwen2 model with a fast tokenizer, which transformers loads without the checkpoint's code. The other
scripts take SOURCE as it is, and convert it by themselves.
"""

import argparse

from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_pickle_flag, run_entry


def main(argv: list[str] | None = None) -> None:
    """Convert. Raises: DataError, SettingsError: the user's mistakes."""
    args = build_parser().parse_args(argv)
    from commands import convert  # torch and transformers, once nothing is left to say without them

    convert.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="python -m tuning.convert", description=__doc__)
    parser.add_argument("source", help="directory of the original checkpoint, with qwen.tiktoken")
    parser.add_argument("out", help="directory for the converted model; absent or empty")
    parser.add_argument("--overwrite", action="store_true", help="delete OUT first")
    add_pickle_flag(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted: nothing was converted")


if __name__ == "__main__":
    run_script()
