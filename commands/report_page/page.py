"""Runs -> one page that needs nothing else: no network, no file beside it."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from commands.report_page.charts import NUM_COLOURS, Curve, Level, draw_chart, show
from commands.report_page.markup import Content, Markup, table, tag
from commands.report_page.row_sections import show_label_view, show_rows
from commands.report_page.runs import Run, is_number
from commands.report_page.settings import show_account, show_differences, show_settings

MARK = tag("meta", name="generator", content="python -m tuning.report")  # a file with it may be written over
_FOLDER = Path(__file__).parent
_CHARTS = (  # title, name in metrics.jsonl, whether the axis begins at 0
    ("Gradient norm", "grad_norm", False),
    ("Learning rate", "learning_rate", True),
    ("Tokens per second", "tokens_per_s", True),
    ("Padding, share of positions", "padding_share", True),
    ("Forgetting: KL to the start on general text", "general_kl", True),
    ("Answers to held-out conversations: ROUGE-L", "eval_rouge_l", True),
    ("Answers to held-out conversations: share as expected", "eval_exact_match", True),
)


def build_page(runs: Sequence[Run], *, refresh_s: int | None = None) -> str:
    """The page of one run, or of several with their curves in the same charts.

    refresh_s: seconds after which a served page asks for itself again; None: it is a file, and never does.
    """
    title = f"Run report: {', '.join(run.name for run in runs)}"
    body = [
        tag("h1", title),
        tag("p", _describe_state(runs), id="state", class_="note"),
        _live("runs", _show_runs(runs)),
        tag("h2", "Curves"),
        _live("curves", tag("div", _draw_charts(runs), class_="charts")),
        _live("answers", _show_answers(runs)),
        [_live(f"rows-{n}", show_rows(run, n, several=len(runs) > 1)) for n, run in enumerate(runs)],
        tag("h2", "Data"),
        [_of_run(run, runs, show_account(run)) for run in runs],
        [_of_run(run, runs, show_label_view(run)) for run in runs],
        tag("h2", "Settings and versions"),
        show_differences(runs),
        [_of_run(run, runs, show_settings(run)) for run in runs],
    ]
    return _write_document(title, body, refresh_s if any(run.is_running for run in runs) else None)


def _write_document(title: str, body: Content, refresh_s: int | None) -> str:
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    asks = " connect-src 'self';" if refresh_s else ""
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)};{asks} base-uri 'none'; "
        "form-action 'none'"
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        MARK,
        tag("meta", name="viewport", content="width=device-width"),
        tag("title", title),
        tag("style", Markup(style)),
    ]
    content = [tag("main", body), tag("script", Markup(script))]
    page = tag("html", tag("head", head), tag("body", content, data_refresh=refresh_s), lang="en")
    return f"<!doctype html>\n{page}\n"


def _hash(text: str) -> str:
    """What a policy calls an inline script or style: nothing else may run, whatever stands on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _live(name: str, *contents: Content) -> Markup:
    return tag("div", contents, id=name, data_live=True)


def _of_run(run: Run, runs: Sequence[Run], content: Content) -> Content:
    return [tag("h3", run.name) if len(runs) > 1 else None, content]


def _describe_state(runs: Sequence[Run]) -> str:
    states = [run.status if len(runs) == 1 else f"{run.name}: {run.status}" for run in runs]
    lines = "; ".join(states)
    damaged = sum(run.unread_lines for run in runs)
    return f"{lines}; {damaged:,} lines of metrics.jsonl could not be read" if damaged else lines


# ---- the runs ----


def _show_runs(runs: Sequence[Run]) -> Markup:
    """A column for each run, a line for each fact that one of them has."""
    facts = [_describe_run(run) for run in runs]
    names = [tag("span", run.name, class_=f"key c{number % NUM_COLOURS}") for number, run in enumerate(runs)]
    rows = [(name, *(each[name] for each in facts)) for name in facts[0] if any(each[name] for each in facts)]
    return table(("", *names), rows)


