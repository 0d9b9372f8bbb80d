"""What a receipt is: the fields of its JSON, and whether one has them. Needs nothing but Python.

    {"format": 1, "date", "git", "minutes", "rehearsal", "device": {...}, "versions": {...}, "entries": [...]}

An entry is {"stage", "name", "status"}, and by its status

    ok        figures (numbers, texts, or lists of objects of these), wall_s
    failed    error, and figures where there are some
    skipped   reason: what is missing here
    not run   reason: "no time"

rehearsal: made without a GPU at tiny sizes, so that no figure in it is a measurement.
"""

import math
import re
from typing import Any

FORMAT = 1
STAGES = ("environment", "correctness", "training", "qlora", "profile")
_HEAD = {"format": int, "date": str, "git": str, "minutes": (int, float), "rehearsal": bool}
_HEAD |= {"device": dict, "versions": dict, "entries": list}
_DEVICE = {"name": str, "memory_gib": (int, float), "driver": str, "capability": str}
_BY_STATUS = {"ok": {"figures": dict, "wall_s": (int, float)}, "failed": {"error": str}}
_BY_STATUS |= {"skipped": {"reason": str}, "not run": {"reason": str}}
_TRAINED = {"tokens_per_s", "s_per_step_mean", "s_per_step_min", "s_per_step_max", "matmul_share", "peak_gib"}
_VERSIONS = ("python", "torch", "transformers", "peft", "accelerate")


def find_faults(receipt: Any) -> list[str]:
    """What is wrong with a receipt, a line each; nothing where it is valid."""
    if not isinstance(receipt, dict):
        return ["a receipt is a JSON object"]
    faults = _check(receipt, _HEAD, "receipt")
    if faults:
        return faults
    if receipt["format"] != FORMAT:
        faults.append(f"format: {receipt['format']}; this program reads {FORMAT}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", receipt["date"]):
        faults.append(f"date: {receipt['date']!r} is not YYYY-MM-DD")
    faults += _check(receipt["device"], _DEVICE, "device")
    for name in _VERSIONS:
        if not isinstance(receipt["versions"].get(name), str):
            faults.append(f"versions.{name}: missing")
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(receipt["entries"]):
        faults += _check_entry(entry, f"entries[{number}]", seen)
    return faults


def _check_entry(entry: Any, where: str, seen: set[tuple[str, str]]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{where}: not an object"]
    if faults := _check(entry, {"stage": str, "name": str, "status": str}, where):
        return faults
    where = f"{where} ({entry['stage']}: {entry['name']})"
    faults = []
    if entry["stage"] not in STAGES:
        faults.append(f"{where}: stage is none of {', '.join(STAGES)}")
    if entry["status"] not in _BY_STATUS:
        return [*faults, f"{where}: status {entry['status']!r} is none of {', '.join(_BY_STATUS)}"]
    if (key := (entry["stage"], entry["name"])) in seen:
        faults.append(f"{where}: stands there twice")
    seen.add(key)
    faults += _check(entry, _BY_STATUS[entry["status"]], where)
    figures = entry.get("figures", {})
    if not isinstance(figures, dict):
        return faults
    faults += [f"{where}.{name}: not finite, or of another kind" for name in figures if not _is_figure(figures[name])]
    if entry["status"] == "ok" and entry["stage"] in ("training", "qlora"):
        for name in sorted(_TRAINED):
            if not _is_number(figures.get(name)) or figures[name] <= 0:
                faults.append(f"{where}.{name}: expected a number above 0")
    return faults


def _is_figure(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, dict) and all(map(_is_plain, each.values())) for each in value)
    return _is_plain(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(found: dict[str, Any], expected: dict[str, Any], where: str) -> list[str]:
    """Fields that are missing or of another type."""
    faults = []
    for name, kind in expected.items():
        if name not in found:
            faults.append(f"{where}.{name}: missing")
        elif not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
            faults.append(f"{where}.{name}: {found[name]!r} is of another type")
    return faults
