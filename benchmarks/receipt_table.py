"""Receipts as markdown: one with all its figures, and the table of several that README shows."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.cells import ARMS
from benchmarks.receipt_schema import STAGES
from benchmarks.receipt_stages.jobs import NEMO, NEMO_TOKENS_PER_S, QLORA_WORK, WORK

LENGTHS = (512, 2048, 4096, 8192)
SHAPES = {"7b": "Qwen-7B", "8b": "Qwen3-8B"}
METHODS = {"lora": "LoRA", "qlora_nf4": "Q-LoRA (NF4)", "qlora_gptq": "Q-LoRA (GPTQ Int4)"}
NAMES = {"ours": "ours", "compiled": "ours, layers compiled", "plain": "transformers, peft", "trl": "TRL"}
NOT_MEASURED = "not measured"
_ERRORS = ("loss_error", "gradient_norm_error", "gradient_error", "output_error", "merge_error")
Receipt = dict[str, Any]


def _draw(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    # A bar in a kernel's name or an error would end the cell.
    for row in rows:
        lines.append("| " + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in row) + " |")
    return "\n".join(lines)


def count_statuses(receipt: Receipt) -> str:
    """How many entries are in each status, in words."""
    counts = Counter(entry["status"] for entry in receipt["entries"])
    return ", ".join(f"{count} {status}" for status, count in counts.items())


# ---- several receipts: README's ----


def draw_table(receipts: list[Receipt]) -> str:
    """Tokens/s by work, arm and length, the share of the device's rate in brackets. Rehearsals do not count."""
    measured = [receipt for receipt in receipts if not receipt["rehearsal"]]
    rows: list[list[str]] = []
    for work, title in _list_work().items():
        before = len(rows)
        for receipt in measured:
            figures = _list_figures(receipt)
            for arm in ARMS:
                found = [figures.get((work, length, arm)) for length in LENGTHS]
                if any(found):
                    place = f"{receipt['device']['name']}, {receipt['date']}"
                    rows.append([title, NAMES[arm], *map(_draw_speed, found), place])
        if len(rows) == before:
            rows.append([title, "", *[""] * len(LENGTHS), NOT_MEASURED])
    return _draw(["work", "trained by", *(f"{length:,}" for length in LENGTHS), "measured on"], rows)


def _draw_speed(figures: dict[str, Any] | None) -> str:
    return f"{figures['tokens_per_s']:,.0f} ({figures['matmul_share']:.0%})" if figures else ""


def _list_work() -> dict[str, str]:
    """Titles of the rows, by name."""
    titles = {}
    for name, (shape, method, rank, dropout) in {**WORK, **QLORA_WORK}.items():
        titles[name] = f"{SHAPES[shape]}, {METHODS[method]} r{rank}" + (f", dropout {dropout}" if dropout else "")
    nemo = f"{SHAPES[NEMO.shape]}, LoRA r{NEMO.rank}, all tokens supervised (NeMo on an H100: {NEMO_TOKENS_PER_S:,})"
    return {"nemo": nemo, **titles}


def _list_figures(receipt: Receipt) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Figures by (work, length, arm)."""
    found = {}
    for entry in receipt["entries"]:
        if entry["stage"] in ("training", "qlora") and entry["status"] == "ok":
            cell, _, arm = entry["name"].partition("/")
            work, _, length = cell.rpartition("-")
            key = (work, int(length), arm) if work else (cell, NEMO.length, arm)
            found[key] = entry["figures"]
    return found


# ---- one receipt ----


def draw_receipt(receipt: Receipt) -> str:
    """All its figures."""
    device, versions = receipt["device"], receipt["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    head = (
        f"{device['name']}, {device['memory_gib']} GiB, driver {device['driver'] or 'none'}; {receipt['date']}; {named}"
    )
    parts = [
        f"# {'Rehearsal, no measurement' if receipt['rehearsal'] else 'Receipt'}",
        f"{head}; commit {receipt['git']}",
    ]
    parts.append(f"{count_statuses(receipt)}.")
    done = {stage: [e for e in receipt["entries"] if e["stage"] == stage and e["status"] == "ok"] for stage in STAGES}
    rates = [pair for e in done["environment"] if e["name"] != "device" for pair in e["figures"].items()]
    parts += ["## The device's own rates", _draw(["rate", "value"], rates)]
    parts += ["## Correctness", "Relative errors against fp32; in brackets transformers' in the same precision."]
    parts.append(_draw(["check", *_ERRORS], ([e["name"], *_list_errors(e)] for e in done["correctness"])))
    parts += ["## Training", _draw_cells(done["training"] + done["qlora"])]
    for entry in done["profile"]:
        figures = entry["figures"]
        parts += [f"## Profile of a step: {figures['cell']}", ", ".join(
            f"{name} {value}" for name, value in figures.items() if name not in ("cell", "kernels")
        )]  # fmt: skip
        parts.append(_draw(["kernel", "calls", "ms", "share"], (each.values() for each in figures["kernels"])))
    rest: dict[tuple[str, str, str], list[str]] = {}
    for entry in receipt["entries"]:
        if entry["status"] != "ok":
            why = entry.get("error") or entry["reason"]
            rest.setdefault((entry["stage"], entry["status"], why), []).append(entry["name"])
    rows = ([*key, "; ".join(names)] for key, names in rest.items())
    parts += ["## Failed, skipped or not run", _draw(["stage", "status", "why", "entries"], rows)]
    return "\n\n".join(parts)


def _list_errors(entry: dict[str, Any]) -> list[str]:
    figures = entry["figures"]
    errors = []
    for name in _ERRORS:
        theirs = figures.get(f"{name}_of_transformers")
        errors.append(f"{figures.get(name, '')}" + ("" if theirs is None else f" ({theirs})"))
    return errors


def _draw_cells(entries: list[dict[str, Any]]) -> str:
    columns = ["tokens/s", "s a step: mean", "min", "max", "share of the rate", "peak GiB", "planned GiB", "recomputed"]
    rows = []
    for entry in entries:
        figures = entry["figures"]
        times = [figures[f"s_per_step_{each}"] for each in ("mean", "min", "max")]
        rows.append([
            entry["name"], f"{figures['tokens_per_s']:,}", *times, f"{figures['matmul_share']:.1%}",
            figures["peak_gib"], figures.get("planned_gib", ""), "yes" if figures["gradient_checkpointing"] else "no",
        ])  # fmt: skip
    return _draw(["cell", *columns], rows)
