"""Loading a checkpoint: its model, its fingerprint, the dtypes it is loaded and trained in."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from tuning.errors import SettingsError
from tuning.messages import first_line
from tuning.model.quantization import (
    Quantization,
    prepare_loading,
    quantize_meta_model,
    read_quantization,
    replace_quantized_layers,
)
from tuning.model.untrusted import check_no_kernel, check_no_pickle


@dataclass(frozen=True)
class Trust:
    """What a user lets run that comes with a model: its code, and pickles. Both are load_model's arguments."""

    trust_remote_code: bool = False
    allow_pickle: bool = False


def load_model(
    path: str,
    *,
    dtype: torch.dtype | str,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    meta: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model from safetensors (or .bin where allow_pickle).

    meta: build it on the meta device, for a plan or for sharding.shard_model to fill. quantization: quantise it while
    it loads; a checkpoint that is quantised already stays as it is. device: where that is done (default: the CPU);
    what is not quantised is always loaded there.

    Raises: SettingsError: nothing there, no causal language model, no safetensors, weights missing, a kind of
        quantisation that is not supported.
    """
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise SettingsError(
            f"{path}: is an adapter, not a model; merge it first, or train it further with --lora_weight_path"
        )
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        own = read_quantization(config)
        if not trust_remote_code:
            check_no_kernel(path, config)
        if not allow_pickle and not meta:
            check_no_pickle(path, config, cache_dir)
        said = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        one_dtype = said if isinstance(dtype, str) else dtype
        if meta:
            vars(config).pop("quantization_config", None)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=one_dtype, trust_remote_code=trust_remote_code)
            with contextlib.suppress(OSError):  # there may be none
                model.generation_config = GenerationConfig.from_pretrained(path, cache_dir=cache_dir)
            if kept := own or quantization:
                quantize_meta_model(model, kept, one_dtype)
            return model
        with prepare_loading(config, own, quantization, one_dtype, device or torch.device("cpu")) as options:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=one_dtype if own or quantization else dtype,
                cache_dir=cache_dir,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                **options,
            )
    except SettingsError as error:
        said_where = str(error).startswith(path)
        raise SettingsError(str(error) if said_where else f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot load a model: {first_line(error)}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise SettingsError(f"{path}: {len(lacking)} weights are missing or of another shape, the first: {lacking[0]}")
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise SettingsError(f"{path}: output_router_logits asks for a loss on the router, which is not supported yet")
    if own or quantization:
        try:
            replace_quantized_layers(model)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None
    return model


def find_quantization(path: str, *, cache_dir: str | None, trust_remote_code: bool) -> Quantization | None:
    """What a checkpoint is quantised with; None where it is not, or where there is none (load_model says so).

    Raises: SettingsError: in a way that is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
    try:
        return read_quantization(config)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def hide_gptqmodel() -> None:
    """Keep peft from importing gptqmodel (seconds, and a banner), whose layers no model here has (quantized_linear)."""
    import peft.tuners.lora.awq
    import peft.tuners.lora.gptq
    import peft.utils.other

    for module in (peft.tuners.lora.awq, peft.tuners.lora.gptq, peft.utils.other):
        if hasattr(module, "is_gptqmodel_available"):
            module.is_gptqmodel_available = lambda: False


def choose_dtypes(
    *, use_lora: bool, pure_bf16: bool, bf16: bool, fp16: bool, deepspeed: bool = False
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the loaded weights and of the computation.

    Frozen weights (LoRA) are kept in the compute dtype. Trained weights are fp32 masters, or bf16 on request;
    DeepSpeed's optimizer has masters of its own.
    """
    compute = torch.bfloat16 if bf16 or pure_bf16 else torch.float16 if fp16 else torch.float32
    return (compute if use_lora or pure_bf16 or deepspeed else torch.float32), compute


def identify_checkpoint(path: str, cache_dir: str | None = None) -> dict[str, str]:
    """{"path": absolute directory, "fingerprint": hash that tells one base model from another}.

    The hash covers names, sizes and samples of the weights files: a 100 GB checkpoint takes no time.
    """
    digest = hashlib.sha256()
    directory = local_directory(path, cache_dir)
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            for position in range(0, size, max(1, size // 16)):
                stream.seek(position)
                digest.update(stream.read(4096))
    return {"path": str(directory), "fingerprint": digest.hexdigest()}


def local_directory(path: str, cache_dir: str | None = None) -> Path:
    """The directory of a checkpoint; of a hub name, its downloaded snapshot."""
    if Path(path).is_dir():
        return Path(path).resolve()
    config = cached_file(path, "config.json", cache_dir=cache_dir)
    assert config is not None
    return Path(config).parent
