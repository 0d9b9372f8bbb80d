"""Adapter directories: what they hold, and reading one that was saved."""

import copy
import dataclasses
from pathlib import Path

import peft
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tuning.checkpoint.manifest import MANIFEST_FILE, check_manifest, read_manifest
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.loading import load_model
from tuning.model.quantization import Quantization
from tuning.model.saved_adapter import SavedAdapter, attach_lora
from tuning.model.token_rows import TokenRows

_NOT_MERGED = {
    "layer_replication": "an adapter of a model with replicated layers",
    "alora_invocation_tokens": "an adapter that acts behind certain tokens (aLoRA)",
}


def check_adapter_base(directory: Path, base_fingerprint: str) -> None:
    """Raises: SettingsError: the adapter was trained on another base model (by its manifest, where it has one)."""
    config = read_adapter_config(directory)
    manifest = directory / MANIFEST_FILE
    if manifest.is_file():
        trained_on = read_manifest(directory)["base_model"]["fingerprint"]
        if trained_on != base_fingerprint:
            raise SettingsError(
                f"{directory}: this adapter was trained on another base model ({config.base_model_name_or_path} as it "
                "was then); name that one"
            )


def find_trained_quantization(directory: Path) -> Quantization | None:
    """How the model was quantised that an adapter was trained on; None where it was not, or nothing says so."""
    if not (directory / MANIFEST_FILE).is_file():
        return None
    values = read_manifest(directory).get("quantization")
    try:
        return None if values is None else Quantization(**values)
    except TypeError:
        raise SettingsError(f"{directory}: was trained by another version, on a kind of model not known here") from None


def read_adapter_config(directory: Path) -> LoraConfig:
    """Configuration of an adapter directory, without reading its weights.

    Raises: SettingsError: no adapter there, not a LoRA adapter of a kind that merges, or not as it was saved.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise SettingsError(f"{directory}: no adapter_config.json in it; name the output directory of a LoRA run")
    check_manifest(directory, [path.name])
    values = read_json_object(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        what = "no peft_type, so no adapter of peft's" if kind is None else f"a {kind} adapter"
        raise SettingsError(f"{path}: {what}; only LoRA adapters are supported")
    for name, what in _NOT_MERGED.items():
        if values.get(name):
            raise SettingsError(f"{path}: {name}: {what}, which peft cannot merge; not supported")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if unknown := [name for name in values if name not in known and values[name] and not _is_note(name)]:
        raise SettingsError(
            f"{path}: {unknown[0]} is not known to peft {peft.__version__}; it may change what the adapter computes: "
            "install a newer peft"
        )
    with explain_bad_files(f"{path}: peft {peft.__version__} cannot read it"):
        return LoraConfig(**{name: value for name, value in values.items() if name in known})


def _is_note(name: str) -> bool:
    """Whether an entry of a configuration says what wrote it, and changes nothing."""
    return name.endswith("_version") or name.startswith("unsloth_")


def check_adapter_fits(directory: Path, base: Path, *, trust_remote_code: bool) -> None:
    """See whether an adapter fits its base, before any weights of that are read.

    Raises: SettingsError: it does not, or is none.
    """
    adapter = read_adapter(directory)
    try:
        model = load_model(str(base), dtype="auto", meta=True, trust_remote_code=trust_remote_code)
    except SettingsError:
        raise
    except Exception:  # code that comes with a model may need values in its tensors
        return
    attach_lora(model, adapter)


def load_lora(model: PreTrainedModel, directory: Path) -> tuple[PeftModel, TokenRows | None]:
    """Give a model the adapters of an adapter directory. Raises: as read_adapter and model.saved_adapter.attach_lora.

    The model may be on the meta device, to see whether they fit.
    """
    return attach_lora(model, read_adapter(directory))


def read_adapter(directory: Path) -> SavedAdapter:
    """Configuration and weights of an adapter directory.

    Raises: SettingsError: as read_adapter_config, or weights that are not safetensors, not finite, or not as they were
    saved.
    """
    config = read_adapter_config(directory)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise SettingsError(
                f"{directory}/adapter_model.bin: a pickle, which can run code when it is read; have peft load it where "
                "you trust it, and save it again (save_pretrained writes adapter_model.safetensors)"
            )
        raise SettingsError(f"{directory}: no adapter_model.safetensors in it; the save was not finished")
    check_manifest(directory, [weights.name])
    with explain_bad_files(f"{weights}: cannot be read; copy it again"):  # a pointer of Git LFS, a page of HTML
        state = load_file(weights)
    for name, tensor in state.items():
        if not tensor.numel():
            raise SettingsError(
                f"{weights}: {name} has no elements: it was saved by ZeRO-3 without gathering the weights; "
                "save it again"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "values that are not finite" if tensor.is_floating_point() else f"the dtype {tensor.dtype}"
            raise SettingsError(f"{weights}: {name} has {what}, so it is damaged; copy it again")
    return SavedAdapter(directory, config, state)


def adapter_state(peft_model: PeftModel, rows: TokenRows | None) -> dict[str, Tensor]:
    """What an adapter directory holds, under peft's names: the trained tensors themselves, rows included."""
    trained = {name: tensor for name, tensor in peft_model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    state: dict[str, Tensor] = get_peft_model_state_dict(peft_model, state_dict=trained, save_embedding_layers=False)
    return state if rows is None else {**state, **rows.state_in_peft_format()}


def adapter_config(peft_model: PeftModel, rows: TokenRows | None) -> LoraConfig:
    """The adapter_config.json for adapter_state's tensors."""
    config = copy.deepcopy(peft_model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in one order, so that equal runs write equal files
        config.target_modules = sorted(config.target_modules)
    if config.target_parameters is not None:
        config.target_parameters = sorted(config.target_parameters)
    if rows is not None:
        config.trainable_token_indices = rows.indices_in_peft_format()
    return config
