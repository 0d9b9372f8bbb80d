"""How much memory a step takes, found by running it on fake tensors (shapes, no values)."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuning.distributed.sharding import SHARDED
from tuning.model.loss import chunk_rows
from tuning.model.quantized_linear import QuantizedLinear
from tuning.model.training_model import TrainingModel


@dataclass(frozen=True)
class MicroBatchShape:
    """Tokens of its rows, and how many of them are supervised. packed: else padded to the longest."""

    lengths: tuple[int, ...]
    num_targets: int
    packed: bool

    @property
    def num_positions(self) -> int:
        """Tokens with padding."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by part.

    process: what the process takes without any of it (on CPUs). weights, gradients, optimizer: this process's share.
    gathered: layers brought together for their computation where weights are in shards. activations: what forward
    keeps for backward, and what both work with. loss: logits of one chunk, and gradients of the output layer.
    allocator: on CPUs, what the C library keeps between its blocks.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    allocator: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# Of resident memory over what is allocated, measured on CPUs (benchmarks/LOG.md).
_ALLOCATOR_SHARE = 0.12

# Optimizer state, bytes per trained parameter. DeepSpeed's fp32 master weights are added in estimate_memory.
_STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "sgd": 0,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}


def estimate_memory(
    training_model: TrainingModel,
    shape: MicroBatchShape,
    *,
    dtype: torch.dtype,
    engine: str,
    num_processes: int,
    optimizer: str,
    device_type: str,
    process_bytes: int,
    accumulates: bool,
    keeps_whole: bool = False,
    offloaded: tuple[str, ...] = (),
    device_memory: int | None = None,
) -> Memory:
    """Memory of training a model that has no storage (on the meta device).

    dtype: of the computation. engine: RunArguments.engine. optimizer: --optim. process_bytes: before any of it.
    accumulates: a step has several micro-batches, so that gradients are there from the first on. keeps_whole: full
    weights stay between forward and backward (--fsdp shard_grad_op). offloaded: "optimizer", "param", of DeepSpeed.
    device_memory: bytes that the device has, where they are known.

    Raises: whatever a model does with tensors without values: where its computation depends on them.
    """
    parameters = list(training_model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    zero = int(engine.removeprefix("zero")) if engine.startswith("zero") else 0
    sharded = engine in SHARDED
    share = num_processes if sharded else 1
    weights = sum(_size(p, dtype if zero else None) for p in parameters) // share  # DeepSpeed casts all weights
    packed = [module for module in training_model.modules() if isinstance(module, QuantizedLinear)]
    weights += sum(table.nbytes for module in packed for table in module.buffers())
    plain = engine in ("single", "ddp")  # others sum gradients over processes layer by layer, and keep their share
    own_gradients = sum(p.numel() * p.element_size() for p in trained)
    gradients = num_trained * 4 // (num_processes if zero >= 2 or sharded else 1)
    if plain:
        gradients = own_gradients * (2 if engine == "ddp" else 1)  # DDP's buckets
    masters = 4 if zero else 0
    state = (_STATE_BYTES.get(optimizer, 8) + masters) * num_trained // (num_processes if zero or sharded else 1)
    working = simulate_step(
        training_model, shape, dtype=dtype, casts_weights=plain, accumulates=accumulates or not plain
    )
    if device_type == "cpu":
        working += _heap_fragmentation(training_model)
    if plain and not accumulates:  # gradients come while activations go
        working -= min(working, own_gradients)
    on_gpu = device_type != "cpu"
    if "optimizer" in offloaded and on_gpu:
        state = gradients = 0
    if "param" in offloaded and on_gpu:
        weights = 0
    simulated_loss = _loss_bytes(training_model, shape, dtype, "cpu", simulated=True)
    memory = Memory(
        process=process_bytes,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        gathered=_gathered_bytes(training_model, dtype, keeps_whole) if sharded else 0,
        activations=max(0, working - simulated_loss),
        loss=_loss_bytes(training_model, shape, dtype, device_type, device_memory=device_memory),
    )
    if device_type != "cpu":
        return memory
    return replace(memory, allocator=int(_ALLOCATOR_SHARE * (memory.total - memory.process)))


def simulate_step(
    training_model: TrainingModel,
    shape: MicroBatchShape,
    *,
    dtype: torch.dtype,
    casts_weights: bool,
    accumulates: bool,
) -> int:
    """Peak bytes of forward and backward of one micro-batch, without weights and gradients allocated before it.

    casts_weights: weights keep their dtype and autocast copies them; else they are in dtype already.
    """
    log = _without_log("torch._subclasses.fake_tensor")
    storage = with_storage(training_model, None if casts_weights else dtype)
    with log, FakeTensorMode(), _fixed_rotary(training_model), storage:
        for parameter in training_model.parameters():
            if parameter.requires_grad and accumulates:
                parameter.grad = torch.empty_like(parameter)
        batch = _build_micro_batch(shape)
        tracker = _PeakTracker([*training_model.parameters(), *training_model.buffers()])
        with tracker:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = training_model.train()(**batch)
            loss.backward()
    return tracker.peak


@contextmanager
def _fixed_rotary(model: nn.Module) -> Iterator[None]:
    """Keep rotary embeddings from looking at the longest position ("dynamic"): it has no value. Sizes are the same."""
    found = [m for m in model.modules() if isinstance(kind := getattr(m, "rope_type", None), str) and "dynamic" in kind]
    kinds: list[Any] = [module.rope_type for module in found]
    for module in found:
        module.rope_type = "default"  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in zip(found, kinds, strict=True):
            module.rope_type = kind


class _PeakTracker(TorchDispatchMode):
    """Tracks the bytes of live storages. before: tensors not to count (allocated before), nor their views."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            # Without values torch has it in bf16 only; on devices it computes in fp32, too.
            result = _empty_grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _empty_grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The result of torch's grouped product without values: rows by groups of matrices, or their gradient.

    Shapes: a [S, K], b [G, K, N] -> [S, N]; a [G, M, K], b [K, S] -> [M, S]; a [M, S], b [S, N] -> [G, M, N].
    """
    rows, columns = a.shape[-2], b.shape[-1]
    if a.ndim != b.ndim:
        return a.new_empty(rows, columns)
    groups = a.shape[0] if a.ndim == 3 or offs is None else offs.shape[0]
    return a.new_empty(groups, rows, columns)


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Keep a library's log off the screen meanwhile; what it logs as an error is raised, too."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def with_storage(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let a model's tensors be fake ones on the CPU meanwhile, cast to a dtype where one is given."""
    tables: list[Any] = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    before = [dict(table) for table in tables]
    made: dict[int, Tensor] = {}
    for table in tables:
        for name, tensor in table.items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                casts = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                empty = torch.empty(tensor.shape, dtype=dtype if casts else tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for table, tensors in zip(tables, before, strict=True):
            table.update(tensors)


def _build_micro_batch(shape: MicroBatchShape) -> dict[str, Any]:
    """Inputs of TrainingModel.forward; what is in them has no value."""
    rows, width = (1, sum(shape.lengths)) if shape.packed else (len(shape.lengths), max(shape.lengths))
    # Each packed row is an operation of its own in every layer; what they hold together is the same for a few.
    few = min(len(shape.lengths), 8)
    lengths = [width // few] * (few - 1) + [width - width // few * (few - 1)]
    batch: dict[str, Any] = {
        "input_ids": torch.empty(rows, width, dtype=torch.long),
        "target_index": torch.empty(shape.num_targets, dtype=torch.long),
        "targets": torch.empty(shape.num_targets, dtype=torch.long),
    }
    if shape.packed:
        batch |= {
            "position_ids": torch.empty(1, width, dtype=torch.long),
            "lengths": lengths,
            "row_starts": torch.empty(few + 1, dtype=torch.int32),
        }
    return batch


def _loss_bytes(
    training_model: TrainingModel,
    shape: MicroBatchShape,
    dtype: torch.dtype,
    device_type: str,
    *,
    simulated: bool = False,
    device_memory: int | None = None,
) -> int:
    """Buffers of the loss: logits and probabilities of a chunk, and the full gradient of a matrix that trains."""
    causal_lm = training_model.causal_lm
    weight = causal_lm.get_output_embeddings().weight
    rows = min(shape.num_targets, chunk_rows(shape.num_targets, len(weight), device_type, device_memory))
    in_place = dtype == torch.float32 and device_type == "cpu"
    chunk = rows * len(weight) * (4 if in_place else dtype.itemsize + 4)
    if device_type == "cpu" and not in_place and not simulated:
        chunk += rows * len(weight) * 4  # softmax copies its input to float32 first
    hidden = shape.num_targets * weight.shape[1] * 4
    trains = any(p.requires_grad and p.shape == weight.shape for p in causal_lm.get_output_embeddings().parameters())
    return chunk + hidden + (weight.numel() * 4 if trains else 0)


def _heap_fragmentation(training_model: TrainingModel) -> int:
    """What the C library's heap keeps between its blocks in the first step: about the bytes of the linear weights.

    glibc raises the size from which blocks are mapped one by one to that of the largest block that was freed, 32 MiB
    at most. Smaller tensors then lie in a heap in which those that stay keep what was freed around them. With
    MALLOC_MMAP_THRESHOLD_=65536 in the environment it does not grow (measured: benchmarks/LOG.md).
    """
    linear = (module for module in training_model.modules() if isinstance(module, nn.Linear))
    weights = {module.weight for module in linear if not isinstance(module, QuantizedLinear)}
    return sum(weight.nbytes for weight in weights)


def _gathered_bytes(training_model: TrainingModel, dtype: torch.dtype, keeps_whole: bool) -> int:
    """What is gathered at a time: two layers (one is prefetched), and all that is in no layer; or everything."""
    if keeps_whole:
        return sum(_size(p, dtype) for p in training_model.parameters())
    sizes = [sum(_size(p, dtype) for p in layer.parameters()) for layer in training_model.layers]
    rest = sum(_size(p, dtype) for p in training_model.parameters()) - sum(sizes)
    return 2 * max(sizes, default=0) + rest


def _size(parameter: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes, cast to a dtype where one is given; quantised weights are not cast."""
    if dtype is not None and parameter.is_floating_point():
        return parameter.numel() * dtype.itemsize
    return parameter.nbytes
