"""The vLLM command that serves a result as it was trained: printed, then run in the place of this program."""

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from commands.loading import read_system_message, tell
from commands.original import find_loadable, find_loadable_base
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from inference.markup import find_markup
from tuning.errors import SettingsError
from tuning.model.loading import find_quantization

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
_PARSERS = {"json": "hermes", "xml-inline": "qwen3_coder"}  # by how the chat template writes calls
_KEY_VARIABLE = "VLLM_API_KEY"


def run(args: argparse.Namespace) -> int:
    """Print the command, and become it. args: of serve.py.

    Raises: SettingsError: no vLLM here, or a result that it refuses.
    """
    words = build_command(args)
    program = find_program()
    if program is None:
        raise SettingsError(
            "--engine vllm: vLLM is not installed: pip install vllm, in an environment of its own (it brings its own "
            f"torch); the command is: {shlex.join(['vllm', *words])}"
        )
    tell(shlex.join(["vllm", *words]))
    if args.api_key:
        os.environ[_KEY_VARIABLE] = args.api_key  # ps does not show it there
    sys.stdout.flush()
    os.execvp(program[0], [*program, *words])


def find_program() -> list[str] | None:
    """How vLLM is started here, if it is installed."""
    beside = Path(sys.executable).parent / "vllm"
    if beside.is_file():
        return [str(beside)]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    found = shutil.which("vllm")
    return [found] if found else None


def build_command(args: argparse.Namespace) -> list[str]:
    """The words after `vllm`. Raises: SettingsError: vLLM refuses the result; it must be merged first."""
    path = Path(args.model)
    words = _name_adapter(args, path) if (path / "adapter_config.json").is_file() else _name_model(args)
    words += ["--host", args.host, "--port", str(args.port), "--dtype", _DTYPES[args.dtype]]
    if args.bits == 8:
        raise SettingsError("--bits 8: vLLM quantises to 4 bits while it loads; take --bits 4")
    if args.bits:
        words += ["--quantization", "bitsandbytes"]
    if args.trust_remote_code:
        words.append("--trust-remote-code")
    if (message := read_system_message(path)) is not None:
        tell(f"note: trained with --system_message {message!r}, which vLLM does not add: requests must bring it")
    return words


def _name_model(args: argparse.Namespace) -> list[str]:
    name = find_loadable(args.model, allow_pickle=args.allow_pickle, say=tell)
    return ["serve", name, "--served-model-name", args.name, *_choose_parser(name, args)]


def _name_adapter(args: argparse.Namespace, path: Path) -> list[str]:
    """The base with the adapter beside it. Template and stop token are the adapter's, not the base's."""
    from tuning.checkpoint.adapter import check_adapter_fits, find_trained_quantization, read_adapter_config
    from tuning.checkpoint.adapter_base import find_base, tokenizer_source
    from tuning.checkpoint.serving import find_obstacles

    config = read_adapter_config(path)
    base = find_base(path, find_loadable_base(path, args.base, args, tell), None)
    check_adapter_fits(path, base, trust_remote_code=args.trust_remote_code)
    own = find_quantization(str(base), cache_dir=None, trust_remote_code=args.trust_remote_code)
    why = find_obstacles(config, has_rows=bool(config.trainable_token_indices))
    if not why and (find_trained_quantization(path) or own):
        why = "it was trained on quantised weights"
    rank = next((rank for rank in _RANKS if rank >= largest_rank(config)), None)
    if not why and rank is None:
        why = f"its rank is over {_RANKS[-1]}"
    if why:
        raise SettingsError(f"{path}: vLLM does not take this adapter: {why}; merge it first: python merge_lora.py")
    tokenizer = str(tokenizer_source(path, base))
    words = ["serve", str(base), "--served-model-name", f"{args.name}-base", "--tokenizer", tokenizer]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{args.name}={path.resolve()}"]
    if (template := Path(tokenizer) / "chat_template.jinja").is_file():
        words += ["--chat-template", str(template)]
    if (path / "generation_config.json").is_file():
        words += ["--generation-config", str(path.resolve())]
    return words + _choose_parser(tokenizer, args)


def largest_rank(config: Any) -> int:
    """Of all layers of an adapter."""
    return max([config.r, *(config.rank_pattern or {}).values()])


def _choose_parser(tokenizer: str, args: argparse.Namespace) -> list[str]:
    """What reads the calls of tools that the chat template writes."""
    template = ChatTemplate(load_tokenizer(tokenizer, trust_remote_code=args.trust_remote_code))
    calls = find_markup(template).calls
    if calls is None:
        return []
    return ["--enable-auto-tool-choice", "--tool-call-parser", _PARSERS[calls["fields"]["tool_calls"]["content"]]]
