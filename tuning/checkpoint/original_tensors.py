"""Tensors of an original Qwen checkpoint under Qwen2's names: copied byte for byte.

A fused c_attn is cut in three: q, k and v are thirds of its rows (packed by GPTQ: of its columns).
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tuning.checkpoint.files import write_json
from tuning.errors import SettingsError, explain_bad_files
from tuning.model.untrusted import read_weight_map

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_FLOATS = ("F32", "F16", "BF16")
# Original name of a linear layer -> Qwen2's; c_attn is three.
_LINEAR = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.logn_tensor")  # old files hold them; made anew


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint's tensors. inner: of each of the two MLP matrices. bits, group_size: of GPTQ, or None."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    bits: int | None = None
    group_size: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class Origin:
    """A tensor of the original: its shape, what it becomes, and the dimension that is cut where that is several.

    floats: whether it holds floating-point numbers.
    """

    shape: tuple[int, ...]
    targets: tuple[str, ...]
    cut: int = 0
    floats: bool = True


class Shards:
    """The weights files of a checkpoint: where each tensor is, and what is known without reading it.

    One file at a time is open, so that no more than it is ever in memory.

    Raises: SettingsError: one is absent, cut short or no such file, or they are pickles.
    """

    def __init__(self, source: Path, *, allow_pickle: bool):
        self.files = _list_files(source, allow_pickle=allow_pickle)
        self.found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for file in self.files:
            with open_file(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in self.found:
                        raise SettingsError(
                            f"{file}: {name} is also in {self.found[name][0].name}; copy the files again"
                        )
                    self.found[name] = (file, *_describe(opened, name))

    def dtype_of(self, name: str) -> str:
        """A tensor's dtype by torch's name, "float32" if there is none."""
        dtype = self.found[name][2] if name in self.found else "F32"
        return {"F16": "float16", "BF16": "bfloat16"}.get(dtype, "float32")


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """Open a weights file: a safetensors handle, or the dict of a pickle. Raises: SettingsError: it cannot be read."""
    with contextlib.ExitStack() as stack:
        with explain_bad_files(f"{file}: cannot be read; copy it again"):
            if file.suffix == ".bin":
                opened = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                named = isinstance(opened, dict) and all(isinstance(name, str) for name in opened)
                if not named or not all(map(torch.is_tensor, opened.values())):
                    raise ValueError("no names with tensors in it")
            else:
                opened = stack.enter_context(safe_open(file, "pt"))
        yield opened


def _describe(opened: Any, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype (by its name in safetensors) of a tensor of an open file."""
    if isinstance(opened, dict):
        return tuple(opened[name].shape), _DTYPES.get(opened[name].dtype, str(opened[name].dtype))
    part = opened.get_slice(name)
    return tuple(part.get_shape()), str(part.get_dtype())


def _read(opened: Any, name: str) -> Tensor:
    tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
    return tensor


