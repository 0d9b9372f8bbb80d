"""Weights files, a tensor at a time: what is in them, and reading.

Files are read in pieces, never mapped into memory: a checkpoint of any size passes through a few megabytes.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.untrusted import read_weight_map

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 8 << 20  # bytes that are read or written at a time
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. dtype: safetensors' name. start: of its bytes in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds numbers with a fraction."""
        return self.dtype[:1] == "F" or self.dtype == "BF16"

    def pieces(self) -> Iterator[bytearray]:
        """Its bytes, in order. Raises: SettingsError: the file ends before."""
        with open(self.file, "rb", buffering=0) as opened:
            opened.seek(self.start)
            for start in range(0, self.num_bytes, PIECE):
                piece = bytearray(min(PIECE, self.num_bytes - start))
                self._fill(opened, memoryview(piece))
                yield piece

    def read_rows(self, count: int) -> Iterator[Tensor]:
        """Its rows, so many at a time. Each part is overwritten by the next one: fresh memory takes longer to get."""
        own, width = DTYPES[self.dtype], self.num_bytes // self.shape[0]
        buffer = torch.empty(count * width, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as opened:
            opened.seek(self.start)
            for start in range(0, self.shape[0], count):
                part = buffer[: min(count, self.shape[0] - start) * width]
                self._fill(opened, memoryview(part.numpy().data))
                yield part.view(own).view(-1, *self.shape[1:])

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in its dtype or another one.

        Raises: SettingsError: a dtype that torch does not have, or a file that ends before.
        """
        if self.dtype not in DTYPES:
            raise SettingsError(f"{self.file}: {self.name} has the dtype {self.dtype}, which is not supported")
        own = DTYPES[self.dtype]
        result = torch.empty(self.num_bytes // own.itemsize, dtype=dtype or own)
        with open(self.file, "rb", buffering=0) as opened:
            opened.seek(self.start)
            if result.dtype == own:
                self._fill(opened, memoryview(result.view(torch.uint8).numpy().data))
            else:  # a piece at a time: a second copy of a large matrix would be most of what is in memory
                buffer = torch.empty(min(PIECE // own.itemsize, len(result)), dtype=own)
                for part in result.split(max(1, len(buffer))):
                    self._fill(opened, memoryview(buffer[: len(part)].view(torch.uint8).numpy().data))
                    part.copy_(buffer[: len(part)])
        return result.view(self.shape)

    def _fill(self, opened: Any, view: memoryview) -> None:
        while view:
            count = opened.readinto(view)
            if not count:
                raise SettingsError(f"{self.file}: ends within {self.name}; copy it again")
            view = view[count:]


def list_tensors(directory: Path, *, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, file by file and in the order of the files.

    allow_pickle: read .bin weights where there are no safetensors.

    Raises: SettingsError: no weights there, some are absent or damaged, or they are pickles.
    """
    tensors: dict[str, StoredTensor] = {}
    index, files = _find_files(directory)
    for file in files:
        if file.suffix == ".bin" and not allow_pickle:
            raise SettingsError(
                f"{directory}: its weights are pickles ({file.name}), which can run code when they are read: if you "
                "trust them, pass --allow_pickle True"
            )
        for tensor in _read_pickle(file) if file.suffix == ".bin" else read_header(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise SettingsError(f"{file}: {tensor.name} is also in {other}; copy the files again")
            tensors[tensor.name] = tensor
    for name, file_name in index.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise SettingsError(f"{directory / file_name}: has no {name}, which the index names; copy it again")
    return tensors


def _find_files(directory: Path) -> tuple[dict[str, str], list[Path]]:
    """What an index of a checkpoint says (the file of each tensor), and its weights files."""
    explicit = read_json_object(directory / "config.json").get("transformers_weights")
    names = [str(explicit)] if explicit else []
    for name in (*names, "model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = directory / name
        if path.is_file() and path.suffix != ".json":
            return {}, [path]
        if not path.is_file():
            continue
        index = read_weight_map(path)
        for file in sorted(set(index.values())):
            if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
                raise SettingsError(f"{path}: names {file}, which is no weights file beside it")
            if not (directory / file).is_file():
                raise SettingsError(f"{path}: names {file}, which is not there; copy it again")
        return index, [directory / file for file in sorted(set(index.values()))]
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return {}, others
    if others:
        raise SettingsError(
            f"{directory}: {len(others)} weights files and no {INDEX_FILE} that lists them; copy it again"
        )
    raise SettingsError(f"{directory}: no weights in it (*.safetensors)")


@dataclass(frozen=True)
class PickledTensor(StoredTensor):
    """A tensor of a .bin file, which torch has mapped into memory."""

    value: Tensor

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in its dtype or another one."""
        return self.value.to(dtype or self.value.dtype, copy=True, memory_format=torch.contiguous_format)

    def pieces(self) -> Iterator[bytearray]:
        """Its bytes, in order."""
        content = self.read().view(-1).view(torch.uint8).numpy()
        for start in range(0, self.num_bytes, PIECE):
            yield bytearray(content[start : start + PIECE])

    def read_rows(self, count: int) -> Iterator[Tensor]:
        """Its rows, so many at a time."""
        yield from self.read().split(count)


def _read_pickle(file: Path) -> list[StoredTensor]:
    with explain_bad_files(f"{file}: cannot be read; copy it again"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
        if not named or not all(map(torch.is_tensor, state.values())):
            raise ValueError("no names with tensors in it")
        tensors: list[StoredTensor] = []
        for name, value in state.items():
            entry = Entry.of(name, value.dtype, value.shape)
            tensors.append(PickledTensor(name, file, entry.dtype, entry.shape, 0, entry.num_bytes, value))
        return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """What a safetensors file holds, in its order. Raises: SettingsError: it is none, or was cut."""
    with explain_bad_files(f"{file}: cannot be read; copy it again"):
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError("not a safetensors file, or only the beginning of one")
            entries: dict[str, Any] = json.loads(opened.read(length).decode())
        tensors = [_read_entry(name, entries[name], file, 8 + length) for name in entries if name != "__metadata__"]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))  # those without bytes come first
        at = 8 + length
        for tensor in tensors:
            dtype = DTYPES.get(tensor.dtype)
            wrong = dtype is not None and tensor.num_bytes != dtype.itemsize * math.prod(tensor.shape)
            if tensor.start != at or tensor.num_bytes < 0 or wrong:
                raise ValueError(f"{tensor.name} does not lie where it should")
            at += tensor.num_bytes
        if at != size:
            raise ValueError(f"has {size:,} bytes instead of {at:,}")
    return tensors


def _read_entry(name: str, entry: Any, file: Path, data: int) -> StoredTensor:
    """A tensor by its entry in a header. data: where the file's tensors begin."""
    name.encode()  # no half surrogates: it has to be written again
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [start, end, *shape]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(_is_size(each) for each in numbers):
        raise ValueError(f"{name} has an odd entry in the header")
    return StoredTensor(name, file, dtype, tuple(shape), data + start, end - start)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def of(name: str, dtype: torch.dtype, shape: Sequence[int]) -> "Entry":
        """Of a dtype and a shape of torch."""
        return Entry(name, _NAMES[dtype], tuple(shape), dtype.itemsize * math.prod(shape))


def name_files(count: int) -> list[str]:
    """Names of the weights files of a model in so many of them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
