"""Adapter -> standalone checkpoint, verified by its logits."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuning.adapters import load_lora, read_adapter
from tuning.args import SettingsError
from tuning.checkpoint import save_full_model, write_manifest
from tuning.model import TrainingModel, load_model, local_directory
from tuning.token_rows import TokenRows

# Largest difference of logits that rounding explains, relative to the largest logit, by the merged weights' dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """Adapter against merged model on probe texts: logits of every position."""

    max_difference: float
    max_logit: float
    top1_agreement: float

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"max |dlogits| {self.max_difference:.2e} (largest logit {self.max_logit:.1f}), "
            f"top-1 {100 * self.top1_agreement:.4g} %"
        )


def load_adapter_model(
    adapter: Path, base: str | None, *, dtype: torch.dtype | str, cache_dir: str | None, trust_remote_code: bool
) -> tuple[TrainingModel, str]:
    """The base model with an adapter on it, in eval mode, and the base's directory.

    Raises: SettingsError: no adapter, no base, or they do not fit.
    """
    config, _ = read_adapter(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise SettingsError(f"{adapter}: does not say which base model it belongs to; name it with --base")
    try:
        model = load_model(base, dtype=dtype, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except SettingsError as error:
        raise SettingsError(f"{error} (the adapter's base model; if it has moved, name it with --base)") from None
    peft_model, rows = load_lora(model, adapter)
    training_model = TrainingModel(peft_model, rows)
    return training_model.eval(), str(local_directory(base, cache_dir))


def merge_weights(training_model: TrainingModel) -> PreTrainedModel:
    """Fold adapters and trained rows or matrices into the base weights. Tied weights stay tied.

    Each matrix is merged in float32 and rounded once to its own dtype.
    """
    peft_model, rows = training_model.model, training_model.token_rows
    assert isinstance(peft_model, PeftModel)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge(safe_merge=True)
            weight.data = weight.data.to(dtype)
    model = peft_model.unload()
    assert isinstance(model, PreTrainedModel)
    if rows is not None:
        assert isinstance(rows, TokenRows)
        rows.write_into(model)
    return model


def save_merged(
    model: PreTrainedModel, adapter: Path, base: str, out: Path, *, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Write the merged model with the adapter's tokenizer, chat template and generation config; manifest last."""
    out.mkdir(parents=True, exist_ok=True)
    generation_config = GenerationConfig.from_pretrained(str(adapter))
    eos = generation_config.eos_token_id
    stop_id = eos[0] if isinstance(eos, list) else eos
    model.config.get_text_config().eos_token_id = stop_id
    model.generation_config = generation_config
    save_full_model(model, out, dtype=dtype, max_shard_size=max_shard_size)
    own = {"adapter_config.json", "generation_config.json", "run.json", "manifest.json", "config.json"}
    for file in adapter.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in own:
            shutil.copy2(file, out / file.name)
    if getattr(model.config, "auto_map", None):
        for file in Path(base).glob("*.py"):
            shutil.copy2(file, out / file.name)
    write_manifest(out)


@torch.no_grad()
def compute_probe_logits(model: torch.nn.Module, probes: list[list[int]]) -> list[Tensor]:
    """Logits of every position of each probe: float32, [T, V], on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in probes]


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Comparison:
    """Compare two models' logits on the same probes."""
    positions = sum(len(logits) for logits in expected)
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, actual, strict=True))
    return Comparison(
        max_difference=max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True)),
        max_logit=max(logits.abs().max().item() for logits in expected),
        top1_agreement=agreeing / positions,
    )


def build_probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts in several languages, rendered with the chat template."""
    questions = ["Who are you?", "请用一句话介绍你自己。", "def fibonacci(n):", "1 + 1 = ?", "Write a short poem 🙂"]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
