"""A standalone model -> a GGUF file and, for Ollama, a Modelfile; both held against the model."""

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from commands.loading import read_system_message
from commands.original import find_loadable
from data_utils.sources import printable
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from inference import gguf_converter, gguf_file
from inference.modelfile import write_modelfile
from inference.pre_tokenizer import find_differences
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.output_directory import check_result_directory
from tuning.checkpoint.ownership import new_result
from tuning.checkpoint.tensor_files import list_tensors
from tuning.errors import SettingsError
from tuning.model.loading import find_quantization, load_config, load_generation_config, local_directory
from tuning.model.stop_token import list_eos_ids

_KEPT = ("f32", "f16", "bf16")


def run(args: argparse.Namespace) -> None:
    """Convert, compare, write. args: of inference/export.py.

    Raises: DataError, SettingsError: the user's mistakes, or what cannot be exported.
    """
    out = Path(args.out)
    try:
        checkpoint = local_directory(find_loadable(args.model, args.cache_dir), args.cache_dir)
    except (OSError, ValueError):
        raise SettingsError(f"{args.model}: no such model") from None

    def check() -> None:
        check_result_directory(out, [checkpoint, args.llama_cpp], overwrite=args.overwrite, mark="exported_from")

    check()
    if own := find_quantization(str(checkpoint), cache_dir=None, trust_remote_code=False):
        raise SettingsError(f"{checkpoint}: is quantised ({own.describe()}); export the model that it was made from")
    own_dtype = find_dtype(checkpoint)
    dtype = choose_dtype(args.dtype, own_dtype, checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    system_message = read_system_message(checkpoint)
    template = ChatTemplate(tokenizer, system_message=system_message)
    stop_ids = find_stop_ids(checkpoint, template)
    eos_id = gguf_file.choose_eos(tokenizer, stop_ids[0])
    notes = [*find_differences(tokenizer)]
    if isinstance(tokenizer.chat_template, dict):
        others = sorted(tokenizer.chat_template.keys() - {"default"})
        notes.append(f"of the named chat templates only the default one is exported, without {', '.join(others)}")
    modelfile = None
    if args.to == "ollama":  # before the minutes that a conversion takes
        modelfile, more = write_modelfile(
            f"{args.name}.gguf",
            template,
            stops=[str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids],
            generation_config=load_generation_config(str(checkpoint)),
        )
        notes += more
    elif system_message is not None:
        notes.append(f"trained with --system_message {system_message!r}, which no GGUF holds: requests must bring it")

    with new_result(out, check=check) as unfinished:
        file = unfinished / f"{args.name}.gguf"
        gguf_converter.convert(
            checkpoint, file, dtype=dtype, tokenizer=tokenizer, name=args.name, llama_cpp=args.llama_cpp
        )
        reader = gguf_file.open_file(file)
        gguf_file.set_ends(reader, eos_id)
        notes += gguf_file.check_tokenizer(
            reader, tokenizer, stop_ids=stop_ids, num_rows=load_config(str(checkpoint)).get_text_config().vocab_size
        )
        comparison = gguf_file.compare_tensors(reader, checkpoint)
        if modelfile is not None:
            (unfinished / "Modelfile").write_text(modelfile, encoding="utf-8")
        write_manifest(unfinished, exported_from=str(checkpoint.resolve()), to=args.to)
    compared, *others = comparison.describe("" if dtype == own_dtype else f" after rounding to {dtype}")
    print(f"exported: {out / file.name} ({dtype})")
    print(f"as in {args.model}: {_describe(tokenizer, stop_ids[0])}; {compared}")
    for line in (*others, *notes):
        print(printable(f"note: {line}"))
    if modelfile is not None:
        print(f"then: ollama create {args.name} -f {out / 'Modelfile'}")


def _describe(tokenizer: PreTrainedTokenizerBase, stop_id: int) -> str:
    stop = tokenizer.convert_ids_to_tokens(stop_id)
    return f"chat template, stop token {stop} ({stop_id}), {len(tokenizer):,} tokens"


def find_dtype(checkpoint: Path) -> str:
    """The dtype of most of the weights, in lower case."""
    sizes: dict[str, int] = {}
    for tensor in list_tensors(checkpoint).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]).lower()


def choose_dtype(asked: str, own: str, checkpoint: Path) -> str:
    """What the converter writes. asked: of --dtype. own: of the checkpoint, which auto keeps."""
    if asked != "auto":
        return asked
    if own not in _KEPT:
        raise SettingsError(
            f"{checkpoint}: its weights are {own}, which no GGUF holds as it is; choose another --dtype"
        )
    return own


def find_stop_ids(checkpoint: Path, template: ChatTemplate) -> list[int]:
    """Tokens that end generation, the trained one first."""
    config = load_generation_config(str(checkpoint)) or load_config(str(checkpoint)).get_text_config()
    ids = list_eos_ids(config)
    if template.stop_id not in ids:
        raise SettingsError(
            f"{checkpoint}: its chat template ends answers with {template.stop}, which ends no generation in "
            "generation_config.json (eos_token_id); is it a base model?"
        )
    return [template.stop_id, *(i for i in ids if i != template.stop_id)]
