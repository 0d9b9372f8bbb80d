"""A loaded model made ready for training: what trains of it, and what is frozen."""

from pathlib import Path

from transformers import PreTrainedModel

from tuning.checkpoint.adapter import check_adapter_base
from tuning.errors import SettingsError
from tuning.model.lora import add_lora, load_lora
from tuning.model.training_model import TrainingModel
from tuning.settings.options import LoraArguments


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

    is_base: whether it is a base model (base_model.judge_base_or_chat). token_ids: the chat template's control tokens,
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
