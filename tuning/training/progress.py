"""While it trains: one live line (or log lines where there is no terminal), loss.png, and sample answers."""

import gc
import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback

from tuning.checkpoint.run_record import METRICS_FILE
from tuning.console import Console
from tuning.errors import explain_failed_write
from tuning.messages import RESUME_HINT

LOSS_PLOT_FILE = "loss.png"
_SECONDS_BETWEEN_PLOTS = 60
_LOG_SCALE_FROM = 20  # times the lowest loss
_MAX_POINTS = 2_000  # of a curve; the picture is 800 pixels wide


class ProgressCallback(TrainerCallback):
    """Shows loss, learning rate, tokens/s and time left; draws loss.png. For rank 0.

    vocabulary_size: of the model; a first loss beyond its logarithm gets a warning.
    """

    def __init__(self, console: Console, output_dir: Path, *, vocabulary_size: int | None = None):
        self._console = console
        self._output_dir = output_dir
        self._chance_loss = math.log(vocabulary_size) if vocabulary_size else None
        self._live: Any = None  # rich's Progress
        self._began = (0.0, 0)  # time (s) and step
        self._task: Any = None
        self._next_plot = time.monotonic() + _SECONDS_BETWEEN_PLOTS

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; open the live line, on a terminal."""
        self._began = (time.monotonic(), state.global_step)
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("", total=state.max_steps, completed=state.global_step)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the live line."""
        if self._live:
            self._live.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Show what was logged."""
        if "eval_loss" in logs:
            line = f"eval loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.3f}"
            if "general_kl" in logs:
                line += f"  general loss {logs['general_loss']:.4f}, KL {logs['general_kl']:.2g}"
            self._console.print(f"{_place(state)}  {line}", highlight=False, soft_wrap=True)
        elif "loss" in logs:
            line = describe_logs(logs)
            if self._live:
                self._live.update(self._task, description=f"epoch {state.epoch:.2f}  {line}")
            else:
                left = f"  {self._time_left(state)} left"
                self._console.print(f"{_place(state)}  {line}{left}", highlight=False, soft_wrap=True)
            self._doubt_loss(logs["loss"])

    def _doubt_loss(self, loss: float) -> None:
        """Say once, of the first loss, that it is worse than that of a model which has learnt nothing."""
        if self._chance_loss is not None and loss > self._chance_loss:
            self._console.print(
                f"warning: a loss of {loss:.2f} is worse than chance, ln(vocabulary) = {self._chance_loss:.2f}: are "
                "these the model's tokenizer and chat template?",
                highlight=False,
                soft_wrap=True,
            )
        self._chance_loss = None

    def _time_left(self, state: Any) -> timedelta:
        began, first = self._began
        per_step_s = (time.monotonic() - began) / max(1, state.global_step - first)
        return timedelta(seconds=round(per_step_s * (state.max_steps - state.global_step)))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the losses so far, from time to time."""
        began = time.monotonic()
        if began >= self._next_plot:
            draw_losses(self._output_dir)
            now = time.monotonic()
            self._next_plot = now + max(_SECONDS_BETWEEN_PLOTS, 100 * (now - began))  # at most 1 % of the time

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the live line and draw the losses."""
        self.close()
        draw_losses(self._output_dir)

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._live:
            self._live.stop()
            self._live = None


def _place(state: Any) -> str:
    return f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}"


def describe_logs(logs: dict[str, float]) -> str:
    """Loss, learning rate, gradient norm and speed in one line."""
    line = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}"
    if "grad_norm" in logs:
        line += f"  grad norm {logs['grad_norm']:.3f}"
    return f"{line}  {logs['tokens_per_s']:,.0f} tokens/s"


def draw_losses(output_dir: Path, title: str = "") -> None:
    """Draw training and evaluation loss over steps from metrics.jsonl, if there are any, into loss.png.

    Raises: MachineError: the disk is full, say.
    """
    if not (output_dir / METRICS_FILE).exists():
        return
    points: dict[str, list[tuple[int, float]]] = {"loss": [], "eval_loss": []}
    steps_per_epoch = None
    with open(output_dir / METRICS_FILE, encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            for key in points.keys() & entry.keys():
                points[key].append((entry["step"], entry[key]))
            if entry.get("epoch"):
                steps_per_epoch = entry["step"] / entry["epoch"]
    with explain_failed_write(output_dir / LOSS_PLOT_FILE, RESUME_HINT):
        _plot(points, output_dir / LOSS_PLOT_FILE, title or str(output_dir), steps_per_epoch)
    gc.collect()  # a figure is a circle of references to several MB


def _plot(points: dict[str, list[tuple[int, float]]], path: Path, title: str, steps_per_epoch: float | None) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss per supervised token")
    axes.set_title(title, parse_math=False)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        shown = points[key][:: len(points[key]) // _MAX_POINTS + 1]
        if shown:
            axes.plot(*zip(*shown, strict=True), style, label=label)
    if points["eval_loss"]:
        step, loss = min(points["eval_loss"], key=lambda point: point[1])
        axes.plot(
            [step], [loss], "*", markersize=14, color="tab:red", label=f"best evaluation: {loss:.4f}, step {step}"
        )
    values = [loss for each in points.values() for _, loss in each if loss > 0]
    if values and max(values) > _LOG_SCALE_FROM * min(values):
        axes.set_yscale("log")
    if steps_per_epoch:
        scale: Any = steps_per_epoch
        above = axes.secondary_xaxis("top", functions=(lambda step: step / scale, lambda epoch: epoch * scale))
        above.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
