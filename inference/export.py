"""Export a model to other engines: python -m inference.export MODEL OUT --to gguf|ollama.

MODEL is a standalone model: of full training, or merged. --to gguf writes OUT/NAME.gguf by llama.cpp's converter and
compares what it holds with MODEL. --to ollama also writes OUT/Modelfile, for `ollama create NAME -f OUT/Modelfile`.
"""

import argparse
import importlib.util
import re
from pathlib import Path

from commands.paths import find_model
from data_utils.sources import DataError
from tuning.entry import OneLineParser, add_hub_flag, run_entry
from tuning.errors import SettingsError

CONVERTER = "convert_hf_to_gguf.py"
DTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_LLAMA_CPP = Path(__file__).parent.parent / ".venv" / "llama.cpp"  # where `make setup-llama-cpp` puts it
_NEEDED = ("gguf", "sentencepiece")


def main(argv: list[str] | None = None) -> None:
    """Export. Raises: DataError, SettingsError: the user's mistakes, or what cannot be exported."""
    args = build_parser().parse_args(argv)
    if (Path(args.model) / "adapter_config.json").is_file():
        raise SettingsError(f"{args.model}: is an adapter; merge it first: python merge_lora.py {args.model} MERGED")
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise SettingsError(f"{lacking[0]} is not installed: pip install -r requirements_export.txt")
    args.llama_cpp = find_llama_cpp(args.llama_cpp)
    args.name = re.sub(r"[^\w.-]", "_", Path(args.model).resolve().name)
    args.model = find_model(args.model, args.hub, args.cache_dir)
    from commands import export  # torch and transformers, once nothing is left to say without them

    export.run(args)


def find_llama_cpp(named: str | None) -> Path:
    """llama.cpp's directory. Raises: SettingsError: its converter is not there."""
    directory = Path(named) if named else _LLAMA_CPP
    if (directory / CONVERTER).is_file():
        return directory.resolve()
    if named:
        raise SettingsError(f"--llama_cpp {named}: no {CONVERTER} in it; name a checkout of llama.cpp")
    raise SettingsError(
        f"llama.cpp's {CONVERTER} is not here: make setup-llama-cpp, or name a checkout: --llama_cpp DIR"
    )


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="python -m inference.export", description=__doc__)
    parser.add_argument("model", help="a standalone model: of full training, or merged")
    parser.add_argument("out", help="directory for the export; absent or empty")
    parser.add_argument("--to", required=True, choices=["gguf", "ollama"], help="ollama: a Modelfile beside the GGUF")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights in the GGUF (default auto: as in MODEL)"
    )
    parser.add_argument("--llama_cpp", metavar="DIR", help="llama.cpp (default: of make setup-llama-cpp)")
    parser.add_argument("--overwrite", action="store_true", help="delete OUT first")
    parser.add_argument("--cache_dir", help="where hub downloads are kept")
    add_hub_flag(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted: nothing was exported")


if __name__ == "__main__":
    run_script()
