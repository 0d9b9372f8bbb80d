"""Local task files of lm-eval: plain ones pass, and what could run code is refused before lm-eval is imported."""

import re

import pytest

from inference.task_files import check_task_files
from tuning.errors import SettingsError

PLAIN = """
task: plain
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [a, b]
metric_list: [{metric: acc, aggregation: mean}]
"""


def write(directory, **files):
    for name, text in files.items():
        path = directory / name.replace("__", "/").replace("_yaml", ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return str(directory)


def test_plain_tasks_pass_with_their_metrics(tmp_path):
    group = "group: both\ntask:\n  - plain\n  - {task: other, metric_list: [{metric: f1}]}\n"
    files = {"plain_yaml": PLAIN, "deep__more_yaml": "include: ../plain.yaml\ntask: more", "group_yaml": group}
    assert check_task_files(write(tmp_path, **files)) == {"acc", "f1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("doc_to_text: !function evil.run", "!function: not a plain value; it may run code: pass --allow_code"),
        ("filter_list: [{name: x, filter: [{function: custom, filter_fn: !function e.f}]}]", "!function"),
        ("metadata: !!python/object/apply:os.system [true]", "python/object/apply:os.system: not a plain value"),
        ("class: something", "class: not a key of plain tasks; it may run code"),
        ("use_prompt: other.yaml:it", "use_prompt: not a key of plain tasks"),
        ("process_docs: x", "process_docs: not a key of plain tasks"),
        ("unsafe_code: true", "unsafe_code: not a key of plain tasks"),
        ("custom_dataset: x", "custom_dataset: not a key"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "hf_evaluate: fetches a script"),
        ("include: ../outside.yaml", "is outside of"),
        ("include: /etc/passwd", "is outside of"),
        ("include: hidden", "hidden: !function: not a plain value"),
        ("include: link.yaml", "link.yaml is outside of"),
        ("group: [", "evil.yaml:1: invalid YAML"),
        ("task: [{task: in, process_results: x}]", "process_results: not a key of plain tasks"),
        ("- a", "expected keys and values"),
        ("metric_list: [acc]", "metric_list: expected entries"),
    ],
)
def test_what_may_run_code_is_refused(tmp_path, text, message):
    (tmp_path / "outside.yaml").write_text(PLAIN)
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "hidden").write_text("doc_to_text: !function evil.run")
    if "link" in text:
        (directory / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(SettingsError, match=re.escape(message)):
        check_task_files(write(directory, evil_yaml=text))


def test_no_directory_and_no_files(tmp_path):
    with pytest.raises(SettingsError, match="no such directory"):
        check_task_files(str(tmp_path / "absent"))
    with pytest.raises(SettingsError, match=r"no \.yaml file in it"):
        check_task_files(str(tmp_path))