def _describe_run(run: Run) -> dict[str, str | None]:
    losses, evaluations, memory = run.points("loss"), run.points("eval_loss"), run.points("peak_gib")
    speed = sorted(value for _, value in run.points("tokens_per_s"))
    steps = max((step for step, _ in losses), default=0)
    planned = run.find("plan", "layout", "num_steps")
    counts = run.find("parameters", "trainable"), run.find("parameters", "total")
    sessions = run.find("sessions")
    began = (
        sessions[0].get("began") if isinstance(sessions, list) and sessions and isinstance(sessions[0], dict) else None
    )
    outcome = run.find("outcome")
    best = min(evaluations, key=lambda point: point[1], default=(0, 0))
    plan, wall_s = run.planned_gib, run.find("wall_s")
    return {
        "status": run.status,
        "began": began if isinstance(began, str) else None,
        "model": run.find_text("settings", "model", "model_name_or_path"),
        "trained": f"{run.kind}: {counts[0]:,} of {counts[1]:,} parameters" if _counts(*counts) else run.kind,
        "steps": f"{steps:,.0f}" + (f" of {planned:,}" if _counts(planned) else ""),
        "loss": f"{show(losses[0][1])} → {show(losses[-1][1])}" if losses else None,
        "evaluation loss": f"best {show(best[1])} at step {best[0]:,.0f}, last {show(evaluations[-1][1])}"
        if evaluations
        else None,
        "tokens per second": f"{speed[len(speed) // 2]:,.0f} (median)" if speed else None,
        "peak memory": f"{max(value for _, value in memory):.2f} GiB" + (f", planned {plan:.2f}" if plan else "")
        if memory
        else None,
        "what happened": "; ".join(map(str, outcome)) if isinstance(outcome, list) and outcome else None,
        "time": f"{wall_s:,.0f} s" if is_number(wall_s) else None,
    }


def _counts(*values: object) -> bool:
    return all(isinstance(value, int) for value in values)


def _draw_charts(runs: Sequence[Run]) -> list[Markup]:
    several = len(runs) > 1

    def curves(key: str, what: str, *, dashed: bool = False, colour: int = 0) -> list[Curve]:
        return [
            Curve(
                f"{run.name} {what}".strip() if several else what or key,
                run.points(key),
                number if several else colour,
                dashed,
            )
            for number, run in enumerate(runs)
        ]

    losses = curves("loss", "" if several else "training") + curves("eval_loss", "evaluation", dashed=True, colour=1)
    charts = [draw_chart("Loss per supervised token", losses)]
    general = curves("general_loss", "" if several else "now")
    general += curves("general_base_loss", "at the start", dashed=True, colour=1)
    charts.append(draw_chart("Forgetting: loss on general text", general))
    charts += [draw_chart(title, curves(key, ""), from_zero=from_zero) for title, key, from_zero in _CHARTS]
    plans = [
        Level(f"{run.name} planned" if several else "planned", plan, number if several else 1)
        for number, run in enumerate(runs)
        if (plan := run.planned_gib) is not None
    ]
    charts.append(
        draw_chart("Peak memory, GiB", curves("peak_gib", "" if several else "measured"), plans, from_zero=True)
    )
    return [chart for chart in charts if chart]


# ---- answers ----


def _show_answers(runs: Sequence[Run]) -> Content:
    """Of every prompt its answers over time; those that stay the same in succession stand once."""
    by_prompt: dict[str, list[tuple[Run, int, str, str]]] = {}
    for run in runs:
        for step, samples in run.samples():
            for sample in samples:
                prompt, answer, ended = (str(sample.get(key, "")) for key in ("prompt", "answer", "ended_by"))
                by_prompt.setdefault(prompt, []).append((run, step, answer, ended))
    if not by_prompt:
        return None
    parts: list[Content] = [tag("h2", "Answers over time")]
    for prompt, answers in by_prompt.items():
        rows: list[list[Content]] = []
        previous: tuple[Run, str] | None = None
        for run, step, answer, ended in answers:
            if previous is not None and previous[0] is run and previous[1] == answer:
                rows[-1][-3] = f"{str(rows[-1][-3]).partition(' – ')[0]} – {step:,}"
                continue
            previous = (run, answer)
            rows.append([*([run.name] if len(runs) > 1 else []), f"{step:,}", answer, ended])
        headings = [*(["run"] if len(runs) > 1 else []), "steps", "answer", "ended by"]
        parts += [tag("h3", prompt), table(headings, rows, class_="answers")]
    return parts
