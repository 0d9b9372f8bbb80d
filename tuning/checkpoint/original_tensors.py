"""Tensors of an original Qwen checkpoint under Qwen2's names: copied byte for byte.

A fused c_attn is cut in three: q, k and v are thirds of its rows (packed by GPTQ: of its columns).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tuning.checkpoint.files import write_json
from tuning.checkpoint.tensor_files import INDEX_FILE, Entry, StoredTensor, name_files
from tuning.checkpoint.tensor_writer import TensorFile
from tuning.errors import SettingsError

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


def copy_tensors(found: dict[str, StoredTensor], out: Path, shape: Shape) -> None:
    """Write each weights file's tensors into one of ours, and an index where they are several.

    found: of the original (tensor_files.list_tensors).

    Raises: SettingsError: a tensor is missing, unknown, or not as config.json says; nothing is written then.
    """
    origins = list_origins(shape)
    _check(found, origins)
    by_file: dict[Path, list[StoredTensor]] = {}
    for name in sorted(origins):
        by_file.setdefault(found[name].file, []).append(found[name])
    names = name_files(len(by_file))
    weight_map: dict[str, str] = {}
    total = 0
    for name, file in zip(names, sorted(by_file), strict=True):
        entries = _write_file(out / name, by_file[file], origins)
        weight_map |= {entry.name: name for entry in entries}
        total += sum(entry.num_bytes for entry in entries)
    if len(names) > 1:
        write_json(
            out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )


def _check(found: dict[str, StoredTensor], origins: dict[str, Origin]) -> None:
    for name, stored in found.items():
        origin, file = origins.get(name), stored.file
        if origin is None:
            _check_left_out(stored)
        elif stored.shape != origin.shape:
            raise SettingsError(
                f"{file}: {name} has the shape {list(stored.shape)}, and by config.json {list(origin.shape)}"
            )
        elif stored.dtype not in (_FLOATS if origin.floats else ("I32",)):
            raise SettingsError(f"{file}: {name} has the dtype {stored.dtype}, which it cannot have; copy it again")
    if missing := [name for name in origins if name not in found]:
        source = next(iter(found.values())).file.parent if found else ""
        raise SettingsError(f"{source}: {len(missing)} tensors are missing, the first: {missing[0]}; copy it again")


def _check_left_out(stored: StoredTensor) -> None:
    """Raises: SettingsError: a tensor that Qwen2 has no place for, and that says something."""
    name = stored.name
    if name.endswith(_COMPUTED):
        return
    # AutoGPTQ gave every layer a bias, of zeros where the model has none.
    is_bias = any(name.startswith("transformer.h.") and name.endswith(f".{layer}.bias") for layer in _LINEAR)
    if is_bias and not bool(stored.read().any()):
        return
    raise SettingsError(f"{stored.file}: {name} is unknown in an original Qwen checkpoint; it would be lost")


def _write_file(path: Path, tensors: list[StoredTensor], origins: dict[str, Origin]) -> list[Entry]:
    """Write a safetensors file from tensors of the original. Returns: what is in it."""
    entries = []
    for stored in tensors:
        origin = origins[stored.name]
        shape, num_bytes = list(stored.shape), stored.num_bytes
        if len(origin.targets) > 1 and origin.cut >= 0:
            shape[origin.cut] //= len(origin.targets)
            num_bytes //= len(origin.targets)
        entries += [Entry(target, stored.dtype, tuple(shape), num_bytes) for target in origin.targets]
    with TensorFile(path, entries) as file:
        for stored in tensors:
            origin, tensor = origins[stored.name], stored.read()
            count = len(origin.targets)
            for part in (tensor,) * count if origin.cut < 0 else tensor.chunk(count, dim=origin.cut):
                file.write(part)
    return entries
