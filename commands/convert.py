"""An original Qwen checkpoint -> a directory that transformers loads without the checkpoint's code."""

import argparse
from pathlib import Path

from data_utils.qwen_tiktoken import END_OF_TEXT, IM_END, VOCABULARY_FILE
from data_utils.tokenizer import load_tokenizer
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.older_readers import add_old_names
from tuning.checkpoint.original_qwen import StopTokens, convert_checkpoint, is_original_qwen
from tuning.checkpoint.output_directory import check_result_directory
from tuning.checkpoint.ownership import new_result
from tuning.errors import SettingsError, explain_bad_files


def run(args: argparse.Namespace) -> None:
    """Convert. args: of tuning/convert.py. Raises: DataError, SettingsError: the user's mistakes."""
    source, out = Path(args.source), Path(args.out)
    if not source.is_dir():
        raise SettingsError(f"{source}: no such directory")
    if not is_original_qwen(source):
        raise SettingsError(
            f'{source}: is no original Qwen checkpoint (config.json: model_type "qwen"); others load as they are'
        )

    def check() -> None:
        check_result_directory(out, [source], overwrite=args.overwrite, mark="converted_from")

    check()
    with new_result(out, check=check) as unfinished:
        write_conversion(source, unfinished, allow_pickle=args.allow_pickle)
        write_manifest(unfinished, converted_from=str(source.resolve()))
    print(f"converted: {out}")


def write_conversion(source: Path, out: Path, *, allow_pickle: bool) -> None:
    """Write model, tokenizer and chat template of an original Qwen checkpoint into OUT, which is there and empty.

    Raises: DataError, SettingsError: a file of it that is damaged, or holds what cannot be taken over.
    """
    if not (source / VOCABULARY_FILE).is_file():
        raise SettingsError(f"{source}: no {VOCABULARY_FILE} in it, the original Qwen's vocabulary; copy it there")
    tokenizer = load_tokenizer(str(source))
    stop = StopTokens(*tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END]))
    convert_checkpoint(source, out, stop, allow_pickle=allow_pickle)
    with explain_bad_files(f"{out}: the tokenizer cannot be written"):
        tokenizer.save_pretrained(out)
    add_old_names(out)
