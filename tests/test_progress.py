import gc
import io
import json
import runpy
import sys
import time

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.conftest import CONVERSATIONS, ROOT, needs
from tests.test_cli import flags
from tuning.training import progress
from tuning.training.progress import ProgressCallback, draw_losses


def make_console(**options):
    needs("rich")
    from rich.console import Console

    return Console(**options)


class State:
    global_step, max_steps, epoch = 3, 10, 1.5


LOGS = {"loss": 1.5, "learning_rate": 3e-4, "grad_norm": 0.25, "tokens_per_s": 1234.5}


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    out = io.StringIO()
    callback = ProgressCallback(make_console(file=out), tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    callback.on_train_begin(None, type("Begin", (), {"global_step": 1, "max_steps": 10}), None)
    monkeypatch.setattr(time, "monotonic", lambda: 120.0)
    callback.on_log(None, State, None, logs=LOGS)
    callback.on_log(None, State, None, logs={"eval_loss": 0.5, "eval_perplexity": 1.65})
    assert out.getvalue().splitlines() == [
        "step 3/10  epoch 1.50  loss 1.5000  lr 3.00e-04  grad norm 0.250  1,234 tokens/s  0:01:10 left",
        "step 3/10  epoch 1.50  eval loss 0.5000  perplexity 1.650",
    ]


def test_a_first_loss_beyond_chance_is_said_once(tmp_path):
    for size, loss, expected in ((1000, 7.0, 1), (1000, 6.8, 0), (None, 99.0, 0)):
        out = io.StringIO()
        callback = ProgressCallback(make_console(file=out, width=200), tmp_path, vocabulary_size=size)
        callback.on_train_begin(None, State, None)
        for value in (loss, 50.0):
            callback.on_log(None, State, None, logs=LOGS | {"loss": value})
        assert out.getvalue().count("is worse than chance, ln(vocabulary) = 6.91") == expected


def test_one_live_line_on_a_terminal(tmp_path):
    out = io.StringIO()
    callback = ProgressCallback(make_console(file=out, force_terminal=True, width=140), tmp_path)
    callback.on_train_begin(None, State, None)
    callback.on_log(None, State, None, logs=LOGS)
    callback.on_step_end(None, State, None)
    callback.close()
    callback.close()
    shown = out.getvalue()
    assert "loss 1.5000" in shown and "3/10" in shown and "step 3/10" not in shown


def test_the_plot_is_a_picture(tmp_path):
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "x": 1}, {"step": 2, "eval_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_epochs_the_best_evaluation_and_a_log_scale_where_the_range_is_wide(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    for lowest in (0.5, 0.01):
        entries = [{"step": step, "loss": max(lowest, 5.0 / step), "epoch": step / 4} for step in range(1, 9)]
        entries += [{"step": 4, "eval_loss": 1.0, "epoch": 1.0}, {"step": 8, "eval_loss": 1.5, "epoch": 2.0}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        draw_losses(tmp_path)
    for figure, scale in zip(figures, ("linear", "linear"), strict=True):
        (axes,) = figure.axes
        assert axes.get_title() == str(tmp_path) and axes.get_yscale() == scale
        assert "best evaluation: 1.0000, step 4" in [text.get_text() for text in axes.get_legend().get_texts()]
        (above,) = axes.child_axes
        assert above.get_xlabel() == "epoch"
    entries.append({"step": 9, "loss": 0.2, "epoch": 2.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_losses(tmp_path)
    assert figures[-1].axes[0].get_yscale() == "log"
    figures.clear()


def test_plots_are_drawn_from_time_to_time_and_take_a_share_of_it(tmp_path, monkeypatch):
    clock, drawn = [0.0], []

    def draw(_):
        drawn.append(clock[0])
        clock[0] += 2.0  # a long file

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "draw_losses", draw)
    callback = ProgressCallback(make_console(file=io.StringIO()), tmp_path)
    for _ in range(600):
        clock[0] += 1.0
        callback.on_evaluate(None, State, None)
    assert drawn == [60.0, 262.0, 464.0]


def test_a_plot_leaves_nothing_behind_and_draws_as_many_points_as_can_be_seen(tmp_path, monkeypatch):
    counts = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *a, **k: counts.append(len(x)) or plot(self, x, *a, **k))
    entries = ({"step": step, "loss": 1.0} for step in range(5_000))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_losses(tmp_path)
    assert counts == [1667]
    assert not [each for each in gc.get_objects() if isinstance(each, Figure)]


def test_prompts_are_answered_at_each_evaluation(checkpoints, tmp_path, capfd, monkeypatch):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("Who are you?\n\n你是谁？ <|im_end|>\n", encoding="utf-8")
    words = flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora", "--eval_data_path", CONVERSATIONS)
    words += ["--eval_strategy", "steps", "--eval_steps", 2, "--sample_prompts", prompts]
    words += ["--sample_max_new_tokens", 4, "--logging_steps", 3]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
    assert exit_.value.code == 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    sampled = [entry for entry in entries if "samples" in entry]
    assert [entry["step"] for entry in sampled] == [2, 4]
    assert [sample["prompt"] for sample in sampled[0]["samples"]] == ["Who are you?", "你是谁？ <|im_end|>"]
    assert all(sample["ended_by"] in ("stop", "length") for sample in sampled[0]["samples"])
    # The first and the last step are logged, whatever --logging_steps says.
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 3, 4]
    shown = capfd.readouterr().out
    assert shown.count("> Who are you?") == 2 and (out / "loss.png").is_file()
    assert f"talk to it: python chat.py {out}" in shown and f"python merge_lora.py {out} {out}-merged" in shown


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_prompt_files_that_are_none(checkpoints, tmp_path, capfd, monkeypatch, content):
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_text(content)
    words = flags(checkpoints["untied"], CONVERSATIONS, tmp_path / "out", "--eval_data_path", CONVERSATIONS)
    words += ["--eval_strategy", "epoch", "--sample_prompts", prompts]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
    assert exit_.value.code == 2 and "prompts.txt" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
