"""Sharded weights (ZeRO-3, FSDP2): scattered from rank 0, gathered as full tensors, written back.

Only rank 0 loads weights; the other ranks hold a meta model until shard_model. So a machine with N processes holds one
copy, and whatever reads weights before training runs as on one process.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tuning.distributed.processes import on_all_ranks, on_rank_0
from tuning.errors import SettingsError

SHARDED = ("zero3", "fsdp")  # engines whose processes hold a part of each weight


def shard_model(training_model: Any, settings: Any, dtype: torch.dtype) -> None:
    """Give every rank its shard of each weight, layer by layer. All must call this.

    training_model: a TrainingModel. settings: RunArguments; an engine that does not shard weights leaves the model
    alone. dtype: of the computation.

    Raises: SettingsError: a rank built another model than rank 0.
    """
    if settings.engine not in SHARDED:
        return
    described = on_rank_0(lambda: {name: (tuple(t.shape), t.dtype) for name, t in _named_tensors(training_model)})
    on_all_ranks(lambda: _check_same(training_model, {name: shape for name, (shape, _) in described.items()}))
    dtypes = {id(t): described[name][1] for name, t in _named_tensors(training_model)}
    shard = _prepare_zero3(settings, dtype) if settings.engine == "zero3" else _prepare_fsdp(settings, dtype)
    done: set[int] = set()
    for module in [*training_model.layers, training_model]:
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) in done or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
                continue
            done.add(id(tensor))
            _materialise(tensor, dtypes[id(tensor)], settings.device)
            if settings.engine == "zero3" and isinstance(tensor, nn.Parameter):
                shard(tensor)
        if settings.engine == "fsdp":
            shard(module)
    on_all_ranks(lambda: _check_nothing_left(training_model))


def gather_tensor(parameter: Any) -> Tensor:
    """The full value of a tensor, in the precision the optimizer keeps it in. All processes must call this."""
    if isinstance(parameter, DTensor):
        sharded: Any = parameter.detach()
        return sharded.full_tensor()
    if _is_partitioned(parameter) and not parameter.requires_grad:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if _has_master(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view(shape_of(parameter))
    return parameter.detach()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor, the same on every rank, into a parameter or its shard. All ranks must call this."""
    if isinstance(parameter, DTensor):
        parameter.copy_(scatter(value, parameter))
        return
    if _is_partitioned(parameter):
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        if _has_master(parameter):
            safe_set_local_fp32_param(parameter, partition(value, parameter))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        return
    if _has_master(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))
    parameter.copy_(value)


def partition(value: Tensor, parameter: Any) -> Tensor:
    """This process's part of a full value as ZeRO-3 cuts it: flat, padded to the number of processes; fp32."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten().to(torch.float32)
    padded = nn.functional.pad(flat, (0, size * dist.get_world_size() - len(flat)))
    return padded.narrow(0, size * dist.get_rank(), size).to(parameter.ds_tensor.device)


def reshard(model: nn.Module) -> None:
    """Free the full weights that FSDP2 and ZeRO-3 keep or prefetch after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    zero3 = next((p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")), None)
    if zero3 is not None:
        zero3.empty_partition_cache()


def check_quantized_sharding(settings: Any) -> None:
    """Raises: SettingsError: this torch's FSDP2 cannot shard integers. settings: RunArguments."""
    if settings.engine != "fsdp":
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if "is_floating_point" not in inspect.getsource(_fsdp_param):  # since torch 2.12 or 2.13
        raise SettingsError(
            f"--q_lora and --fsdp: FSDP2 of torch {torch.__version__} cannot shard quantised weights; use torch 2.13, "
            "or --deepspeed finetune/ds_config_zero2.json"
        )


def scatter(value: Tensor, like: DTensor) -> DTensor:
    """This process's shard of a full value that every process has."""
    device = like.device_mesh.device_type
    return distribute_tensor(value.to(device), like.device_mesh, like.placements, src_data_rank=None)


def local_part(parameter: Any) -> Tensor:
    """This rank's shard of a parameter; the full parameter where it is not sharded."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return parameter.ds_tensor.detach() if _is_partitioned(parameter) else parameter.detach()


def master_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of gather_tensor's result."""
    return torch.float32 if _has_master(parameter) else parameter.dtype


def shape_of(parameter: Any) -> torch.Size:
    """The shape of a tensor's full value."""
    return parameter.ds_shape if _is_partitioned(parameter) else parameter.shape


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _has_master(parameter: Any) -> bool:
    """Whether DeepSpeed's optimizer keeps a copy of its own that trains (ZeRO-1, ZeRO-2: _hp_mapping)."""
    return parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_same(model: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    built = {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}
    for name in {**expected, **built}:
        if built.get(name) != expected.get(name):
            raise SettingsError(
                f"the model has {name} {built.get(name)} here and {expected.get(name)} in process 0; give all machines "
                "the same checkpoint and libraries"
            )
    if list(built) != list(expected):  # tensors are shared in this order
        raise SettingsError("the model has its layers in another order here than in process 0; use ZeRO-2 or no engine")


def _check_nothing_left(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise SettingsError(
                    f"{type(module).__name__} has a tensor that is no parameter or buffer ({name}.{key}), which "
                    "cannot be sharded; use --deepspeed finetune/ds_config_zero2.json, or no engine"
                )


@torch.no_grad()
def _materialise(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Bring a tensor to the device with rank 0's value. The object stays the same, and so do ties and references."""
    if tensor.is_meta:
        empty = torch.empty(tensor.shape, dtype=dtype, device=device)
        fresh = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        torch.utils.swap_tensors(tensor, fresh)
    else:
        tensor.data = tensor.data.to(device).contiguous()
    dist.broadcast(tensor.data.view(-1).view(torch.uint8), 0)


def _prepare_fsdp(settings: Any, dtype: torch.dtype) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(settings.device.type, (settings.world_size,))
    # Weights are cast for the computation, gradients are summed in fp32, inputs stay as they are.
    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    # None: layers are sharded again after forward; the rest, which the loss needs at once, is not.
    reshard = False if "shard_grad_op" in settings.fsdp else None

    def shard(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)

    return shard


def _prepare_zero3(settings: Any, dtype: torch.dtype) -> Any:
    import deepspeed

    config = settings.hf_deepspeed_config.config
    context = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)

    def shard(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(dtype)  # its optimizer has fp32 copies of what trains
        context._convert_to_zero_parameters([parameter])

    return shard
