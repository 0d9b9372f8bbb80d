"""Adapter -> standalone checkpoint, verified by its logits."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuning.checkpoint.adapter import (
    check_adapter_base,
    find_trained_quantization,
    load_lora,
    read_adapter,
    read_adapter_config,
)
from tuning.checkpoint.manifest import MANIFEST_FILE
from tuning.checkpoint.older_readers import add_old_names
from tuning.checkpoint.result import gather_full_state, save_full_model
from tuning.errors import SettingsError, explain_bad_files
from tuning.messages import first_line
from tuning.model.loading import (
    Trust,
    find_quantization,
    hide_gptqmodel,
    identify_checkpoint,
    load_generation_config,
    load_model,
    local_directory,
)
from tuning.model.new_tokens import resize_for_adapter
from tuning.model.quantization import Quantization, dequantize
from tuning.model.quantized_linear import QuantizedLinear
from tuning.model.stop_token import list_eos_ids
from tuning.model.training_model import TrainingModel

# Largest difference of float32 logits that rounding explains, relative to the largest logit.
TOLERANCE = 1e-4

_PROBE_TOKENS = 2048  # of a template that writes pages around a question, the last ones
_QUESTIONS = ["Who are you?", "请用一句话介绍你自己。", "def fibonacci(n):", "1 + 1 = ?", "Write a short poem 🙂"]


@dataclass(frozen=True)
class Comparison:
    """Two models' logits on probe texts, at every position."""

    max_difference: float
    max_logit: float
    top1_agreement: float

    @property
    def holds(self) -> bool:
        """Whether rounding in float32 explains the difference; a NaN does not, nor a dead model."""
        return self.max_logit > 0 and self.max_difference <= TOLERANCE * max(1.0, self.max_logit)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"max |dlogits| {self.max_difference:.2e} (largest logit {self.max_logit:.1f}), "
            f"top-1 {100 * self.top1_agreement:.4g} %"
        )


_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json"),
)


def find_base(adapter: Path, base: str | None, cache_dir: str | None, *, other: bool = False) -> Path:
    """Directory of the base model: the one named, or the one the adapter names.

    other: it may be another one than the adapter was trained on.

    Raises: SettingsError: no adapter there, or no base.
    """
    config = read_adapter_config(adapter)
    named = base or config.base_model_name_or_path
    if not named:
        raise SettingsError(f"{adapter}: does not say which base model it belongs to; name it with --base")
    try:
        directory = local_directory(named, cache_dir, None if base else config.revision)
    except (OSError, ValueError):
        raise SettingsError(f"{named}: no such model (the adapter's base model); name it with --base") from None
    if not (directory / "config.json").is_file():
        raise SettingsError(f"{directory}: no config.json, so no model; name the adapter's base model with --base")
    if not other:
        check_adapter_base(adapter, identify_checkpoint(str(directory))["fingerprint"])
    return directory


def choose_onto(
    adapter: Path, onto: str | None, base: str | None, cache_dir: str | None, *, trust: Trust
) -> Quantization | None:
    """Quantisation of the model that the adapter was trained on, after checking --onto; None if it was not quantised.

    onto: of the command line, "dequantized", "base" or None.

    Raises: SettingsError: onto has no effect, or the unquantised base is not known.
    """
    trained = find_trained_quantization(adapter)
    if trained is None and not (adapter / MANIFEST_FILE).is_file():  # a plain peft adapter: its base says it
        for name in filter(None, (read_adapter_config(adapter).base_model_name_or_path, base)):
            trained = trained or find_quantization(
                str(name), cache_dir=cache_dir, trust_remote_code=trust.trust_remote_code
            )
    if trained is None and onto is not None:
        raise SettingsError(f"--onto {onto}: has no effect; {adapter} was not trained on a quantised model")
    if onto == "base" and trained is not None and trained.dtype is None and base is None:
        raise SettingsError(
            f"--onto base: {adapter} was trained on a checkpoint that is quantised itself; name the unquantised model "
            "with --base"
        )
    return trained


