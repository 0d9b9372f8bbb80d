"""Loss, gradients and attention on the device at hand, each against fp32 on the same device.

In half precision nothing equals fp32. So transformers and peft alone, one row at a time, are measured in the same
precision, and ours may be twice as far off as they are, and no further.
"""

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.cells import Figures
from benchmarks.random_models import choose_device
from benchmarks.receipt_stages.one_job import CheckError
from data_utils.micro_batch import pack_rows
from tuning.checkpoint.changes import merge_rows
from tuning.model.attention import attend
from tuning.model.lora import add_lora
from tuning.model.lora_linear import FusedLoraLinear
from tuning.model.packing import enable_packing
from tuning.model.quantized_linear import FourBitLinear
from tuning.model.training_model import TrainingModel

_EXACT, _FACTOR = 1e-4, 2.0  # relative errors: of fp32; of half precision over that of transformers
_SCALE = 1024.0  # of the loss, so that gradients in fp16 do not vanish
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "packed": (Qwen3Config, Qwen3ForCausalLM, {}),
    "windows": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "experts": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def list_checks() -> dict[str, Callable[[], Figures]]:
    """By name. Each gives its errors, or raises CheckError."""
    checks: dict[str, Callable[[], Figures]] = {}
    for kind, dtype in itertools.product(_MODELS, _DTYPES):
        checks[f"{kind}, {dtype}"] = functools.partial(check_model, kind, _DTYPES[dtype])
    for window, dtype in itertools.product((None, 16), ("bf16", "fp16")):
        name = "attention" if window is None else "attention in a window"
        checks[f"{name}, {dtype}"] = functools.partial(check_attention, _DTYPES[dtype], window)
    return {**checks, "NF4, bf16": check_nf4, "merge": check_merge}


