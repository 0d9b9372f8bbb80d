"""From a checkpoint's weights to a model that the Trainer can train."""

from dataclasses import dataclass

import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuning.checkpoint.base import BaseModel
from tuning.console import is_rank_0, say
from tuning.distributed.processes import on_all_ranks, on_rank_0
from tuning.distributed.sharding import SHARDED, shard_model
from tuning.model.build import TokensInUse, build_training_model
from tuning.model.loading import load_model
from tuning.model.lora_experts import count_expert_adapters, find_experts
from tuning.model.other_parts import find_other_parts
from tuning.model.packing import describe_rotary_switch, enable_packing
from tuning.model.stop_token import align_stop_token
from tuning.model.training_model import (
    TrainingModel,
    check_loss_path,
    check_positions,
    compile_layers,
    count_parameters,
    enable_gradient_checkpointing,
    trains_row,
)
from tuning.settings.arguments import Arguments


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to train.

    generation_config: saved with the result, which then stops on the template's stop token. padded_because: why it
    cannot train packed sequences; None where it can. trainable, total: numbers of parameters. resized_to: rows of the
    vocabulary matrices, where new tokens made them larger.
    """

    training_model: TrainingModel
    generation_config: GenerationConfig
    padded_because: str | None
    trainable: int
    total: int
    resized_to: int | None = None


def prepare_model(
    arguments: Arguments,
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TokensInUse,
    *,
    longest: int,
    checkpointing: bool,
) -> PreparedModel:
    """Load the weights and make them ready: what trains, gradient checkpointing, packing, shards.

    longest: tokens of the longest conversation. All processes must call this.

    Raises: SettingsError: a model that cannot be trained as the settings say.
    """
    model_args, run = arguments.model, arguments.run
    transformers.set_seed(run.seed)  # fresh adapters are random
    is_sharded = run.engine in SHARDED
    model = on_all_ranks(
        lambda: load_model(
            model_args.model_name_or_path,
            dtype=base.load_dtype,
            allow_pickle=model_args.allow_pickle,
            meta=is_sharded and not is_rank_0(),
            quantization=base.quantization,
            device=None if is_sharded else run.device,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
    )
    is_base, num_rows = base.evidence.is_base, _count_vocabulary(model)
    training_model = build_training_model(model, arguments.lora, is_base=is_base, tokens=tokens, adapter=base.adapter)
    resized_to = after if (after := _count_vocabulary(model)) != num_rows else None
    if checkpointing:
        enable_gradient_checkpointing(model)
    if not is_sharded:
        training_model.to(run.device)
    on_rank_0(lambda: check_loss_path(training_model))
    trainable, total = count_parameters(training_model)
    dtype = str(base.compute_dtype).removeprefix("torch.")
    say(f"model: {base.evidence.describe()}")
    say(f"       {trainable:,} of {total:,} parameters train; computing in {dtype}")
    if tokens.new is not None:
        new = f"{len(tokens.new.ids)} new tokens, from {tokens.new.ids[0]} on"
        where = f"the vocabulary matrices now have {resized_to:,} rows" if resized_to else "in rows that no token used"
        say(f"       {new}; {where}")
    for name, part in find_other_parts(model).items():
        say(f"       {name} stays as it is ({sum(p.numel() for p in part.parameters()):,} parameters)")
    if adapted := count_expert_adapters(training_model):
        say(f"       {adapted:,} of them adapt experts")
    elif arguments.lora.use_lora and find_experts(model):
        say("       its experts stay as they are (--lora_experts on adapts them)")
    if base.quantization:
        say(f"       its linear layers: {base.quantization.describe()}")
    if is_rank_0() and is_base and not trains_row(training_model, tokens.stop_id):
        say(
            f"warning: the rows of {tokens.stop} ({tokens.stop_id}) do not train, and a base model has never learnt "
            "them: answers may not end; use --train_embeddings auto (of an adapter: start a new one)"
        )
    check_positions(training_model, longest)
    obstacle = enable_packing(training_model, max_length=longest, dtype=base.compute_dtype)
    packed = "packed sequences" if obstacle is None else f"padded sequences; this model cannot pack: {obstacle}"
    say(f"batches: {packed}")
    if warning := describe_rotary_switch(model.config, longest):
        say(f"batches: {warning}")
    if run.compile_layers:
        compile_layers(training_model)
    generation_config = align_stop_token(model, tokenizer, stop_id=tokens.stop_id, is_base=is_base)
    shard_model(training_model, run, base.compute_dtype)
    return PreparedModel(training_model, generation_config, obstacle, trainable, total, resized_to)


def _count_vocabulary(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)
