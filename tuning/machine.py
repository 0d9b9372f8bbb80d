"""What the machine is: its device, its memory, and errors that say that memory ran out."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

from tuning.errors import SettingsError


def describe_device(device: torch.device) -> str:
    """One line for the log: the device, its memory, and why it is not a GPU if it is not."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bf16: computing in fp16"
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}{bf16}"
    line = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        return line
    if torch.version.cuda is None and Path("/proc/driver/nvidia").exists():
        return f"{line}; there is an NVIDIA GPU, but torch {torch.__version__} is a CPU build: install the CUDA build"
    if torch.version.cuda is not None and Path("/proc/driver/nvidia").exists() and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = (
            f"CUDA_VISIBLE_DEVICES={hidden} hides it" if hidden is not None else "its driver is too old for this torch"
        )
        return f"{line}; there is an NVIDIA GPU, but {why}"
    return f"{line} (no GPU found)"


def check_device(device: torch.device) -> None:
    """Raises: SettingsError: a GPU that this build of torch has no kernels for."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    built = [
        int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    ]
    if built and major * 10 + minor < min(built):
        raise SettingsError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is too old for torch "
            f"{torch.__version__}, which starts at {min(built) / 10}; install an older torch, or pass --use_cpu"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, kilobytes elsewhere


def process_memory() -> int:
    """Bytes that are resident now."""
    return psutil.Process().memory_info().rss


def memory_limit(device: torch.device) -> int | None:
    """Bytes this process may use: a GPU's total; on CPUs its share of free memory (plus its own) or of its cgroup."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limits = [psutil.virtual_memory().available // processes + process_memory()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(path).read_text()) // processes)
    return min(limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the device or the machine running out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
