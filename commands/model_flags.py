"""The flags that say which model answers, and how it is loaded: of chat.py, serve.py and the tools of inference/."""

import argparse
from pathlib import Path

from commands.paths import find_adapter_base, find_model
from tuning.entry import add_hub_flag, add_trust_flags
from tuning.errors import SettingsError


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the flags of loading it."""
    parser.add_argument("model", help="merged model, full model, or adapter directory")
    add_loading_flags(parser)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of loading a model."""
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
        "--kv_cache",
        choices=["full", "quantized"],
        default="full",
        help="quantized: keys and values as 8-bit floats, for longer conversations (default full)",
    )
    add_hub_flag(parser)
    add_trust_flags(parser)


def find_named_model(args: argparse.Namespace) -> None:
    """Put in args.model and args.base what libraries take.

    Raises: SettingsError: not there, or flags that contradict it. DataError: a download that failed.
    """
    if args.device_map and args.bits:
        raise SettingsError(f"--device_map {args.device_map}: a quantised model stays on one device; leave it out")
    named = args.model
    args.model = find_model(named, args.hub, allow_pickle=args.allow_pickle)
    if (Path(args.model) / "adapter_config.json").is_file():
        args.base = find_adapter_base(args.model, args.base, args.hub, allow_pickle=args.allow_pickle)
    elif args.base:
        raise SettingsError(f"--base {args.base}: has no effect, as {named} is no adapter")
