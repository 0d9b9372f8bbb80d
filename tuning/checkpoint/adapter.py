"""Adapter directories: what they hold, and reading one that was saved."""

import copy
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tuning.checkpoint.manifest import MANIFEST_FILE, check_manifest, read_manifest
from tuning.errors import SettingsError
from tuning.model.lora import SavedAdapter, attach_lora
from tuning.model.quantization import Quantization
from tuning.model.token_rows import TokenRows


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

    Raises: SettingsError: no adapter there, not a LoRA adapter, or not as it was saved.
    """
    if not (directory / "adapter_config.json").is_file():
        raise SettingsError(f"{directory}: no adapter_config.json in it; name the output directory of a LoRA run")
    check_manifest(directory, ["adapter_config.json"])
    config = LoraConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        raise SettingsError(f"{directory}: a {config.peft_type} adapter; only LoRA adapters are supported")
    return config


def load_lora(model: PreTrainedModel, directory: Path) -> tuple[PeftModel, TokenRows | None]:
    """Give a model the adapters of an adapter directory. Raises: as read_adapter and model.lora.attach_lora."""
    return attach_lora(model, read_adapter(directory))


def read_adapter(directory: Path) -> SavedAdapter:
    """Configuration and weights of an adapter directory.

    Raises: SettingsError: as read_adapter_config, or weights that are not safetensors or not as they were saved.
    """
    config = read_adapter_config(directory)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise SettingsError(f"{directory}: no adapter_model.safetensors in it; the save was not finished")
    check_manifest(directory, [weights.name])
    try:
        return SavedAdapter(directory, config, load_file(weights))
    except SafetensorError as error:
        raise SettingsError(f"{weights}: cannot be read ({error}); copy it again") from None


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
    if rows is not None:
        config.trainable_token_indices = rows.indices_in_peft_format()
    return config
