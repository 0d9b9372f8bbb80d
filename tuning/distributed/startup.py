"""How the processes of a run meet: MPI, DeepSpeed, and checks that everyone is there."""

import contextlib
import logging
import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tuning.distributed.processes import gather_values, on_rank_0
from tuning.errors import MachineError, SettingsError
from tuning.machine import check_device
from tuning.settings.arguments import Arguments, RunArguments
from tuning.settings.deepspeed_json import read_deepspeed_config

_MEETING_S = 120  # timeout (s) of the connection check: how late the slowest rank may reach it
_VISIBLE_S = 30  # for a new file to be seen by other machines: network file systems cache directories


def start_processes(arguments: Arguments) -> None:
    """Read DeepSpeed's file, join the other processes of the run, and give this one its device.

    What building the arguments leaves alone happens here: imports of engines, sockets, files. All must call this.

    Raises: SettingsError: an engine that cannot work. MachineError: a process is missing.
    """
    run = arguments.run
    flag = "--deepspeed" if run.deepspeed is not None else "--fsdp" if run.fsdp is not None else None
    if flag and "RANK" not in os.environ:
        raise SettingsError(f"{flag}: needs torchrun, for one process too: torchrun --nproc_per_node N finetune.py ...")
    if run.deepspeed is not None:
        given: Any = run
        given.deepspeed = read_deepspeed_config(run.deepspeed, run)
        _import_deepspeed(use_cpu=run.use_cpu)
    run.started = True
    device = run.device  # transformers opens the process group
    check_engine(arguments)
    if run.deepspeed is not None:
        _prepare_deepspeed(run)
    check_device(device)
    check_connection(device)


def check_engine(arguments: Arguments) -> None:
    """Hold the engine against the other settings, once DeepSpeed's file was read. Raises: SettingsError."""
    model, _data, lora, run = arguments
    if run.engine in ("single", "ddp"):
        return
    flag = "--deepspeed" if run.deepspeed else "--fsdp"
    config: Any = run.deepspeed or {}
    if run.deepspeed and model.pure_bf16:
        raise SettingsError(
            "--pure_bf16: has no effect with --deepspeed, which keeps fp32 master weights; --bf16 will do"
        )
    if run.fsdp and run.fp16:
        raise SettingsError("--fsdp and --fp16: gradients of shards are not scaled; use --bf16, or --deepspeed")
    if run.optimizer_name not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"--optim {run.optimizer_name}: {flag} shards its state; use adamw_torch")
    asked = "sample_prompts" if run.sample_prompts else "eval_generate" if run.eval_generate else None
    if asked and run.engine in ("zero3", "fsdp"):
        raise SettingsError(f"--{asked}: no process holds the full model with {flag}; ask checkpoints with chat.py")
    if lora.q_lora and (config.get("data_types") or {}).get("buffer_dtype"):
        raise SettingsError("--deepspeed: data_types.buffer_dtype casts the scales of quantised weights; delete it")
    if lora.q_lora and run.engine == "zero3":
        raise SettingsError(
            "--q_lora and ZeRO-3: it casts and shards quantised weights; use --deepspeed "
            "finetune/ds_config_zero2.json, or --fsdp full_shard, which shards the model, too"
        )


def _import_deepspeed(*, use_cpu: bool) -> None:
    """Import DeepSpeed, and on CPUs open the process group through it: transformers would not in time.

    Raises: SettingsError: it is not installed, or would use GPUs against --use_cpu.
    """
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import logger
    except ImportError:
        raise SettingsError("--deepspeed: not installed; pip install deepspeed") from None
    logger.setLevel(logging.WARNING)
    if use_cpu and get_accelerator().device_name() != "cpu":
        raise SettingsError("--deepspeed and --use_cpu: set DS_ACCELERATOR=cpu in the environment, too")
    if use_cpu and not dist.is_initialized():
        # Its own sums in shared memory: a minute of compiling, and other rounding than gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def _prepare_deepspeed(run: RunArguments) -> None:
    """Give the Trainer DeepSpeed's configuration, as transformers does when it builds its arguments."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments: Any = run
    config = HfTrainerDeepSpeedConfig(run.deepspeed)
    # To the Trainer a step is one item, whatever it accumulates.
    accumulation, run.gradient_accumulation_steps = run.gradient_accumulation_steps, 1
    config.trainer_config_process(run)
    run.gradient_accumulation_steps = accumulation
    arguments.hf_deepspeed_config, arguments.deepspeed_plugin = config, DeepSpeedPlugin(hf_ds_config=config)
    unset_hf_deepspeed_config()  # from_pretrained would shard at once; here rank 0 loads all of it


def check_connection(device: torch.device) -> None:
    """Check that all processes are there and that a sum over all devices is right. All must call this.

    Raises: MachineError: a process is missing, or the devices cannot reach each other.
    """
    if not dist.is_initialized():
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    timeout = timedelta(seconds=_MEETING_S)
    group = dist.new_group(backend="gloo", timeout=timeout)
    try:
        dist.monitored_barrier(group, timeout=timeout, wait_all_ranks=True)
        total = torch.tensor([float(rank + 1)], device=device)
        work = dist.all_reduce(total, async_op=True)
        deadline = time.monotonic() + _MEETING_S
        while work is not None and not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within {_MEETING_S} s")
            time.sleep(0.01)
        if (sum_ := total.item()) != size * (size + 1) / 2:
            raise RuntimeError(f"a sum over all processes is {sum_}")
    except RuntimeError as error:
        name = dist.get_backend()
        why = " ".join(str(error).split())
        raise MachineError(
            f"process {rank} ({socket.gethostname()}): the {size} processes cannot reach each other by {name}: {why}; "
            "see docs/distributed.md"
        ) from None
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group(group)


def check_shared(directory: Path) -> None:
    """Check that all processes see the same directory. All must call this.

    directory: need not exist yet; its nearest existing parent is checked. Nothing is left there.

    Raises: SettingsError: it is another one on some machine.
    """
    if not dist.is_initialized():
        return

    target = directory.absolute()

    def leave() -> tuple[int, str]:
        depth, existing = next((d, path) for d, path in enumerate((target, *target.parents)) if path.exists())
        name = f".{uuid.uuid4().hex}.tmp"
        try:
            (existing / name).touch()
        except OSError as error:
            raise SettingsError(f"--output_dir {directory}: cannot be written to: {error.strerror}") from None
        return depth, name

    depth, name = on_rank_0(leave)
    mark = (target, *target.parents)[depth] / name
    deadline = time.monotonic() + _VISIBLE_S
    try:
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        everyone = gather_values((seen, socket.gethostname()))
        blind = [f"process {rank} ({host})" for rank, (sees, host) in enumerate(everyone) if not sees]
    finally:
        if dist.get_rank() == 0:
            mark.unlink(missing_ok=True)
    if blind:
        raise SettingsError(
            f"--output_dir {directory}: is not the same directory in {blind[0]} as in process 0; name one that all "
            "machines share (checkpoints are written by process 0 and read by all)"
        )
