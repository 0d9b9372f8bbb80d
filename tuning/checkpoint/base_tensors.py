"""A checkpoint's weights under its model's names, read when they are asked for.

transformers renames tensors when it loads them, and stacks or splits some (the weights of experts): its own conversions
are used in both directions, a matrix or a layer's experts at a time.
"""

import copy
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from tuning.checkpoint.tensor_files import DTYPES, StoredTensor, list_tensors, read_header
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.new_tokens import append_rows, resize_model
from tuning.model.quantization import Quantization
from tuning.model.quantized_linear import QuantizedLinear
from tuning.model.quantized_pieces import dequantize_pieces, quantize_and_dequantize


@dataclass
class Source:
    """Stored tensors that give one or several of a model's, and how.

    converter: transformers' (WeightConverter), with the pattern of each stored tensor; None where one is one. module:
    the quantised layer whose pieces they are.
    """

    stored: list[StoredTensor] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    module: str | None = None


class BaseTensors:
    """The weights of a checkpoint by the names of its model's state_dict.

    model: on the meta device, as loading.load_model builds it; layers that are quantised become plain ones. trained:
    how its weights were quantised when an adapter was trained on it: the weights are those, dequantised.

    Raises: SettingsError: weights that are missing, or of another shape.
    """

    def __init__(
        self, model: PreTrainedModel, directory: Path, trained: Quantization | None = None, *, pickled: bool = False
    ):
        self.directory, self.model = directory, model
        self.quantization = trained
        said = read_json_object(directory / "config.json").get("quantization_config") or {}
        self._gptq_format = said.get("checkpoint_format", "gptq")
        self._quantized = _make_plain(model)
        self._state = model.state_dict(keep_vars=True)
        self.stored = list_tensors(directory, allow_pickle=pickled)
        self.stored |= _find_beside(model, directory, self.stored)
        self.sources: list[Source] = []
        self.source_of: dict[str, Source] = {}  # by name in the model
        self._grown: set[str] = set()
        self._read_last: tuple[Source, dict[str, Tensor]] | None = None
        with explain_bad_files(f"{directory}: its tensors have names that cannot be understood"):
            self._find_sources()
        self._check()

    # ---- reading ----

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """A tensor of the model; floating point ones in a dtype, or as they are stored (None)."""
        source = self.source_of[self.own_name(name)]
        if (stored := self.find_stored(name)) is not None:
            return stored.read(dtype if stored.is_floating_point else None)
        if self._read_last is None or self._read_last[0] is not source:
            self._read_last = None
            self._read_last = source, self._convert(source)
        value = self._read_last[1][self.own_name(name)]
        if len(source.targets) == 1:
            self._read_last = None  # nothing else is in it
        value = append_rows(value, len(self._state[name])) if name in self._grown else value
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def find_stored(self, name: str) -> StoredTensor | None:
        """Where a tensor lies that is stored as it is; None of one that is made of others, or has grown."""
        source = self.source_of[self.own_name(name)]
        made = source.module is not None or source.converter is not None or name in self._grown
        return None if made else source.stored[0]

    def grow(self, num_rows: int) -> None:
        """Have vocabulary matrices of so many rows, where they have fewer: with zeros behind their own."""
        before = {name: tensor.shape for name, tensor in self._state.items()}
        resize_model(self.model, num_rows)
        self._state = self.model.state_dict(keep_vars=True)
        self._grown |= {name for name, tensor in self._state.items() if tensor.shape != before[name]}

    @property
    def num_rows(self) -> int:
        """Rows of the vocabulary matrices."""
        return len(self.model.get_input_embeddings().weight)

    def is_grown(self, name: str) -> bool:
        """Whether a tensor has more rows than the stored one."""
        return name in self._grown

    def own_name(self, name: str) -> str:
        """The name under which a tensor is stored; of a tied matrix that may be its other one."""
        if name in self.source_of:
            return name
        return next((other for other in self.aliases(name) if other in self.source_of), name)

    def aliases(self, name: str) -> list[str]:
        """All names of a tensor: several where it is tied."""
        tensor = self._state.get(name)
        return [other for other, each in self._state.items() if each is tensor] if tensor is not None else [name]

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor of the model."""
        return self._state[name].shape

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def names(self) -> list[str]:
        """All names of the model's state_dict."""
        return list(self._state)

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is not the stored one, but what dequantising gives."""
        return name.rpartition(".")[0] in self._quantized and name.endswith(".weight")

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the files; of experts that are stored in several, one that holds all of them."""
        dtypes = {stored.dtype for stored in self._stored_of(name)}
        return functools.reduce(torch.promote_types, (DTYPES[dtype] for dtype in dtypes))

    # ---- writing ----

    def to_stored_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stacks of the model as its files have them. values: all that come of the same stored tensors together."""
        with explain_bad_files(f"{self.directory}: {min(values)} cannot be brought back into its files' form"):
            reverted: dict[str, Tensor] = revert_weight_conversion(self.model, values)
        return reverted

    def new_name(self, name: str) -> str:
        """The name in files of a tensor that they do not hold (the output layer of matrices that come apart)."""
        known = next(iter(self.source_of.values())).stored[0].name
        prefix = self.model.base_model_prefix
        if not name.startswith(f"{prefix}.") or known.startswith(f"{prefix}."):
            return name
        return name.removeprefix(f"{prefix}.")

    def plain_name(self, source: Source) -> str:
        """The name in files of a quantised layer's weight, once it is plain."""
        assert source.module is not None
        stored = source.stored[0].name
        inside = self._renamed[stored].removeprefix(f"{source.module}.")
        return f"{stored.removesuffix(inside)}weight"

    def _stored_of(self, name: str) -> list[StoredTensor]:
        return self.source_of[self.own_name(name)].stored

    # ---- which is which ----

    def _find_sources(self) -> None:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self.model.base_model_prefix
        self._renamed: dict[str, str] = {}
        found: dict[str, Source] = {}
        for name in sorted(self.stored, key=dot_natural_key):  # experts are stacked by their numbers
            stored = self.stored[name]
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if renamed not in self._state and name in self._state:
                renamed, pattern = name, None
            self._renamed[name] = renamed
            layer = _find_layer(renamed, self._quantized)
            if layer is not None and renamed != f"{layer}.bias":
                source = found.setdefault(f"{layer}.weight", Source(module=layer, targets=[f"{layer}.weight"]))
            elif renamed not in self._state:
                continue
            else:
                source = found.setdefault(renamed, Source(targets=[renamed]))
                if pattern is not None:
                    source.converter = by_pattern[pattern]
                    source.patterns.append(pattern)
            source.stored.append(stored)
        self.model._weight_conversions = [each for each in mapping if each.was_used()]  # what reverting goes by
        for first, source in found.items():
            if source.converter is not None:
                source.targets = list(self._run_converter(source, first, meta=True))
            self.sources.append(source)
            self.source_of |= dict.fromkeys(source.targets, source)

    def _check(self) -> None:
        """Raises: SettingsError: the model would not be whole."""
        lacking = []
        for name in self._state:
            if self.own_name(name) not in self.source_of:
                lacking.append(name)
        for source in self.sources:
            if source.module is not None or source.converter is not None:
                continue  # their shapes are seen when they are put together
            (stored,), (name,) = source.stored[:1], source.targets
            if tuple(self._state[name].shape) != stored.shape:
                lacking.append(name)
            weight = name.endswith(".weight")
            if weight and not stored.is_floating_point and self._state[name].is_floating_point():
                raise SettingsError(
                    f"{stored.file}: {stored.name} has the dtype {stored.dtype}, so it is no weight; copy it again"
                )
        if lacking:
            raise SettingsError(
                f"{self.directory}: {len(lacking)} weights are missing or of another shape, the first: {min(lacking)}"
            )

    def _convert(self, source: Source) -> dict[str, Tensor]:
        where = f"{source.stored[0].file}: {source.stored[0].name} cannot be read as {source.targets[0]}"
        with explain_bad_files(where):
            if source.module is not None:
                weight = self._read_quantized(source)
                values = {source.targets[0]: weight}
            elif source.converter is None:
                return {source.targets[0]: source.stored[0].read()}
            else:
                values = self._run_converter(source, source.targets[0], meta=False)
            for name, value in values.items():
                if value.shape != self._state[name].shape:
                    raise ValueError(f"has the shape {[*value.shape]}, {[*self._state[name].shape]} is needed")
        return values

    def _read_quantized(self, source: Source) -> Tensor:
        module = source.module
        assert module is not None and self.quantization is not None
        layer = self._quantized[module]
        if self.quantization.dtype is not None:  # it was quantised when it was loaded
            return quantize_and_dequantize(source.stored[0].read(), self.quantization)
        pieces = {self._renamed[each.name].removeprefix(f"{module}."): each.read() for each in source.stored}
        return dequantize_pieces(pieces, self.quantization, layer.in_features, layer.out_features, self._gptq_format)

    def _run_converter(self, source: Source, first: str, *, meta: bool) -> dict[str, Tensor]:
        """What transformers makes of stored tensors. meta: shapes only."""
        converter = copy.deepcopy(source.converter)
        for stored, pattern in zip(source.stored, source.patterns, strict=True):
            # Read as late as it is needed: a layer's experts are stacked from many.
            value = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta") if meta else stored.read()
            converter.add_tensor(first, stored.name, pattern, value)
        realized = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in realized.items()}


def _make_plain(model: PreTrainedModel) -> dict[str, QuantizedLinear]:
    """Put plain layers in the place of quantised ones. Returns: these, by name."""
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in quantized.items():
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        model.set_submodule(name, plain)
    return quantized


def _find_layer(name: str, layers: Iterable[str]) -> str | None:
    """The layer that a stored tensor is a piece of."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None


def _find_beside(model: PreTrainedModel, directory: Path, known: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of other files of a checkpoint that its class knows of and passes by (`mtp.*`)."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    files = {tensor.file for tensor in known.values()}
    found = {}
    for file in sorted(directory.glob("*.safetensors")) if patterns else []:
        for tensor in read_header(file) if file not in files else []:
            if tensor.name not in known and any(re.search(pattern, tensor.name) for pattern in patterns):
                found[tensor.name] = tensor
    return found
