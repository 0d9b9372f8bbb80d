"""One training run: its record, its end by a signal, an error or the last step, and its result."""

import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

from tuning.checkpoint.base import BaseModel
from tuning.checkpoint.output_directory import check_run_directory, prepare_output_directory, write_plan
from tuning.checkpoint.ownership import new_result, step_of
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.resume import StartingPoint
from tuning.checkpoint.run_record import RunFacts, RunRecord, describe_environment, read_sessions
from tuning.checkpoint.serving import describe_serving
from tuning.console import CONSOLE, is_rank_0, say
from tuning.distributed.processes import check_agreement, leave_processes, on_rank_0
from tuning.distributed.startup import check_shared
from tuning.machine import describe_device
from tuning.messages import RESUME_HINT
from tuning.planning.plan import Plan
from tuning.settings.arguments import Arguments, RunArguments, describe_settings, flatten_settings
from tuning.training.prepare import PreparedModel
from tuning.training.progress import LOSS_PLOT_FILE, ProgressCallback
from tuning.training.row_recorder import RowRecorder
from tuning.training.trainer import StepTrainer


def check_run(arguments: Arguments) -> dict[str, Any]:
    """See that all processes run the same command, and that the result can be written. All must call this.

    Returns: the environment, for run.json. Raises: SettingsError.
    """
    run, environment = arguments.run, describe_environment()
    check_agreement({**flatten_settings(arguments), **environment["versions"], "python": environment["python"]})
    on_rank_0(lambda: check_run_directory(arguments))
    check_shared(Path(run.output_dir))
    say(f"device: {describe_device(run.device)}{run.describe_engine()}")
    return environment


def finish_dry_run(run: RunArguments, plan: Plan, account: Any) -> int:
    """Show the plan and write plan.json. Returns: exit code."""
    say("plan: " + "\n      ".join(plan.describe()))
    path = on_rank_0(lambda: write_plan(Path(run.output_dir), {"data": account.to_json(), **plan.to_json()}))
    say(f"plan: {path}")
    leave_processes()
    return 0


def describe_run(
    arguments: Arguments,
    base: BaseModel,
    model: PreparedModel,
    plan: Plan,
    facts: RunFacts,
    environment: dict[str, Any],
    start: StartingPoint,
    data: Any,
    *,
    began: float,
) -> RunRecord:
    """The record of a run that is about to begin.

    data: data_utils' TrainingData. began: time.perf_counter() when the program began.
    """
    run = arguments.run
    values = {
        **environment,
        "settings": describe_settings(arguments),
        "base_model": {**base.identity, "evidence": base.evidence.describe(), "is_base": base.evidence.is_base},
        "stop_token": {"text": data.template.stop, "id": data.template.stop_id},
        "resumed_from": str(start.checkpoint) if start.checkpoint else None,
        "data": data.account.to_json(),
        "eval_data": data.eval_account.to_json() if data.eval_account else None,
        "parameters": {"trainable": model.trainable, "total": model.total},
        "layout": {"packed": model.padded_because is None, "padded_because": model.padded_because},
        "plan": plan.to_json(),
        "serving": describe_serving(
            model.training_model, quantized=base.quantization is not None, resized_to=model.resized_to
        ),
        "processes": run.world_size,
        "engine": run.engine,
    }
    record = RunRecord(Path(run.output_dir), facts, values, began=began)
    earlier = read_sessions(start.checkpoint.parent) if start.checkpoint else []
    record.begin_session(earlier, first_step=step_of(start.checkpoint) + 1 if start.checkpoint else 1)
    return record


def begin_run(arguments: Arguments, record: RunRecord, start: StartingPoint, dropped: Path | None) -> None:
    """Make the output directory ready and write run.json, once everything is loaded. dropped: a list to keep there."""
    prepare_output_directory(record.directory, start.checkpoint, lambda: check_run_directory(arguments))
    if dropped is not None:
        shutil.copy(dropped, record.directory / dropped.name)
    record.write("running")


def run_training(
    trainer: StepTrainer,
    record: RunRecord,
    writer: ResultWriter,
    start: StartingPoint,
    recorder: RowRecorder | None = None,
) -> int:
    """Train from the starting point and write the result, or what a stop leaves. All processes must call this.

    Returns: exit code: 0, or 128 and the number of the signal that stopped it.

    Raises: MachineError: what training could not do.
    """
    if is_rank_0():
        trainer.add_callback(progress := _build_progress(trainer, record))
    try:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    except BaseException as error:
        if is_rank_0():
            progress.close()
        record.write_failure(error)
        raise
    record.results = trainer.summarize()
    if trainer.stopped_by:
        name = signal.Signals(trainer.stopped_by).name
        on_rank_0(lambda: record.write(f"stopped by {name}"))
        step, last = trainer.state.global_step, trainer.state.max_steps
        then = "it cannot be resumed (--save_only_model)" if trainer.args.save_only_model else RESUME_HINT
        say(f"stopped by {name} at step {step:,} of {last:,}; {then}")
        trainer.close()
        return 128 + trainer.stopped_by
    state = writer.collect()
    if recorder is not None:
        recorder.gather()

    def write_result() -> None:
        with new_result(record.directory, RESUME_HINT) as unfinished:
            writer.write(unfinished, state)
            if recorder is not None:
                recorder.write(unfinished)
            writer.seal(unfinished, step=record.results["steps"])
            record.write("finished")

    on_rank_0(write_result)
    trainer.close()
    return 0


def _build_progress(trainer: StepTrainer, record: RunRecord) -> ProgressCallback:
    # A base model may well begin worse than chance: rows of control tokens were never trained.
    is_base = record.values["base_model"]["is_base"]
    size = None if is_base else trainer.model.causal_lm.get_input_embeddings().num_embeddings
    return ProgressCallback(CONSOLE, record.directory, vocabulary_size=size)


def say_summary(record: RunRecord, scripts: Path, *, use_lora: bool) -> None:
    """Where everything is, and what to do next. scripts: the directory of chat.py and merge_lora.py."""
    results: dict[str, Any] = record.results
    python = f"python {'' if Path.cwd() == scripts else shlex.quote(f'{scripts}/')}"
    out, merged = shlex.quote(str(record.directory)), shlex.quote(f"{record.directory}-merged")
    for line in results["outcome"]:
        say(line)
    if best := results["best"]:
        say(f"evaluation: best loss {best['eval_loss']:.4f} at step {best['step']:,}, last {results['eval_loss']:.4f}")
        if results["stopped_early"]:
            say(f"            stopped early at step {results['steps']:,}: it did not fall any more")
        if results["eval_loss"] > best["eval_loss"] and not record.values["settings"]["run"]["load_best_model_at_end"]:
            say("            the result is the last step; --load_best_model_at_end True takes the best")
    say(f"trained {results['steps']:,} steps in {results['train_s']:,} s, {results['tokens_per_s']:,} tokens/s")
    memory = record.values["plan"]["memory"]
    planned = memory and f" (planned: {memory['total'] / 2**30:.2f})"
    say(f"peak memory: {results['peak_gib']:.2f} GiB{planned or ''}")
    say(f"result: {record.directory} (run.json, metrics.jsonl, {LOSS_PLOT_FILE})")
    say(f"talk to it: {python}chat.py {out}")
    if use_lora:
        say(f"merge it:   {python}merge_lora.py {out} {merged}")
    serving = record.values["serving"]
    where = f"{serving['as_it_is']}, as it is"
    say(
        f"serve it:   {where}; elsewhere merge it first: {serving['merge_first']}"
        if serving["merge_first"]
        else f"serve it:   {where}"
    )
