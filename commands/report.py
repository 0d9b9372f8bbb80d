"""A run's report: a page in a file, a page that is served, or a list of its rows."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from commands.report_page.charts import show
from commands.report_page.data_rows import DataRows, Place, read_rows, shorten
from commands.report_page.page import MARK, build_page
from commands.report_page.row_losses import RowLosses, choose_rows, read_row_losses
from commands.report_page.row_sections import NUM_WORST
from commands.report_page.runs import read_run, read_runs
from commands.report_page.server import ADDRESS, make_server
from data_utils.sources import printable
from tuning.checkpoint.files import replace_file
from tuning.errors import SettingsError, explain_failed_write

PAGE_FILE = "report.html"
_HEAD_BYTES = 4096  # of a page, which has its mark there
_MAX_SHOWN_EPOCHS = 6  # losses of a row in the terminal; of more its first and last


def run(args: argparse.Namespace) -> None:
    """Write, serve or list. args: of tuning/report.py. Raises: MachineError, SettingsError."""
    if args.rows:
        list_rows(args)
    elif args.serve:
        serve(args.runs, args.port or 0)
    else:
        write_page(args.runs, args.out)


def write_page(directories: list[str], out: str | None) -> None:
    """Write the page. Raises: SettingsError: no such run. MachineError: it cannot be written."""
    runs = read_runs(directories)
    path = Path(out) if out is not None else runs[0].directory / PAGE_FILE
    with explain_failed_write(path, "try again, or name another --out"):
        _check_place(path)
        replace_file(path, build_page(runs).encode())
    print(f"report: {path}")


def _check_place(path: Path) -> None:
    """See that a file in the page's place is an earlier page. Raises: SettingsError."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if MARK.encode() not in head:
        raise SettingsError(f"{path}: is there, and no report; name another --out")


def serve(directories: list[str], port: int) -> None:
    """Serve the page until Ctrl-C. Raises: SettingsError: no such run. MachineError: the port is taken."""
    read_runs(directories)  # what is wrong is said here, not in the browser
    with make_server(directories, port) as server:
        print(f"report: http://{ADDRESS}:{server.server_address[1]} (this machine only; Ctrl-C ends it)", flush=True)
        server.serve_forever()


# ---- --rows ----


def list_rows(args: argparse.Namespace) -> None:
    """Print rows by an order. Raises: SettingsError: no such run, one without row losses, or damaged ones."""
    run = read_run(args.runs[0])
    if run.rows_file is None:
        why = "they are written with each checkpoint, and at the end" if run.is_running else "it recorded none"
        raise SettingsError(f"{run.name}: no rows.parquet in it: {why}")
    losses = read_row_losses(run.rows_file)
    if args.epoch is not None:
        losses = losses.until(args.epoch)
    sort, num = args.sort or "excess", args.num or NUM_WORST
    rows = choose_rows(losses, sort=sort, verdict=args.verdict)
    if args.filter is None:
        rows = rows[:num]
        data = read_rows(run, [losses.place(row) for row in rows])
    else:
        data = read_rows(run, [losses.place(row) for row in rows])
        rows = [row for row in rows if _contains(losses.place(row), data, args.filter)][:num]
    if args.json:
        for row in rows:
            print(printable(json.dumps(describe_row(losses, row, data), ensure_ascii=False)))
        return
    print(f"{len(rows):,} of {len(losses.losses):,} rows, by {sort}, after {len(losses.epochs):,} epochs")
    for row in rows:
        print("\n".join(_row_lines(losses, row, data)))
    for note in data.notes:
        print(note)


def describe_row(losses: RowLosses, row: int, data: DataRows) -> dict[str, Any]:
    """A row as JSON values. losses: by epoch; null where it was not trained, or its loss is not finite."""
    where, row_id = losses.place(row)
    texts = data.texts((where, row_id))
    return {
        "source": where,
        "row_id": row_id,
        "tokens": int(losses.tokens[row]),
        "losses": {str(e): _number(v) for e, v in zip(losses.epochs, losses.losses[row], strict=True)},
        "excess": _number(losses.excess[row]),
        "verdicts": losses.verdicts_of(row),
        **({"prompt": texts[0], "answer": texts[1]} if texts else {}),
    }


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _row_lines(losses: RowLosses, row: int, data: DataRows) -> list[str]:
    where, row_id = losses.place(row)
    values = [show(value) for value in losses.losses[row] if not math.isnan(value)]
    if len(values) > _MAX_SHOWN_EPOCHS:
        values = [*values[:3], "...", *values[-2:]]
    words = [where, row_id, f"excess {show(round(losses.excess[row], 1))}", f"{losses.tokens[row]:,} tokens"]
    words += [f"loss {' '.join(values)}", ", ".join(losses.verdicts_of(row))]
    lines = [printable("  ".join(filter(None, words)))]
    if texts := data.texts((where, row_id)):
        lines.append(f"    {shorten(texts[0], 60)} -> {shorten(texts[1], 80)}")
    return lines


def _contains(place: Place, data: DataRows, text: str) -> bool:
    return any(text.lower() in each.lower() for each in (*place, *(data.texts(place) or ())))
