"""A model or an adapter, ready to answer: for chat.py, serve.py, evaluate.py and the tools of inference/."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from commands.original import find_loadable, find_loadable_base
from data_utils.sources import printable
from data_utils.tokenizer import load_tokenizer
from tuning.checkpoint.manifest import MANIFEST_FILE
from tuning.checkpoint.run_record import RUN_FILE
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.loading import Trust, find_quantization, load_generation_config, load_model
from tuning.model.quantization import Quantization

SYSTEM_MESSAGE = "system_message"  # in manifests of models that are made of results
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Answering:
    """A model that answers as it was trained.

    system_message: of the run, where the template does not carry it itself. kept: whose hooks the model needs: its
    trained token rows take part by them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system_message: str | None
    kept: Any = None


def load_answering(args: argparse.Namespace, *, needs_template: bool = True) -> Answering:
    """Load what args.model names: a model, or an adapter onto its base (args.base, or the one it names).

    args: of model_flags.add_model_flags, after find_named_model. needs_template: as load_tokenizer has it.

    Raises: SettingsError: no model, no adapter, or they do not fit. DataError: no tokenizer.
    """
    path, bits, device_map = Path(args.model), args.bits, args.device_map
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = vars(Trust(args.trust_remote_code, args.allow_pickle))
    loaded_in = DTYPES.get(args.dtype, "auto" if device.type == "cuda" else torch.float32)
    if not (path / "adapter_config.json").is_file():
        name = find_loadable(args.model, allow_pickle=args.allow_pickle, say=tell)
        tokenizer = load_tokenizer(name, needs_template=needs_template, trust_remote_code=args.trust_remote_code)
        own = find_quantization(name, cache_dir=None, trust_remote_code=args.trust_remote_code) if bits else None
        quantization = _choose_quantization(bits, own, args.model)
        model = load_model(
            name, dtype=loaded_in, quantization=quantization, device=device, device_map=device_map, **options
        )
        model = model.eval() if device_map else model.to(device).eval()
        return Answering(model, tokenizer, read_system_message(path))
    if device_map:
        raise SettingsError(f"--device_map {device_map}: not with an adapter; merge it first (merge_lora.py)")
    # peft and what it imports take a second, which a model without an adapter need not.
    from tuning.checkpoint.adapter import check_adapter_fits, find_trained_quantization, load_lora
    from tuning.checkpoint.adapter_base import find_base, tokenizer_source
    from tuning.model.training_model import TrainingModel

    base = find_base(path, find_loadable_base(path, args.base, args, tell), None)
    source = str(tokenizer_source(path, base))
    tokenizer = load_tokenizer(source, needs_template=needs_template, trust_remote_code=args.trust_remote_code)
    check_adapter_fits(path, base, trust_remote_code=args.trust_remote_code)
    trained = find_trained_quantization(path)
    if bits:
        own = trained or find_quantization(str(base), cache_dir=None, trust_remote_code=args.trust_remote_code)
        trained = _choose_quantization(bits, own, args.model)
    model = load_model(str(base), dtype=loaded_in, quantization=trained, device=device, **options)
    training_model = TrainingModel(*load_lora(model, path)).to(device).eval()
    model = training_model.causal_lm
    if (generation_config := load_generation_config(str(path))) is not None:
        model.generation_config = generation_config  # where the adapter was trained to stop
    return Answering(model, tokenizer, read_system_message(path), kept=training_model)


@dataclass
class Asking:
    """What prompts are made with and answers end by, without a model: its tokenizer, system message and stop tokens."""

    tokenizer: PreTrainedTokenizerBase
    system_message: str | None
    generation_config: GenerationConfig


def load_asking(args: argparse.Namespace) -> Asking:
    """Load what goes with the model or adapter that args.model names, but no weights.

    args: as load_answering takes them. Raises: as load_answering does.
    """
    path = Path(args.model)
    if not (path / "adapter_config.json").is_file():
        source = name = find_loadable(args.model, allow_pickle=args.allow_pickle, say=tell)
    else:
        from tuning.checkpoint.adapter_base import find_base, tokenizer_source

        base = find_base(path, find_loadable_base(path, args.base, args, tell), None)
        source = str(tokenizer_source(path, base))
        name = str(path if (path / "generation_config.json").is_file() else base)
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    config = load_generation_config(name) or GenerationConfig()
    return Asking(tokenizer, read_system_message(path), config)


def _choose_quantization(bits: int | None, own: Quantization | None, path: str) -> Quantization | None:
    if bits is None:
        return None
    if own is not None:
        raise SettingsError(f"--bits {bits}: has no effect on {path}, which is quantised ({own.describe()})")
    return Quantization("bitsandbytes", bits, "nf4" if bits == 4 else None, double=bits == 4)


def read_system_message(path: Path) -> str | None:
    """The --system_message of a run, where the template does not carry it. path: its result, or made of one."""
    run, manifest = path / RUN_FILE, path / MANIFEST_FILE
    message: Any = None
    if run.is_file():
        with explain_bad_files(f"{run}: is not as it was written"):
            message = read_json_object(run)["settings"]["data"]["system_message"]
    elif manifest.is_file():
        said = read_json_object(manifest)  # a checkpoint's has the settings of its run
        trajectory = said.get("trajectory")
        message = said.get(SYSTEM_MESSAGE) or (isinstance(trajectory, dict) and trajectory.get(SYSTEM_MESSAGE)) or None
    return None if message is None else str(message)


def keep_system_message(*sources: Path) -> dict[str, Any]:
    """What the manifest of a model that is made of results says of their system messages.

    Raises: SettingsError: they have several, of which the new model could keep one only.
    """
    found = {message for source in sources if (message := read_system_message(source)) is not None}
    if len(found) > 1:
        raise SettingsError(f"{', '.join(map(str, sources))}: trained with different --system_message")
    return {SYSTEM_MESSAGE: found.pop()} if found else {}


def tell(line: str) -> None:
    """Print a line where answers do not go."""
    print(printable(line), file=sys.stderr)
