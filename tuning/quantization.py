"""Linear layers whose frozen weights are packed in 4 or 8 bits: bitsandbytes' NF4, FP4 and Int8, and GPTQ.

The libraries read, pack and unpack. The product is our own: it keeps packed weights alone for the backward pass and
unpacks them again there, so that its gradient is that of the unpacked matrix, after an evaluation as before. The
libraries' layers have other ways for inference, which some of them never leave again, and some keep every layer's
unpacked matrix until backward.
"""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.errors import SettingsError

_INSTALL = "pip install -r requirements_finetune.txt"
_UNPACKED_ROWS = 1024  # input channels that GPTQ unpacks at a time; a multiple of 32
_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes': weights that share a scale, scales that share theirs


@dataclass(frozen=True)
class Quantization:
    """How a model's linear layers are kept.

    method: "bitsandbytes" or "gptq". quant_type: "nf4" or "fp4", of bitsandbytes with 4 bits. group_size: input
    channels that share a scale, of GPTQ; -1 is all. double: whether bitsandbytes' scales are quantised, too.
    dtype: that weights had when they were quantised, by name; None where a checkpoint brings them quantised. skipped:
    names of layers, or of what holds them, that a checkpoint leaves as they are.
    """

    method: str
    bits: int
    quant_type: str | None = None
    group_size: int | None = None
    double: bool = False
    dtype: str | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skipped", tuple(self.skipped))  # JSON has lists

    def describe(self) -> str:
        """A few words for the log."""
        if self.method == "gptq":
            return f"GPTQ, {self.bits} bits, groups of {self.group_size}"
        kind = "Int8" if self.bits == 8 else f"{str(self.quant_type).upper()}"
        return f"bitsandbytes {kind}{', double quantisation' if self.double else ''}"

    def to_json(self) -> dict[str, Any]:
        """For manifests."""
        return asdict(self)


