"""Talk to a model: python chat.py MODEL, where MODEL is a merged model or an adapter directory.

One answer with --prompt, many with --prompts FILE (a prompt a line; JSON lines come out).
"""

import argparse
from pathlib import Path

from commands.paths import find_adapter_base, find_model
from data_utils.sources import DataError, read_lines
from inference.decoding import read_setting
from tuning.entry import OneLineParser, add_hub_flag, add_trust_flags, run_entry
from tuning.errors import SettingsError


def main(argv: list[str] | None = None) -> None:
    """Answer once, many times, or in a conversation."""
    args = build_parser().parse_args(argv)
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise SettingsError("--batch_size and --max_new_tokens: must be at least 1")
    if args.temperature is not None:
        try:
            args.temperature = read_setting("temperature", args.temperature)
        except SettingsError as error:
            raise SettingsError(f"--temperature {args.temperature}: {error}") from None
    args.model = find_model(args.model, args.hub, allow_pickle=args.allow_pickle)
    if (Path(args.model) / "adapter_config.json").is_file():
        args.base = find_adapter_base(args.model, args.base, args.hub, allow_pickle=args.allow_pickle)
    prompts = read_lines(args.prompts) if args.prompts else []
    from commands import chat  # torch and transformers, once nothing is left to say without them

    chat.run(args, prompts)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="merged model, full model, or adapter directory")
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--prompt", help="one question; the answer goes to standard output")
    ask.add_argument("--prompts", metavar="FILE", help="a question a line; JSON lines go to standard output")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time with --prompts (default 8)")
    parser.add_argument("--system", help="system turn")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    parser.add_argument("--temperature", help="0: greedy; above, samples (default: the model's own)")
    parser.add_argument("--seed", type=int, help="random seed of sampled answers")
    parser.add_argument("--base", help="base model of an adapter (default: the one it names)")
    add_hub_flag(parser)
    add_trust_flags(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