def _sizes() -> tuple[dict[str, int], list[int]]:
    """(sizes of a model, lengths of rows): tiny ones without a GPU."""
    big = choose_device().type == "cuda"
    sizes = dict(
        hidden_size=1024 if big else 64, intermediate_size=2816 if big else 128, num_hidden_layers=4 if big else 2,
        num_attention_heads=8 if big else 4, num_key_value_heads=2, head_dim=128 if big else 16,
        vocab_size=32_000 if big else 512, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    return sizes, [1500, 7, 700, 2, 1300, 300] if big else [40, 7, 21, 2]


# ---- whole models ----


def check_model(kind: str, dtype: torch.dtype) -> Figures:
    """Rows packed, with our LoRA, loss and experts, against rows alone by transformers and peft."""
    device = choose_device()
    config_class, model_class, changes = _MODELS[kind]
    sizes, lengths = _sizes()
    torch.manual_seed(0)
    with device:
        model = model_class(config_class(**sizes, **changes))
    peft_model, _ = add_lora(model, r=8, alpha=16, dropout=0.0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    peft_model.to(device)
    rows = [np.random.default_rng(number).integers(3, sizes["vocab_size"], n) for number, n in enumerate(lengths)]
    theirs = copy_as_pefts(peft_model)
    if kind == "experts":
        theirs.get_base_model().set_experts_implementation("eager")
    exact = _compute(theirs, functools.partial(_sum_alone, theirs, rows), torch.float32)
    training_model = TrainingModel(peft_model)
    obstacle = enable_packing(training_model, max_length=max(lengths), dtype=dtype)
    assert obstacle is None, obstacle
    batch = {name: _to(value, device) for name, value in pack_rows([(ids, _labels(ids), None) for ids in rows]).items()}
    ours = _compute(peft_model, lambda: training_model.train()(**batch), dtype)
    if dtype == torch.float32:
        return _judge(_compare(exact, ours), dict.fromkeys(("loss_error", "gradient_error"), 0.0), exact=True)
    same = _compute(theirs, functools.partial(_sum_alone, theirs, rows), dtype)
    return _judge(_compare(exact, ours), _compare(exact, same), exact=False)


def copy_as_pefts(peft_model: Any) -> Any:
    """A copy that peft and transformers compute."""
    theirs = copy.deepcopy(peft_model)
    for module in theirs.modules():
        vars(module).pop("forward", None)
        if isinstance(module, FusedLoraLinear):
            module.__class__ = LoraLinear
    return theirs


@contextlib.contextmanager
def _transformers_rotary(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' own, also where a TrainingModel was built before."""
    namespace = vars(sys.modules[type(model).__module__])
    before = namespace["apply_rotary_pos_emb"]
    namespace["apply_rotary_pos_emb"] = getattr(before, "reference", before)
    try:
        yield
    finally:
        namespace["apply_rotary_pos_emb"] = before


def _labels(ids: Any) -> Any:
    """The later half is supervised."""
    return np.where(np.arange(len(ids)) < len(ids) // 2, -100, ids)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _sum_alone(model: Any, rows: list[Any]) -> Tensor:
    """Summed loss of rows, one by one, by transformers."""
    total: Any = 0.0
    for ids in rows:
        inputs, labels = (torch.tensor(each, device=model.device) for each in (ids, _labels(ids)))
        with _transformers_rotary(model.get_base_model()):
            logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum")
    return total


def _compute(model: nn.Module, give_sum: Callable[[], Tensor], dtype: torch.dtype) -> tuple[float, Tensor]:
    """(loss, all gradients in one vector)."""
    model.zero_grad()
    device = choose_device()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = give_sum()
    (loss * _SCALE / 1000).backward()
    named = sorted((name, p) for name, p in model.named_parameters() if p.grad is not None)
    return loss.item(), torch.cat([p.grad.double().flatten() for _, p in named])


def _compare(exact: tuple[float, Tensor], other: tuple[float, Tensor]) -> Figures:
    (loss, gradient), (other_loss, other_gradient) = exact, other
    return {
        "loss_error": abs(other_loss - loss) / abs(loss),
        "gradient_norm_error": abs(float(other_gradient.norm() / gradient.norm()) - 1),
        "gradient_error": _distance(other_gradient, gradient),
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of all numbers."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _judge(ours: Figures, theirs: Figures, *, exact: bool) -> Figures:
    """Put errors side by side. Raises: CheckError: ours is too large."""
    figures: Figures = {name: float(f"{value:.3g}") for name, value in ours.items()}
    if not exact:
        figures |= {f"{name}_of_transformers": float(f"{theirs[name]:.3g}") for name in theirs}
    for name, value in ours.items():
        # The error of a sum may be nothing by chance: gradients, which are many numbers, say how exact a precision is.
        limit = _EXACT if exact else _FACTOR * max(theirs[name], theirs["gradient_error"] / 4) + _EXACT
        if not value <= limit:
            raise CheckError(f"{name} {value:.3g}, at most {limit:.3g}", figures)
    return figures


# ---- pieces ----


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = 1


def check_attention(dtype: torch.dtype, window: int | None) -> Figures:
    """Our attention of packed rows against a masked product for each row. kernel: whether torch's varlen one ran."""
    from tuning.model.attention import _kernel_takes

    device = choose_device()
    sizes, lengths = _sizes()
    heads, key_heads, width = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
    torch.manual_seed(0)
    states = [torch.randn(1, n, sum(lengths), width, device=device) for n in (heads, key_heads, key_heads)]
    direction = torch.randn(1, sum(lengths), heads, width, device=device)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def run(give: Callable[..., Tensor], of: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = [each.to(of).requires_grad_() for each in states]
        output = give(*inputs)
        gradients = torch.autograd.grad((output.float() * direction).sum(), inputs)
        return output.detach(), torch.cat([each.double().flatten() for each in gradients])

    def ours(*inputs: Tensor) -> Tensor:
        options: dict[str, Any] = {"packed_lengths": lengths, "packed_starts": starts, "sliding_window": window}
        return attend(_Module(), *inputs, None, **options)[0]

    def by_row(*inputs: Tensor) -> Tensor:
        parts = zip(*(each.split(lengths, 2) for each in inputs), strict=True)
        return torch.cat([_attend_row(*part, window) for part in parts], 2).transpose(1, 2)

    exact, found, same = run(by_row, torch.float32), run(ours, dtype), run(by_row, dtype)
    errors, theirs = (
        {"output_error": _distance(each[0], exact[0]), "gradient_error": _distance(each[1], exact[1])}
        for each in (found, same)
    )
    query, _, value = (each.to(dtype) for each in states)
    return {"kernel": _kernel_takes(query, value, 0.0, window), **_judge(errors, theirs, exact=False)}


def _attend_row(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    place = torch.arange(length, device=query.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or length))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def check_nf4() -> Figures:
    """A quantised layer's product and gradient against those of its dequantised matrix."""
    import bitsandbytes as bnb

    device, dtype = choose_device(), torch.bfloat16
    inside, outside = (1024, 2816) if device.type == "cuda" else (64, 128)
    torch.manual_seed(0)
    weight = torch.randn(outside, inside, dtype=dtype) * 0.02
    layer = bnb.nn.Linear4bit(inside, outside, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    packed = FourBitLinear.take(layer)
    matrix = packed.dequantize().detach()
    x, direction = torch.randn(256, inside, device=device), torch.randn(256, outside, device=device)

    def run(product: Callable[[Tensor], Tensor], of: torch.dtype) -> tuple[Tensor, Tensor]:
        given = x.to(of).requires_grad_()
        output = product(given)
        return output.detach(), torch.autograd.grad((output.float() * direction).sum(), given)[0]

    exact = run(lambda given: given @ matrix.float().t(), torch.float32)
    found, same = run(packed, dtype), run(lambda given: given @ matrix.to(dtype).t(), dtype)
    errors, theirs = (
        {"output_error": _distance(each[0], exact[0]), "gradient_error": _distance(each[1], exact[1])}
        for each in (found, same)
    )
    quantised = _distance(matrix.float(), weight.float().to(device))
    if not quantised < 0.15:  # of numbers like weights NF4 loses about 0.1
        raise CheckError(f"the dequantised matrix is {quantised:.3g} off", {"quantisation_error": quantised})
    return {"quantisation_error": round(quantised, 4), **_judge(errors, theirs, exact=False)}


def check_merge() -> Figures:
    """A merged matrix against the sum in float64."""
    device = choose_device()
    outside, inside, rank = (2816, 1024, 16) if device.type == "cuda" else (128, 64, 4)
    torch.manual_seed(0)
    weight = (torch.randn(outside, inside) * 0.02).to(device, torch.bfloat16)
    up, down = torch.randn(outside, rank, device=device) * 0.01, torch.randn(rank, inside, device=device) * 0.01
    merged = merge_rows("weight", weight, [(up, down)], torch.empty(outside, inside, device=device))
    expected = weight.double() + up.double() @ down.double()
    return _judge({"merge_error": _distance(merged, expected)}, {}, exact=True)