def read_quantization(config: Any) -> Quantization | None:
    """What a checkpoint is quantised with, by its configuration; None where it is not.

    Raises: SettingsError: in a way that is not supported.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    try:
        values = _as_dict(found)
    except (AttributeError, TypeError, ValueError):
        raise SettingsError("config.json: quantization_config is not an object") from None
    method, bits = values.get("quant_method", "gptq"), values.get("bits")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        bits = 8 if values.get("load_in_8bit") else 4
        double = bits == 4 and bool(values.get("bnb_4bit_use_double_quant"))
        kind = None if bits == 8 else str(values.get("bnb_4bit_quant_type", "fp4"))
        skipped = values.get("llm_int8_skip_modules") or values.get("modules_to_not_convert") or ()
        return Quantization(method, bits, kind, double=double, skipped=tuple(map(str, skipped)))
    known = "bitsandbytes, and GPTQ with 4 or 8 bits, are supported"
    if method != "gptq":
        raise SettingsError(f"quantised with {method}; {known}. Take the unquantised model, with --q_lora")
    if bits not in (4, 8) or values.get("dynamic") or values.get("modules_in_block_to_quantize"):
        what = "other bits in some layers" if bits in (4, 8) else f"{bits!r} bits"
        raise SettingsError(f"quantised with GPTQ and {what}; {known}")
    if values.get("lm_head"):
        raise SettingsError("its output layer is quantised, too, which is not supported")
    size = values.get("group_size", 128)
    return Quantization(method, int(bits), group_size=size if isinstance(size, int) else -1)


def choose_quantization(
    own: Quantization | None, *, path: str, q_lora: bool, bits: int | None, quant_type: str | None, dtype: torch.dtype
) -> Quantization | None:
    """How a model is kept in training: as the checkpoint is, or as --q_lora, --bits and --quant_type say.

    own: of the checkpoint. dtype: its weights are loaded in, where they are quantised then.

    Raises: SettingsError: the checkpoint is quantised, and the flags say otherwise.
    """
    if own is None:
        if not q_lora:
            return None
        bits = bits or 4
        kind = (quant_type or "nf4") if bits == 4 else None
        name = str(dtype).removeprefix("torch.")
        return Quantization("bitsandbytes", bits, kind, double=bits == 4, dtype=name)
    if not q_lora:
        raise SettingsError(f"{path}: is quantised ({own.describe()}): its own weights cannot train; pass --q_lora")
    for flag, value in (("--bits", bits), ("--quant_type", quant_type)):
        if value is not None:
            raise SettingsError(f"{flag} {value}: has no effect on {path}, which is quantised ({own.describe()})")
    return own


@contextlib.contextmanager
def prepare_loading(
    config: Any, own: Quantization | None, wanted: Quantization | None, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What from_pretrained needs beside the usual, and silence while it runs.

    own: of the checkpoint (read_quantization). wanted: to be done at loading, where the checkpoint is not quantised.

    Raises: SettingsError: a library is not installed.
    """
    if own is None and wanted is None:
        yield {}
        return
    method = (own or wanted).method  # type: ignore[union-attr]
    if own is None:
        assert wanted is not None
        if method != "bitsandbytes":
            raise SettingsError("is not quantised; it is not the checkpoint that was trained on")
        from transformers import BitsAndBytesConfig

        require("bitsandbytes")
        options: dict[str, Any] = {"load_in_8bit": True}
        if wanted.bits == 4:
            options = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": wanted.quant_type,
                "bnb_4bit_use_double_quant": wanted.double,
                "bnb_4bit_compute_dtype": dtype,
            }
        yield {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": device}}
    elif method == "bitsandbytes":
        require("bitsandbytes")
        yield {"device_map": {"": device}}
    else:
        with silence_gptqmodel():
            require("gptqmodel", "optimum")
            config.quantization_config = {**_as_dict(config.quantization_config), "backend": "torch"}
            yield {"device_map": {"": torch.device("cpu")}}


@contextlib.contextmanager
def silence_gptqmodel() -> Iterator[None]:
    """Keep gptqmodel's banner and log from the terminal, and its settings of the allocator from other programs."""
    before = dict(os.environ)
    levels = {logger: logger.level for logger in map(logging.getLogger, ("transformers", "tokenicer"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(ImportError):
                from logbar import LogBar

                LogBar.shared().setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name in set(os.environ) - set(before):
            del os.environ[name]


def require(*libraries: str) -> None:
    """Raises: SettingsError: a library is not installed."""
    import importlib

    for name in libraries:
        try:
            importlib.import_module(name)
        except Exception as error:  # they look for devices and compile when they are imported
            raise SettingsError(f"quantised models need {name} ({first_line(error)}); {_INSTALL}") from None


def first_line(error: Exception) -> str:
    """Of its message; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. Frozen.

    weight: the packed numbers, as the library lays them out. Tables of scales are buffers.
    """

    def __init__(self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def unpack(self) -> Tensor:
        """The weight, [out, in], in the dtype that its scales give."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Cast to half precision, scales (of double quantisation above all) would give other weights.
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, with the unpacked weight in x's dtype (autocast's, where it is on)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            result: Tensor = _UnpackedProduct.apply(x.to(dtype), self)
            return result if self.bias is None else result + self.bias.to(dtype)


class _UnpackedProduct(torch.autograd.Function):
    """x @ weight.T. The weight is unpacked for each of both passes, and not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpack().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.unpack().to(grad_output.dtype), None


class FourBitLinear(PackedLinear):
    """bitsandbytes' NF4 or FP4. weight: [in * out / 2] uint8, two weights a byte, 64 weights a scale."""

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        *,
        quant_type: str,
        dtype: torch.dtype,
        tables: dict[str, Tensor],
    ):
        super().__init__(in_features, out_features, packed, bias)
        self.quant_type, self.unpacked_dtype = quant_type, dtype
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @classmethod
    def take(cls, layer: Any) -> "FourBitLinear":
        """From bitsandbytes' layer."""
        state = getattr(layer.weight, "quant_state", None)
        if state is None or state.blocksize != _BLOCK or (state.nested and state.state2.blocksize != _NESTED_BLOCK):
            raise SettingsError("its weights are not packed as its configuration says")
        tables = {"absmax": state.absmax, "code": state.code}
        if state.nested:
            nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
            tables |= nested
        return cls(
            layer.in_features,
            layer.out_features,
            layer.weight.data.view(torch.uint8).flatten(),
            _data(layer.bias),
            quant_type=state.quant_type,
            dtype=state.dtype,
            tables=tables,
        )

    @classmethod
    def sketch(cls, linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> "FourBitLinear":
        """Of the same shapes, without storage."""
        num_weights = linear.in_features * linear.out_features
        num_blocks = -(-num_weights // _BLOCK)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "absmax": ((num_blocks,), torch.uint8 if quantization.double else torch.float32),
            "code": ((16,), torch.float32),
        }
        if quantization.double:
            shapes |= {
                "nested_absmax": ((-(-num_blocks // _NESTED_BLOCK),), torch.float32),
                "nested_code": ((256,), torch.float32),
                "offset": ((), torch.float32),
            }
        return cls(
            linear.in_features,
            linear.out_features,
            _meta(-(-num_weights // 2), dtype=torch.uint8),
            _data(linear.bias),
            quant_type=str(quantization.quant_type),
            dtype=dtype,
            tables={name: _meta(*shape, dtype=table_dtype) for name, (shape, table_dtype) in shapes.items()},
        )

    def unpack(self) -> Tensor:
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
            dtype=self.unpacked_dtype,
            offset=self.offset if nested is not None else None,
            state2=nested,
        )
        return dequantize_4bit(self.weight.view(-1, 1), state)


class Int8Linear(PackedLinear):
    """bitsandbytes' Int8 weights, a scale an output channel. weight: [out, in] int8.

    Activations stay as they are: the library's own product rounds them to 8 bits as well.
    """

    scales: Tensor

    def __init__(self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None, *, scales: Tensor):
        super().__init__(in_features, out_features, packed, bias)
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def take(cls, layer: Any) -> "Int8Linear":
        """From bitsandbytes' layer."""
        if getattr(layer.weight, "SCB", None) is None:
            raise SettingsError("its weights are not packed as its configuration says")
        scales = layer.weight.SCB.float() / 127
        return cls(layer.in_features, layer.out_features, layer.weight.data, _data(layer.bias), scales=scales)

    @classmethod
    def sketch(cls, linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> "Int8Linear":
        """Of the same shapes, without storage."""
        shape = (linear.out_features, linear.in_features)
        scales = _meta(linear.out_features, dtype=torch.float32)
        return cls(shape[1], shape[0], _meta(*shape, dtype=torch.int8), _data(linear.bias), scales=scales)

    def unpack(self) -> Tensor:
        """The weight, [out, in]."""
        return self.weight * self.scales[:, None]


class GptqLinear(PackedLinear):
    """GPTQ's weights. weight: [in * bits / 32, out] int32, of consecutive input channels each.

    zeros: [groups, out * bits / 32] int32, of consecutive output channels. scales: [groups, out]. group_index: [in],
    each input channel's group.
    """

    zeros: Tensor
    scales: Tensor
    group_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        *,
        bits: int,
        zeros: Tensor,
        scales: Tensor,
        group_index: Tensor,
    ):
        super().__init__(in_features, out_features, packed, bias)
        self.bits = bits
        for name, table in (("zeros", zeros), ("scales", scales), ("group_index", group_index)):
            self.register_buffer(name, table, persistent=False)

    @classmethod
    def take(cls, layer: Any) -> "GptqLinear":
        """From gptqmodel's layer, which keeps zeros as they are (format 2) whatever the file has."""
        in_features, out_features = len(layer.g_idx), layer.scales.shape[1]
        if layer.pack_dtype != torch.int32 or layer.qzero_format() != 2 or getattr(layer, "planar", False):
            raise SettingsError(f"its layers are packed in a way that is not supported ({type(layer).__name__})")
        return cls(
            in_features,
            out_features,
            layer.qweight,
            _data(layer.bias),
            bits=layer.bits,
            zeros=layer.qzeros,
            scales=layer.scales,
            group_index=layer.g_idx,
        )

    @classmethod
    def sketch(cls, linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> "GptqLinear":
        """Of the same shapes, without storage."""
        rows, columns, bits = linear.in_features, linear.out_features, quantization.bits
        size = quantization.group_size if quantization.group_size and quantization.group_size > 0 else rows
        groups = -(-rows // size)
        return cls(
            rows,
            columns,
            _meta(rows * bits // 32, columns, dtype=torch.int32),
            _data(linear.bias),
            bits=bits,
            zeros=_meta(groups, columns * bits // 32, dtype=torch.int32),
            scales=_meta(groups, columns, dtype=torch.float16),
            group_index=_meta(rows, dtype=torch.int32),
        )

    def unpack(self) -> Tensor:
        """The weight, [out, in]."""
        mask = 2**self.bits - 1
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.weight.device)
        zeros = ((self.zeros[:, :, None] >> shifts) & mask).flatten(1, 2)[:, : self.out_features]
        weight = self.scales.new_empty(self.in_features, self.out_features)
        # A part at a time: whole, the integers would take several times what the weight does.
        for start in range(0, self.in_features, _UNPACKED_ROWS):
            rows = slice(start, start + _UNPACKED_ROWS)
            words = self.weight[rows.start * self.bits // 32 : rows.stop * self.bits // 32]
            groups = self.group_index[rows].long()
            codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
            torch.mul(codes.sub_(zeros[groups]), self.scales[groups], out=weight[rows])
        return weight.t()


def pack_like(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Give a model without storage the layers that loading it quantised would give it."""
    layer_type: Any = Int8Linear if quantization.bits == 8 else FourBitLinear
    if quantization.method == "gptq":
        layer_type = GptqLinear
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # which bitsandbytes transposes
            raise SettingsError(f"has layers that are no linear ones ({name}); use --use_lora")
        skipped = any(f".{part}." in f".{name}." for part in quantization.skipped)
        if type(module) is nn.Linear and module is not output and not skipped:
            _put(model, name, layer_type.sketch(module, quantization, dtype))


def take_over(model: PreTrainedModel) -> None:
    """Put our layers in the place of the libraries', and forget that transformers quantised the model.

    Raises: SettingsError: no layer is quantised, or one that must not be.
    """
    found = 0
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if getattr(module, "source_cls", None) is Conv1D:  # transposed
            raise SettingsError(f"has layers that are no linear ones ({name}); use --use_lora")
        if kind == "Linear4bit":
            packed: PackedLinear = FourBitLinear.take(module)
        elif kind == "Linear8bitLt":
            packed = Int8Linear.take(module)
        elif hasattr(module, "qweight") and hasattr(module, "g_idx"):
            packed = GptqLinear.take(module)
        else:
            continue
        if module is output:
            raise SettingsError("its output layer is quantised, too, which is not supported")
        _put(model, name, packed)
        found += 1
    experts = [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    if experts:
        raise SettingsError(f"its experts are 3-D parameters ({experts[0]}), which cannot be quantised here")
    if not found:
        raise SettingsError("has no linear layer that could be quantised")
    _forget_quantizer(model)


def _put(model: PreTrainedModel, name: str, packed: PackedLinear) -> None:
    """In the place of a layer. The library may have changed the order of layers, by which processes share tensors."""
    model.set_submodule(name, packed)
    parent = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.ModuleList | nn.Sequential):
        parent._modules = dict(sorted(parent._modules.items()))


def _forget_quantizer(model: PreTrainedModel) -> None:
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "_weight_conversions")
    for name in ("hf_quantizer", *marks):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(name, None)


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Unpack all layers into float32, one by one. Returns: the model, as if it had never been quantised."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.unpack().float().contiguous())
            plain.bias = None if module.bias is None else nn.Parameter(module.bias.float())
            model.set_submodule(name, plain)
    return model.float()


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has packed layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _data(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.data


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
