"""A loaded model made ready for training: what trains of it, and what is frozen."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from tuning.errors import SettingsError
from tuning.model.lora import add_lora
from tuning.model.new_tokens import NewTokens, add_rows, resize_for_adapter
from tuning.model.other_parts import freeze_other_parts
from tuning.model.saved_adapter import SavedAdapter, attach_lora
from tuning.model.training_model import TrainingModel
from tuning.settings.options import LoraArguments


@dataclass(frozen=True)
class TokensInUse:
    """Tokens of the chat template and the data.

    stop_id, stop: the token that ends an answer, and its text. template_ids: the template's control tokens.
    largest_id: in the data. vocabulary_size: ids from here on belong to no token of the checkpoint. new: tokens that
    were added to it.
    """

    stop_id: int
    stop: str
    template_ids: list[int]
    largest_id: int
    vocabulary_size: int
    new: NewTokens | None = None


def build_training_model(
    model: PreTrainedModel, lora: LoraArguments, *, is_base: bool, tokens: TokensInUse, adapter: SavedAdapter | None
) -> TrainingModel:
    """Prepare a loaded model, or a meta model, for training: adapters, token rows, what is frozen.

    is_base: whether it is a base model (judge_base_or_chat): then the control tokens' rows train, too. adapter: of
    --lora_weight_path.

    Raises: SettingsError: control tokens outside the embedding, or adapters that do not fit.
    """
    if adapter is not None:
        resize_for_adapter(model, adapter.config, adapter.state)
    elif tokens.new is not None:
        add_rows(model, tokens.new)
    check_vocabulary(model, max(*tokens.template_ids, tokens.stop_id, tokens.largest_id))
    freeze_other_parts(model)
    if not lora.use_lora:
        return TrainingModel(model)
    if adapter is not None:
        return TrainingModel(*attach_lora(model, adapter))
    embeddings, new_ids = lora.train_embeddings, set(tokens.new.ids) if tokens.new else set()
    token_ids = {*tokens.template_ids, tokens.stop_id, *new_ids}
    if embeddings == "auto":
        embeddings = "tokens" if is_base or new_ids else "off"
        token_ids = token_ids if is_base else new_ids
    peft_model, rows = add_lora(
        model,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        target_modules=lora.lora_target_modules,
        experts=lora.lora_experts,
        embeddings=embeddings,
        token_ids=sorted(token_ids),
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
