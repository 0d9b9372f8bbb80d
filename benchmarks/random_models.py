"""Random models in the shapes of cells; a cell's rows, operations and planned memory.

Operations are 4 P_linear + 4 phi H V + attention + 6 P_lora a token, phi the supervised share;
nothing that is recomputed counts.
"""

from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.cells import LENGTHS, SHAPES, Cell
from tuning.machine import memory_limit
from tuning.model.lora import add_lora
from tuning.model.quantization import Quantization, quantize_meta_model, replace_quantized_layers
from tuning.model.quantized_linear import GptqLinear
from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing
from tuning.planning.memory import Memory, MicroBatchShape, estimate_memory
from tuning.planning.operations import count_operations

GROUP_SIZE = 128  # of GPTQ
QUANTIZATIONS = {
    "qlora_nf4": Quantization("bitsandbytes", 4, "nf4", double=True),
    "qlora_gptq": Quantization("gptq", 4, group_size=GROUP_SIZE),
}


def choose_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- models ----


def build_config(shape: str) -> Any:
    """The configuration of a model."""
    sizes = dict(SHAPES[shape])
    heads, vocab = sizes.pop("heads"), sizes.pop("vocab")
    common: dict[str, Any] = dict(
        num_attention_heads=heads, num_key_value_heads=sizes.pop("key_heads", heads), vocab_size=vocab,
        max_position_embeddings=max(LENGTHS), tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return (Qwen3Config if "head_dim" in sizes else Qwen2Config)(**sizes, **common)


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A random model, made where it is used."""
    config = build_config(shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return (Qwen3ForCausalLM if isinstance(config, Qwen3Config) else Qwen2ForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)


def adapt(model: Any, cell: Cell) -> tuple[Any, Any]:
    """(model with what trains of it, trained rows or None), as finetune.py makes them."""
    if cell.method == "full":
        return model, None
    embeddings = {"lora_emb": "full", "lora_tokens": "tokens"}.get(cell.method, "off")
    lora = {"r": cell.rank, "alpha": 16, "dropout": cell.dropout}
    return add_lora(model, **lora, embeddings=embeddings, token_ids=list(range(26)))


def quantize(model: Any, method: str, *, ours: bool) -> None:
    """Quantise all linear layers but the output, where they are; with the library's layers, or ours."""
    device, dtype = model.device, model.dtype
    if method == "qlora_gptq":
        if not ours:
            raise NotImplementedError("not measured: GPTQ with peft's own layers")
        quantize_meta_model(model, QUANTIZATIONS[method], dtype, kept=[])
        for module in (m for m in model.modules() if isinstance(m, GptqLinear)):
            packed = torch.empty_like(module.weight, device=device).random_()
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.zeros = torch.full_like(module.zeros, 0x77777777, device=device)
            module.scales = torch.full_like(module.scales, 1e-3, device=device)
            module.group_index = (torch.arange(module.in_features, device=device) // GROUP_SIZE).int()
        return
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(device)
            layer.bias = module.bias
            model.set_submodule(name, layer)
    if ours:
        replace_quantized_layers(model)


# ---- what a step is ----


def make_rows(cell: Cell, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of one step's rows: random tokens, the last ones supervised."""
    shape = (cell.rows_per_step, cell.length)
    ids = torch.randint(30, vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()
    first = cell.length - cell.targets_per_row
    return [(row, [-100] * first + row[first:]) for row in ids]


def count_work(cell: Cell) -> int:
    """Operations of a step."""
    with torch.device("meta"):
        model = build_model(cell.shape, torch.device("meta"), torch.float32)
    flops = count_operations(TrainingModel(*adapt(model, cell)))
    assert flops is not None
    return flops.of({
        "num_tokens": cell.tokens_per_step,
        "num_targets": cell.rows_per_step * cell.targets_per_row,
        "num_pairs": cell.rows_per_step * cell.length**2,
    })  # fmt: skip


def plan_memory(cell: Cell, *, device_type: str, process_bytes: int = 0) -> Memory:
    """The plan of a step, of a model without storage: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    model = build_model(cell.shape, torch.device("meta"), dtype)
    if cell.method in QUANTIZATIONS:
        quantize_meta_model(model, QUANTIZATIONS[cell.method], dtype, kept=[])
    if cell.lean:
        enable_gradient_checkpointing(model)
    training_model = TrainingModel(*adapt(model, cell))
    model.set_attn_implementation("packed_rows")
    return estimate_memory(
        training_model,
        MicroBatchShape((cell.length,) * cell.rows, cell.rows * cell.targets_per_row, packed=True),
        dtype=dtype,
        engine="single",
        num_processes=1,
        optimizer="adamw_torch",
        device_type=device_type,
        process_bytes=process_bytes,
        accumulates=cell.micro_batches > 1,
        device_memory=memory_limit(device) if (device := choose_device()).type == device_type == "cuda" else None,
    )
