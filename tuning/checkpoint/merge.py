"""Adapters and base model -> standalone checkpoint, a tensor at a time.

The base's files are read, changed and written in their order. What no adapter touches is copied byte for byte, under
its name, whether transformers knows it or not. Memory: the largest matrix (of experts: a layer's) a few times, and the
adapters.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuning.checkpoint.adapter_base import copy_tokenizer, tokenizer_source
from tuning.checkpoint.base_tensors import BaseTensors, Source
from tuning.checkpoint.carried import copy_processors, list_kept_names
from tuning.checkpoint.changes import Changes, check_finite, count_rows_at_once, join_products, merge_rows
from tuning.checkpoint.files import write_json
from tuning.checkpoint.older_readers import add_old_names
from tuning.checkpoint.tensor_files import DTYPES, INDEX_FILE, Entry, StoredTensor, name_files
from tuning.checkpoint.tensor_writer import TensorFile
from tuning.errors import SettingsError
from tuning.model.loading import Trust, load_generation_config, read_dtype
from tuning.model.stop_token import list_eos_ids

_STEPS = 16  # of merge_rows, whose result is written at a time
_ROOM = 64 << 20  # bytes of a result beside its weights


@dataclass(frozen=True)
class Weighted:
    """An adapter's changes, and how much of them is added."""

    changes: Changes
    weight: float


class Merge:
    """The tensors of a merged model, computed when they are asked for.

    base: the base's tensors. adapters: added up. dtype: of the result; None: each tensor keeps the one it is stored in.
    """

    def __init__(self, base: BaseTensors, adapters: list[Weighted], *, dtype: torch.dtype | None, trust: Trust):
        self.base, self.adapters, self.dtype = base, adapters, dtype
        self._said = read_dtype(str(base.directory), trust_remote_code=trust.trust_remote_code)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.changed = {name for each in adapters for name in each.changes.names}
        self.comes_apart = any(each.changes.comes_apart for each in adapters)
        if unknown := sorted(name for name in self.changed if name not in base):
            raise SettingsError(f"{base.directory}: has no {unknown[0]}, which an adapter changes")
        self._kept = list_kept_names(base.model)

    def is_computed(self, name: str) -> bool:
        """Whether a tensor of the model is another one than the base's."""
        return name in self.changed or self.base.is_quantized(name) or self.base.is_grown(name)

    def list_touching(self, name: str) -> list[Weighted]:
        """The adapters that change a tensor."""
        return [each for each in self.adapters if name in each.changes.names]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor of the model has in the result."""
        stored = self.base.stored_dtype(name)
        if self.base.is_quantized(name):
            return self.dtype or self._said
        if not stored.is_floating_point or (self.dtype is None) or name in self._kept:
            return stored
        return self.dtype

    @torch.no_grad()
    def compute(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """A tensor of the merged model, in a dtype (None: that of the result).

        Raises: SettingsError: it is not finite in that dtype, or cannot be merged.
        """
        dtype = dtype or self.dtype_of(name)
        if (products := self._find_products(name)) is not None:
            weight = self.base.read(name, None).to(self._device)
            pairs = [(up.to(self._device), down.to(self._device)) for up, down in products]
            out = torch.empty(weight.shape, dtype=dtype, device=self._device)
            return merge_rows(name, weight, pairs, out).cpu()
        if not (touching := self.list_touching(name)):
            return self.base.read(name, dtype)
        if len(touching) == 1 and touching[0].weight == 1:
            value = touching[0].changes.apply(name, self.base.read)
        else:
            weight = self.base.read(name)
            value = weight.clone()
            for each in touching:
                value += (each.changes.apply(name, self.base.read) - weight) * each.weight
        check_finite(name, torch.aminmax(value), dtype)
        return value.to(dtype)

    @torch.no_grad()
    def compute_rows(self, name: str) -> Iterator[Tensor] | None:
        """What compute(name, None) gives, some rows at a time; None where that is not possible, or not as fast."""
        products, stored = self._find_products(name), self.base.find_stored(name)
        if products is None or stored is None or self._device.type != "cpu":
            return None
        return self._merge_rows(name, stored, join_products(products))

    def _merge_rows(self, name: str, stored: StoredTensor, product: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        up, down = product
        count = count_rows_at_once(stored.shape[1]) * _STEPS
        for number, weight in enumerate(stored.read_rows(count)):
            rows = up[number * count : number * count + len(weight)]
            yield merge_rows(name, weight, [(rows, down)], torch.empty(weight.shape, dtype=self.dtype_of(name)))

    def _find_products(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """The pairs of matrices whose products are all that is added to a tensor; None where more is done to it."""
        pairs = [(each.changes.plain(name), each.weight) for each in self.list_touching(name)]
        if not pairs or any(pair is None for pair, _ in pairs):
            return None
        return [(pair[0] * weight, pair[1]) for pair, weight in pairs if pair is not None]


@dataclass(frozen=True)
class Item:
    """A tensor of the result's files. stored: copied as it is; else cast or computed. names: the model's tensors."""

    entry: Entry
    stored: StoredTensor | None
    names: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.entry.num_bytes


def list_items(merge: Merge) -> Iterator[tuple[Path, Item]]:
    """All tensors of the result, in the order of the base's files, with the file of the base they stand in."""
    base, seen, last = merge.base, set(), Path()
    of_stored = {stored.name: source for source in base.sources for stored in source.stored}
    for stored in base.stored.values():
        source, last = of_stored.get(stored.name), stored.file
        as_it_is = Entry(stored.name, stored.dtype, stored.shape, stored.num_bytes)
        if source is None:
            yield last, Item(as_it_is, stored)
        elif source.module is not None:
            if id(source) not in seen:  # all pieces become one tensor
                (name,) = source.targets
                entry = Entry.of(base.plain_name(source), merge.dtype_of(name), base.shape(name))
                yield last, Item(entry, None, (name,))
        else:
            dtype = merge.dtype_of(source.targets[0])
            computed = any(map(merge.is_computed, source.targets))
            same = merge.dtype is None or dtype == DTYPES[stored.dtype]
            shape = stored.shape if source.converter is not None else base.shape(source.targets[0])
            item = Item(Entry.of(stored.name, dtype, shape), None, tuple(source.targets))
            yield last, Item(as_it_is, stored) if same and not computed else item
        seen.add(id(source))
    if merge.comes_apart:
        for name in sorted(name for name in merge.base.names() if name not in base.source_of):
            yield last, Item(Entry.of(base.new_name(name), merge.dtype_of(name), base.shape(name)), None, (name,))


