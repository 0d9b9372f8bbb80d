"""Serve a model: python serve.py MODEL, where MODEL is a merged model or an adapter directory.

OpenAI's clients talk to it at http://HOST:PORT/v1. It answers as chat.py does: as it was trained.
"""

import argparse
import importlib.util
import ipaddress
import os
from pathlib import Path

from commands.paths import find_adapter_base, find_model
from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_hub_flag, add_trust_flags, run_entry
from tuning.errors import SettingsError

KEY_VARIABLE = "SERVE_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns: exit code."""
    args = build_parser().parse_args(argv)
    check_network(args)
    if args.engine == "vllm" and args.device_map:
        raise SettingsError("--device_map: has no effect with --engine vllm, which spreads a model by its own flags")
    if args.engine == "vllm" and args.page:
        raise SettingsError("--page: has no effect with --engine vllm, which has no page")
    if args.device_map and args.bits:
        raise SettingsError(f"--device_map {args.device_map}: a quantised model stays on one device; leave it out")
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if args.engine == "transformers" and lacking:
        raise SettingsError(f"{lacking[0]} is not installed: pip install -r requirements_serve.txt")
    args.name = name_model(args.model)
    args.model = find_model(args.model, args.hub, allow_pickle=args.allow_pickle)
    if (Path(args.model) / "adapter_config.json").is_file():
        args.base = find_adapter_base(args.model, args.base, args.hub, allow_pickle=args.allow_pickle)
    elif args.base:
        raise SettingsError(f"--base {args.base}: has no effect, as {args.model} is no adapter")
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
    parser = OneLineParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="merged model, full model, or adapter directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    parser.add_argument(
        "--api_key",
        help=f"key that clients must send; better {KEY_VARIABLE} in the environment, which ps does not show",
    )
    parser.add_argument("--page", action="store_true", help="serve a chat page for the browser, too")
    parser.add_argument("--base", help="base model of an adapter (default: the one it names)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="of the weights (auto: as in the files; on a CPU fp32)",
    )
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the weights with bitsandbytes")
    parser.add_argument("--device_map", choices=["auto"], help="spread a model over all GPUs")
    parser.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="vllm: print the command of an installed vLLM, and run it",
    )
    add_hub_flag(parser)
    add_trust_flags(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
