"""What an adapter makes of its base, a matrix at a time.

The adapter's modules are peft's, over a base on the meta device: a matrix is put into its layer, peft merges it, and it
is taken out again. Plain LoRA on linear layers, nearly all there is, takes a faster way (merge_rows).
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuning.errors import SettingsError
from tuning.messages import first_line
from tuning.model.new_tokens import resize_for_adapter
from tuning.model.saved_adapter import SavedAdapter, attach_lora, find_row_ids
from tuning.model.token_rows import PEFT_SUFFIX, is_tied

ADAPTER = "default"
_ELEMENTS = 1 << 17  # elements of a matrix that are merged at a time: they stay in the processor's cache


class Changes:
    """The tensors that an adapter changes, by their names in the base model's state_dict, and their new values.

    model: the base on the meta device, with plain layers; the adapter's modules are put into it.

    comes_apart: whether a tied matrix becomes two. num_rows: rows of the vocabulary matrices.

    Raises: SettingsError: the adapter does not fit.
    """

    def __init__(self, model: PreTrainedModel, adapter: SavedAdapter):
        was_tied = is_tied(model)
        self.adapter = adapter
        resize_for_adapter(model, adapter.config, adapter.state)
        ids = find_row_ids(model, adapter)
        embedding, output = _vocabulary_names(model)
        peft_model, _ = attach_lora(model, adapter, values=True)
        self.num_rows = len(model.get_input_embeddings().weight)  # more than the base's where it has new tokens
        self._layers: dict[str, tuple[str, LoraLayer]] = {}  # of a tensor: its name in its layer, and the layer
        self._trained: dict[str, Tensor] = {}  # whole tensors that take the place of the base's
        self._row_values: dict[str, tuple[Tensor, Tensor]] = {}  # ids and values of rows
        for name, part in ((embedding, "embedding"), (output, "output")):
            if ids[part]:
                values = adapter.state[f"base_model.model.{name.removesuffix('.weight')}.{PEFT_SUFFIX}"]
                self._row_values[name] = torch.tensor(ids[part]), values
        self._find(peft_model.get_base_model())
        self.comes_apart = was_tied and self._differs(embedding, output)
        if was_tied and not self.comes_apart:  # one matrix: what is done to it is done under both names
            tables: tuple[dict[str, Any], ...] = (self._layers, self._trained, self._row_values)
            for known, (name, other) in itertools.product(tables, ((embedding, output), (output, embedding))):
                if name in known:
                    known.setdefault(other, known[name])

    @functools.cached_property
    def names(self) -> set[str]:
        """All that are changed."""
        return {*self._layers, *self._trained, *self._row_values}

    def plain(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The two matrices, [out, r] and [r, in], whose product is added to a weight; None where more is done to it."""
        where = self._layers.get(name)
        if (
            where is None
            or name in self._row_values
            or name in self._trained
            or not _is_plain(where[1])
            or where[0] != "weight"
        ):
            return None
        if isinstance(self.adapter.config.init_lora_weights, str):  # it may begin from another weight
            return None
        layer: Any = where[1]
        down, up = layer.lora_A[ADAPTER].weight.detach().float(), layer.lora_B[ADAPTER].weight.detach().float()
        return up * layer.scaling[ADAPTER], down

    def apply(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The changed tensor, in float32.

        read: gives a tensor of the base in float32, by name.

        Raises: SettingsError: peft cannot merge it.
        """
        if (plain := self.plain(name)) is not None:
            value = merge_rows(name, read(name), [plain])
        elif name in self._layers:
            value = self._merge(name, lambda other: self._begin(other, read))
        else:
            value = self._begin(name, read)
        if name in self._row_values:
            ids, rows = self._row_values[name]
            value[ids] = rows.float()
        return value

    def _begin(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What an adapter is merged into: the base's tensor, or one that takes its place."""
        return self._trained[name].float().clone() if name in self._trained else read(name)

    def sample_rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor | None:
        """Rows of a changed matrix by peft's own arithmetic; None where apply() is that.

        Shapes: rows [N], their numbers; weight and result [N, in], of the base and changed.
        """
        if self.plain(name) is None:
            return None
        layer: Any = copy.copy(self._layers[name][1])
        part = nn.Linear(1, 1, bias=False)
        part.weight = nn.Parameter(layer.lora_B[ADAPTER].weight.detach()[rows], requires_grad=False)
        object.__setattr__(layer, "_modules", {**layer._modules, "lora_B": nn.ModuleDict({ADAPTER: part})})
        delta: Tensor = layer.get_delta_weight(ADAPTER)
        return weight + delta.float()

    @torch.no_grad()
    def _merge(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Have peft merge the layer that holds a tensor."""
        _, layer = self._layers[name]
        together = {key: inside for key, (inside, other) in self._layers.items() if other is layer}
        base: Any = layer.get_base_layer()
        before = {inside: getattr(base, inside) for inside in together.values()}
        try:
            for key, inside in together.items():
                setattr(base, inside, nn.Parameter(read(key).clone(), requires_grad=False))
            redo_initialisation(layer, self.adapter.config)
            for module in _wrappers(layer):
                module.merge(safe_merge=True)
            return getattr(base, together[name]).data.float()
        except Exception as error:  # a kind that peft cannot merge, or not finite
            raise SettingsError(f"the adapter cannot be merged: {first_line(error)}") from None
        finally:
            for inside, value in before.items():
                setattr(base, inside, value)
            for module in _wrappers(layer):
                module.merged_adapters.clear()

    def _find(self, model: nn.Module) -> None:
        """Take down what peft put into the model. What is not on the meta device was trained."""
        inside = ""
        for path, module in model.named_modules():
            if inside and path.startswith(inside):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                inside = f"{path}."
                trained = module.modules_to_save[ADAPTER].state_dict()
                self._trained |= {f"{path}.{name}": value for name, value in trained.items()}
            elif isinstance(module, LoraLayer):
                inside = f"{path}."
                self._layers |= {f"{path}.{name}": (name, module) for name in _list_changed(module)}
                own = module.get_base_layer().named_parameters()
                self._trained |= {f"{path}.{name}": p for name, p in own if not p.is_meta}
            else:
                own = module.named_parameters(recurse=False)
                self._trained |= {f"{path}.{name}": p for name, p in own if not p.is_meta}

    def _differs(self, embedding: str, output: str) -> bool:
        """Whether embedding and output become two matrices, which were one."""
        first, second = self._trained.get(embedding), self._trained.get(output)
        if first is None or second is None:
            return first is not second
        return not torch.equal(first, second)


def _vocabulary_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the embedding's and the output layer's matrices."""
    names = {id(module): name for name, module in model.named_modules()}
    return (
        f"{names[id(model.get_input_embeddings())]}.weight",
        f"{names[id(model.get_output_embeddings())]}.weight",
    )


def _wrappers(layer: LoraLayer) -> list[Any]:
    """The layer, and those of peft's that it wraps (one a parameter of experts), from the inside."""
    found: list[Any] = [layer]
    while isinstance(found[-1].base_layer, LoraLayer):
        found.append(found[-1].base_layer)
    return found[::-1]


def _list_changed(layer: LoraLayer) -> list[str]:
    """Parameters of a layer that merging changes."""
    changed = [getattr(module, "parameter_name", "weight") for module in _wrappers(layer)]
    return [*changed, "bias"] if any(layer.lora_bias.values()) else changed


def _is_plain(layer: LoraLayer) -> bool:
    base: Any = layer.get_base_layer()
    known = type(layer) is LoraLinear and isinstance(base, nn.Linear) and not layer.fan_in_fan_out
    return known and ADAPTER not in layer.lora_variant and not layer.lora_bias[ADAPTER]


def redo_initialisation(layer: Any, config: Any) -> None:
    """Change a base's weight as peft does when it adapts a layer (PiSSA, OLoRA), which then adds the trained matrices.

    The layer's weight must be there; its matrices stay as they are.
    """
    if not isinstance(config.init_lora_weights, str) or not hasattr(layer, "lora_A") or ADAPTER not in layer.lora_A:
        return
    trained = {name: p.data for name, p in layer.named_parameters() if "lora_" in name}
    layer.update_layer(ADAPTER, layer.r[ADAPTER], layer.lora_alpha[ADAPTER], config)
    for name, p in layer.named_parameters():
        if name in trained:
            p.data = trained[name]


def check_finite(name: str, numbers: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises: SettingsError: a merged tensor is not finite in a dtype. numbers: its extremes, or sums of its parts."""
    if not bool(torch.stack(list(numbers)).abs().max() <= torch.finfo(dtype).max):  # NaN is not, either
        raise SettingsError(f"the adapter cannot be merged: {name} becomes no finite numbers in {dtype}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces this small are computed as fast as a disk takes them; threads that wait for each other are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_rows_at_once(width: int) -> int:
    """Rows of a matrix that are merged at a time."""
    return max(1, _ELEMENTS // width)


def join_products(products: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the sum of those of several pairs. Shapes: [out, r] and [r, in]."""
    return torch.cat([pair[0] for pair in products], 1), torch.cat([pair[1] for pair in products], 0)


@torch.no_grad()
def merge_rows(name: str, weight: Tensor, products: list[tuple[Tensor, Tensor]], out: Tensor | None = None) -> Tensor:
    """Weight plus the products of pairs of matrices, a few rows at a time. name: of the weight, for the error.

    Shapes: weight and out [out, in], of any dtype; products of [out, r] and [r, in], float32. Returns: out, or a new
    matrix in float32.

    Raises: SettingsError: a result that is not finite in out's dtype.
    """
    up, down = join_products(products)
    result = torch.empty(weight.shape, dtype=torch.float32) if out is None else out
    step = count_rows_at_once(weight.shape[1])
    buffer = torch.empty(step, weight.shape[1], device=weight.device)
    # A number that is not finite shows in the sum; fp16 alone has no room for large ones. isfinite() of a matrix in
    # half precision takes longer than the merge.
    numbers: list[Tensor] = []
    with _one_thread():
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            merged = buffer[: len(up[rows])].copy_(weight[rows]).addmm_(up[rows], down)
            numbers += torch.aminmax(merged) if result.dtype == torch.float16 else [merged.sum()]
            result[rows] = merged
    check_finite(name, numbers, result.dtype)
    return result