def split_files(items: list[tuple[Path, Item]], max_bytes: int | None) -> dict[str, list[Item]]:
    """The result's files: as the base's are, or none larger than so many bytes."""
    groups: list[list[Item]] = []
    if max_bytes is None:
        by_file: dict[Path, list[Item]] = {}
        for file, item in items:
            by_file.setdefault(file, []).append(item)
        groups = list(by_file.values())
    else:
        room = 0
        for _, item in items:
            if not groups or item.num_bytes > room:
                groups.append([])
                room = max_bytes
            groups[-1].append(item)
            room -= item.num_bytes
    # Tensors of the widest dtype come first, as the library has them, so that all lie at multiples of their size.
    ordered = [sorted(group, key=lambda item: -_width(item.entry)) for group in groups]
    return dict(zip(name_files(len(groups)), ordered, strict=True))


def _width(entry: Entry) -> int:
    elements = math.prod(entry.shape)
    return entry.num_bytes // elements if elements else 0


def check_room(files: dict[str, list[Item]], out: Path, written: int) -> None:
    """Raises: SettingsError: the disk is too small. written: bytes that are there already."""
    needed = sum(item.num_bytes for items in files.values() for item in items) + _ROOM - written
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise SettingsError(
            f"{out}: the result takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or "
            "choose another disk"
        )


def write_weights(
    merge: Merge, files: dict[str, list[Item]], directory: Path, finished: dict[str, Any], note: Callable[[], None]
) -> None:
    """Write the result's weights, and the index of several files.

    finished: files that are whole, with size and hash; those that it has are left alone, and each is added when it is
    on disk. note: called then.
    """
    ready: dict[str, Tensor] = {}  # computed together with one that was written
    for name, items in files.items():
        if name in finished:
            continue
        with TensorFile(directory / name, [item.entry for item in items]) as file:
            for item in items:
                if item.stored is not None:
                    file.copy(item.stored)
                    continue
                if (parts := _compute_rows(merge, item)) is not None:
                    for part in parts:
                        file.write(part)
                    continue
                if item.entry.name not in ready:
                    ready |= _compute(merge, item)
                value = ready.pop(item.entry.name)
                assert Entry.of(item.entry.name, value.dtype, value.shape) == item.entry, "as the header has it"
                file.write(value)
        finished[name] = file.facts
        note()
    if len(files) > 1:
        sizes = [item.num_bytes for items in files.values() for item in items]
        weight_map = {item.entry.name: name for name, items in files.items() for item in items}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _compute_rows(merge: Merge, item: Item) -> Iterator[Tensor] | None:
    return merge.compute_rows(item.names[0]) if len(item.names) == 1 else None


def _compute(merge: Merge, item: Item) -> dict[str, Tensor]:
    """Tensors of the result's files that come of the same tensors of the model."""
    base = merge.base
    source: Source | None = base.source_of.get(item.names[0])
    if source is None or source.converter is None:
        (name,) = item.names
        return {item.entry.name: merge.compute(name, None)}
    values = {name: merge.compute(name, None) for name in item.names}
    stored = base.to_stored_names(values)
    if stored.keys() != {each.name for each in source.stored}:
        raise SettingsError(
            f"{base.directory}: {item.names[0]} cannot be brought back into its files' form "
            f"({min(stored.keys() ^ {each.name for each in source.stored})})"
        )
    # A part of a stack keeps all of it: copied, it can go when it is written.
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in stored.items()}


def write_others(merge: Merge, adapter: Path, out: Path, *, dtype: torch.dtype, trust: Trust) -> None:
    """Write what a merged model has beside its weights: of the adapter where it brings it along, else of the base."""
    base, model = merge.base.directory, merge.base.model
    source = adapter if (adapter / "generation_config.json").is_file() else base
    if (generation_config := load_generation_config(str(source))) is not None:
        model.config.get_text_config().eos_token_id = next(iter(list_eos_ids(generation_config)), None)
        generation_config.save_pretrained(out)
    if merge.comes_apart:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(out)
    add_old_names(out)
    copy_processors(base, out)
    copy_tokenizer(tokenizer_source(adapter, base), out)
    if trust.trust_remote_code and getattr(model.config, "auto_map", None):
        for file in base.glob("*.py"):
            shutil.copy2(file, out / file.name)
