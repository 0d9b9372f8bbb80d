"""One quantised matrix at a time, from the tensors that a checkpoint's files have for it."""

import torch
from torch import Tensor

from tuning.errors import SettingsError
from tuning.model.quantization import Quantization, require
from tuning.model.quantized_linear import GptqLinear

_STATE = "weight.quant_state."


def quantize_and_dequantize(weight: Tensor, quantization: Quantization) -> Tensor:
    """What a weight became when an adapter was trained on it: rounded to 4 or 8 bits at loading. Shapes: [out, in]."""
    require("bitsandbytes")
    from bitsandbytes import functional

    weight = weight.to(getattr(torch, str(quantization.dtype)))
    if quantization.bits == 8:
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return packed * (scales.float() / 127)[:, None]
    packed, state = functional.quantize_4bit(
        weight.contiguous(), compress_statistics=quantization.double, quant_type=str(quantization.quant_type)
    )
    return functional.dequantize_4bit(packed, state)


def dequantize_pieces(
    pieces: dict[str, Tensor], quantization: Quantization, in_features: int, out_features: int, gptq_format: str
) -> Tensor:
    """The weight, [out, in], of a layer of a quantised checkpoint.

    pieces: its tensors by the ends of their names ("weight.absmax", "qweight"). gptq_format: "gptq", whose files have
    zeros less one, or "gptq_v2".

    Raises: SettingsError: pieces are missing, or of another kind.
    """
    if quantization.method == "gptq":
        return _dequantize_gptq(pieces, quantization, in_features, out_features, gptq_format)
    require("bitsandbytes")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = _take(pieces, "weight")
    if quantization.bits == 8:
        return weight * (_take(pieces, "SCB").float() / 127)[:, None]
    if not any(name.startswith(_STATE) for name in pieces):
        raise SettingsError("its weights are not quantised as its configuration says")
    state = {name.removeprefix("weight."): value for name, value in pieces.items() if name != "weight"}
    return dequantize_4bit(weight, QuantState.from_dict(state, device=torch.device("cpu")))


def _dequantize_gptq(
    pieces: dict[str, Tensor], quantization: Quantization, in_features: int, out_features: int, gptq_format: str
) -> Tensor:
    bits = quantization.bits
    zeros = _take(pieces, "qzeros")
    if gptq_format == "gptq":
        zeros = zeros + sum(1 << shift for shift in range(0, 32, bits))  # one to each of a word's
    layer = GptqLinear(
        in_features,
        out_features,
        _take(pieces, "qweight"),
        None,
        bits=bits,
        zeros=zeros,
        scales=_take(pieces, "scales"),
        group_index=_take(pieces, "g_idx"),
    )
    return layer.dequantize()


def _take(pieces: dict[str, Tensor], name: str) -> Tensor:
    if name not in pieces:
        raise SettingsError(f"its weights are not quantised as its configuration says: no {name}")
    return pieces[name]
