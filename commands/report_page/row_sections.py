"""Rows on the page: how their losses lie, the worst, those with a verdict, and the label view of a few."""

from collections.abc import Sequence

import numpy as np

from commands.report_page.charts import Curve, draw_chart, draw_sparkline, show
from commands.report_page.data_rows import DataRows, read_rows, shorten, show_labels
from commands.report_page.markup import Content, Markup, table, tag
from commands.report_page.row_losses import RowLosses, choose_rows, read_row_losses
from commands.report_page.runs import Run
from commands.report_page.verdicts import VERDICTS
from tuning.errors import SettingsError

NUM_WORST = 20
_NUM_LISTED = 20  # rows of each verdict
_NUM_FIRST, _NUM_WORST_SHOWN = 3, 2  # rows in the label view
_QUANTILES = ((0.9, "90 % of rows are below"), (0.5, "median row"), (0.1, "10 % of rows are below"))


def show_rows(run: Run, number: int, *, several: bool) -> Content:
    """What the losses of a run's rows say. number: of the run on this page."""
    heading = tag("h2", f"Rows of {run.name}" if several else "Rows")
    losses, why = read_losses_of(run)
    if losses is None:
        return [heading, tag("p", why, class_="note")]
    worst = choose_rows(losses)[:NUM_WORST]
    by_verdict = {name: choose_rows(losses, verdict=name)[:_NUM_LISTED] for name in VERDICTS}
    data = read_rows(run, {losses.place(row) for rows in (worst, *by_verdict.values()) for row in rows})
    identifier = f"worst-{number}"
    search = tag("input", placeholder="show rows that contain ...", data_rows=identifier, type="search")
    return [
        heading,
        tag("p", _summarize(run, losses)),
        [tag("p", note, class_="note") for note in data.notes],
        tag("div", _draw_epochs(losses), class_="charts"),
        tag("h3", "Worst rows"),
        tag(
            "p",
            "By their mean loss over the first three epochs, against rows with about as many supervised tokens: excess "
            "1 is one median distance above their median. ",
            search,
            class_="note",
        ),
        tag("div", _list_rows(losses, worst, data), id=identifier),
        tag("h3", "Verdicts"),
        [_show_verdict(losses, name, rows, data) for name, rows in by_verdict.items()],
    ]


def show_label_view(run: Run) -> Content:
    """Some rows as the model sees them: the first of the data, and the worst."""
    losses, _ = read_losses_of(run)
    worst = [] if losses is None else choose_rows(losses)[:_NUM_WORST_SHOWN]
    places = [] if losses is None else [losses.place(row) for row in worst]
    data = read_rows(run, places, num_first=_NUM_FIRST)
    try:
        sections = show_labels(run, data.conversations) if data.conversations else []
    except SettingsError as error:
        return [tag("h3", "Rows as they are trained"), tag("p", str(error), class_="note")]
    marks = [tag("span", "trained", class_="trained"), " ", tag("span", "control token", class_="control"), " context."]
    return [
        tag("h3", "Rows as they are trained"),
        tag("p", marks, " Hover to see why. The first rows of the data, and the worst.", class_="note"),
        [tag("p", note, class_="note") for note in data.notes],
        sections,
    ]


def read_losses_of(run: Run) -> tuple[RowLosses | None, str]:
    """The losses of a run's rows; or None, and why there are none."""
    if run.rows_file is None:
        running = "they are written with each checkpoint, and at the end" if run.is_running else "--record_rows False?"
        return None, f"no rows.parquet in {run.name}: {running}"
    try:
        return read_row_losses(run.rows_file), ""
    except SettingsError as error:
        return None, str(error)


def _summarize(run: Run, losses: RowLosses) -> str:
    counts = ", ".join(f"{mask.sum():,} {name}" for name, mask in losses.verdicts.items() if mask.any())
    text = f"{len(losses.losses):,} rows in {len(losses.epochs):,} epochs: {counts or 'no verdict on any'}."
    if run.rows_file is not None and run.rows_file.parent != run.directory:
        text += f" As of {run.rows_file.parent.name}."
    evaluations = run.points("eval_loss")
    if evaluations:
        best, last = min(value for _, value in evaluations), evaluations[-1][1]
        text += f" Evaluation: last {show(last)}, best {show(best)}."
    return text


def _draw_epochs(losses: RowLosses) -> Markup:
    if len(losses.epochs) < 2:
        return Markup("")
    finite = np.where(np.isinf(losses.losses), np.nan, losses.losses)
    known = ~np.isnan(finite).all(axis=0)
    curves = []
    for colour, (quantile, label) in enumerate(_QUANTILES):
        values = np.nanquantile(finite[:, known], quantile, axis=0)
        curves.append(Curve(label, [*zip(losses.epochs[known].tolist(), values.tolist(), strict=True)], colour))
    return draw_chart("Losses of rows, by epoch", curves, x_name="epoch")


def _show_verdict(losses: RowLosses, name: str, rows: Sequence[int], data: DataRows) -> Content:
    count = int(losses.verdicts[name].sum())
    rule = tag("span", [tag("b", f"{name}: {count:,}"), f" ({VERDICTS[name]})"])
    if not count:
        return tag("p", rule, class_="note")
    more = f" The first {len(rows)} of them:" if count > len(rows) else None
    return tag("details", tag("summary", rule, more), _list_rows(losses, rows, data))


def _list_rows(losses: RowLosses, rows: Sequence[int], data: DataRows) -> Markup:
    finite = losses.losses[np.isfinite(losses.losses)]
    highest = float(finite.max()) if len(finite) else 1.0
    lines: list[list[Content]] = []
    for row in rows:
        where, row_id = losses.place(row)
        texts = data.texts((where, row_id))
        values = losses.losses[row]
        lines.append(
            [
                [where, tag("br"), tag("span", row_id, class_="note")],
                f"{losses.tokens[row]:,}",
                f"{show(losses.first[row])} → {show(losses.last[row])}",
                draw_sparkline(values[~np.isnan(values)].tolist(), highest),
                show(round(losses.excess[row], 1)),
                ", ".join(losses.verdicts_of(row)),
                [tag("span", shorten(texts[0]), class_="note"), tag("br"), shorten(texts[1])] if texts else None,
            ]
        )
    headings = ("place", "tokens", "loss", "by epoch", "excess", "verdicts", "prompt and answer")
    return table(headings, lines, class_="rows")
