"""A row as text, as a page, or as JSON: which tokens are control tokens, which are trained, and why."""

import html
import json
from collections.abc import Iterator, Sequence

from data_utils.new_tokens import list_content_tokens
from data_utils.sources import DataError, printable
from data_utils.template import IGNORE_INDEX, ChatTemplate, Row

_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>Training rows</title><style>
body {{ font: 14px/1.5 sans-serif; max-width: 60em; margin: 2em auto; color: #333 }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1em; border-radius: 4px }}
.control {{ color: #888; border: 1px dotted #aaa }} .trained {{ background: #c8eac8 }}
.place {{ color: #888; font-weight: normal }} input {{ font: inherit; width: 20em }}
</style></head><body>
<p>{totals}</p>
<p><span class="trained">trained</span> <span class="control">control token</span> context. Hover to see why.
<input id="filter" placeholder="show rows that contain ..."> <span id="shown"></span></p>
{rows}
<script>
const rows = [...document.querySelectorAll("section")];
document.getElementById("filter").addEventListener("input", (event) => {{
  const wanted = event.target.value.toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  document.getElementById("shown").textContent = rows.filter((row) => !row.hidden).length + " rows";
}});
</script>
</body></html>
"""


def as_text(row_id: str | None, row: Row, template: ChatTemplate, *, colour: bool, ids: bool) -> str:
    """Trained stretches in [[ ]], control tokens in « », and below them why each stretch is trained or not."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        raise DataError("rich is not installed: pip install rich; --html and --json do without") from None
    text = Text()
    for trained, pieces in _stretches(row, template):
        marked = Text("[[" if trained else "")
        for piece, is_control, piece_ids in pieces:
            shown = printable(piece)
            marked.append(f"«{shown}»" if is_control else shown, "dim cyan" if is_control else "")
            if ids:
                marked.append(f" {piece_ids} ", "dim")
        marked.append("]]" if trained else "")
        if trained:
            marked.stylize("green")
        text.append_text(marked)
    console = Console(force_terminal=colour, no_color=not colour, width=10**6, highlight=False)
    with console.capture() as capture:
        console.print(text, soft_wrap=True)
    why = "\n".join(f"  {start}-{end}: {reason}" for start, end, reason in _reasons(row))
    return f"{_headline(row_id, row)}\n{capture.get().rstrip()}\n{why}"


def as_json(row_id: str | None, row: Row, template: ChatTemplate) -> str:
    """One JSON object: id, input_ids, labels, pieces (start, end, text, why)."""
    pieces = [
        {"start": start, "end": end, "text": template.tokenizer.decode(row.input_ids[start:end]), "why": reason}
        for start, end, reason in _reasons(row)
    ]
    found = {"id": row_id, "input_ids": row.input_ids, "labels": row.labels, "pieces": pieces}
    return printable(json.dumps(found, ensure_ascii=False))


def as_html(rows: Sequence[tuple[str | None, str, Row]], template: ChatTemplate, *, ids: bool) -> str:
    """One self-contained page. rows: (id, `file:line`, row)."""
    parts = [as_section(row_id, where, row, template, ids=ids) for row_id, where, row in rows]
    tokens, supervised = sum(len(row.input_ids) for *_, row in rows), sum(row.num_supervised for *_, row in rows)
    totals = f"{len(rows):,} rows, {tokens:,} tokens, {supervised:,} supervised"
    return _PAGE.format(totals=totals, rows="\n".join(parts))


def as_section(row_id: str | None, where: str, row: Row, template: ChatTemplate, *, ids: bool = False) -> str:
    """A row as a part of a page, everything in it escaped. where: `file:line`."""
    body, position = "", 0
    reasons = _reasons(row)
    for trained, pieces in _stretches(row, template):
        inner = ""
        for piece, is_control, piece_ids in pieces:
            shown = html.escape(printable(piece)) + (f" <small>{piece_ids}</small> " if ids else "")
            inner += f'<span class="control">{shown}</span>' if is_control else shown
            position += len(piece_ids)
        why = next((reason for start, end, reason in reasons if start < position <= end), "")
        body += f'<span{" class=trained" if trained else ""} title="{html.escape(why)}">{inner}</span>'
    title = f'{html.escape(_headline(row_id, row))} <span class="place">{html.escape(where)}</span>'
    return f"<section><h3>{title}</h3>\n<pre>{body}</pre></section>"


def _headline(row_id: str | None, row: Row) -> str:
    return f"--- {row_id}: {len(row.input_ids):,} tokens, {row.num_supervised:,} supervised"


def _reasons(row: Row) -> list[tuple[int, int, str]]:
    starts = [0, *(end for end, _ in row.pieces)]
    return [(start, end, reason) for start, (end, reason) in zip(starts, row.pieces, strict=False)]


def _stretches(row: Row, template: ChatTemplate) -> Iterator[tuple[bool, list[tuple[str, bool, list[int]]]]]:
    """(trained, [(text, whether it is a control token, its ids), ...]) of each stretch."""
    start = 0
    for end in range(1, len(row.input_ids) + 1):
        trained = row.labels[start] != IGNORE_INDEX
        if end == len(row.input_ids) or (row.labels[end] != IGNORE_INDEX) != trained:
            yield trained, list(_pieces(row.input_ids[start:end], template))
            start = end


def _pieces(ids: list[int], template: ChatTemplate) -> Iterator[tuple[str, bool, list[int]]]:
    tokenizer = template.tokenizer
    new = tokenizer.convert_tokens_to_ids(list_content_tokens(tokenizer))
    control = {*template.encoder.control_ids.values(), *new}
    plain: list[int] = []
    for token_id in ids:
        if token_id in control:
            if plain:
                yield template.tokenizer.decode(plain), False, plain
            yield template.tokenizer.decode([token_id]), True, [token_id]
            plain = []
        else:
            plain.append(token_id)
    if plain:
        yield template.tokenizer.decode(plain), False, plain
