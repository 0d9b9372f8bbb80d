"""Serve a model: python serve.py MODEL, where MODEL is a merged model or an adapter directory.

OpenAI's clients talk to it at http://HOST:PORT/v1. It answers as chat.py does: as it was trained.
"""

import argparse
import importlib.util
import ipaddress
import os
from pathlib import Path

from commands.model_flags import add_model_flags, find_named_model
from data_utils.sources import DataError
from tuning.entry import OneLineParser, run_entry
from tuning.errors import SettingsError

KEY_VARIABLE = "SERVE_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns: exit code."""
    args = build_parser().parse_args(argv)
    check_network(args)
    if args.engine == "vllm" and args.device_map:
        raise SettingsError("--device_map: has no effect with --engine vllm, which spreads a model by its own flags")
    if args.engine == "vllm" and args.kv_cache != "full":
        raise SettingsError("--kv_cache: has no effect with --engine vllm, which has a flag of its own")
    if args.engine == "vllm" and args.page:
        raise SettingsError("--page: has no effect with --engine vllm, which has no page")
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if args.engine == "transformers" and lacking:
        raise SettingsError(f"{lacking[0]} is not installed: pip install -r requirements_serve.txt")
    args.name = name_model(args.model)
    find_named_model(args)
    from commands import serve  # torch and transformers, once nothing is left to say without them

    return serve.run(args)


def check_network(args: argparse.Namespace) -> None:
    """Take the key from the environment, if it is there. Raises: SettingsError: a host, port or key that cannot be."""
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    if args.api_key is not None and (
        not args.api_key.isascii() or not args.api_key.isprintable() or " " in args.api_key
    ):
        raise SettingsError("--api_key: expected printable ASCII characters, without spaces")
    if args.api_key == "":
        raise SettingsError(f"--api_key: is empty (it may come from {KEY_VARIABLE})")
    if not 0 <= args.port < 65536:
        raise SettingsError(f"--port {args.port}: expected a number from 0 (any free port) to 65535")
    if args.api_key is None and not is_loopback(args.host):
        raise SettingsError(
            f"--host {args.host}: other machines could use the model; set a key (--api_key, or {KEY_VARIABLE} in the "
            "environment), or serve 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_model(path: str) -> str:
    """What clients call a model: a directory's own name, or its name on the hub."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    parser.add_argument(
        "--api_key",
        help=f"key that clients must send; better {KEY_VARIABLE} in the environment, which ps does not show",
    )
    parser.add_argument("--page", action="store_true", help="serve a chat page for the browser, too")
    parser.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="vllm: print the command of an installed vLLM, and run it",
    )
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
