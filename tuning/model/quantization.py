"""Quantised models: what a checkpoint is quantised with, loading in 4 or 8 bits, and back to plain layers."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.errors import SettingsError
from tuning.messages import first_line
from tuning.model.quantized_linear import FourBitLinear, GptqLinear, Int8Linear, QuantizedLinear

_INSTALL = "pip install -r requirements_finetune.txt"


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
        raise SettingsError(f"{path}: is quantised ({own.describe()}); only adapters train on it: pass --q_lora")
    for flag, value in (("--bits", bits), ("--quant_type", quant_type)):
        if value is not None:
            raise SettingsError(f"{flag} {value}: has no effect on {path}, which is quantised ({own.describe()})")
    return own


@contextlib.contextmanager
def prepare_loading(
    config: Any,
    own: Quantization | None,
    wanted: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kept: list[str],
) -> Iterator[dict[str, Any]]:
    """What from_pretrained needs beside the usual, and silence while it runs.

    own: of the checkpoint (read_quantization). wanted: to be done at loading, where the checkpoint is not quantised.
    kept: names of parts that stay as they are.

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
        if kept:
            options["llm_int8_skip_modules"] = [*kept, "lm_head"]
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


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def quantize_meta_model(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype, *, kept: list[str]
) -> None:
    """Give a meta model the layers that loading it quantised would give it. kept: parts that stay as they are."""
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # which bitsandbytes transposes
            raise SettingsError(f"has layers that are no linear ones ({name}); use --use_lora")
        skipped = any(f".{part}." in f".{name}." for part in (*quantization.skipped, *kept))
        if type(module) is nn.Linear and module is not output and not skipped:
            _put(model, name, _meta_like(module, quantization, dtype))


def _meta_like(linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> QuantizedLinear:
    if quantization.method == "gptq":
        return GptqLinear.meta_like(linear, bits=quantization.bits, group_size=quantization.group_size or -1)
    if quantization.bits == 8:
        return Int8Linear.meta_like(linear)
    kind = str(quantization.quant_type)
    return FourBitLinear.meta_like(linear, quant_type=kind, double=quantization.double, dtype=dtype)


def replace_quantized_layers(model: PreTrainedModel) -> None:
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
            packed: QuantizedLinear = FourBitLinear.take(module)
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
    experts = {name: p for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}
    if experts:
        count = sum(p.numel() for p in experts.values())
        raise SettingsError(
            f"its experts are 3-D parameters ({next(iter(experts))}), which cannot be quantised here; unquantised they "
            f"take {2 * count / 2**30:.1f} GiB in bf16 ({count:,} parameters): use --use_lora without --q_lora"
        )
    if not found:
        raise SettingsError("has no linear layer that could be quantised")
    _forget_quantizer(model)


def _put(model: PreTrainedModel, name: str, packed: QuantizedLinear) -> None:
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
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.dequantize().float().contiguous())
            plain.bias = None if module.bias is None else nn.Parameter(module.bias.float())
            model.set_submodule(name, plain)
    return model.float()
