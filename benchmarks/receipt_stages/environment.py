"""The device, by its own account: its rate of matrix products, and how fast it copies memory."""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cells import Figures
from benchmarks.random_models import choose_device
from benchmarks.receipt_stages.jobs import ENVIRONMENT
from tuning.planning.operations import measure_matmul_rate

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "gptqmodel", "trl", "triton")


def list_checks() -> dict[str, Callable[[], Figures]]:
    """By name."""
    return dict(zip(ENVIRONMENT, (describe_device, measure_matrix_products, measure_memory), strict=True))


def describe_device() -> Figures:
    """What a receipt says of where it was made. rehearsal: there is no GPU."""
    device = choose_device()
    facts: dict[str, Any] = {"name": platform.processor() or platform.machine(), "capability": "", "driver": ""}
    facts["memory_gib"] = 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _ask_driver(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    facts |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda or "", "rehearsal": device.type == "cpu"}
    facts["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            facts[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[f"version of {name}"] = None
    return facts


def _ask_driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def measure_matrix_products() -> Figures:
    """TFLOP/s of square products: of 8,192 in three dtypes; of 512 in fp32 without a GPU."""
    device = choose_device()
    if device.type == "cpu":
        return {"float32_tflops": round(measure_matmul_rate(device, torch.float32, size=512) / 1e12, 3)}
    return {
        f"{str(dtype).removeprefix('torch.')}_tflops": round(measure_matmul_rate(device, dtype, size=8192) / 1e12, 1)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }


def measure_memory() -> Figures:
    """GB/s of a copy, read and write counted: best of five."""
    device = choose_device()
    source = torch.empty(2**30 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {"copy_gb_per_s": round(2 * source.nbytes / min(seconds[1:]) / 1e9, 1)}
