"""The base model of a run, before its weights load: which one it is, how it is kept, and whether it is a chat model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tuning.checkpoint.adapter import check_adapter_base, find_trained_quantization, read_adapter
from tuning.checkpoint.manifest import MANIFEST_FILE
from tuning.console import say
from tuning.distributed.processes import on_all_ranks, on_rank_0
from tuning.distributed.sharding import check_quantized_sharding
from tuning.errors import SettingsError
from tuning.machine import process_memory
from tuning.messages import first_line
from tuning.model.base_or_chat import Evidence, judge_base_or_chat
from tuning.model.build import TokensInUse, build_training_model
from tuning.model.loading import choose_dtypes, find_quantization, identify_checkpoint, load_model
from tuning.model.lora_experts import count_expert_adapters
from tuning.model.quantization import Quantization, choose_quantization
from tuning.model.saved_adapter import SavedAdapter
from tuning.model.training_model import TrainingModel
from tuning.settings.arguments import Arguments

T = TypeVar("T")


@dataclass(frozen=True)
class BaseModel:
    """What a run starts from, as far as configuration and a few rows tell.

    path, fingerprint, name, revision: which checkpoint it is (identify_checkpoint). load_dtype, compute_dtype: of its
    weights, and of the computation.
    quantization: of its linear layers in training. adapter: of --lora_weight_path. evidence: base or chat.
    meta_model: on the meta device, with what trains of it, on rank 0; None where it cannot be built, unknown says why.
    process_bytes: memory of this process before.
    """

    path: str
    fingerprint: str
    name: str
    revision: str | None
    load_dtype: torch.dtype
    compute_dtype: torch.dtype
    quantization: Quantization | None
    adapter: SavedAdapter | None
    evidence: Evidence
    meta_model: TrainingModel | None
    unknown: str | None
    process_bytes: int

    @property
    def identity(self) -> dict[str, Any]:
        """For manifests and run.json."""
        return {"path": self.path, "fingerprint": self.fingerprint, "name": self.name, "revision": self.revision}


def inspect_base(arguments: Arguments, tokens: TokensInUse) -> BaseModel:
    """Look at the base model, and at the adapter that training starts from. All processes must call this.

    Raises: SettingsError: no model there, or not one that can be trained as the settings say.
    """
    model_args, lora, run = arguments.model, arguments.lora, arguments.run
    path, cache_dir, trust = model_args.model_name_or_path, model_args.cache_dir, model_args.trust_remote_code
    process_bytes = process_memory()
    identity = identify_checkpoint(path, cache_dir)
    load_dtype, compute_dtype = choose_dtypes(
        use_lora=lora.use_lora,
        pure_bf16=model_args.pure_bf16,
        bf16=run.bf16,
        fp16=run.fp16,
        deepspeed=run.deepspeed is not None,
    )

    def choose() -> Quantization | None:
        own = find_quantization(path, cache_dir=cache_dir, trust_remote_code=trust)
        if lora.q_lora:
            check_quantized_sharding(run)
        return choose_quantization(
            own, path=path, q_lora=lora.q_lora, bits=lora.bits, quant_type=lora.quant_type, dtype=load_dtype
        )

    quantization = on_rank_0(choose)
    adapter = None
    if lora.lora_weight_path:
        directory = Path(lora.lora_weight_path)
        on_all_ranks(lambda: check_adapter_base(directory, identity["fingerprint"]))
        adapter = on_all_ranks(lambda: read_adapter(directory))
        _say_other_quantization(adapter.directory, quantization)
    built: list[TrainingModel] = []

    def judge() -> tuple[Evidence, str | None]:
        model, unknown = _try(
            lambda: load_model(
                path,
                dtype=load_dtype,
                meta=True,
                quantization=quantization,
                cache_dir=cache_dir,
                trust_remote_code=trust,
            )
        )
        evidence = judge_base_or_chat(
            path,
            model,
            stop_id=tokens.stop_id,
            stop=tokens.stop,
            vocabulary_size=tokens.vocabulary_size,
            cache_dir=cache_dir,
            allow_pickle=model_args.allow_pickle,
            trust_remote_code=trust,
        )
        if model is not None:
            training_model, unknown = _try(
                lambda: build_training_model(model, lora, is_base=evidence.is_base, tokens=tokens, adapter=adapter)
            )
            if training_model is not None:
                _check_engine(training_model, run.engine)
                built.append(training_model)
        return evidence, unknown

    evidence, unknown = on_rank_0(judge)
    return BaseModel(
        **identity,
        load_dtype=load_dtype,
        compute_dtype=compute_dtype,
        quantization=quantization,
        adapter=adapter,
        evidence=evidence,
        meta_model=built[0] if built else None,
        unknown=unknown,
        process_bytes=process_bytes,
    )


def _check_engine(training_model: TrainingModel, engine: str) -> None:
    if engine == "zero3" and count_expert_adapters(training_model):
        raise SettingsError(
            "--deepspeed with ZeRO-3: gathers a layer's weights for that layer only, and cannot train adapters of "
            "experts; use finetune/ds_config_zero2.json, --fsdp full_shard, or --lora_experts off"
        )


def _try(build: Callable[[], T]) -> tuple[T | None, str | None]:
    """What a function builds, or why it cannot: code that comes with a model may need values in its tensors."""
    try:
        return build(), None
    except SettingsError:
        raise
    except Exception as error:
        return None, first_line(error)


def _say_other_quantization(adapter: Path, quantization: Quantization | None) -> None:
    if not (adapter / MANIFEST_FILE).is_file():
        return
    was, now = (q.describe() if q else "no quantisation" for q in (find_trained_quantization(adapter), quantization))
    if was != now:
        say(f"adapter: changed since it was trained: {was} -> {now}")
