"""Loading a checkpoint: its model, its fingerprint, the dtypes it is loaded and trained in."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.messages import first_line
from tuning.model.other_parts import choose_auto_class, find_other_parts
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
    buffers: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model from safetensors (or .bin where allow_pickle), with all that its checkpoint holds.

    meta: build it on the meta device, for a plan or for sharding.shard_model to fill. buffers: it keeps the values of
    its buffers there. quantization: quantise it while it loads; a checkpoint that is quantised already stays as it is.
    device: where that is done (default: the CPU); what is not quantised is always loaded there. device_map: how
    accelerate spreads what is not quantised over devices instead.

    Raises: SettingsError: nothing there, no causal language model, no safetensors, weights missing, a kind of
        quantisation that is not supported.
    """
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise SettingsError(
            f"{path}: is an adapter, not a model; merge it first, or train it further with --lora_weight_path"
        )
    with _say_where(path):
        config = load_config(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        with explain_bad_files(f"{path}/config.json"):
            own = read_quantization(config)
            said = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
            if not trust_remote_code:
                check_no_kernel(path, config)
            if not allow_pickle and not meta:
                check_no_pickle(path, config, cache_dir)
        if device_map and (own or quantization):
            raise SettingsError(f"--device_map {device_map}: a quantised model stays on one device; leave it out")
        one_dtype = said if isinstance(dtype, str) else dtype
        if meta:
            model = _build_on_meta(
                path, config, one_dtype, cache_dir, trust_remote_code=trust_remote_code, buffers=buffers
            )
            if wanted := own or quantization:
                quantize_meta_model(model, wanted, one_dtype, kept=list(find_other_parts(model)))
            return model
        device = device or torch.device("cpu")
        kept: list[str] = []
        if quantization and not own and choose_auto_class(config) is not AutoModelForCausalLM:
            whole = _build_on_meta(path, config, one_dtype, cache_dir, trust_remote_code=trust_remote_code)
            kept = list(find_other_parts(whole))
        with (
            explain_bad_files(f"{path}: cannot load a model"),
            prepare_loading(config, own, quantization, one_dtype, device, kept=kept) as options,
        ):
            model, info = choose_auto_class(config).from_pretrained(
                path,
                config=config,
                dtype=one_dtype if own or quantization else dtype,
                cache_dir=cache_dir,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
                **({"device_map": device_map} if device_map else {}),
            )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise SettingsError(f"{path}: {len(lacking)} weights are missing or of another shape, the first: {lacking[0]}")
    if unknown := sorted(map(str, info["unexpected_keys"])):
        raise SettingsError(
            f"{path}: its files hold {len(unknown)} tensors that a {type(model).__name__} does not have, the first: "
            f"{unknown[0]}; they would be lost: name the right architecture in config.json, or take them out of the "
            "files"
        )
    if own is None:
        _check_dtypes(local_directory(path, cache_dir))
    _check_finite(path, model)
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise SettingsError(f"{path}: output_router_logits asks for a loss on the router, which is not supported yet")
    if own or quantization:
        try:
            replace_quantized_layers(model)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None
    _keep_caps(model)
    return model


def _keep_caps(model: PreTrainedModel) -> None:
    """Attention that caps scores (Gemma-2), where transformers 5.17 takes one that leaves the caps out in silence."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _build_on_meta(
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    cache_dir: str | None,
    *,
    trust_remote_code: bool,
    buffers: bool = False,
) -> PreTrainedModel:
    """A model without values. Errors other than OSError and ValueError are not explained: the caller may go without."""
    vars(config).pop("quantization_config", None)
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = choose_auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot load a model: {first_line(error)}") from None
    if buffers:
        model.tie_weights()  # accelerate gives each layer a matrix of its own
    if (generation_config := load_generation_config(path, cache_dir)) is not None:
        model.generation_config = generation_config
    _keep_caps(model)
    return model


def find_quantization(path: str, *, cache_dir: str | None, trust_remote_code: bool) -> Quantization | None:
    """What a checkpoint is quantised with; None where it is not, or where there is none (load_model says so).

    Raises: SettingsError: in a way that is not supported.
    """
    try:
        config = load_config(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except SettingsError:
        return None
    with _say_where(path):
        return read_quantization(config)


def load_config(path: str, *, cache_dir: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """A checkpoint's configuration. Raises: SettingsError: there is none, or it is none of a model."""
    if (file := Path(path) / "config.json").is_file():
        read_json_object(file)
    with explain_bad_files(f"{path}: cannot load a model"):
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    _check_ids(f"{path}/config.json", config)
    for name, value in vars(config.get_text_config()).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise SettingsError(f"{path}/config.json: {name} {value}: expected a probability, from 0 to 1")
    return config


def read_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a checkpoint says its weights have; float32 where it says none."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_generation_config(path: str, cache_dir: str | None = None) -> GenerationConfig | None:
    """A checkpoint's generation_config.json; None where it has none. Raises: SettingsError: it is none."""
    if (file := Path(path) / "generation_config.json").is_file():
        read_json_object(file)
    elif Path(path).is_dir():
        return None
    with explain_bad_files(f"{path}: generation_config.json"):
        try:
            config = GenerationConfig.from_pretrained(path, cache_dir=cache_dir)
        except OSError:  # of a hub name
            return None
    _check_ids(f"{path}/generation_config.json", config)
    return config


def _check_ids(where: str, config: PretrainedConfig | GenerationConfig) -> None:
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and abs(each) < 2**31 for each in ids):
            raise SettingsError(f"{where}: {name}: expected a token id, or a list of them")


@contextlib.contextmanager
def _say_where(path: str) -> Iterator[None]:
    """Let an error begin with the checkpoint's path."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def _check_dtypes(directory: Path) -> None:
    """Raises: SettingsError: weights that are whole numbers, which loading turned into others in silence."""
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                dtype = opened.get_slice(name).get_dtype()
                if name.endswith(".weight") and dtype.startswith(("I", "U", "BOOL")):
                    raise SettingsError(f"{file}: {name} has the dtype {dtype}, so it is no weight; copy it again")


def _check_finite(path: str, model: PreTrainedModel) -> None:
    """Raises: SettingsError: a weight is NaN or infinite. One pass over the weights, at 0.05 s a GB."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    extremes = {name: torch.stack(torch.aminmax(weight)).isfinite().all() for name, weight in weights.items()}
    if broken := next((name for name, finite in extremes.items() if not finite), None):
        raise SettingsError(f"{path}: {broken} has values that are not finite, so it is damaged; copy it again")


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


def identify_checkpoint(path: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Which checkpoint it is, for whoever looks for it later, on another machine too.

    path: absolute directory. fingerprint: hash that tells one base model from another. name: of the hub, with its
    revision (commit), or the directory again, with None.

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
    is_local = Path(path).is_dir()
    name, revision = (str(directory), None) if is_local else (path, directory.name)  # snapshots/COMMIT
    return {"path": str(directory), "fingerprint": digest.hexdigest(), "name": name, "revision": revision}


def local_directory(path: str, cache_dir: str | None = None, revision: str | None = None) -> Path:
    """The directory of a checkpoint; of a hub name, its downloaded snapshot."""
    if Path(path).is_dir():
        return Path(path).resolve()
    config = cached_file(path, "config.json", cache_dir=cache_dir, revision=revision)
    assert config is not None
    return Path(config).parent
