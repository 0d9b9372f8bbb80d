"""What of run.json stands on the page in words and tables: the data account, settings, versions."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from commands.report_page.markup import Content, table, tag
from commands.report_page.runs import Run
from data_utils.report import Account
from tuning.errors import SettingsError, explain_bad_files

_OF_THE_PLACE = {"output_dir", "run_name", "overwrite_output_dir"}  # differ between any two runs


def show_account(run: Run) -> Content:
    """Where every conversation went, in the words of the log."""
    return [
        tag("ul", [tag("li", line) for line in _describe(run, account)])
        if account == "data"
        else [tag("p", "Evaluation:", class_="note"), tag("ul", [tag("li", line) for line in _describe(run, account)])]
        for account in ("data", "eval_data")
        if run.find(account)
    ]


def _describe(run: Run, name: str) -> list[str]:
    values = run.find(name)
    limit = run.find("settings", "data", "model_max_length")
    try:
        with explain_bad_files(name):
            account = Account(**values)
            files = [f"{file['path']}: {file['conversations']:,} conversations" for file in account.files]
            return [*files, *account.describe_fully(limit)]
    except SettingsError:  # another version's account
        return [f"{key}: {show_value(value)}" for key, value in values.items()] if isinstance(values, dict) else []


def show_settings(run: Run) -> Content:
    """All settings, and the versions that ran."""
    versions = run.find("versions")
    facts = {"command": run.find("command"), "directory": run.find("directory"), "python": run.find("python")}
    facts |= {name: version for name, version in versions.items() if version} if isinstance(versions, dict) else {}
    facts |= {"machine": run.find("machine"), "this program": _describe_commit(run)}
    rows = [(name, show_value(value)) for name, value in facts.items() if value is not None]
    settings = [(name, show_value(value)) for name, value in list_settings(run)]
    return [
        table(("what", "value"), rows),
        tag("details", tag("summary", f"all {len(settings):,} settings"), table(("setting", "value"), settings)),
    ]


def _describe_commit(run: Run) -> str | None:
    commit = run.find("git", "commit")
    return f"{commit}{', changed since' if run.find('git', 'dirty') else ''}" if commit else None


def show_differences(runs: Sequence[Run]) -> Content:
    """Settings and data that are not the same in all runs."""
    if len(runs) < 2:
        return None
    values = [{**dict(list_settings(run)), "data fingerprint": run.find("data", "fingerprint")} for run in runs]
    names = dict.fromkeys(name for each in values for name in each if name not in _OF_THE_PLACE)
    rows = [(name, *(show_value(each.get(name)) for each in values)) for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if not different:
        return tag("p", "All settings are the same, and so is the data.")
    return [tag("h3", "What differs"), table(("setting", *(run.name for run in runs)), different)]


def list_settings(run: Run) -> Iterator[tuple[str, Any]]:
    """(name, value) of all settings."""
    groups = run.find("settings")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            yield from group.items()


def show_value(value: Any) -> str:
    """A value of run.json as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