def check_same_origin(base: Path, trained_on: Path, *, trust: Trust) -> None:
    """Raises: SettingsError: a quantised checkpoint was not made from this unquantised one, by some of its layers."""
    plain = dict(load_model(str(base), dtype="auto", **vars(trust)).named_modules())
    packed = load_model(str(trained_on), dtype="auto", **vars(trust))
    layers = [(name, module) for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)]
    for name, layer in layers[:: max(1, len(layers) // 4)]:
        weight, dequantized = getattr(plain.get(name), "weight", None), layer.dequantize().float()
        same = weight is not None and weight.shape == dequantized.shape
        if weight is None or not same or (weight.float() - dequantized).norm() > 0.5 * dequantized.norm():
            raise SettingsError(f"--base {base}: {trained_on} was not made from it ({name} is another)")


def load_base(base: Path, quantization: Quantization | None, *, trust: Trust) -> PreTrainedModel:
    """The model to merge onto, in float32: as it is, or quantised as in training and dequantised."""
    dtype = getattr(torch, quantization.dtype) if quantization and quantization.dtype else torch.float32
    model = load_model(str(base), dtype=dtype, quantization=quantization, **vars(trust))
    return dequantize(model)


def compute_expected_logits(
    adapter: Path, base: Path, quantization: Quantization | None, probes: list[list[int]], *, trust: Trust
) -> list[Tensor]:
    """Logits of base and adapter as peft itself loads them: independent code, so that our mistakes show."""
    saved = read_adapter(adapter)  # a damaged file is one line here, and a traceback in peft
    model = load_base(base, quantization, trust=trust)
    resize_for_adapter(model, saved.config, saved.state)
    hide_gptqmodel()
    with explain_bad_files(f"{adapter}: peft cannot load it"):
        peft_model = PeftModel.from_pretrained(model, str(adapter))
    return compute_logits(peft_model.eval(), probes)


def merge_adapter(adapter: Path, base: Path, quantization: Quantization | None, *, trust: Trust) -> PreTrainedModel:
    """The base model in float32 with adapters and trained rows or matrices folded in. Tied weights stay tied."""
    model = load_base(base, quantization, trust=trust)
    return merge_weights(TrainingModel(*load_lora(model, adapter)))


def merge_weights(training_model: TrainingModel) -> PreTrainedModel:
    """Fold adapters and trained rows or matrices into the base weights, which must be float32."""
    peft_model, rows = training_model.model, training_model.token_rows
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            try:
                module.merge(safe_merge=True)
            except Exception as error:  # not finite, or a kind that peft cannot merge
                raise SettingsError(f"the adapter cannot be merged: {first_line(error)}") from None
    model = peft_model.unload()
    if rows is not None:
        rows.write_into(model)
    return model.eval()


def save_merged(
    model: PreTrainedModel,
    adapter: Path,
    base: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_size: str,
    trust: Trust,
) -> None:
    """Write the merged model with the adapter's tokenizer, chat template and generation config."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out}: cannot be made: {error.strerror}") from None
    # A plain peft adapter brings none of these along; then they are the base's.
    source = adapter if (adapter / "generation_config.json").is_file() else base
    if (generation_config := load_generation_config(str(source))) is not None:
        model.generation_config = generation_config
        model.config.get_text_config().eos_token_id = next(iter(list_eos_ids(model.generation_config)), None)
    _describe_tying(model)
    state = gather_full_state(model, base, dtype)
    save_full_model(model, base, out, state, dtype=dtype, max_shard_size=max_shard_size)
    copy_tokenizer(tokenizer_source(adapter, base), out)
    if trust.trust_remote_code and getattr(model.config, "auto_map", None):
        for file in base.glob("*.py"):
            shutil.copy2(file, out / file.name)


def _describe_tying(model: PreTrainedModel) -> None:
    """Let the configuration say that the two vocabulary matrices are two, where they were trained apart."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def changes_nothing(adapter: Path) -> bool:
    """Whether an adapter is as fresh ones are: every B is zero, and nothing else was trained."""
    state = read_adapter(adapter).state
    trained = [tensor for name, tensor in state.items() if "lora_A" not in name and "lora_embedding_A" not in name]
    return bool(trained) and all("lora_" in name for name in state) and not any(bool(t.any()) for t in trained)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files and its chat templates as they are, and nothing else."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            (out / file.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copy2(file, out / file.relative_to(source))
    add_old_names(out)


def tokenizer_source(adapter: Path, base: Path) -> Path:
    """Where the tokenizer comes from: the adapter's directory, or the base's for a plain peft adapter."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def verify_saved(
    model: PreTrainedModel,
    out: Path,
    expected: list[Tensor],
    probes: list[list[int]],
    *,
    dtype: torch.dtype,
    trust: Trust,
) -> Comparison:
    """Check that OUT loads as the merged model, and compare the merged model's logits with the adapter's.

    The file's tensors must be the merged ones, rounded to dtype; the logits are those of a freshly loaded model with
    the float32 tensors put in, so that nothing left over in the merged object can hide a mistake.

    Raises: SettingsError: a tensor loads as something else.
    """
    saved = load_model(str(out), dtype=dtype, **vars(trust)).eval()
    merged, rounded = model.state_dict(), saved.state_dict()
    for name, value in merged.items():
        if name not in rounded or not torch.equal(rounded[name], value.to(rounded[name].dtype)):
            raise SettingsError(f"{out}: {name} does not load as it was saved")
    saved.load_state_dict(merged, assign=True)
    return compare_logits(expected, compute_logits(saved, probes))


def measure_distance(
    out: Path, expected: list[Tensor], probes: list[list[int]], *, dtype: torch.dtype, trust: Trust
) -> Comparison:
    """How far the saved weights, rounded to dtype, are from other logits; computed in float32."""
    saved = load_model(str(out), dtype=dtype, **vars(trust))
    return compare_logits(expected, compute_logits(saved.float().eval(), probes))


@torch.no_grad()
def compute_logits(model: nn.Module, probes: list[list[int]]) -> list[Tensor]:
    """Logits of every position of each probe: float32, [T, V], on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in probes]


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Comparison:
    """Compare two models' logits on the same probes."""
    positions = sum(len(logits) for logits in expected)
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, actual, strict=True))
    return Comparison(
        max_difference=float(torch.stack([(a - b).abs().max() for a, b in zip(expected, actual, strict=True)]).max()),
        max_logit=max(logits.abs().max().item() for logits in expected),
        top1_agreement=agreeing / positions,
    )


def build_probes(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> list[list[int]]:
    """Token ids of prompts in several languages, rendered with the chat template, and those whose rows were trained."""
    indices = read_adapter_config(adapter).trainable_token_indices or []
    by_matrix = indices.values() if isinstance(indices, dict) else [indices]
    trained = sorted(
        {token_id for ids in by_matrix if isinstance(ids, list) for token_id in ids if type(token_id) is int}
    )
    with explain_bad_files(f"{tokenizer.name_or_path}: the chat template cannot render a question"):
        probes = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in _QUESTIONS
        ]
        if not all(probes):
            raise ValueError("it writes nothing")
        return [ids[-_PROBE_TOKENS:] for ids in [*probes, *([trained] if trained else [])]]
