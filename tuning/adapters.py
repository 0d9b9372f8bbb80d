"""LoRA: which layers it adapts, fresh or from a saved adapter, and what an adapter directory holds."""

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.args import LoraArguments
from tuning.errors import SettingsError
from tuning.lora_linear import speed_up_lora
from tuning.model import TrainingModel, hide_gptqmodel
from tuning.quantization import Quantization
from tuning.record import MANIFEST_FILE, check_manifest, read_manifest
from tuning.token_rows import PEFT_SUFFIX, TokenRows, find_module_name, is_tied

_ROUTERS = ("gate", "router", "shared_expert_gate")


def find_lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers to adapt: all of the decoder's, never the output layer or a router.

    Raises: SettingsError: experts kept as 3-D parameters, which LoRA on linear layers would skip in silence.
    """
    experts = find_expert_parameters(model)
    if experts:
        raise SettingsError(
            f"mixture of experts: {experts[0]} and {len(experts) - 1} more are 3-D parameters that LoRA on linear "
            "layers leaves frozen; say so with --lora_target_modules q_proj k_proj v_proj o_proj"
        )
    output = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    return sorted(names - set(_ROUTERS))


def find_expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of parameters that hold the weights of several experts."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]


def check_lora_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Raises: SettingsError: a name that matches no linear layer, a router, or the output layer."""
    layers = dict(model.named_modules())
    output = model.get_output_embeddings()
    for target in targets:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        if target.rpartition(".")[2] in _ROUTERS and find_expert_parameters(model):
            raise SettingsError(f"--lora_target_modules {target}: a router; adapting it unbalances the experts")
        if not matched:
            linear = sorted({n.rpartition(".")[2] for n, m in layers.items() if isinstance(m, (nn.Linear, Conv1D))})
            raise SettingsError(f"--lora_target_modules {target}: no such layer; the model has {', '.join(linear)}")
        if not all(isinstance(layers[name], (nn.Linear, Conv1D)) for name in matched):
            kind = type(layers[matched[0]]).__name__
            raise SettingsError(f"--lora_target_modules {target}: {matched[0]} is a {kind}, not a linear layer")
        if any(layers[name] is output for name in matched):
            hint = "the output layer; --train_embeddings full trains it, and loads everywhere"
            raise SettingsError(f"--lora_target_modules {target}: {hint}")


def build_training_model(
    model: PreTrainedModel,
    lora: LoraArguments,
    *,
    is_base: bool,
    stop_id: int,
    token_ids: list[int],
    largest_token_id: int,
    base_fingerprint: str,
) -> TrainingModel:
    """Prepare a loaded model for training: adapters, embedding rows, what is frozen and what is not.

    is_base: whether it is a base model (base_model.judge_base_model). token_ids: the chat template's control tokens,
    whose rows train on a base model. largest_token_id: in the data.
    base_fingerprint: the fingerprint of model.identify_checkpoint, held against that of --lora_weight_path.

    Raises: SettingsError: control tokens outside the embedding, or adapters that do not fit.
    """
    check_vocabulary(model, max(*token_ids, stop_id, largest_token_id))
    check_language_model_only(model)
    if not lora.use_lora:
        return TrainingModel(model)
    if lora.lora_weight_path:
        directory = Path(lora.lora_weight_path)
        check_adapter_base(directory, base_fingerprint)
        return TrainingModel(*load_lora(model, directory))
    embeddings = lora.train_embeddings
    if embeddings == "auto":
        embeddings = "tokens" if is_base else "off"
    peft_model, rows = add_lora(
        model,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        target_modules=lora.lora_target_modules,
        embeddings=embeddings,
        token_ids=sorted({*token_ids, stop_id}),
    )
    return TrainingModel(peft_model, rows)


def check_vocabulary(model: PreTrainedModel, largest_token_id: int) -> None:
    """Raises: SettingsError: a token of the data or the template has no row in the model's embedding."""
    num_rows = len(model.get_input_embeddings().weight)
    if largest_token_id >= num_rows:
        raise SettingsError(
            f"token {largest_token_id} has no row in the model's embedding ({num_rows} rows); the tokenizer belongs to "
            "another checkpoint, or the embedding must be resized first (model.resize_token_embeddings)"
        )


