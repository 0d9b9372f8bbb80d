"""Talk to a model: python chat.py MODEL, where MODEL is a merged model or an adapter directory.

One answer with --prompt, many with --prompts FILE: a prompt a line, or whole conversations (.jsonl, .json, .parquet,
...). JSON lines come out. --raw continues a text without the chat template, as base models do.
"""

import argparse
from pathlib import Path

from commands.model_flags import add_model_flags, find_named_model
from commands.prompts import check_answers, describe_answers, read_prompts
from data_utils.sources import DataError
from inference.decoding import read_setting
from tuning.entry import OneLineParser, run_entry
from tuning.errors import SettingsError


def main(argv: list[str] | None = None) -> None:
    """Answer once, many times, or in a conversation."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    named = args.model
    find_named_model(args)
    prompts = read_prompts(args.prompts, raw=args.raw) if args.prompts else []
    if args.out and not check_answers(args, prompts, named):
        print(describe_answers(args, len(prompts)))
        return
    from commands import chat  # torch and transformers, once nothing is left to say without them

    chat.run(args, prompts)


def check_flags(args: argparse.Namespace) -> None:
    """Hold the flags against each other. Raises: SettingsError: one that would be ignored, or is out of its bounds."""
    if args.batch_size is not None and not args.prompts:
        raise SettingsError("--batch_size: only with --prompts")
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise SettingsError("--batch_size and --max_new_tokens: must be at least 1")
    if args.temperature is not None:
        try:
            args.temperature = read_setting("temperature", args.temperature)
        except SettingsError as error:
            raise SettingsError(f"--temperature {args.temperature}: {error}") from None
    if args.out and not args.prompts:
        raise SettingsError("--out: only with --prompts")
    for name in ("system", "tools", "tool_module"):
        if args.raw and getattr(args, name) is not None:
            raise SettingsError(f"--{name}: has no effect with --raw, which knows no turns")
    if args.tool_module and (args.prompt is not None or args.prompts):
        raise SettingsError("--tool_module: only in a conversation, where you are asked before a tool runs")
    for name in ("tools", "tool_module"):
        if (file := getattr(args, name)) is not None and not Path(file).is_file():
            raise SettingsError(f"--{name} {file}: no such file")


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(description=__doc__)
    add_model_flags(parser)
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--prompt", help="one question; the answer goes to standard output")
    ask.add_argument("--prompts", metavar="FILE", help="many questions; JSON lines go to standard output, or --out")
    parser.add_argument("--out", metavar="FILE", help="of --prompts; if some answers are in it, the rest is added")
    parser.add_argument("--batch_size", type=int, help="questions at a time with --prompts (default 8)")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--system", help="system turn")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of the tools that the model may call")
    parser.add_argument(
        "--tool_module", metavar="TOOLS.py", help="run this file; its functions are tools, each run when you say so"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    parser.add_argument("--temperature", help="0: greedy; above, samples (default: the model's own)")
    parser.add_argument("--seed", type=int, help="random seed of sampled answers")
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