def _list_files(source: Path, *, allow_pickle: bool) -> list[Path]:
    for index, single in ((_INDEX, "*.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        names = [file.name for file in sorted(source.glob(single))]
        if (source / index).is_file():
            names = sorted(set(read_weight_map(source / index).values()))
        if not names:
            continue
        if len(names) > 1 and not (source / index).is_file():
            raise SettingsError(f"{source}: {len(names)} weights files and no {index} that lists them; copy it again")
        for name in names:
            if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
                raise SettingsError(f"{source / index}: names {name}, which is no weights file beside it")
            if not (source / name).is_file():
                raise SettingsError(f"{source / index}: names {name}, which is not there; copy it again")
            if name.endswith(".bin") and not allow_pickle:
                raise SettingsError(
                    f"{source}: its weights are pickles ({name}), which can run code when they are read: if you trust "
                    "them, pass --allow_pickle True"
                )
        return [source / name for name in names]
    raise SettingsError(f"{source}: no weights in it (*.safetensors)")


def list_origins(shape: Shape) -> dict[str, Origin]:
    """Every tensor that a checkpoint of this shape has, by its original name."""
    hidden, matrix = shape.hidden, (shape.vocabulary, shape.hidden)
    origins = {
        "transformer.wte.weight": Origin(matrix, ("model.embed_tokens.weight",)),
        "transformer.ln_f.weight": Origin((hidden,), ("model.norm.weight",)),
    }
    if not shape.tied:
        origins["lm_head.weight"] = Origin(matrix, ("lm_head.weight",))
    sizes = {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (shape.inner, hidden),
        "mlp.w2": (shape.inner, hidden),
        "mlp.c_proj": (hidden, shape.inner),
    }
    for layer in range(shape.layers):
        old, new = f"transformer.h.{layer}", f"model.layers.{layer}"
        for name, norm in _NORMS.items():
            origins[f"{old}.{name}.weight"] = Origin((hidden,), (f"{new}.{norm}.weight",))
        for name, targets in _LINEAR.items():
            for kind, origin in _list_parts(sizes[name], shape, fused=len(targets) > 1).items():
                named = tuple(f"{new}.{target}.{kind}" for target in targets)
                one = Origin(origin.shape, named, origin.cut, origin.floats)
                origins[f"{old}.{name}.{kind}"] = one
    return origins


def _list_parts(size: tuple[int, int], shape: Shape, *, fused: bool) -> dict[str, Origin]:
    """Tensors of one linear layer. cut -1: the whole of it belongs to each target."""
    outputs, inputs = size
    bias = {"bias": Origin((outputs,), ())} if fused else {}
    if shape.bits is None:
        return {"weight": Origin((outputs, inputs), ()), **bias}
    assert shape.group_size is not None
    groups = 1 if shape.group_size == -1 else math.ceil(inputs / shape.group_size)
    per_word = 32 // shape.bits
    return {
        "qweight": Origin((inputs // per_word, outputs), (), 1, floats=False),
        "qzeros": Origin((groups, outputs // per_word), (), 1, floats=False),
        "scales": Origin((groups, outputs), (), 1),
        "g_idx": Origin((inputs,), (), -1, floats=False),
        **bias,
    }


def copy_tensors(shards: Shards, out: Path, shape: Shape) -> None:
    """Write each weights file's tensors into one of ours, and an index where they are several.

    Raises: SettingsError: a tensor is missing, unknown, or not as config.json says; nothing is written then.
    """
    origins = list_origins(shape)
    _check(shards, origins)
    names_in = {file: [name for name, (where, *_) in shards.found.items() if where == file] for file in shards.files}
    kept = {file: [name for name in names if name in origins] for file, names in names_in.items()}
    files = [file for file, names in kept.items() if names]
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        written, size = _write_file(out / name, file, shards, {old: origins[old] for old in sorted(kept[file])})
        weight_map |= dict.fromkeys(written, name)
        total += size
    if len(files) > 1:
        write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _check(shards: Shards, origins: dict[str, Origin]) -> None:
    for name, (file, shape, dtype) in shards.found.items():
        origin = origins.get(name)
        if origin is None:
            _check_left_out(shards, name)
        elif shape != origin.shape:
            raise SettingsError(f"{file}: {name} has the shape {list(shape)}, and by config.json {list(origin.shape)}")
        elif dtype not in (_FLOATS if origin.floats else ("I32",)):
            raise SettingsError(f"{file}: {name} has the dtype {dtype}, which it cannot have; copy it again")
    if missing := [name for name in origins if name not in shards.found]:
        source = shards.files[0].parent
        raise SettingsError(f"{source}: {len(missing)} tensors are missing, the first: {missing[0]}; copy it again")


def _check_left_out(shards: Shards, name: str) -> None:
    """Raises: SettingsError: a tensor that Qwen2 has no place for, and that says something."""
    file = shards.found[name][0]
    if name.endswith(_COMPUTED):
        return
    # AutoGPTQ gave every layer a bias, of zeros where the model has none.
    is_bias = any(name.startswith("transformer.h.") and name.endswith(f".{layer}.bias") for layer in _LINEAR)
    if is_bias:
        with open_file(file) as opened:
            if not bool(_read(opened, name).any()):
                return
    raise SettingsError(f"{file}: {name} is unknown in an original Qwen checkpoint; it would be lost")


def _write_file(path: Path, source: Path, shards: Shards, origins: dict[str, Origin]) -> tuple[list[str], int]:
    """Write a safetensors file from one of the original's. Returns: names in it, bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for old, origin in origins.items():
        dtype = shards.found[old][2]
        width = {"F32": 4, "I32": 4}.get(dtype, 2)
        shape = list(origin.shape)
        if len(origin.targets) > 1 and origin.cut >= 0:
            shape[origin.cut] //= len(origin.targets)
        for target in origin.targets:
            end = position + width * math.prod(shape)
            header[target] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open_file(source) as opened, open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for old, origin in origins.items():
            tensor, count = _read(opened, old), len(origin.targets)
            parts = (tensor,) * count if origin.cut < 0 else tensor.chunk(count, dim=origin.cut)
            for part in parts:
                file.write(part.contiguous().view(torch.uint8).flatten().numpy().data)
    return [name for name in header if name != "__metadata__"], position
