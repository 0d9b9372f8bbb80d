"""A step of one cell as torch's profiler sees it: where the time goes, how many launches, how long nothing runs."""

from collections import Counter
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.arms import run_cell
from benchmarks.cells import Cell, Figures
from benchmarks.random_models import choose_device

_TOP = 15


def run(cell: Cell, name: str) -> Figures:
    """Profile the first timed step of a cell, ours. name: of the cell.

    Returns: kernels (the longest, with calls, ms and share of the busy time), launches, span_ms from the first kernel
    to the end of the last, busy_ms in which one runs, idle_share, longest_gap_ms. Without a GPU kernels are torch's
    innermost operators.
    """
    on_gpu = choose_device().type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    run_cell(cell, "ours", profiler)
    events: Any = profiler.events()
    if on_gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not _is_mark(event)]
        launches = sum("LaunchKernel" in event.name for event in events)
    else:
        kernels = [event for event in events if not event.cpu_children]
        launches = len(kernels)
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in kernels]
    return {"cell": name, "gradient_checkpointing": cell.lean, "launches": launches, **summarise(spans)}


def _is_mark(event: Any) -> bool:
    """Whether an event only names a stretch of the device's time."""
    return event.name.startswith("ProfilerStep") or bool(getattr(event, "is_user_annotation", False))


def summarise(spans: list[tuple[str, float, float]]) -> Figures:
    """Of (name, start, end) in microseconds; they may overlap."""
    assert spans, "the profiler saw no kernel"
    total, calls = Counter[str](), Counter[str]()
    busy, longest_gap, end = 0.0, 0.0, min(start for _, start, _ in spans)
    first = end
    for name, start, stop in sorted(spans, key=lambda span: span[1]):
        total[name] += stop - start
        calls[name] += 1
        longest_gap = max(longest_gap, start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span, everything = end - first, sum(total.values())
    return {
        "span_ms": round(span / 1e3, 3),
        "busy_ms": round(busy / 1e3, 3),
        "idle_share": round(1 - busy / span, 4) if span else 0.0,
        "longest_gap_ms": round(longest_gap / 1e3, 3),
        "kernels": [
            {
                "name": name[:120],
                "calls": calls[name],
                "ms": round(time / 1e3, 3),
                "share": round(time / everything, 4) if everything else 0.0,
            }
            for name, time in total.most_common(_TOP)
        ],
    }
