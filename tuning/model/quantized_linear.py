"""Linear layers with frozen 4- or 8-bit weights: bitsandbytes' NF4, FP4 and Int8, and GPTQ.

The libraries read and quantise. The product is our own: only the quantised weight is kept for the backward pass, and
it is dequantised again there, so that the gradient is that of the dequantised matrix, also after an evaluation. The
libraries' layers switch to other code for inference, which some never leave again, and some keep every layer's
dequantised matrix until backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuning.errors import SettingsError

_DEQUANTIZED_CHANNELS = 1024  # input channels that GPTQ dequantises at a time; a multiple of 32
_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes: weights per scale, scales per nested scale


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantised, frozen weight.

    weight: the quantised numbers, as the library stores them. tables: of scales, by the names of their buffers.
    """

    def __init__(self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None, **tables: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.data, requires_grad=False))
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def dequantize(self) -> Tensor:
        """The weight, [out, in], in the dtype that its scales give."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Move, but never cast: scales in half precision (nested ones above all) would change the weights.
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, with the dequantised weight in x's dtype (autocast's, where it is on)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            result: Tensor = _DequantizedProduct.apply(x.to(dtype), self)
            return result if self.bias is None else result + self.bias.to(dtype)


class _DequantizedProduct(torch.autograd.Function):
    """x @ weight.T. The weight is dequantised in each of both passes, and not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.dequantize().to(grad_output.dtype), None


class FourBitLinear(QuantizedLinear):
    """bitsandbytes' NF4 or FP4. weight: [in * out / 2] uint8, two weights a byte, 64 weights a scale."""

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(self, *args: Any, quant_type: str, dtype: torch.dtype, **tables: Any):
        super().__init__(*args, **tables)
        self.quant_type, self.dequantized_dtype = quant_type, dtype

    @classmethod
    def take(cls, layer: Any) -> "FourBitLinear":
        """From bitsandbytes' layer."""
        state = getattr(layer.weight, "quant_state", None)
        if state is None or state.blocksize != _BLOCK or (state.nested and state.state2.blocksize != _NESTED_BLOCK):
            raise SettingsError("its weights are not quantised as its configuration says")
        tables = {"absmax": state.absmax, "code": state.code}
        if state.nested:
            tables |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
        return cls(
            layer.in_features,
            layer.out_features,
            layer.weight.data.view(torch.uint8).flatten(),
            layer.bias,
            quant_type=state.quant_type,
            dtype=state.dtype,
            **tables,
        )

    @classmethod
    def meta_like(cls, linear: nn.Linear, *, quant_type: str, double: bool, dtype: torch.dtype) -> "FourBitLinear":
        """Of the same shapes, without storage."""
        num_weights = linear.in_features * linear.out_features
        num_blocks = -(-num_weights // _BLOCK)
        tables = {
            "absmax": _meta(num_blocks, dtype=torch.uint8 if double else torch.float32),
            "code": _meta(16, dtype=torch.float32),
        }
        if double:
            nested = {"nested_absmax": (-(-num_blocks // _NESTED_BLOCK),), "nested_code": (256,), "offset": ()}
            tables |= {name: _meta(*shape, dtype=torch.float32) for name, shape in nested.items()}
        packed = _meta(-(-num_weights // 2), dtype=torch.uint8)
        shape = linear.in_features, linear.out_features
        return cls(*shape, packed, linear.bias, quant_type=quant_type, dtype=dtype, **tables)

    def dequantize(self) -> Tensor:
        """The weight, [out, in]."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        nested = None
        if hasattr(self, "offset"):
            nested = QuantState(self.nested_absmax, code=self.nested_code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        state = QuantState(
            self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=_BLOCK,
            quant_type=self.quant_type,
            dtype=self.dequantized_dtype,
            offset=self.offset if nested is not None else None,
            state2=nested,
        )
        return dequantize_4bit(self.weight.view(-1, 1), state)


class Int8Linear(QuantizedLinear):
    """bitsandbytes' Int8 weights, a scale an output channel. weight: [out, in] int8.

    Activations stay as they are: the library's own product rounds them to 8 bits as well.
    """

    scales: Tensor

    @classmethod
    def take(cls, layer: Any) -> "Int8Linear":
        """From bitsandbytes' layer."""
        if getattr(layer.weight, "SCB", None) is None:
            raise SettingsError("its weights are not quantised as its configuration says")
        scales = layer.weight.SCB.float() / 127
        return cls(layer.in_features, layer.out_features, layer.weight.data, layer.bias, scales=scales)

    @classmethod
    def meta_like(cls, linear: nn.Linear) -> "Int8Linear":
        """Of the same shapes, without storage."""
        rows, columns = linear.out_features, linear.in_features
        scales = _meta(rows, dtype=torch.float32)
        return cls(columns, rows, _meta(rows, columns, dtype=torch.int8), linear.bias, scales=scales)

    def dequantize(self) -> Tensor:
        """The weight, [out, in]."""
        return self.weight * self.scales[:, None]


class GptqLinear(QuantizedLinear):
    """GPTQ's weights. weight: [in * bits / 32, out] int32, of consecutive input channels each.

    zeros: [groups, out * bits / 32] int32, of consecutive output channels. scales: [groups, out]. group_index: [in],
    each input channel's group.
    """

    zeros: Tensor
    scales: Tensor
    group_index: Tensor

    def __init__(self, *args: Any, bits: int, **tables: Any):
        super().__init__(*args, **tables)
        self.bits = bits

    @classmethod
    def take(cls, layer: Any) -> "GptqLinear":
        """From gptqmodel's layer, which keeps zeros as they are (format 2) whatever the file has."""
        in_features, out_features = len(layer.g_idx), layer.scales.shape[1]
        if layer.pack_dtype != torch.int32 or layer.qzero_format() != 2 or getattr(layer, "planar", False):
            raise SettingsError(f"its layers store weights in a way that is not supported ({type(layer).__name__})")
        tables = {"zeros": layer.qzeros, "scales": layer.scales, "group_index": layer.g_idx}
        return cls(in_features, out_features, layer.qweight, layer.bias, bits=layer.bits, **tables)

    @classmethod
    def meta_like(cls, linear: nn.Linear, *, bits: int, group_size: int) -> "GptqLinear":
        """Of the same shapes, without storage."""
        rows, columns = linear.in_features, linear.out_features
        groups = -(-rows // group_size) if group_size > 0 else 1
        return cls(
            rows,
            columns,
            _meta(rows * bits // 32, columns, dtype=torch.int32),
            linear.bias,
            bits=bits,
            zeros=_meta(groups, columns * bits // 32, dtype=torch.int32),
            scales=_meta(groups, columns, dtype=torch.float16),
            group_index=_meta(rows, dtype=torch.int32),
        )

    def dequantize(self) -> Tensor:
        """The weight, [out, in]."""
        mask = 2**self.bits - 1
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.weight.device)
        zeros = ((self.zeros[:, :, None] >> shifts) & mask).flatten(1, 2)[:, : self.out_features]
        weight = self.scales.new_empty(self.in_features, self.out_features)
        # A part at a time: all integers at once would take several times the memory of the weight.
        for start in range(0, self.in_features, _DEQUANTIZED_CHANNELS):
            rows = slice(start, start + _DEQUANTIZED_CHANNELS)
            words = self.weight[rows.start * self.bits // 32 : rows.stop * self.bits // 32]
            groups = self.group_index[rows].long()
            codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
            torch.mul(codes.sub_(zeros[groups]), self.scales[groups], out=weight[rows])
        return weight.t()


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
