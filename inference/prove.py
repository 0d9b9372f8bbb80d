"""Prove that an endpoint serves the trained model: python -m inference.prove MODEL|ADAPTER --url http://HOST:PORT/v1.

Prompts of the run's own rows and fixed ones go to the endpoint, be it serve.py, vLLM, Ollama or another one that
speaks OpenAI's API, and to the model here. Prompt, answers token by token, log probabilities and the stop are
compared. Exit code 0: it is the model that was trained; 1: it is not, or that cannot be told.
"""

import argparse
import importlib.util
from urllib.parse import urlsplit

from commands.model_flags import add_model_flags, find_named_model
from data_utils.sources import DataError
from tuning.entry import OneLineParser, run_entry
from tuning.errors import SettingsError


def main(argv: list[str] | None = None) -> int:
    """Ask the endpoint and the model. Returns: exit code."""
    args = build_parser().parse_args(argv)
    url = urlsplit(args.url)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise SettingsError(f"--url {args.url}: expected http://HOST:PORT/v1")
    if args.num < 0 or args.max_new_tokens < 1 or not 0 <= args.tolerance < 100:
        raise SettingsError("--num, --max_new_tokens, --tolerance: out of range")
    if args.data and not args.num:
        raise SettingsError("--data: has no effect with --num 0")
    if importlib.util.find_spec("openai") is None:
        raise SettingsError("openai is not installed: pip install -r requirements_serve.txt")
    args.named = args.model
    find_named_model(args)
    from commands import prove  # torch and transformers, once nothing is left to say without them

    return prove.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="python -m inference.prove", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--url", required=True, help="of the API, up to and with /v1")
    parser.add_argument("--api_key", default="none", help="that the endpoint asks for")
    parser.add_argument("--served_name", help="what the endpoint calls the model (default: its only one)")
    parser.add_argument("--data", metavar="FILE", help="rows to ask (default: the run's evaluation data, or its data)")
    parser.add_argument("--num", type=int, default=8, help="of rows (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="how much less likely than the likeliest token here a served one may be, in nats: two dtypes may round "
        "a tie to different sides (default 0.1)",
    )
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