def check_language_model_only(model: PreTrainedModel) -> None:
    """Raises: SettingsError: the checkpoint has parts beside the language model, such as a vision tower."""
    inside = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    if outside:
        raise SettingsError(
            f"{type(model).__name__} has parts beside the language model ({outside[0]}); only text models are supported"
        )


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


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    bias: str = "none",
    use_dora: bool = False,
    use_rslora: bool = False,
    target_modules: list[str] | None = None,
    embeddings: str = "off",
    token_ids: list[int] | None = None,
) -> tuple[PeftModel, TokenRows | None]:
    """Freeze a model and give it fresh LoRA adapters.

    embeddings: "off", "tokens" (rows of token_ids train) or "full" (both whole matrices train).
    target_modules: layer names; None adapts every linear layer but the output.

    Raises: SettingsError: no such layer, or one that cannot be adapted.
    """
    targets = find_lora_targets(model) if target_modules is None else target_modules
    check_lora_targets(model, targets)
    whole: dict[str, Any] = {}
    if embeddings == "full":
        matrices = [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()])
        whole = {
            "modules_to_save": [find_module_name(model, matrix).rpartition(".")[2] for matrix in matrices],
            "ensure_weight_tying": is_tied(model),
        }
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **whole,
    )
    if embeddings == "tokens" and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise SettingsError(
            "--train_embeddings tokens: peft drops the output layer's bias beside rows; use full or off"
        )
    rows = TokenRows(model, token_ids or []) if embeddings == "tokens" else None
    tied = is_tied(model)
    hide_gptqmodel()
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    if embeddings == "full" and tied and not _trains_one_matrix(peft_model):
        raise SettingsError(
            "--train_embeddings full: peft cannot keep this model's tied matrices tied; use tokens or off"
        )
    speed_up_lora(peft_model)
    if bias != "none" and not any("bias" in name for name, p in peft_model.named_parameters() if p.requires_grad):
        raise SettingsError(f"--lora_bias {bias}: the model has no biases")
    return peft_model, rows


def _trains_one_matrix(peft_model: PeftModel) -> bool:
    model = peft_model.get_base_model()
    weights = [
        (module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module).weight
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    return weights[0] is weights[1]


def load_lora(model: PreTrainedModel, directory: Path) -> tuple[PeftModel, TokenRows | None]:
    """Give a model the adapters (and trained rows) of a saved adapter directory, ready to train further.

    Raises: SettingsError: not an adapter directory, or it does not fit the model.
    """
    config, state = read_adapter(directory)
    row_state = {name: value for name, value in state.items() if name.endswith(PEFT_SUFFIX)}
    rows = None
    if config.trainable_token_indices is not None:
        indices = config.trainable_token_indices
        by_matrix = [indices] if isinstance(indices, list) else list(indices.values())
        if any(ids != by_matrix[0] for ids in by_matrix) or len(by_matrix) != 2 - is_tied(model):
            raise SettingsError(
                f"{directory}: trains other token rows in each matrix, or those of one only, which is not supported"
            )
        rows = TokenRows(model, by_matrix[0])
        config.trainable_token_indices = None
    config.inference_mode = False
    hide_gptqmodel()
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    if model.get_input_embeddings().weight.is_meta:  # nothing to put values into
        speed_up_lora(peft_model)
        return peft_model, rows
    try:
        if rows is not None:
            rows.load_peft_state(row_state)
        result = set_peft_model_state_dict(peft_model, {n: v for n, v in state.items() if n not in row_state})
    except (KeyError, RuntimeError) as error:
        raise SettingsError(f"{directory}: the adapter does not fit this model: {str(error).splitlines()[0]}") from None
    speed_up_lora(peft_model)
    if is_tied(model) and isinstance(model.get_output_embeddings(), LoraLayer):
        raise SettingsError(
            f"{directory}: adapts the output layer, which shares its matrix with the embedding: it could not be merged"
        )
    absent = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if result.unexpected_keys or absent:
        odd = [*result.unexpected_keys, *absent][0]
        raise SettingsError(f"{directory}: the adapter does not fit this model: {odd}")
    return peft_model, rows


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


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of an adapter directory.

    Raises: SettingsError: as read_adapter_config, or weights that are not safetensors or not as they were saved.
    """
    config = read_adapter_config(directory)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise SettingsError(f"{directory}: no adapter_model.safetensors in it; the save was not finished")
    check_manifest(directory, [weights.name])
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise SettingsError(f"{weights}: cannot be read ({error}); copy it again") from None


def adapter_state(peft_model: PeftModel, rows: TokenRows | None) -> dict[str, Tensor]:
    """What an adapter directory holds, under peft's names: the trained tensors themselves, rows included."""
    trained = {name: tensor for name, tensor in peft_model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    state: dict[str, Tensor] = get_peft_model_state_dict(peft_model, state_dict=trained, save_embedding_layers=False)
    return state if rows is None else {**state, **rows.state_in_peft_format()}


def adapter_config(peft_model: PeftModel, rows: TokenRows | None) -> LoraConfig:
    """The adapter_config.json to it."""
    config = copy.deepcopy(peft_model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in one order, so that equal runs write equal files
        config.target_modules = sorted(config.target_modules)
    if rows is not None:
        config.trainable_token_indices = rows.indices_in_peft_format()
    return config
